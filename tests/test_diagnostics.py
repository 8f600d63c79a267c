"""The dominant eigenvalue against that of the whole Hessian, and what it must leave alone."""

import copy

import pytest
import torch

import diagnostics
from conftest import vary_kernels
from genotypes import SEARCH_SPACES
from gradients import Gradients
from model_search import Network

_SMALL = ["none", "skip_connect", "max_pool_3x3", "sep_invo_3x3"]


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


@pytest.mark.parametrize("primitives", [SEARCH_SPACES["s3"], _SMALL], ids=["s3", "involution"])
def test_it_is_that_of_the_whole_hessian(primitives):
    net, groups = make(primitives)
    found = diagnostics.dominant_eigenvalue(Gradients(net), groups, tolerance=1e-7, most=100)
    expected = dominant(hessian(net, groups))
    assert abs(found.value - expected) < 1e-6 * abs(expected)
    assert found.error <= 1e-7 * abs(expected) and found.products < len(hessian(net, groups))


def test_a_negative_one_keeps_its_sign():
    """A Hessian and its negative: one of them is dominated by a negative eigenvalue."""
    found = []
    for sign in (1, -1):
        net, groups = make(sign=sign)
        found.append(diagnostics.dominant_eigenvalue(Gradients(net), groups, tolerance=1e-7, most=100).value)
    assert min(found) < 0 < max(found)
    assert found[0] == pytest.approx(dominant(hessian(*make())), rel=1e-6)
    assert found[1] == pytest.approx(dominant(hessian(*make(sign=-1))), rel=1e-6)


def test_everything_stays_as_it_was():
    net, groups = make(dtype=torch.float32)
    net.eval()
    seen = []
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()

    def look():
        seen.append(all(torch.equal(value, before[name]) for name, value in net.state_dict().items()))

    diagnostics.dominant_eigenvalue(Gradients(net), groups, look)
    assert seen and all(seen)
    assert torch.equal(torch.get_rng_state(), random)
    assert net.fast and not net.training and not any(module.training for module in net.modules())
    assert all(w.requires_grad and w.grad is None for w in [*net.parameters(), *net.arch_parameters()])


def test_statistics_are_those_of_each_group_and_not_the_running_ones():
    net, groups = make()
    expected = diagnostics.dominant_eigenvalue(Gradients(net), groups)
    for buffer in net.buffers():
        buffer.fill_(3)
    assert diagnostics.dominant_eigenvalue(Gradients(net), groups) == expected
    together = [tuple(torch.cat(part) for part in zip(*groups, strict=True))]
    assert diagnostics.dominant_eigenvalue(Gradients(net), together).value != pytest.approx(expected.value, rel=1e-3)
