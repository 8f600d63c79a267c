"""What a test says of a network: against small cases by hand, scikit-learn and SciPy."""

import csv
import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, recall_score

from data import Images
from watch import evaluation
from watch import evaluation_figures as figures
from watch.evaluation import NO_PREDICTION, Predictions


def random_predictions(count=500, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, count)
    predicted = np.where(rng.random(count) < 0.5, targets, rng.integers(0, classes, count))
    return Predictions(targets, predicted, rng.random(count))


def measured(logits, targets):
    """A meter of two batches."""
    meter, half = evaluation.Meter(), len(targets) // 2
    for part in (slice(half), slice(half, None)):
        meter.add(torch.tensor(logits[part]), torch.tensor(targets[part]))
    return meter


def images_of(targets, classes, size=8):
    pixels = torch.arange(len(targets) * size * size * 3).reshape(-1, size, size, 3).to(torch.uint8)
    return Images(pixels, torch.tensor(targets), classes, [f"folder/{k}.png" for k in range(len(targets))])


def test_predictions_by_hand():
    meter = measured([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0], [0.0, 0.0, 0.0], [math.log(3), 0.0, 0.0]], [0, 1, 0, 2])
    assert meter.predictions.predicted.tolist() == [0, 2, 0, 0] and meter.predictions.right.tolist() == [1, 0, 1, 0]
    e = math.e
    by_hand = [e**2 / (e**2 + 2), e**3 / (1 + e + e**3), 1 / 3, 3 / 5]
    assert meter.predictions.confidences == pytest.approx(by_hand, abs=1e-7)
    assert meter.top1 == 50


def test_logits_that_are_not_finite_are_no_predictions():
    logits = [[9.0, 0.0, 0.0], [math.nan, 0.0, 0.0], [9.0, -math.inf, 0.0], [0.0, 9.0, math.inf]]
    meter = measured(logits, [0, 0, 0, 2])
    assert meter.predictions.predicted.tolist() == [0] + 3 * [NO_PREDICTION]
    confusion, calibration, numbers = evaluation.measure(meter, list("abc"))
    assert confusion.tolist() == [[1, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert numbers["without_finite_logits"] == 3 and numbers["top1"] == 25 and calibration.counts.sum() == 1
    assert len(evaluation.surest_mistakes(meter.predictions, 9)) == 0


def test_the_confusion_has_the_accuracy_of_the_meter_when_logits_are_equal():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 12, 300)
    meter = measured(rng.integers(0, 2, (300, 12)).astype(np.float32), targets)
    confusion, _, _ = evaluation.measure(meter, [str(k) for k in range(12)])
    assert 100 * np.trace(confusion) / 300 == pytest.approx(meter.top1)


def test_confusion_and_class_accuracy_are_scikit_learns():
    predictions = random_predictions()
    confusion = evaluation.count_confusion(predictions.targets, predictions.predicted, 8)  # one class has no image
    expected = confusion_matrix(predictions.targets, predictions.predicted, labels=range(8))
    assert (confusion[:, :-1] == expected).all() and not confusion[:, -1].any()
    rows = evaluation.class_rows(confusion, list("abcdefgh"))
    recalls = recall_score(predictions.targets, predictions.predicted, average=None)
    assert [row[3] for row in rows[:7]] == pytest.approx(100 * recalls)
    assert rows[7][:3] == ("h", 0, 0) and math.isnan(rows[7][3])


@pytest.mark.parametrize("hits, count", [(0, 10), (5, 10), (10, 10), (1, 1), (873, 1000)])
def test_intervals_are_scipys(hits, count):
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert evaluation.interval(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_calibration_error_by_hand():
    """Bins of a half: three predictions of 0.1, 0.3 and 0.5 (on the edge: below), one right; one of 0.9, right."""
    found = evaluation.calibrate(np.array([0.1, 0.3, 0.5, 0.9]), np.array([False, True, False, True]), bins=2)
    assert found.counts.tolist() == [3, 1]
    assert found.accuracy == pytest.approx([1 / 3, 1]) and found.confidence == pytest.approx([0.3, 0.9])
    assert found.ece == pytest.approx(3 / 4 * (1 / 3 - 0.3) + 1 / 4 * 0.1)


def test_calibration_is_scikit_learns():
    predictions = random_predictions()
    found = evaluation.calibrate(predictions.confidences, predictions.right)
    accuracy, confidence = calibration_curve(predictions.right, predictions.confidences, n_bins=evaluation.BINS)
    full = found.counts > 0
    assert found.accuracy[full] == pytest.approx(accuracy) and found.confidence[full] == pytest.approx(confidence)
    assert found.ece == pytest.approx((found.counts[full] * abs(accuracy - confidence)).sum() / 500)


def test_the_surest_mistakes_come_first():
    targets, predicted = np.array([0, 0, 1, 1, 0]), np.array([1, 0, 0, 0, NO_PREDICTION])
    predictions = Predictions(targets, predicted, np.array([0.6, 1.0, 0.9, 0.6, math.nan]))
    assert evaluation.surest_mistakes(predictions, 9).tolist() == [2, 0, 3]
    assert evaluation.surest_mistakes(predictions, 1).tolist() == [2]


def test_confused_pairs_by_hand():
    confusion = np.array([[5, 3, 0, 2], [0, 4, 0, 0], [4, 0, 1, 0]])
    assert evaluation.confused_pairs(confusion, list("abc")) == [("c", "a", 4, 0.8), ("a", "b", 3, 0.3)]


def test_the_files_hold_the_numbers(tmp_path):
    classes = ["a,b", "$x_", "<c>"]
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 40)
    logits = rng.normal(size=(40, 3)).astype(np.float32) + 2 * np.eye(3, dtype=np.float32)[targets]
    logits[5, 1] = math.nan
    meter = measured(logits, targets)
    evaluation.write(tmp_path, meter, images_of(targets, classes), {"epoch": 3})
    tables = {path.stem: list(csv.DictReader(path.open())) for path in tmp_path.glob("*.csv")}
    assert {name: len(rows) for name, rows in tables.items()} == dict(
        classes=3, confusion=3, calibration=15, predictions=40
    )
    numbers = json.loads((tmp_path / "test.json").read_text())
    right = sum(int(row[row["class"]]) for row in tables["confusion"])
    assert right == sum(int(row["correct"]) for row in tables["classes"]) == round(0.4 * numbers["top1"])
    assert numbers["epoch"] == 3 and sum(int(row["(not finite)"]) for row in tables["confusion"]) == 1
    lost = tables["predictions"][5]
    assert (lost["image"], lost["predicted"], lost["confidence"]) == ("folder/5.png", "", "")
    assert sum(row["class"] == row["predicted"] for row in tables["predictions"]) == right
    for name in ("classes", "confusion", "calibration", "mistakes"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(2**24)) > 10


def test_names_that_are_no_utf_8(tmp_path):
    targets, name = np.arange(4) % 2, os.fsdecode(b"\xff.png")
    images = Images(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.tensor(targets), ["a", "b"], [name] * 4)
    evaluation.write(tmp_path, measured(50 * np.eye(2)[1 - targets], targets), images, {})
    assert (tmp_path / "predictions.csv").read_bytes().count(b"\xff.png") == 4


def test_nothing_is_wrong_with_a_network_that_is_always_right(tmp_path):
    targets = np.arange(6) % 2
    evaluation.write(tmp_path, measured(50 * np.eye(2)[targets], targets), images_of(targets, ["a", "b"]), {})
    assert json.loads((tmp_path / "test.json").read_text())["most_confused"] == []


def overlapping(labels, figure):
    """Pairs of labels beside each other on an axis of which one lies over the other, and labels outside the figure."""
    boxes = [label.get_window_extent() for label in labels]
    frame = figure.bbox
    outside = [box for box in boxes if not (frame.contains(*box.min) and frame.contains(*box.max))]
    return [a for a, b in zip(boxes, boxes[1:], strict=False) if a.shrunk(0.99, 0.99).overlaps(b)] + outside


@pytest.mark.parametrize("count", [2, 100])
def test_names_of_classes_are_readable(count):
    names = [f"a class named {k:03d}" for k in range(count)]
    confusion = np.eye(count, count + 1, dtype=int) * 9 + 1
    for figure in (
        figures.draw_confusion(confusion, names),
        figures.draw_classes(evaluation.class_rows(confusion, names)),
    ):
        figure.draw_without_rendering()
        shown = 0
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                labels = [label for label in axis.get_ticklabels() if label.get_text().startswith("a class")]
                shown += len(labels)
                assert not overlapping(labels, figure)
        assert shown % count == 0 and shown > 0


def test_of_many_classes_the_highest_and_the_lowest_are_shown():
    rows = [(f"class {k}", 10, 5, 100 * k / 300, 0.0, 100.0) for k in range(300)]
    figure = figures.draw_classes(rows)
    names = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert names == [f"class {k}" for k in (*range(299, 249, -1), *range(49, -1, -1))]


@pytest.mark.parametrize("share, text", [(0.5, "50.0%"), (0.99996, "99.996%"), (0.999999, "99.999%")])
def test_a_probability_that_is_not_one_does_not_look_like_one(share, text):
    assert figures._percent(share) == text
