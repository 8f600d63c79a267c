"""The fast cell against the plain one, edge by edge: float64, every gradient, and the running statistics."""

import copy

import pytest
import torch
import torch.nn as nn

import fast_cell
import fast_cell_torch
import operations
from genotypes import SEARCH_SPACES
from model_search import Network


@pytest.fixture(params=["torch", "cpu"])
def backend(request, monkeypatch):
    """Run with each backend; C++ is left out where it cannot be built."""
    if request.param == "torch":
        monkeypatch.setattr(fast_cell, "choose_backend", lambda x: fast_cell_torch)
    elif fast_cell.choose_backend(torch.zeros(1)) is fast_cell_torch:
        pytest.skip("no C++ compiler here")
    return request.param


def make(primitives, C=8, layers=3, steps=3, **kwargs):
    """A float64 supernet with a reduction cell after a normal one; alphas and running statistics at random."""
    torch.manual_seed(0)
    net = Network(C, 5, layers, nn.CrossEntropyLoss(), steps=steps, multiplier=2, primitives=primitives, **kwargs)
    with torch.no_grad():
        for alpha in net.arch_parameters():
            alpha.normal_()
        for name, buffer in net.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return net.double().to(memory_format=torch.channels_last)


def results(net, input, target):
    """Everything that a step can see: loss, logits, gradients by name, and buffers."""
    logits = net(input)
    loss = net._criterion(logits, target)
    inputs = {**dict(net.named_parameters()), "normal": net.alphas_normal, "reduce": net.alphas_reduce}
    grads = torch.autograd.grad(loss, inputs.values(), allow_unused=True, materialize_grads=True)
    return {"logits": logits, **{f"grad {name}": g for name, g in zip(inputs, grads, strict=True)},
            **{name: buffer.clone() for name, buffer in net.named_buffers()}}  # fmt: skip


def assert_equal_to_plain(net, size=8, batch=4):
    plain = copy.deepcopy(net)
    plain.fast = False
    input, target = (
        torch.randn(batch, 3, *size if isinstance(size, tuple) else (size, size)).double(),
        torch.arange(batch),
    )
    expected = results(plain, input, target)
    for name, value in results(net, input, target).items():
        scale = max(1e-3, expected[name].abs().max().item())
        assert (value - expected[name]).abs().max().item() <= 1e-9 * scale, name


@pytest.mark.parametrize("space", SEARCH_SPACES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_equal_to_the_plain_cell(backend, space, training):
    assert_equal_to_plain(make(SEARCH_SPACES[space]).train(training))


@pytest.mark.parametrize("space", ["involution", "darts"])
@pytest.mark.parametrize("size", [7, (5, 10)], ids=["odd", "not square"])
def test_sizes_that_a_stride_does_not_divide(backend, space, size):
    assert_equal_to_plain(make(SEARCH_SPACES[space]), size)


@pytest.mark.parametrize("C", [1, 3, 6, 20], ids=lambda C: f"C={C}")
def test_channels_that_fill_no_vector(backend, C):
    assert_equal_to_plain(make(SEARCH_SPACES["mixed"], C, steps=2))
