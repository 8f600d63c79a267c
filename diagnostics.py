"""The sharpness of the minimum that a search is in, the dominant eigenvalue of ∇²_α L_val; and when to stop a search.

Where the validation loss is sharp in the alphas, the discrete cell does worse than the supernet says, and the sharpness
rises before a search collapses (arXiv 1909.09656). The eigenvalue is found by Lanczos iteration on exact products of
the Hessian, of the normal and the reduction cell's alphas together. Dominant is the one of largest magnitude, and it
keeps its sign. Early in a search it may be negative; then the largest one, which the paper's code takes (of a Hessian
to which it adds the weight decay of the alphas), is another. It comes out of the same products, and is kept as well.

The loss is the one whose gradient the alphas follow, of a network in training mode: batch norms normalise by the
statistics of the images at hand, so that what the alphas do to the scale of a node is seen as in the search. The images
are the same in every epoch, the first plain ones of the search images, so that only the network moves the curve. They
are taken in groups, each with its own statistics: to differentiate twice takes about seven times the memory of a
gradient, and a group is an eighth of a batch. Nothing is dropped (drop path), and noise is the same in every product.
Weights, alphas, running statistics and random states stay as they are.

`early_stop` looks at the finished epochs alone, so that a run that is resumed stops where it would have stopped. Its
rules are, with the largest eigenvalue, that of arXiv 1909.09656, section 4: λ(i) is its mean over the five epochs
around i, known two epochs after it, and of the measured ones where not all are; a search stops when λ(i − 5) <
0.75 λ(i), and keeps the genotype of epoch i − 5, which is not before the tenth (as in the paper's code). With skip
connections, that of DARTS+ (arXiv 1909.06035): a search stops when the normal cell has two or more.
"""

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch

from gradients import from_seed
from runtime import progress

_SMALLEST_GROUP = 8  # images: fewer have poor statistics
_GROUPS = 4
_PRODUCTS = 20  # at most, for one eigenvalue
_TOLERANCE = 0.01

WINDOW = 5  # epochs that an eigenvalue is smoothed over, and by which the two that are compared are apart
_RATIO = 0.75
_FIRST_KEPT = 10  # epoch
FIRST_STOP = _FIRST_KEPT + WINDOW + WINDOW // 2
_SKIPS = 2
RULES = ("none", "eigenvalue", "skips")


class Eigenvalue(NamedTuple):
    """The dominant eigenvalue, the largest one, a bound of their errors, and how many products they took.

    NaN where a product was not finite.
    """

    value: float
    largest: float
    error: float
    products: int

    def __str__(self):
        return f"{self.value:.4g}, the largest {self.largest:.4g} ± {self.error:.1g} ({self.products} products)"


def steps_of_eigenvalue(unrolled):
    """How many steps of a search take as long as an eigenvalue.

    It takes about ten products, and a product as long as 1.05 second-order or 2.75 first-order steps.
    """
    return 10 * (1.05 if unrolled else 2.75)


def usual_interval(steps, unrolled):
    """Epochs between two eigenvalues that take about 5 % of the time of a search of so many steps an epoch."""
    return math.ceil(steps_of_eigenvalue(unrolled) / (0.05 * steps))


def take_groups(batches):
    """[(input, target)] of the same images at every call: groups of an eighth of a batch, half a batch in all."""
    images = min(batches.batch_size, len(batches.labels)) // batches.team.count  # as many in each process
    input, target = (part[:images] for part in next(iter(batches)))
    size = max(_SMALLEST_GROUP, images // 8)
    groups = list(zip(input.split(size), target.split(size), strict=True))[:_GROUPS]
    return [group for group in groups if len(group[1]) > 1]  # batch norm has nothing to normalise in one image


def dominant_eigenvalue(gradients, groups, after_product=lambda: None, tolerance=_TOLERANCE, most=_PRODUCTS):
    """The dominant eigenvalue of the Hessian of the loss by the alphas, as an Eigenvalue.

    Args:
        gradients: a `gradients.Gradients`, of the network and of how to differentiate it.
        groups: [(input (N, 3, H, W), target (N,))]; the loss is the mean over their images.
        after_product: called after each product, when everything is as it was; may raise.
        tolerance: largest error, relative to the dominant one; `most`: products after which that is given up.
    """
    model, images = gradients.model, sum(len(target) for _, target in groups)
    count = sum(alpha.numel() for alpha in gradients.alphas)

    def product(vector):
        progress.doing("the dominant eigenvalue of the Hessian of the alphas")
        with _measured(model):
            parts = [len(group[1]) / images * gradients.hessian_product(vector, *group) for group in groups]
        after_product()
        return sum(parts)

    return lanczos(product, torch.randn(count, generator=torch.Generator().manual_seed(0)), tolerance, most)


@contextmanager
def _measured(model):
    """The network in training mode, nothing dropped, its noise always the same; afterwards all is as it was."""
    device, was = model.alphas_normal.device, (model.training, model.drop_path_prob)
    try:
        with from_seed(device, 0):
            model.train()
            model.drop_path_prob = 0.0
            yield
    finally:
        model.train(was[0])
        model.drop_path_prob = was[1]


def lanczos(product, start, tolerance, most):
    """The eigenvalue of largest magnitude of a symmetric matrix (n, n), and the largest one, as an Eigenvalue.

    ARPACK (`scipy.sparse.linalg.eigsh`) looks at what it has after twenty products; here it is looked at after each,
    since one costs as much as some steps of a search.

    Args:
        product: the matrix times a vector (n,), float64.
        start: a vector (n,), with a part of every eigenvector.
    """
    start = start.double()
    basis, diagonal, beside = (start / start.norm())[None], [], []  # of the tridiagonal matrix in that basis
    for products in range(1, most + 1):
        vector = product(basis[-1]).double().cpu()
        if not vector.isfinite().all():
            return Eigenvalue(math.nan, math.nan, math.nan, products)
        diagonal.append(vector @ basis[-1])
        for _ in range(2):  # rounding leaves a part of the basis the first time
            vector = vector - basis.T @ (basis @ vector)
        beside.append(vector.norm())
        tridiagonal = torch.stack(diagonal).diag()
        if products > 1:
            off = torch.stack(beside[:-1])
            tridiagonal += off.diag(1) + off.diag(-1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        dominant = values.abs().argmax()
        error = (beside[-1] * vectors[-1, [dominant, -1]]).abs().max()
        if error <= tolerance * values[dominant].abs() or products == len(start):
            break
        basis = torch.cat([basis, (vector / beside[-1])[None]])
    return Eigenvalue(values[dominant].item(), values[-1].item(), error.item(), products)


class Stop(NamedTuple):
    """Why a search is to stop, and the epoch whose genotype it keeps."""

    kept_epoch: int
    why: str


def early_stop(rule, history):
    """The Stop that a rule (one of `RULES`) demands after the last epoch of a history of metrics, or None.

    A rise is one from a positive eigenvalue: for others a ratio says nothing.
    """
    last = len(history)
    if rule == "skips":
        return _stop_of_skips(history)
    i = last - WINDOW // 2
    if rule == "none" or i - WINDOW < _FIRST_KEPT:
        return None
    before, now = _smoothed(history, i - WINDOW), _smoothed(history, i)
    if not 0 < before < _RATIO * now:
        return None
    why = (
        f"the largest eigenvalue rose from {before:.4g} around epoch {i - WINDOW} to {now:.4g} around epoch {i}, "
        f"by more than a factor of {1 / _RATIO:.3g}"
    )
    return Stop(i - WINDOW, why)


def _stop_of_skips(history):
    counts = [row["skip_connects"] for row in history]
    if counts[-1] < _SKIPS:
        return None
    kept = len(counts) - (len(counts) > 1 and counts[-2] < _SKIPS)
    return Stop(kept, f"the normal cell has {counts[-1]} skip connections after epoch {len(counts)}")


def _smoothed(history, epoch):
    """The mean of the largest eigenvalues measured in the epochs around one; NaN if one is, or if there is none."""
    around = history[epoch - 1 - WINDOW // 2 : epoch + WINDOW // 2]
    values = [row["eigenvalue_largest"] for row in around if "eigenvalue_largest" in row]
    return sum(values) / len(values) if values else math.nan


def final_row(history):
    """The epoch whose genotype a search ends with: the one that an early stop kept, else the last.

    Args:
        history: a dict of numbers for every epoch, or of their texts in metrics.csv.
    """
    kept = history[-1].get("kept_epoch")
    return history[int(kept) - 1] if kept else history[-1]
