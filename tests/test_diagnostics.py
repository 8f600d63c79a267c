"""The dominant eigenvalue against that of the whole Hessian, what it must leave alone; the rules of an early stop."""

import copy
import math

import pytest
import torch

import data
import diagnostics
from conftest import vary_kernels
from genotypes import SEARCH_SPACES
from gradients import Gradients
from model_search import Network


def make(primitives=SEARCH_SPACES["s3"], dtype=torch.float64, sign=1):
    """A supernet whose loss is sign times the cross-entropy, and two groups of images."""
    torch.manual_seed(0)
    cross_entropy = torch.nn.CrossEntropyLoss()
    form = dict(steps=2, multiplier=2, primitives=primitives)
    net = vary_kernels(Network(4, 3, 3, lambda *batch: sign * cross_entropy(*batch), **form)).to(dtype)
    groups = [(torch.randn(n, 3, 6, 6, dtype=dtype), torch.randint(3, (n,))) for n in (4, 2)]
    return net, groups


def hessian(net, groups):
    """The matrix (alphas, alphas), row by row, of the loss averaged over the images of all groups."""
    net.fast = False
    loss = sum(len(target) * net._loss(input, target) for input, target in groups) / sum(len(t) for _, t in groups)
    alphas = net.arch_parameters()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, alphas, create_graph=True)])
    rows = [torch.autograd.grad(g, alphas, retain_graph=True) for g in gradient]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])


def dominant(matrix):
    values = torch.linalg.eigvalsh(matrix)
    return values[values.abs().argmax()].item()


@pytest.mark.parametrize("sign", [1, -1], ids=["Hessian", "its negative"])
def test_it_is_that_of_the_whole_hessian(sign):
    """Of a matrix and its negative one is dominated by a negative eigenvalue, which must keep its sign."""
    net, groups = make(sign=sign)
    found = diagnostics.dominant_eigenvalue(Gradients(net), groups, tolerance=1e-7, most=100)
    matrix = hessian(net, groups)
    expected = dominant(matrix)
    assert abs(found.value - expected) < 1e-6 * abs(expected)
    assert abs(found.largest - torch.linalg.eigvalsh(matrix).max()) < 1e-6 * abs(expected)
    assert found.error <= 1e-7 * abs(expected) and found.products < len(matrix)
    assert math.copysign(1, expected) == sign  # else neither case would be one of a negative eigenvalue


def test_a_product_is_that_of_the_whole_hessian_with_involutions():
    net, groups = make(["none", "skip_connect", "max_pool_3x3", "sep_invo_3x3"])
    vector = torch.randn(40, dtype=torch.float64)
    product = Gradients(net).hessian_product(vector, *groups[0])
    assert torch.allclose(product, hessian(net, groups[:1]) @ vector, rtol=1e-9, atol=1e-12)


def symmetric(*eigenvalues):
    """A matrix with these eigenvalues."""
    turn = torch.linalg.qr(torch.randn(2 * [len(eigenvalues)], dtype=torch.float64)).Q
    return turn @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ turn.T


@pytest.mark.parametrize(
    "eigenvalues, expected",
    [([3, 2.9, 1, -1], 3), ([2, 1, 0, -2.5], -2.5), ([-1, -2, -3], -3), ([0, 0, 0], 0), ([5, 5, 5], 5), ([-7], -7)],
)
def test_lanczos_finds_the_largest_magnitude(eigenvalues, expected):
    torch.manual_seed(0)
    matrix = symmetric(*eigenvalues)
    found = diagnostics.lanczos(lambda vector: matrix @ vector, torch.randn(len(eigenvalues)), 1e-9, 50)
    assert found.value == pytest.approx(expected, abs=1e-9) and found.products <= len(eigenvalues)
    assert found.largest == pytest.approx(max(eigenvalues), abs=1e-9)


def test_lanczos_gives_up_in_time_and_says_how_far_off_it_is():
    torch.manual_seed(0)
    matrix = symmetric(*range(-50, 52))
    found = diagnostics.lanczos(lambda vector: matrix @ vector, torch.randn(102), 1e-9, 5)
    assert found.products == 5 and abs(found.value) < 51
    assert min(abs(found.value - value) for value in range(-50, 52)) <= found.error


def test_what_is_not_finite_is_no_eigenvalue():
    found = diagnostics.lanczos(lambda vector: vector * math.inf, torch.ones(4), 1e-3, 9)
    assert math.isnan(found.value) and found.products == 1


def test_everything_stays_as_it_was():
    net, groups = make(SEARCH_SPACES["s4"], dtype=torch.float32)
    net.eval()
    net.drop_path_prob = 0.3
    seen = []
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()

    def look():
        seen.append(all(torch.equal(value, before[name]) for name, value in net.state_dict().items()))

    diagnostics.dominant_eigenvalue(Gradients(net), groups, look)
    assert seen and all(seen)
    assert torch.equal(torch.get_rng_state(), random)
    assert net.fast and net.drop_path_prob == 0.3 and not any(module.training for module in net.modules())
    assert all(w.requires_grad and w.grad is None for w in [*net.parameters(), *net.arch_parameters()])


def test_statistics_are_those_of_each_group_and_not_the_running_ones():
    net, groups = make()
    expected = diagnostics.dominant_eigenvalue(Gradients(net), groups)
    for buffer in net.buffers():
        buffer.fill_(3)
    assert diagnostics.dominant_eigenvalue(Gradients(net), groups) == expected
    together = [tuple(torch.cat(part) for part in zip(*groups, strict=True))]
    assert diagnostics.dominant_eigenvalue(Gradients(net), together).value != pytest.approx(expected.value, rel=1e-3)


def test_it_sees_no_chance():
    net, groups = make(SEARCH_SPACES["s4"])
    expected = diagnostics.dominant_eigenvalue(Gradients(net), groups)
    net.drop_path_prob = 0.5
    torch.randn(3)
    assert diagnostics.dominant_eigenvalue(Gradients(net), groups) == expected


@pytest.mark.parametrize(
    "batch_size, sizes", [(64, [8] * 4), (96, [12] * 4), (20, [8, 8, 4]), (17, [8, 8]), (4, [4]), (2, [2])]
)
def test_groups_are_the_same_images_every_time(batch_size, sizes):
    images = data.Images(torch.randint(256, (200, 4, 4, 3), dtype=torch.uint8), torch.arange(200) % 3, list("abc"))
    plain = data.Normalization((0.0,) * 3, (1.0,) * 3)
    batches = data.Batches(images, batch_size, plain, data.Augmentation(1, True, 0))
    first, again = diagnostics.take_groups(batches), diagnostics.take_groups(batches)
    assert [len(target) for _, target in first] == sizes
    assert all(torch.equal(a, b) for pair in zip(first, again, strict=True) for a, b in zip(*pair, strict=True))


def test_the_usual_interval_is_one_of_five_percent():
    assert diagnostics.usual_interval(391, unrolled=True) == 1
    assert diagnostics.usual_interval(391, unrolled=False) == 2
    assert diagnostics.usual_interval(3, unrolled=True) > 50


# ------------------------------------------------------------------------------------------------------ early stop


def measured(values, every=1):
    """A history with these largest eigenvalues, of which every so many are known."""
    rows = [dict(epoch=k + 1, skip_connects=0) for k in range(len(values))]
    of_epoch = {every * k: {"eigenvalue_largest": values[every * k - 1]} for k in range(1, len(values) // every + 1)}
    return [row | of_epoch.get(row["epoch"], {}) for row in rows]


def first_stop(rule, history):
    """(epoch, Stop) of the first epoch that a rule stops at, or None."""
    stops = ((last, diagnostics.early_stop(rule, history[:last])) for last in range(1, len(history) + 1))
    return next(((last, stop) for last, stop in stops if stop), None)


def test_a_rise_of_the_eigenvalue_stops_with_the_genotype_of_before():
    history = measured([0.1] * 20 + [0.2] * 20)
    # the mean around epoch 19 has one of the twenty-first and no more: 0.12, and 0.1 < 0.75 * 0.14 around epoch 20
    last, stop = first_stop("eigenvalue", history)
    assert (last, stop.kept_epoch) == (22, 15)
    assert "from 0.1 around epoch 15 to 0.14 around epoch 20" in stop.why


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5])
def test_it_stops_too_where_not_every_epoch_is_measured(every):
    last, stop = first_stop("eigenvalue", measured([0.1] * 20 + [0.2] * 20, every))
    assert 21 <= last <= 27 and stop.kept_epoch == last - 7 <= 20


@pytest.mark.parametrize(
    "values",
    [
        [0.1] * 40,
        [0.1 * 1.05**k for k in range(40)],  # by a factor of 1.28 in five epochs
        [0.5] * 20 + [0.1] * 20,
        [-0.3] * 20 + [-0.1] * 20,
        [-0.1] * 40,
        [0.01] * 8 + [0.1] * 32,  # before the tenth epoch
        [math.nan] * 40,
    ],
)
def test_what_is_no_rise_does_not_stop(values):
    assert first_stop("eigenvalue", measured(values)) is None


def test_a_mean_that_is_not_positive_has_no_ratio():
    """The mean around epoch 15 is the last negative one that the rule would compare; around 20 it is positive."""
    last, stop = first_stop("eigenvalue", measured([-0.1] * 20 + [0.3] * 20))
    history = measured([-0.1] * 20 + [0.3] * 20)
    assert sum(row["eigenvalue_largest"] for row in history[stop.kept_epoch - 3 : stop.kept_epoch + 2]) > 0


def test_the_first_epoch_that_an_eigenvalue_can_stop_at():
    last, stop = first_stop("eigenvalue", measured([0.1 * 2**k for k in range(40)]))
    assert (last, stop.kept_epoch) == (diagnostics.FIRST_STOP, 10)


@pytest.mark.parametrize(
    "skips, expected", [([0, 1, 1, 2], (4, 3)), ([0, 1, 5, 6], (3, 2)), ([3, 0], (1, 1)), ([1, 0, 1], None)]
)
def test_two_skip_connections_stop_with_the_genotype_of_the_epoch_before(skips, expected):
    found = first_stop("skips", [dict(epoch=k + 1, skip_connects=count) for k, count in enumerate(skips)])
    assert (found and (found[0], found[1].kept_epoch)) == expected


def test_without_a_rule_nothing_stops():
    assert first_stop("none", measured([0.1 * 2**k for k in range(40)])) is None


@pytest.mark.parametrize("as_text", [False, True], ids=["checkpoint", "metrics.csv"])
def test_the_final_row_is_the_kept_one(as_text):
    rows = [dict(epoch=k) for k in (1, 2, 3)]
    table = [dict(row, kept_epoch="") if as_text else row for row in rows]
    assert diagnostics.final_row(table)["epoch"] == 3
    table[-1] = dict(table[-1], kept_epoch="2" if as_text else 2)
    assert diagnostics.final_row(table)["epoch"] == 2
