"""Drawing cells."""

import csv
import shlex
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageSequence

import genotypes
import visualize
from conftest import assert_one_clear_line
from watch import alphas

needs_dot = pytest.mark.skipif(not shutil.which("dot"), reason="needs Graphviz's dot program")


def cells(genotype):
    yield visualize.cell_graph(genotype.normal, genotype.normal_concat, "normal")
    yield visualize.cell_graph(genotype.reduce, genotype.reduce_concat, "reduction")


def test_a_cell_has_a_labelled_line_for_every_edge():
    source = next(cells(genotypes.DARTS)).source
    assert source.count("->") == 2 * 8 + 4 + 1  # to and from the primitives, to the output, the order of the inputs
    assert '"edge 0" [label=sep_invo_3x3' in source
    assert '"c_{k-1}" -> "edge 0":w' in source and '"edge 0":e -> 0\n' in source
    assert '"edge 5" [label=skip_connect' in source
    assert '0 -> "edge 5":w' in source and '"edge 5":e -> 2\n' in source
    assert '3 -> "c_{k}" [style=dashed]' in source


def layout(graph):
    """Boxes (left, bottom, right, top) of the nodes; points on every edge. All as dot lays them out."""
    boxes, lines = {}, []
    for row in map(shlex.split, graph.pipe("plain", encoding="utf-8").splitlines()):
        if row[0] == "node":
            x, y, width, height = map(float, row[2:6])
            boxes[row[1]] = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        elif row[0] == "edge" and "invis" not in row:
            points = np.array(row[4 : 4 + 2 * int(row[3])], dtype=float).reshape(-1, 2)
            pieces = [points[k : k + 4] for k in range(0, len(points) - 1, 3)]  # Bézier curves
            t = np.linspace(0, 1, 50)[:, None]
            weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
            lines.append((row[1], row[2], np.vstack([weights @ piece for piece in pieces])))
    return boxes, lines


@needs_dot
@pytest.mark.parametrize("name", ["NASNet", "AmoebaNet", "DARTS_V2", "DARTS_L8", "DARTS_L10", "DARTS_L20"])
def test_inputs_keep_their_order_and_no_line_crosses_a_label(name):
    for graph in cells(genotypes.NAMED[name]):
        boxes, lines = layout(graph)
        assert boxes["c_{k-2}"][1] > boxes["c_{k-1}"][3] and boxes["c_{k-2}"][0] == boxes["c_{k-1}"][0]
        for node, (left, bottom, right, top) in boxes.items():
            for start, end, points in lines:
                inside = (points > (left, bottom)).all(1) & (points < (right, top)).all(1)
                assert node in (start, end) or not inside.any(), (node, start, end)


@needs_dot
def test_an_svg_says_which_cell_of_which_genotype_it_is(script, tmp_path):
    script("visualize.py", "DARTS_V2", "--format", "svg")
    assert "<title>reduction cell of DARTS_V2</title>" in (tmp_path / "reduction.svg").read_text()
    odd = 'a "b" <c>\\ \n\ud800'  # as a folder may be called
    path, _ = visualize.draw(genotypes.DARTS_V2, tmp_path, "svg", odd)
    title = ElementTree.parse(path).find(".//{http://www.w3.org/2000/svg}title").text
    assert title == 'normal cell of a "b" <c>? ?'


@needs_dot
@pytest.mark.parametrize("format, magic", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_pictures(tmp_path, format, magic):
    pictures = visualize.draw(genotypes.DARTS_V2, tmp_path, format)
    assert [path.name for path in pictures] == [f"normal.{format}", f"reduction.{format}"]
    assert all(path.read_bytes().startswith(magic) for path in pictures)


@needs_dot
def test_the_printed_command_works(script, tmp_path):
    assert script("visualize.py", "DARTS").stdout.split() == ["normal.pdf", "reduction.pdf"]
    assert (tmp_path / "normal.pdf").exists()


@needs_dot
def test_expressions_and_run_folders(script, tmp_path):
    expression = genotypes.format(genotypes.DARTS_L20)
    assert script("visualize.py", expression, "--format", "svg", "--output", "a").returncode == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "genotype.json").write_text(genotypes.to_json(genotypes.DARTS_L20))
    assert script("visualize.py", "run", "--format", "svg", "--output", "b").returncode == 0
    for name in ("normal", "reduction"):
        of_expression, of_run = ((tmp_path / folder / f"{name}.svg").read_text() for folder in "ab")
        assert f"<title>{name} cell of run</title>" in of_run and f"<title>{name} cell of Genotype(" in of_expression
        assert of_expression.split("</title>")[1:] == of_run.split("</title>")[1:]


def search_rows(seeds):
    """Rows of metrics.csv of a search whose genotypes are random ones."""
    found = [genotypes.format(genotypes.sample(genotypes.PRIMITIVES, seed)) for seed in seeds]
    return [dict(epoch=k + 1, valid_acc=40.0 + k, genotype=genotype) for k, genotype in enumerate(found)]


def write_rows(folder, rows):
    folder.mkdir()
    (folder / "genotype.json").write_text(genotypes.to_json(genotypes.parse(rows[-1]["genotype"])))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@needs_dot
def test_an_evolution_has_a_frame_for_every_change(tmp_path):
    folder = write_rows(tmp_path / "run", search_rows([1, 1, 2, 3, 3]))
    visualize.draw_evolution(visualize.read_history(folder), tmp_path / "evolution.gif")
    with Image.open(tmp_path / "evolution.gif") as picture:
        assert (picture.format, picture.n_frames) == ("GIF", 3)
        durations, pixels = [], []
        for frame in ImageSequence.Iterator(picture):
            durations.append(frame.info["duration"])
            pixels.append(np.asarray(frame.convert("RGB")).astype(int))
    assert durations[0] == durations[1] < durations[2]
    colored = [(frame[..., 0] - frame[..., 2] > 120).any() for frame in pixels]  # what is new
    assert colored == [False, True, True]


@needs_dot
def test_nothing_moves_from_frame_to_frame_and_no_line_crosses_a_label():
    found = [genotypes.sample(genotypes.PRIMITIVES, seed) for seed in range(4)]
    frames = [
        (layout(graph), graph) for graph in visualize._frames([(cell.normal, cell.normal_concat) for cell in found])
    ]
    (first, _), _ = frames[0]
    for cell, ((boxes, lines), graph) in zip(found, frames, strict=True):
        assert boxes == first
        assert graph.source.count("style=invis") == 1 + 3 * (len(boxes) - 7 - 8)  # the order of inputs; no edges now
        shown = {f"edge {(node, 2 + k // 2)}" for k, (_, node) in enumerate(cell.normal)}
        for node in shown:
            left, bottom, right, top = boxes[node]
            for start, end, points in lines:
                inside = (points > (left, bottom)).all(1) & (points < (right, top)).all(1)
                assert node in (start, end) or not inside.any(), (node, start, end)


def test_what_a_search_leaves_is_drawn(script, tmp_path):
    folder = write_rows(tmp_path / "run", search_rows([1, 2]))
    trajectory = alphas.Trajectory(["skip_connect", "sep_conv_3x3"])
    trajectory.add(0, [np.full((2, 2), 0.5)] * 2)
    trajectory.write(folder)
    result = script("visualize.py", "run", "--what", "alphas", "--format", "svg", "--output", "a")
    names = ["a/alphas_normal.svg", "a/alphas_reduction.svg", "a/alphas_heat_map.svg"]
    assert result.stdout.split() == names and all((tmp_path / name).stat().st_size > 0 for name in names)
    if shutil.which("dot"):
        assert script("visualize.py", "run", "--what", "evolution").stdout.split() == ["evolution.gif"]
        assert (tmp_path / "evolution.gif").read_bytes()[:3] == b"GIF"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["DARTS", "--what", "alphas"], "--what alphas needs the run folder of a search, got 'DARTS'"),
        (
            [genotypes.format(genotypes.DARTS), "--what", "evolution"],
            "--what evolution needs the run folder of a search",
        ),
        (["training", "--what", "alphas"], "training/alphas.csv: no such file: not a search"),
        (["empty", "--what", "evolution"], "empty has no epochs in a metrics.csv: give the folder of a search"),
        (["training", "--what", "evolution"], "metrics.csv has no column 'genotype': not a search"),
        (["damaged", "--what", "evolution"], "metrics.csv is damaged: "),
        (["damaged", "--what", "evolution", "--format", "png"], "--format png: an evolution is a GIF"),
        (["damaged", "--what", "alpha"], "invalid choice: 'alpha'"),
    ],
)
def test_a_folder_without_what_is_to_be_drawn(script, tmp_path, arguments, says):
    (row,) = search_rows([1])
    write_rows(tmp_path / "training", [row])
    (tmp_path / "training" / "metrics.csv").write_text("epoch,valid_acc\n1,40.0\n")
    write_rows(tmp_path / "damaged", [row])
    write_rows(tmp_path / "empty", [row])
    (tmp_path / "empty" / "metrics.csv").unlink()
    (tmp_path / "damaged" / "metrics.csv").write_text("epoch,valid_acc,genotype\n1,high,DARTS\n")
    before = set(tmp_path.rglob("*"))
    assert_one_clear_line(script("visualize.py", *arguments), says)
    assert set(tmp_path.rglob("*")) == before


def test_without_dot_there_is_no_evolution(script, tmp_path, monkeypatch):
    write_rows(tmp_path / "run", search_rows([1, 2]))
    monkeypatch.setenv("PATH", "")
    result = script("visualize.py", "run", "--what", "evolution")
    assert_one_clear_line(result, "evolution.gif is not made: install Graphviz")
    assert not list(tmp_path.glob("*.gif"))


def test_without_dot_the_source_is_kept(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert_one_clear_line(script("visualize.py", "DARTS"), "normal.gv", "install Graphviz")
    assert "digraph" in (tmp_path / "normal.gv").read_text()


@pytest.mark.parametrize(
    "name, says", [("DART", "did you mean DARTS"), ("Genotype(", "malformed"), (".", "has no genotype")]
)
def test_bad_input(script, tmp_path, name, says):
    assert_one_clear_line(script("visualize.py", name), says)
    assert not list(tmp_path.iterdir())
