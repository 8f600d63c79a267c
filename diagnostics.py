"""The sharpness of the minimum that a search is in: the dominant eigenvalue of ∇²_α L_val.

Where the validation loss is sharp in the alphas, the discrete cell does worse than the supernet says, and the sharpness
rises before a search collapses (arXiv 1909.09656). The eigenvalue is found by Lanczos iteration on exact products of
the Hessian, of the normal and the reduction cell's alphas together. Dominant is the one of largest magnitude, and it
keeps its sign; the paper's code takes the largest one, which is the same unless it is negative, and of a Hessian to
which it adds the weight decay of the alphas.

The loss is the one whose gradient the alphas follow, of a network in training mode: batch norms normalise by the
statistics of the images at hand, so that what the alphas do to the scale of a node is seen as in the search. The images
are the same in every epoch, the first plain ones of the search images, so that only the network moves the curve. They
are taken in groups, each with its own statistics: to differentiate twice takes about seven times the memory of a
gradient, and a group is an eighth of a batch. Weights, alphas, running statistics and random states stay as they are.
"""

import math
from typing import NamedTuple

import torch

import progress

_SMALLEST_GROUP = 8  # images: fewer have poor statistics
_GROUPS = 4
_PRODUCTS = 20  # at most, for one eigenvalue
_TOLERANCE = 0.01


class Eigenvalue(NamedTuple):
    """An eigenvalue, a bound of its error, and how many products it took. NaN where a product was not finite."""

    value: float
    error: float
    products: int

    def __str__(self):
        return f"{self.value:.4g} ± {self.error:.1g} ({self.products} products)"


def usual_interval(steps, unrolled):
    """Epochs between two eigenvalues that take about 5 % of the time of a search of so many steps an epoch.

    An eigenvalue takes about ten products, and a product as long as 1.05 second-order or 2.75 first-order steps.
    """
    return math.ceil(10 * (1.05 if unrolled else 2.75) / (0.05 * steps))


def take_groups(batches):
    """[(input, target)] of the same images at every call: groups of an eighth of a batch, half a batch in all."""
    input, target = next(iter(batches))
    size = max(_SMALLEST_GROUP, batches.batch_size // 8)
    groups = list(zip(input.split(size), target.split(size), strict=True))[:_GROUPS]
    return [group for group in groups if len(group[1]) > 1]  # batch norm has nothing to normalise in one image


def dominant_eigenvalue(gradients, groups, after_product=lambda: None, tolerance=_TOLERANCE, most=_PRODUCTS):
    """The dominant eigenvalue of the Hessian of the loss by the alphas, as an Eigenvalue.

    Args:
        gradients: a `gradients.Gradients`, of the network and of how to differentiate it.
        groups: [(input (N, 3, H, W), target (N,))]; the loss is the mean over their images.
        after_product: called after each product, when everything is as it was; may raise.
        tolerance: largest error, relative to the eigenvalue; `most`: products after which that is given up.
    """
    model, images = gradients.model, sum(len(target) for _, target in groups)
    count = sum(alpha.numel() for alpha in gradients.alphas)
    was_training = model.training

    def product(vector):
        progress.doing("the dominant eigenvalue of the Hessian of the alphas")
        model.train()
        try:
            parts = [len(group[1]) / images * gradients.hessian_product(vector, *group) for group in groups]
        finally:
            model.train(was_training)
        after_product()
        return sum(parts)

    return lanczos(product, torch.randn(count, generator=torch.Generator().manual_seed(0)), tolerance, most)


def lanczos(product, start, tolerance, most):
    """The eigenvalue of largest magnitude of a symmetric matrix (n, n), as an Eigenvalue.

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
            return Eigenvalue(math.nan, math.nan, products)
        diagonal.append(vector @ basis[-1])
        for _ in range(2):  # rounding leaves a part of the basis the first time
            vector = vector - basis.T @ (basis @ vector)
        beside.append(vector.norm())
        tridiagonal = torch.stack(diagonal).diag()
        if products > 1:
            off = torch.stack(beside[:-1])
            tridiagonal += off.diag(1) + off.diag(-1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        best = values.abs().argmax()
        error = (beside[-1] * vectors[-1, best]).abs()
        if error <= tolerance * values[best].abs() or products == len(start):
            break
        basis = torch.cat([basis, (vector / beside[-1])[None]])
    return Eigenvalue(values[best].item(), error.item(), products)
