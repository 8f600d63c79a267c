"""The alphas over the epochs of a search: kept, written as tables, drawn.

    alphas.csv               epoch (0: before the first), cell, edge, primitive, weight (the softmax of the alphas)
    winners.csv              which primitive was ahead on an edge, from which epoch to which, and by how much
    alphas_normal.png, …     the weights over the epochs, a panel for every edge
    alphas_heat_map.png      the weights of the last epoch, edges by primitives

An edge is named by its nodes, as in the drawings of the cells: `c_{k-2} -> 0` leads from the output of the cell before
the last to the first own node. The winner of an edge is the primitive that a genotype takes there (`genotypes.derive`):
the one of the largest weight besides `none`.
"""

import csv
import io
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import genotypes
from utils import UserError, replacing, write_text

NAME, WINNERS = "alphas.csv", "winners.csv"
CELLS = {"normal": "normal", "reduce": "reduction"}  # as genotypes call them, as figures do
_COLUMNS = ["epoch", "cell", "edge", "primitive", "weight"]
_NAMED = 3  # curves that a panel tells apart, besides `none`


class Trajectory:
    """The softmax of the alphas after some epochs.

    Attributes:
        primitives: their names.
        epochs: ascending; 0 is before the first one. A run from before they were kept starts later.
        weights: for each of `CELLS` a list of float32 arrays (edges, primitives), one for every one of the epochs.
    """

    def __init__(self, primitives):
        self.primitives, self.epochs, self.weights = list(primitives), [], {cell: [] for cell in CELLS}

    def add(self, epoch, weights):
        """Add an epoch: for each of `CELLS`, an array (edges, primitives)."""
        self.epochs.append(epoch)
        for cell, array in zip(CELLS, weights, strict=True):
            self.weights[cell].append(np.asarray(array, dtype=np.float32))

    def state_dict(self):
        tensors = {cell: [torch.from_numpy(array) for array in self.weights[cell]] for cell in CELLS}
        return {"epochs": list(self.epochs), **tensors}

    def load_state_dict(self, state, epoch, shape):
        """Go on from what `state_dict` returned after so many epochs, of alphas of this shape (edges, primitives).

        Raises:
            ValueError: it does not fit; further kinds, of a value of another kind.
        """
        epochs = state["epochs"]
        if (
            any(type(e) is not int for e in epochs)
            or sorted(set(epochs)) != epochs
            or not {*epochs} <= {*range(epoch + 1)}
        ):
            raise ValueError(f"its epochs are {epochs!r}"[:100])
        for cell in CELLS:
            for weights in state[cell]:
                if weights.shape != shape or weights.dtype != torch.float32 or not weights.isfinite().all():
                    raise ValueError("weights are not finite, or of another shape than the alphas")
        for k, epoch in enumerate(epochs):
            self.add(epoch, [state[cell][k] for cell in CELLS])

    def array(self, cell):
        """(epochs, edges, primitives)."""
        return np.stack(self.weights[cell])

    def write(self, folder):
        """Replace alphas.csv and winners.csv in a folder."""
        rows = [
            (epoch, cell, edge, primitive, f"{weight:.7g}")
            for k, epoch in enumerate(self.epochs)
            for cell in CELLS
            for edge, weights in zip(edge_names(len(self.weights[cell][k])), self.weights[cell][k], strict=True)
            for primitive, weight in zip(self.primitives, weights, strict=True)
        ]
        write_text(Path(folder) / NAME, _csv(_COLUMNS, rows))
        write_text(Path(folder) / WINNERS, _csv(*self.winners()))

    def winners(self):
        """Columns, and a row for every time that a primitive is ahead on an edge.

        `weight`, `runner_up` (the second besides `none`), `margin` (their difference) and `kept` (whether the genotype
        has the edge) are those of the last of its epochs.
        """
        columns = ["cell", "edge", "first_epoch", "last_epoch", "primitive", "weight", "runner_up", "margin", "kept"]
        rows = []
        for cell in CELLS:
            leaders = [self._leaders(weights) for weights in self.weights[cell]]
            for edge, name in enumerate(edge_names(len(leaders[0]) if leaders else 0)):
                start = 0
                for k, epoch in enumerate(self.epochs):
                    winner, weight, runner_up, margin, kept = leaders[k][edge]
                    if k + 1 < len(leaders) and leaders[k + 1][edge][0] == winner:
                        continue
                    found = (winner, f"{weight:.7g}", runner_up, f"{margin:.3g}", "yes" if kept else "no")
                    rows.append((cell, name, self.epochs[start], epoch, *found))
                    start = k + 1
        return columns, rows

    def _leaders(self, weights):
        """(winner, its weight, the runner-up, the margin, whether the genotype keeps the edge) of every edge."""
        candidates = [k for k, primitive in enumerate(self.primitives) if primitive != "none"]
        kept = _kept(weights, self.primitives)
        leaders = []
        for edge, row in enumerate(weights.tolist()):
            first, *others = sorted(candidates, key=lambda k: -row[k])  # of equal ones, the first, as in `derive`
            second = others[0] if others else None
            margin = row[first] - (row[second] if others else 0.0)
            runner_up = self.primitives[second] if others else ""
            leaders.append((self.primitives[first], row[first], runner_up, margin, edge in kept))
        return leaders


def entropies(weights):
    """The entropy of the weights of an edge in nats, averaged over the edges: of arrays (edges, primitives)."""
    weights = [np.asarray(w, dtype=np.float64) for w in weights]
    return [float(-(w * np.log(np.maximum(w, 1e-30))).sum(-1).mean()) for w in weights]


def edge_names(count):
    """The names of that many edges, in the order of the alphas' rows."""
    return [f"{start} -> {end}" for start, end in _ends(count)]


def _ends(count):
    nodes, ends = ["c_{k-2}", "c_{k-1}"], []
    while len(ends) < count:
        name = str(len(nodes) - 2)
        ends += [(node, name) for node in nodes]
        nodes.append(name)
    return ends


def _kept(weights, primitives):
    """The edges that the genotype has, as indices of rows."""
    gene = genotypes.derive(weights.tolist(), primitives)
    return {sum(range(2, 2 + k // 2)) + node for k, (_, node) in enumerate(gene)}


def _csv(columns, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    return text.getvalue()


def read(path):
    """The Trajectory that an alphas.csv holds.

    Raises:
        UserError: a file that is missing or damaged.
    """
    try:
        with open(path, newline="") as file:
            columns, *rows = csv.reader(file)
        if columns != _COLUMNS or not rows:
            raise ValueError(f"its columns are not {', '.join(_COLUMNS)}, or it has no rows")
        values = {(int(epoch), cell, edge, primitive): float(weight) for epoch, cell, edge, primitive, weight in rows}
        epochs, cells, edges, primitives = (list(dict.fromkeys(key)) for key in zip(*values, strict=True))
        if cells != list(CELLS) or edges != edge_names(len(edges)) or sorted(epochs) != epochs or epochs[0] < 0:
            raise ValueError("its epochs, cells or edges are not those of a search")
        if not all(0 <= weight <= 1 for weight in values.values()) or set(primitives) <= {"none"}:
            raise ValueError("a weight is not between 0 and 1, or there is no primitive")
        trajectory = Trajectory(primitives)
        for epoch in epochs:
            of = [[[values[epoch, cell, edge, p] for p in primitives] for edge in edges] for cell in cells]
            trajectory.add(epoch, of)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: not a search, or one from before the alphas were kept") from None
    except (ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return trajectory


# ------------------------------------------------------------------------------------------------------ pictures

_WINE = "#882255"
_COLORS = {  # a hue for what an operation does, told apart by the colour-blind; convolutions are dashed
    "skip_connect": "#d55e00",
    "max_pool_3x3": "#56b4e9",
    "avg_pool_3x3": "#000000",
    **{f"sep_{of}_3x3": "#0072b2" for of in ("invo", "conv")},
    **{f"sep_{of}_5x5": "#009e73" for of in ("invo", "conv")},
    **{f"sep_{of}_7x7": "#cc79a7" for of in ("invo", "conv")},
    **{f"dil_{of}_3x3": "#e69f00" for of in ("invo", "conv")},
    **{f"dil_{of}_5x5": _WINE for of in ("invo", "conv")},
}
_NONE = dict(color="#777777", ls=":")


def draw(trajectory, folder, format="png"):
    """Write the pictures into a folder; returns their paths."""
    figures = {f"alphas_{name}": plot_weights(trajectory, cell) for cell, name in CELLS.items()}
    figures["alphas_heat_map"] = plot_heat_map(trajectory)
    paths = []
    for name, figure in figures.items():
        paths.append(Path(folder) / f"{name}.{format}")
        with replacing(paths[-1]) as temporary:
            figure.savefig(temporary, format=format, dpi=150)
    return paths


def plot_weights(trajectory, cell):
    """The weights of a cell's edges over the epochs, as a Figure: a row of panels for each node, a column an input.

    A panel names the curves of the primitives that end highest; the others are a band from the smallest to the largest.
    """
    weights, primitives = trajectory.array(cell), trajectory.primitives
    ends = _ends(weights.shape[1])
    nodes = list(dict.fromkeys(end for _, end in ends))
    inputs = list(dict.fromkeys(start for start, _ in ends))
    kept = _kept(weights[-1], primitives)
    figure = Figure(figsize=(1.0 + 2.0 * len(inputs), 0.8 + 1.6 * len(nodes)))
    grid = figure.add_gridspec(len(nodes), len(inputs), left=0.06, right=0.985, bottom=0.085, top=0.94)
    grid.update(wspace=0.09, hspace=0.32)
    shared, named = None, {}
    for edge, (start, end) in enumerate(ends):
        row, column = nodes.index(end), inputs.index(start)
        axes = figure.add_subplot(grid[row, column], sharex=shared, sharey=shared)
        shared = shared or axes
        named |= _plot_edge(axes, trajectory.epochs, weights[:, edge], primitives)
        weight = "bold" if edge in kept else "normal"
        axes.set_title(f"{_label(start)} → {end}", fontsize=9, pad=3, fontweight=weight, y=1)  # y: found is slower
        for side in axes.spines.values():
            side.set(linewidth=1.6 if edge in kept else 0.6, color="#000000" if edge in kept else "#aaaaaa")
        axes.tick_params(labelsize=8, width=0.6)
        axes.xaxis.set_visible(row == len(nodes) - 1)  # ticks that say nothing take a fifth of the time
        axes.yaxis.set_visible(column == 0)
    low, high = _range(weights)
    shared.set_ylim(low, high + 0.08 * (high - low))
    margin = 0.5 if len(trajectory.epochs) == 1 else 0
    shared.set_xlim(trajectory.epochs[0] - margin, trajectory.epochs[-1] + margin)
    shared.xaxis.get_major_locator().set_params(integer=True, nbins=4)
    shared.yaxis.get_major_locator().set_params(nbins=4)
    figure.supxlabel("epoch", fontsize=10, y=0.008)
    figure.supylabel("weight (softmax of the alphas)", fontsize=10, x=0.003)
    order = [name for name in (*primitives, _OTHERS) if name in named]
    box = dict(loc="upper right", bbox_to_anchor=(0.985, 0.965), fontsize=9, frameon=False, ncols=2)
    title = f"{CELLS[cell]} cell (framed: edges of the genotype)"
    legend = figure.legend([named[name] for name in order], order, title=title, title_fontsize=10, **box)
    for line in legend.get_lines():
        line.set_linewidth(2)
    return figure


_OTHERS = "range of the others"


def _plot_edge(axes, epochs, weights, primitives):
    """Plot the weights (epochs, primitives) of an edge; returns name -> what the legend shows for it."""
    none = [k for k, name in enumerate(primitives) if name == "none"]
    ranked = [int(k) for k in np.argsort(-weights[-1], kind="stable") if k not in none]
    others, handles = ranked[_NAMED:], {}
    if others:
        band = weights[:, others]
        handles[_OTHERS] = axes.fill_between(epochs, band.min(1), band.max(1), color="#dddddd", lw=0)
    for k in [*none, *reversed(ranked[:_NAMED])]:  # the winner on top
        style = dict(lw=1.1, marker="." if len(epochs) == 1 else None) | _style(primitives[k])
        (handles[primitives[k]],) = axes.plot(epochs, weights[:, k], **style | {"lw": 2.0 if k == ranked[0] else 1.1})
    return handles


def _style(primitive):
    if primitive == "none":
        return _NONE
    return dict(color=_COLORS.get(primitive, _WINE), ls="--" if "conv" in primitive else "-")


def _label(node):
    """A node's name with its index set as one, in characters: matplotlib's mathematics takes a tenth of a second."""
    return {"c_{k-2}": "cₖ₋₂", "c_{k-1}": "cₖ₋₁"}.get(node, node)


def _range(weights):
    """Ends of an axis for weights: from zero, unless they lie close together as in the first epochs."""
    low, high = float(weights.min()), float(weights.max())
    return (0.0 if low < high / 2 else low - 0.1 * (high - low)), max(high, low + 1e-3)


def plot_heat_map(trajectory):
    """The weights of the last epoch as a Figure: edges by primitives, for both cells.

    The winner of an edge has its weight written in; a frame is around those that the genotype has.
    """
    primitives = trajectory.primitives
    arrays = {cell: trajectory.weights[cell][-1] for cell in CELLS}
    edges = max(len(array) for array in arrays.values())
    size = (1.9 + 2 * max(1.6, 0.45 * len(primitives)), 1.25 + 0.25 * edges)  # a title needs 1.6 inches
    figure = Figure(figsize=size)
    grid = figure.add_gridspec(1, 2, left=0.6 / size[0], right=1 - 0.1 / size[0], bottom=0.85 / size[1], wspace=0.05)
    grid.update(top=1 - 0.35 / size[1])
    low, high = _range(np.concatenate([*arrays.values()]))
    panels = []
    for k, (cell, array) in enumerate(arrays.items()):
        axes = figure.add_subplot(grid[k])
        panels.append(axes)
        image = axes.imshow(array, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axes.set_title(f"{CELLS[cell]} cell, epoch {trajectory.epochs[-1]}", fontsize=10)
        axes.set_xticks(range(len(primitives)), primitives, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        names = [f"{_label(start)} → {end}" for start, end in _ends(len(array))]
        axes.set_yticks(range(len(array)), names if k == 0 else [], fontsize=8)
        axes.tick_params(length=0)
        _mark_winners(axes, array, primitives, low, high)
    bar = figure.colorbar(image, ax=panels, aspect=30, fraction=0.75 / size[0], pad=0.1 / size[0])
    bar.set_label("weight (softmax of the alphas)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _mark_winners(axes, weights, primitives, low, high):
    kept, ends = _kept(weights, primitives), _ends(len(weights))
    digits = 2 if high - low > 0.1 else 3
    allowed = np.array([name != "none" for name in primitives])
    for edge, row in enumerate(weights):
        best = int(np.argmax(np.where(allowed, row, -1)))
        color = "black" if row[best] > low + 0.6 * (high - low) else "white"
        axes.text(best, edge, f"{row[best]:.{digits}f}", ha="center", va="center", fontsize=7.5, color=color)
        if edge in kept:
            box = dict(fill=False, edgecolor="#d55e00", linewidth=1.8)
            axes.add_patch(Rectangle((best - 0.47, edge - 0.45), 0.94, 0.9, **box))
        if edge and ends[edge][1] != ends[edge - 1][1]:
            axes.axhline(edge - 0.5, color="white", lw=2)
