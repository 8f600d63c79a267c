"""The curves of a run: accuracy and loss of its training images and of those it is judged by; a search's sharpness.

Every value is inside the frame: a loss that spans more than a factor of ten has a logarithmic axis. An epoch whose
loss is not finite, which no axis can show, leaves a gap in the line and a triangle at the upper edge.
"""

import math

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from utils import replacing

_STYLES = (("#0072b2", "o", "-"), ("#d55e00", "s", "--"))  # told apart without colours too


def plot_curves(history, judged_by, path):
    """Write the picture of `make_figure` as a PNG."""
    with replacing(path) as temporary:
        make_figure(history, judged_by).savefig(temporary, format="png", dpi=150)


def make_figure(history, judged_by):
    """Two panels, accuracy and loss.

    Args:
        history: a dict for every epoch: `epoch`, and `train_acc`, `train_loss`, `valid_acc`, `valid_loss`.
        judged_by: the images behind the columns `valid_*`, "validation" or "test".
    """
    epochs = [row["epoch"] for row in history]
    parts = (("train", "training"), ("valid", judged_by))
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    panels = figure.subplots(1, 2)
    marks = {}  # of losses that are not finite, for the legend
    for axes, what, title in zip(panels, ("acc", "loss"), ("accuracy (%)", "loss (cross-entropy)"), strict=True):
        shown = []  # of both parts
        for (part, name), (color, marker, dashes), height in zip(parts, _STYLES, (0.92, 0.97), strict=True):
            values = [row[f"{part}_{what}"] for row in history]
            finite = [value if math.isfinite(value) else math.nan for value in values]
            shown += [value for value in finite if not math.isnan(value)]
            size = min(4, 200 / len(epochs))
            axes.plot(epochs, finite, color=color, marker=marker, ls=dashes, ms=size, label=f"{name} images")
            lost = [epoch for epoch, value in zip(epochs, finite, strict=True) if math.isnan(value)]
            if lost:
                axes.margins(y=0.15)
                place = dict(transform=axes.get_xaxis_transform())  # x an epoch, y a share of the frame's height
                (mark,) = axes.plot(lost, [height] * len(lost), "^", color=color, ms=7, **place)
                marks[f"{name} loss not finite"] = mark
        margin = 0.5 if len(epochs) < 3 else 0.05 * len(epochs)
        axes.set(xlabel="epoch", ylabel=title, xlim=(epochs[0] - margin, epochs[-1] + margin))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.yaxis.get_major_locator().set_params(steps=[1, 2, 5, 10])  # round numbers
        axes.grid(alpha=0.3)
    set_scale(panels[1], shown)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend([*lines, *marks.values()], [*labels, *marks], loc="outside upper center", ncols=4, frameon=False)
    return figure


def plot_eigenvalue(history, path):
    """Write the picture of `make_eigenvalue_figure` as a PNG."""
    with replacing(path) as temporary:
        make_eigenvalue_figure(history).savefig(temporary, format="png", dpi=150)


def make_eigenvalue_figure(history):
    """The dominant eigenvalue of the Hessian of the alphas, over the skip connections of the normal cell.

    They are below each other, since it is the question whether they rise together (arXiv 1909.09656).

    Args:
        history: a dict for every epoch: `epoch`, `skip_connects`, `eigenvalue` where it was measured, and
            `kept_epoch` where an early stop has kept the genotype of that epoch.
    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    measured = [row for row in history if "eigenvalue" in row]
    finite = [row for row in measured if math.isfinite(row["eigenvalue"])]
    epochs, values = ([row[name] for row in finite] for name in ("epoch", "eigenvalue"))
    top.plot(epochs, values, color=_STYLES[0][0], marker="o", ms=min(4, 200 / len(measured)))
    lost = [row["epoch"] for row in measured if row not in finite]
    if lost:
        place = dict(transform=top.get_xaxis_transform())  # as in make_figure
        top.plot(lost, [0.95] * len(lost), "^", color=_STYLES[0][0], ms=7, label="not finite", **place)
    if values and min(values) <= 0:
        top.axhline(0, color="#555555", lw=0.8)
    else:
        set_scale(top, values)
    top.set(ylabel="dominant eigenvalue of\n$\\nabla^2_\\alpha L_{val}$")
    epochs, skips = ([row[name] for row in history] for name in ("epoch", "skip_connects"))
    bottom.step(epochs, skips, where="mid", color=_STYLES[1][0])
    bottom.plot(epochs, skips, "s", color=_STYLES[1][0], ms=min(4, 200 / len(epochs)))
    bottom.set(xlabel="epoch", ylabel="skip connections\n(normal cell)", ylim=(-0.3, max(4, *skips) + 0.3))
    margin = 0.5 if len(epochs) < 3 else 0.05 * len(epochs)
    bottom.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    for axis in (bottom.xaxis, bottom.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    kept = history[-1].get("kept_epoch")
    for axes in (top, bottom):
        if kept is not None:
            axes.axvline(kept, color="#009e73", ls=":", label="genotype kept by the early stop")
        axes.grid(alpha=0.3)
    lines, labels = top.get_legend_handles_labels()
    if lines:
        figure.legend(lines, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def set_scale(axes, losses):
    """Show all losses: a logarithmic axis where they span more than a factor of ten, with ticks at round numbers."""
    positive = [loss for loss in losses if loss > 0]
    if not losses:
        axes.set_yticks([])
    elif positive and max(losses) > 10 * min(losses):
        if len(positive) < len(losses):
            axes.set_yscale("symlog", linthresh=min(positive))  # which ends in a linear piece, where zero is
            return
        axes.set_yscale("log")
        if max(losses) < 1000 * min(losses):
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
