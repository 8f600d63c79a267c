"""The alphas' gradient against the one that exact automatic differentiation gives."""

from argparse import Namespace

import pytest
import torch
from torch.func import functional_call

import architect
from architect import Architect
from conftest import vary_kernels
from genotypes import SEARCH_SPACES
from model_search import Network

ARGS = Namespace(momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-4, arch_weight_decay=1e-3)
ETA = 0.025


def make_search(space, warm_up=3, seed=0):
    """A tiny float64 supernet whose SGD has momentum, and one batch for the weights and one for the alphas."""
    torch.manual_seed(seed)
    criterion = torch.nn.CrossEntropyLoss()
    model = Network(4, 3, 3, criterion, steps=2, multiplier=2, primitives=SEARCH_SPACES[space]).double()
    vary_kernels(model)
    with torch.no_grad():
        for alpha in model.arch_parameters():
            alpha.normal_()
    optimizer = torch.optim.SGD(model.parameters(), ETA, momentum=ARGS.momentum, weight_decay=ARGS.weight_decay)
    train, valid = ((torch.randn(6, 3, 8, 8).double(), torch.randint(3, (6,))) for _ in range(2))
    model.fast = False  # a test may have put another function in the place of ReLU
    for _ in range(warm_up):
        optimizer.zero_grad()
        model._loss(*train).backward()
        optimizer.step()
    model.fast = True
    return model, optimizer, train, valid


def exact_gradient(model, optimizer, train, valid):
    """d L_val(w'(alpha), alpha) / d alpha, through the inner SGD step, by double backward of the plain cells."""
    fast, model.fast = model.fast, False
    weights, alphas = (
        dict(model.named_parameters()),
        dict(zip(("normal", "reduce"), model.arch_parameters(), strict=True)),
    )
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def loss(weights, batch):
        state = {**weights, "alphas_normal": alphas["normal"], "alphas_reduce": alphas["reduce"], **buffers}
        return model._criterion(functional_call(model, state, (batch[0],)), batch[1])

    grads = torch.autograd.grad(loss(weights, train), list(weights.values()), create_graph=True)
    stepped = {}
    for (name, w), grad in zip(weights.items(), grads, strict=True):
        momentum = optimizer.state[w]["momentum_buffer"] if optimizer.state else 0
        stepped[name] = w - ETA * (ARGS.momentum * momentum + grad + ARGS.weight_decay * w)
    exact = torch.autograd.grad(loss(stepped, valid), list(alphas.values()))
    model.fast = fast
    return exact


def bilevel_gradient(model, optimizer, train, valid, unrolled):
    Architect(model, ARGS).step(*train, *valid, ETA, optimizer, unrolled)
    return [alpha.grad.clone() for alpha in model.arch_parameters()]


def distance(xs, ys):
    """Relative L2 distance."""
    xs, ys = (torch.cat([v.flatten() for v in values]) for values in (xs, ys))
    return ((xs - ys).norm() / ys.norm()).item()


def assert_exact(search):
    exact = exact_gradient(*search)
    first_order = torch.autograd.grad(search[0]._loss(*search[3]), search[0].arch_parameters())
    unrolled = bilevel_gradient(*search, unrolled=True)
    assert distance(unrolled, exact) < 1e-4
    assert distance(first_order, exact) > 1e-2


@pytest.mark.parametrize("space", ["involution", "darts"])
@pytest.mark.parametrize("warm_up", [0, 3], ids=["no momentum yet", "with momentum"])
def test_second_order_gradient_is_the_exact_one(space, warm_up, monkeypatch):
    """At the paper's epsilon, where the loss is smooth: softplus for ReLU, no maximum. In the plain cells, then."""
    monkeypatch.setattr(torch.nn.functional, "relu", lambda x, inplace=False: torch.nn.functional.softplus(x))
    monkeypatch.setitem(SEARCH_SPACES, space, [p for p in SEARCH_SPACES[space] if p != "max_pool_3x3"])
    search = make_search(space, warm_up, seed=1)
    search[0].fast = False
    assert_exact(search)


@pytest.mark.parametrize("space", ["involution", "darts"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast cells", "plain cells"])
def test_second_order_gradient_is_the_exact_one_in_the_real_spaces(space, fast, monkeypatch):
    """With a step of the difference that is too short to cross a kink of ReLU or of the maximum."""
    monkeypatch.setattr(architect, "_R", 1e-6)
    search = make_search(space)
    search[0].fast = fast
    assert_exact(search)


@pytest.mark.parametrize("space, drop, fast", [("s3", 0.4, True), ("s4", 0.0, False)], ids=["drop path", "noise"])
def test_a_step_differentiates_one_draw(space, drop, fast, monkeypatch):
    """Exact backward draws for the training batch, then for the validation batch, as the step does."""
    monkeypatch.setattr(architect, "_R", 1e-6)
    search = make_search(space)
    search[0].drop_path_prob, search[0].fast = drop, fast
    gradients = []
    for gradient in (exact_gradient, lambda *search: bilevel_gradient(*search, unrolled=True)):
        torch.manual_seed(7)
        gradients.append(gradient(*search))
    assert distance(gradients[1], gradients[0]) < 1e-4
    assert distance(exact_gradient(*search), gradients[0]) > 1e-2  # another draw has another one


def test_first_order_gradient_is_that_of_the_validation_loss():
    search = make_search("involution")
    expected = torch.autograd.grad(search[0]._loss(*search[3]), search[0].arch_parameters())
    assert distance(bilevel_gradient(*search, unrolled=False), expected) < 1e-12


@pytest.mark.parametrize("unrolled", [False, True])
def test_weights_and_buffers_are_untouched_bit_for_bit(unrolled):
    model, optimizer, train, valid = make_search("involution")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    momentum = [optimizer.state[w]["momentum_buffer"].clone() for w in model.parameters()]
    bilevel_gradient(model, optimizer, train, valid, unrolled)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("alphas"), name
    for w, expected in zip(model.parameters(), momentum, strict=True):
        assert torch.equal(optimizer.state[w]["momentum_buffer"], expected)
        assert w.requires_grad


def test_a_failing_step_puts_the_weights_back():
    model, optimizer, train, valid = make_search("darts")
    before = [w.clone() for w in model.parameters()]
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        Architect(model, ARGS).step(*train, valid[0], valid[1][:-1], ETA, optimizer, unrolled=True)
    assert all(torch.equal(w, saved) for w, saved in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("unrolled", [False, True])
def test_alphas_without_a_finite_gradient_stay_as_they_were(unrolled):
    model, optimizer, train, valid = make_search("darts")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    infinite = torch.full_like(valid[0], torch.inf)
    with pytest.raises(FloatingPointError, match="gradient of the alphas"):
        Architect(model, ARGS).step(*train, infinite, valid[1], ETA, optimizer, unrolled)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_applied_update_is_adam_on_the_gradient():
    model, optimizer, train, valid = make_search("darts")
    before = [alpha.detach().clone() for alpha in model.arch_parameters()]
    grads = bilevel_gradient(model, optimizer, train, valid, unrolled=True)
    for alpha, old, grad in zip(model.arch_parameters(), before, grads, strict=True):
        step = (alpha - old).detach()
        decayed = grad + ARGS.arch_weight_decay * old  # Adam's first step is lr * sign
        assert torch.allclose(step, -ARGS.arch_learning_rate * decayed.sign(), rtol=1e-3)


def test_a_supernet_without_normal_cells_has_a_zero_gradient_for_their_alphas():
    torch.manual_seed(0)
    model = Network(4, 3, 2, torch.nn.CrossEntropyLoss(), steps=1, multiplier=1)
    optimizer = torch.optim.SGD(model.parameters(), ETA)
    batch = torch.randn(4, 3, 8, 8), torch.randint(3, (4,))
    normal, reduce = bilevel_gradient(model, optimizer, batch, batch, unrolled=True)
    assert not normal.any() and reduce.any()
