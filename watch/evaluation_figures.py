"""The pictures of an evaluation, as figures: accuracy by class, confusion, calibration, the surest mistakes.

They stay readable with two classes and with a hundred; of more than a hundred, what is highest and lowest is shown.
"""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from utils import readable, replacing

MISTAKES = 24  # on a contact sheet
_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#6b7680"
_NAMED = 100  # classes that have their names on a picture
_ROWS, _COLUMNS = 25, 6  # bars below each other; mistakes beside each other
_LONG = 22  # characters of a name


def save(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _short(name, length=_LONG):
    name = readable(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _name_ticks(axis, places, names, **style):
    """Ticks with the names of classes, which may hold what would be read as a formula."""
    axis.set_ticks(places, [_short(name) for name in names], **style)
    for label in axis.get_ticklabels():
        label.set_parse_math(False)


def draw_classes(rows):
    """Bars of the accuracy of every class with its interval, highest first.

    Args:
        rows: (class, images, correct, accuracy, low, high), in percent.
    """
    ranked = sorted((row for row in rows if row[1]), key=lambda row: -row[3])
    title = f"accuracy by class, mean {np.mean([row[3] for row in ranked]):.1f}%"
    if len(ranked) > _NAMED:
        title += f"; the {_NAMED // 2} highest and the {_NAMED // 2} lowest of {len(ranked)}"
        ranked = ranked[: _NAMED // 2] + ranked[-_NAMED // 2 :]
    count = -(-len(ranked) // _ROWS)
    height = -(-len(ranked) // count)
    figure = Figure(figsize=(6.5 if count == 1 else 3.2 * count, 1.1 + 0.24 * height), layout="constrained")
    panels = figure.subplots(1, count, sharex=True, squeeze=False)[0]
    for k, axes in enumerate(panels):
        part = ranked[k * height : (k + 1) * height]
        places, accuracy = np.arange(len(part)), np.array([row[3] for row in part])
        bars = np.array([(row[3] - row[4], row[5] - row[3]) for row in part]).T
        style = dict(ecolor="black", elinewidth=0.9, capsize=1.5)
        axes.barh(places, accuracy, 0.72, xerr=np.maximum(0, bars), color=_BLUE, alpha=0.75, error_kw=style)
        _name_ticks(axes.yaxis, places, [row[0] for row in part], fontsize=8 if count > 1 else 10)
        axes.set(xlim=(0, 100), ylim=(height - 0.4, -0.6), xlabel="accuracy (%)")
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    each = sorted(row[1] for row in rows)
    size = f"{each[0]:,}" if each[0] == each[-1] else f"{each[0]:,} to {each[-1]:,}"
    figure.suptitle(f"{title}\nlines: 95% interval of {size} images each", fontsize=10)
    return figure


def draw_confusion(confusion, classes):
    """A map of the shares of every class (rows) that were taken for each class (columns), in percent.

    Args:
        confusion: (classes, classes + 1), the last column for images whose logits are not finite.
    """
    names = list(classes)
    if confusion[:, -1].any():
        names.append("(not finite)")
    shares = 100 * confusion[:, : len(names)] / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    size = min(14, max(4.5, 2.2 + (0.46 if len(classes) <= _ROWS else 0.125) * len(classes)))
    figure = Figure(figsize=(size + 0.9, size), layout="constrained")
    axes = figure.subplots()
    # the square root, so that rare confusions are seen beside the diagonal
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label="share of the class (%)")
    bar.set_ticks([0, 1, 5, 10, 25, 50, 100])
    axes.set(xlabel="predicted", ylabel="class")
    if len(classes) <= _NAMED:
        fontsize = 9 if len(classes) <= _ROWS else 6
        _name_ticks(axes.xaxis, range(len(names)), names, rotation=90, fontsize=fontsize)
        _name_ticks(axes.yaxis, range(len(classes)), classes, fontsize=fontsize)
    if len(classes) <= _ROWS:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                style = dict(ha="center", va="center", fontsize=8, color="white" if share > 25 else "black")
                axes.text(column, row, f"{share:.0f}", **style)
    return figure


def draw_calibration(calibration):
    """The reliability diagram (arXiv 1706.04599, fig. 1): accuracy by confidence, and how many images have which."""
    counts, accuracy, confidence, ece = calibration
    bins, full = len(counts), counts > 0
    edges = np.arange(bins + 1) / bins
    figure = Figure(figsize=(5.2, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    gap = dict(bottom=np.minimum(accuracy, confidence)[full], color="none", edgecolor=_ORANGE, hatch="////")
    style = dict(width=1 / bins, align="edge", edgecolor="white", linewidth=0.6)
    top.bar(edges[:-1][full], accuracy[full], color=_BLUE, alpha=0.8, label="share that is right", **style)
    gaps = np.abs(accuracy - confidence)[full]
    top.bar(edges[:-1][full], gaps, label="gap to the mean confidence", **style | gap)
    top.plot([0, 1], [0, 1], color="black", lw=1, ls="--", label="perfect calibration")
    top.set(ylabel="accuracy", ylim=(0, 1), xlim=(0, 1))
    top.set_title(f"expected calibration error {100 * ece:.1f}% ({bins} bins, {counts.sum():,} images)", fontsize=10)
    top.legend(loc="upper left", frameon=False)
    bottom.bar(edges[:-1], 100 * counts / max(1, counts.sum()), color=_GREY, **style)
    bottom.set(xlabel="confidence", ylabel="images (%)")
    if full.any():
        for values, color, name in ((accuracy, _BLUE, "accuracy"), (confidence, "black", "mean confidence")):
            mean = (counts[full] * values[full]).sum() / counts.sum()
            bottom.axvline(mean, color=color, ls="-" if color == _BLUE else "--", label=f"{name} {mean:.3f}")
        bottom.legend(fontsize=8, frameon=False)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def draw_mistakes(mistakes, total, predictions, images):
    """A contact sheet: images, what each was taken for with its probability, and what it is.

    Args:
        mistakes: indices of images, in order.
        total: how many mistakes there are.
    """
    rows = max(1, -(-len(mistakes) // _COLUMNS))
    side, gap, text, title = 1.5, 0.1, 0.6, 0.6  # inches: of an image, beside it, below it, above all
    width, height = _COLUMNS * (side + gap) + gap, title + rows * (side + text)
    figure = Figure(figsize=(width, height))
    place = dict(left=gap / width, right=1 - gap / width, top=1 - title / height, bottom=text / height)
    figure.subplots_adjust(**place, wspace=gap / side, hspace=text / side)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    pixels_of = (pixels for part in images.parts(torch.as_tensor(mistakes)) for pixels in part.numpy())
    for k, pixels, axes in zip(mistakes, pixels_of, panels, strict=False):
        axes.imshow(pixels, interpolation="nearest" if len(pixels) < 100 else "antialiased")
        predicted, target = (images.classes[labels[k]] for labels in (predictions.predicted, predictions.targets))
        text = f"{_short(predicted, 14)} {_percent(predictions.confidences[k])}\nis {_short(target, 18)}"
        axes.text(0.5, -0.04, text, transform=axes.transAxes, ha="center", va="top", fontsize=9, parse_math=False)
        name = _short(Path(images.names[k]).name[::-1], 26)[::-1]  # the end of a name tells most
        place = dict(transform=axes.transAxes, ha="center", va="top", fontsize=6, color=_GREY)
        axes.text(0.5, -0.29, name, parse_math=False, **place)
    name = f"the {len(mistakes)} most confident of {total:,} mistakes: what each was taken for, with its probability"
    figure.text(0.5, 1 - 0.3 / height, name if len(mistakes) else "no mistakes", ha="center", va="center", fontsize=11)
    return figure


def _percent(share):
    """A probability that is not one does not look like one."""
    return f"{100 * share:.1f}%" if share < 0.9995 else f"{math.floor(100_000 * share) / 1000:.3f}%"
