"""The alphas over the epochs: tables that read back, winners that are the genotype's, pictures that tell them apart."""

import csv

import numpy as np
import pytest
import torch

import genotypes
from utils import UserError
from watch import alphas


def softmax(values):
    return np.exp(values) / np.exp(values).sum(-1, keepdims=True)


def make(epochs=4, space="involution", seed=0):
    rng = np.random.default_rng(seed)
    trajectory = alphas.Trajectory(genotypes.SEARCH_SPACES[space])
    values = [rng.standard_normal((14, len(trajectory.primitives))) for _ in alphas.CELLS]
    for epoch in range(epochs + 1):
        trajectory.add(epoch, [softmax(v * epoch / 4) for v in values])
        values = [v + rng.standard_normal(v.shape) / 2 for v in values]
    return trajectory


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_edges_have_the_names_of_their_nodes():
    assert alphas.edge_names(5) == ["c_{k-2} -> 0", "c_{k-1} -> 0", "c_{k-2} -> 1", "c_{k-1} -> 1", "0 -> 1"]
    assert alphas.edge_names(14)[-1] == "2 -> 3" and len(set(alphas.edge_names(14))) == 14


def test_the_table_reads_back(tmp_path):
    trajectory = make()
    trajectory.write(tmp_path)
    rows = read_csv(tmp_path / "alphas.csv")
    assert len(rows) == 5 * 2 * 14 * 9 and list(rows[0]) == ["epoch", "cell", "edge", "primitive", "weight"]
    again = alphas.read(tmp_path / "alphas.csv")
    assert (again.epochs, again.primitives) == (trajectory.epochs, trajectory.primitives)
    for cell in alphas.CELLS:
        np.testing.assert_allclose(again.array(cell), trajectory.array(cell), rtol=1e-6)


@pytest.mark.parametrize("space", genotypes.SEARCH_SPACES)
def test_winners_are_what_the_genotype_takes(tmp_path, space):
    trajectory = make(space=space)
    trajectory.write(tmp_path)
    rows = read_csv(tmp_path / "winners.csv")
    for epoch in trajectory.epochs:
        for cell in alphas.CELLS:
            now = [row for row in rows if row["cell"] == cell and int(row["first_epoch"]) <= epoch]
            now = [row for row in now if epoch <= int(row["last_epoch"])]
            assert [row["edge"] for row in now] == alphas.edge_names(14)  # each edge has one winner at any time
            winners = {row["edge"]: row["primitive"] for row in now}
            gene = genotypes.derive(trajectory.weights[cell][epoch].tolist(), trajectory.primitives)
            nodes = ["c_{k-2}", "c_{k-1}", "0", "1", "2", "3"]
            taken = {f"{nodes[start]} -> {k // 2}": primitive for k, (primitive, start) in enumerate(gene)}
            assert taken.items() <= winners.items()
            kept = {row["edge"] for row in now if row["kept"] == "yes" and int(row["last_epoch"]) == epoch}
            assert kept == {row["edge"] for row in now if int(row["last_epoch"]) == epoch} & set(taken)


def test_a_margin_is_that_to_the_second_besides_none():
    trajectory = alphas.Trajectory(["none", "skip_connect", "sep_conv_3x3"])
    for epoch, weights in enumerate(([0.5, 0.3, 0.2], [0.6, 0.15, 0.25], [0.7, 0.05, 0.25])):
        trajectory.add(epoch, [np.array([weights] * 2)] * 2)
    _, rows = trajectory.winners()
    assert rows[:2] == [
        ("normal", "c_{k-2} -> 0", 0, 0, "skip_connect", "0.3", "sep_conv_3x3", "0.1", "yes"),
        ("normal", "c_{k-2} -> 0", 1, 2, "sep_conv_3x3", "0.25", "skip_connect", "0.2", "yes"),
    ]


def test_entropies():
    uniform, certain = np.full((3, 4), 0.25), np.eye(4)[:3]
    assert alphas.entropies([uniform, certain]) == pytest.approx([np.log(4), 0])


def test_what_a_checkpoint_keeps_is_exact(tmp_path):
    trajectory, again = make(), alphas.Trajectory(genotypes.PRIMITIVES)
    torch.save(trajectory.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), 4, (14, 9))
    assert again.epochs == trajectory.epochs
    assert all(np.array_equal(again.array(cell), trajectory.array(cell)) for cell in alphas.CELLS)


@pytest.mark.parametrize("cell", alphas.CELLS)
def test_a_panel_for_every_edge_tells_the_strongest_apart(cell):
    trajectory = make()
    figure = alphas.plot_weights(trajectory, cell)
    figure.draw_without_rendering()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    gene = genotypes.derive(trajectory.weights[cell][-1].tolist(), trajectory.primitives)
    assert len(figure.axes) == 14 and {primitive for primitive, _ in gene} <= set(legend)
    assert sum(axes.title.get_fontweight() == "bold" for axes in figure.axes) == 8  # the edges of the genotype
    by_color = {}
    for axes, weights in zip(figure.axes, np.moveaxis(trajectory.array(cell), 1, 0), strict=True):
        assert len(axes.lines) == 4  # none and the three strongest
        winner = max(axes.lines, key=lambda line: line.get_linewidth())
        assert winner.get_ydata()[-1] == weights[-1, 1:].max()
        for line in axes.lines:
            k = int(np.argmin(np.abs(weights - line.get_ydata()[:, None]).sum(0)))
            by_color.setdefault(line.get_color(), set()).add(trajectory.primitives[k])
            assert 0 <= line.get_ydata().min() and line.get_ydata().max() <= axes.get_ylim()[1]
    assert all(len(primitives) == 1 for primitives in by_color.values()), by_color


def test_primitives_of_one_search_space_have_looks_of_their_own():
    for primitives in genotypes.SEARCH_SPACES.values():
        looks = {(style["color"], style["ls"]) for style in map(alphas._style, primitives)}
        assert len(looks) == len(primitives)


def test_the_heat_map_frames_the_genotype():
    trajectory = make()
    figure = alphas.plot_heat_map(trajectory)
    for axes, cell in zip(figure.axes, alphas.CELLS, strict=False):
        weights = trajectory.weights[cell][-1]
        np.testing.assert_array_equal(axes.images[0].get_array(), weights)
        written = {(int(text.get_position()[1]), text.get_text()) for text in axes.texts}
        assert written == {(k, f"{row[1:].max():.2f}") for k, row in enumerate(weights)}
        gene = genotypes.derive(weights.tolist(), trajectory.primitives)
        expected = {
            (sum(range(2, 2 + k // 2)) + node, trajectory.primitives.index(p)) for k, (p, node) in enumerate(gene)
        }
        assert {(round(box.get_y() + 0.45), round(box.get_x() + 0.47)) for box in axes.patches} == expected


def test_one_epoch_and_one_primitive_are_drawn(tmp_path):
    trajectory = alphas.Trajectory(["skip_connect"])
    trajectory.add(0, [np.ones((2, 1))] * 2)
    trajectory.write(tmp_path)
    assert [path.stat().st_size > 0 for path in alphas.draw(trajectory, tmp_path)] == [True] * 3


@pytest.mark.parametrize(
    "old, new",
    [
        ("epoch,cell", "epoch,c"),
        ("0,normal,c_{k-2} -> 0,none,", "0,normal,c_{k-2} -> 0,none,x"),
        ("0,normal,c_{k-2} -> 0,none,0.", "0,normal,c_{k-2} -> 0,none,7."),
        ("0,normal,c_{k-2} -> 0,none,", "0,normal,c_{k-2} -> 0,"),
        ("2 -> 3", "3 -> 2"),
        ("4,reduce,2 -> 3,dil_invo_5x5", "5,reduce,2 -> 3,dil_invo_5x5"),
        ("reduce", "reduction"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, old, new):
    make().write(tmp_path)
    path = tmp_path / "alphas.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match="alphas.csv is damaged"):
        alphas.read(path)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file: not a search, or one from before"):
        alphas.read(tmp_path / "alphas.csv")
