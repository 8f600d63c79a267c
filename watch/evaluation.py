"""What a network does with the images of its test: accuracy of every class, confusion, calibration, surest mistakes.

A prediction is the class of the largest logit, its confidence that class's softmax. An image whose logits are not all
finite has neither: it counts as a mistake, and calibration and surest mistakes leave it out.

    FOLDER/                      RUN/test/, or --output
        test.json                all numbers, settings, machine, images; written last
        classes.csv, .png        accuracy of every class
        confusion.csv, .png      images by class and by prediction
        calibration.csv, .png    how often predictions of a confidence are right
        predictions.csv          one row an image
        mistakes.png             the mistakes with the highest confidence
"""

import csv
import io
import json
import math
from typing import NamedTuple

import numpy as np
import torch

import utils
from watch import evaluation_figures as figures

BINS = 15  # of confidences, as in arXiv 1706.04599
_Z = 1.959964  # a normal variable is within so many standard deviations with 95%
NO_PREDICTION = -1


class Predictions(NamedTuple):
    """What a network says of N images; arrays (N,)."""

    targets: np.ndarray  # int64
    predicted: np.ndarray  # int64; NO_PREDICTION where logits are not finite
    confidences: np.ndarray  # float64; NaN where logits are not finite

    @property
    def finite(self):
        return self.predicted != NO_PREDICTION

    @property
    def right(self):
        return self.predicted == self.targets


class Meter(utils.Evaluation):
    """The meter of an evaluation that keeps every image's prediction as well."""

    def __init__(self):
        super().__init__()
        self._parts = []  # of batches

    def add(self, logits, target):
        """Add a batch: logits (N, classes), target (N,)."""
        super().add(logits, target)
        logits = logits.cpu().double()
        # among equal logits the one that `accuracy` takes first
        predicted = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, 0]
        confidence = logits.softmax(1).gather(1, predicted[:, None])[:, 0]
        finite = logits.isfinite().all(dim=1)
        self._parts.append((target.cpu(), predicted.where(finite, NO_PREDICTION), confidence.where(finite, math.nan)))

    @property
    def predictions(self):
        return Predictions(*(torch.cat(parts).numpy() for parts in zip(*self._parts, strict=True)))


def count_confusion(targets, predicted, classes):
    """Images by class and prediction: (classes, classes + 1), the last column for those without a prediction."""
    columns = np.where(predicted == NO_PREDICTION, classes, predicted)
    counts = np.bincount(targets * (classes + 1) + columns, minlength=classes * (classes + 1))
    return counts.reshape(classes, classes + 1)


def interval(hits, count):
    """The 95% interval of a share of which `hits` of `count` were seen (Wilson 1927), two numbers in [0, 1]."""
    if count == 0:
        return 0.0, 1.0
    share, z = hits / count, _Z
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


class Calibration(NamedTuple):
    """How often predictions are right, by their confidence (arXiv 1706.04599, section 2); arrays (bins,)."""

    counts: np.ndarray  # predictions in ((m - 1) / bins, m / bins]
    accuracy: np.ndarray  # the share of them that is right; NaN in an empty bin
    confidence: np.ndarray  # their mean confidence; NaN in an empty bin
    ece: float  # expected calibration error, eq. 3: sum over m of counts_m / n |accuracy_m - confidence_m|


def calibrate(confidences, right, bins=BINS):
    """The Calibration of predictions: their confidences (N,) in [0, 1], and whether each is right (N,)."""
    edges = np.arange(1, bins) / bins
    places = np.searchsorted(edges, confidences)  # on an edge: the bin below
    counts = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        accuracy, confidence = (
            np.bincount(places, weights, minlength=bins) / counts for weights in (right.astype(float), confidences)
        )
    gaps = np.abs(accuracy - confidence)[counts > 0]
    ece = float((counts[counts > 0] * gaps).sum() / max(1, counts.sum()))
    return Calibration(counts, accuracy, confidence, ece)


def surest_mistakes(predictions, count):
    """The indices of at most `count` images that were taken for another class, by falling confidence."""
    places = np.flatnonzero(predictions.finite & ~predictions.right)
    return places[np.argsort(-predictions.confidences[places], kind="stable")[:count]]


def confused_pairs(confusion, classes, count=12):
    """(class, taken for, images, share of the class) of the most frequent confusions, most frequent first."""
    mistakes = confusion[:, : len(classes)].copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:count]
    pairs = [divmod(int(place), len(classes)) for place in order]
    return [
        (classes[i], classes[j], int(mistakes[i, j]), mistakes[i, j] / confusion[i].sum())
        for i, j in pairs
        if mistakes[i, j]
    ]


def measure(meter, classes):
    """The confusion, the Calibration, and all numbers as plain values for test.json."""
    predictions = meter.predictions
    finite, confidences = predictions.finite, predictions.confidences[predictions.finite]
    confusion = count_confusion(predictions.targets, predictions.predicted, len(classes))
    calibration = calibrate(confidences, predictions.right[finite])
    numbers = dict(
        images=meter.images,
        without_finite_logits=int((~finite).sum()),
        loss=meter.loss,
        top1=meter.top1,
        top5=meter.top5 if meter.has_top5 else None,
        expected_calibration_error=calibration.ece,
        calibration_bins=BINS,
        mean_confidence=float(confidences.mean()) if len(confidences) else None,
        most_confused=confused_pairs(confusion, classes),
    )
    return confusion, calibration, numbers


def write(folder, meter, images, facts):
    """Write everything that there is to know into a folder, test.json last.

    Args:
        images: those of data.py that were evaluated, in their order.
        facts: further plain values for test.json.
    """
    predictions = meter.predictions
    confusion, calibration, numbers = measure(meter, images.classes)
    _write_tables(folder, meter.losses, predictions, images, confusion, calibration)
    mistakes, total = surest_mistakes(predictions, figures.MISTAKES), int((~predictions.right).sum())
    for name, figure in (
        ("classes", figures.draw_classes(class_rows(confusion, images.classes))),
        ("confusion", figures.draw_confusion(confusion, images.classes)),
        ("calibration", figures.draw_calibration(calibration)),
        ("mistakes", figures.draw_mistakes(mistakes, total, predictions, images)),
    ):
        figures.save(figure, folder / f"{name}.png")
    utils.write_text(folder / "test.json", json.dumps(facts | numbers, indent=2) + "\n")


def class_rows(confusion, classes):
    """(class, images, correct, accuracy, low, high) of every class; accuracy and its 95% interval in percent."""
    rows = []
    for label, name in enumerate(classes):
        count, hits = int(confusion[label].sum()), int(confusion[label, label])
        low, high = interval(hits, count)
        rows.append((name, count, hits, 100 * hits / count if count else math.nan, 100 * low, 100 * high))
    return rows


def _write_tables(folder, losses, predictions, images, confusion, calibration):
    classes = images.classes
    _write_csv(folder / "classes.csv", "class images correct accuracy low high", class_rows(confusion, classes))
    lost = ["(not finite)"] if confusion[:, -1].any() else []
    columns = [*classes, *lost]
    rows = [[name, *counts[: len(columns)]] for name, counts in zip(classes, confusion.tolist(), strict=True)]
    _write_csv(folder / "confusion.csv", ["class", *columns], rows)
    edges = np.arange(BINS + 1) / BINS
    rows = zip(edges[:-1], edges[1:], *(values.tolist() for values in calibration[:3]), strict=True)
    _write_csv(folder / "calibration.csv", "above to images accuracy confidence", rows)
    names = [*classes, ""]  # the last one for NO_PREDICTION
    rows = zip(
        images.names,
        (names[label] for label in predictions.targets),
        (names[label] for label in predictions.predicted),
        predictions.confidences.tolist(),
        losses.tolist(),
        strict=True,
    )
    _write_csv(folder / "predictions.csv", "image class predicted confidence loss", rows)


def _write_csv(path, columns, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns.split() if isinstance(columns, str) else columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    utils.write_text(path, text.getvalue())


def _cell(value):
    """Six digits of a number; nothing for one that is not there."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
