"""The curves of a run: nothing outside of the frame, what is not finite marked, parts called what they are."""

import math

import numpy as np
import pytest

from watch import curves


def history(train, valid):
    return [
        dict(epoch=k + 1, train_loss=a, valid_loss=b, train_acc=40.0, valid_acc=30.0)
        for k, (a, b) in enumerate(zip(train, valid, strict=True))
    ]


def in_frame(axes, line):
    """For every finite point of a line, whether its place on the page is inside of the frame."""
    points = line.get_xydata()
    places = line.get_transform().transform(points[np.isfinite(points).all(1)])
    return [axes.bbox.x0 <= x <= axes.bbox.x1 and axes.bbox.y0 <= y <= axes.bbox.y1 for x, y in places]


@pytest.mark.parametrize(
    "train, valid, scale",
    [
        ([2.3, 2.0, 1.5], [2.2, 2.1, 1.9], "linear"),
        ([2.3, 2.0, 0.05], [2.4, 702160.0, 2.1], "log"),
        ([2.3, 2.0, 0.5], [7.0, 1e30, 1e30], "log"),
        ([2.3, 0.0, 0.0], [2.4, 0.01, 0.0], "symlog"),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], "linear"),
        ([2.3], [2.4], "linear"),
    ],
)
def test_every_loss_is_in_the_frame(train, valid, scale):
    figure = curves.make_figure(history(train, valid), "validation")
    figure.draw_without_rendering()
    axes = figure.axes[1]
    assert axes.get_yscale() == scale
    assert [in_frame(axes, line) for line in axes.lines] == [[True] * len(train)] * 2
    assert "not finite" not in "".join(text.get_text() for text in figure.legends[0].get_texts())


@pytest.mark.parametrize(
    "valid, lost", [([2.2, math.nan, 1.9, math.inf], [2, 4]), ([math.nan] * 4, [1, 2, 3, 4]), ([math.nan], [1])]
)
def test_epochs_that_are_not_finite_are_marked_at_the_upper_edge(valid, lost):
    figure = curves.make_figure(history([2.3, 2.0, 1.5, 1.0][: len(valid)], valid), "test")
    figure.draw_without_rendering()
    axes = figure.axes[1]
    assert len(axes.lines) == 3
    (mark,) = (line for line in axes.lines if line.get_marker() == "^")
    assert list(mark.get_xdata()) == lost and all(in_frame(axes, mark))
    _, top = axes.transAxes.inverted().transform(axes.transData.transform((1, 2.3)))
    assert top + 0.05 < min(mark.get_ydata()) <= 1  # clear of the values
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["training images", "test images", "test loss not finite"]


def test_the_images_are_called_what_they_are():
    figure = curves.make_figure(history([2.0], [2.1]), "validation")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training images", "validation images"]


@pytest.mark.parametrize("epochs", [1, 2, 6, 50, 600])
def test_epochs_are_whole_numbers(epochs):
    figure = curves.make_figure(history([2.0] * epochs, [2.1] * epochs), "validation")
    figure.draw_without_rendering()
    for axes in figure.axes:
        left, right = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
        assert ticks and all(tick == round(tick) for tick in ticks)


def test_the_eigenvalue_is_shown_where_it_was_measured():
    values = {1: 0.5, 3: 50.0, 4: math.nan, 6: 0.7}
    history = [dict(epoch=k, skip_connects=k // 2) for k in range(1, 7)]
    for k, value in values.items():
        history[k - 1]["eigenvalue"] = value
    top, bottom = curves.make_eigenvalue_figure(history).axes
    line, mark = top.lines
    assert line.get_xydata().tolist() == [[1, 0.5], [3, 50.0], [6, 0.7]] and list(mark.get_xdata()) == [4]
    assert top.get_yscale() == "log" and bottom.lines[0].get_ydata().tolist() == [0, 1, 1, 2, 2, 3]
    assert bottom.get_xlim()[0] < 1 and bottom.get_xlim()[1] > 6


@pytest.mark.parametrize("values", [[-0.5], [math.nan], [0.0, -3.0, 40.0]])
def test_any_eigenvalues_can_be_drawn(values, tmp_path):
    history = [dict(epoch=k, skip_connects=0, eigenvalue=value) for k, value in enumerate(values, 1)]
    curves.plot_eigenvalue(history, tmp_path / "eigenvalue.png")
    assert (tmp_path / "eigenvalue.png").stat().st_size > 1000


def test_the_epoch_that_an_early_stop_keeps_is_marked():
    history = [dict(epoch=k, skip_connects=0, eigenvalue=value) for k, value in enumerate([0.1, math.nan, 0.3, 0.4], 1)]
    history[-1]["kept_epoch"] = 3
    figure = curves.make_eigenvalue_figure(history)
    marks = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines[1:]}
    assert marks == {"not finite": [2], "genotype kept by the early stop": [3, 3]}
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(marks)
