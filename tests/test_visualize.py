"""Drawing cells."""

import shlex
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest

import genotypes
import visualize
from conftest import assert_one_clear_line

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
