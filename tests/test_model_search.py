"""The supernet: the mixture, the interface of the original, the derivation of genotypes."""

import math

import pytest
import torch

import original_darts
from conftest import logits_of_scaled_images
from genotypes import PRIMITIVES, SEARCH_SPACES, Genotype, format, parse
from involution import Involution2d, set_kernel_norm
from model_search import STEM_STRIDES, MixedOp, Network
from operations import KERNEL_NORM

CRITERION = torch.nn.CrossEntropyLoss()


def make(**kwargs):
    torch.manual_seed(0)
    return Network(**(dict(C=4, num_classes=5, layers=3, criterion=CRITERION, steps=2, multiplier=2) | kwargs))


@pytest.mark.parametrize("space", SEARCH_SPACES)
@pytest.mark.parametrize("size", [8, 9], ids=["even", "odd"])
def test_logits(space, size):
    net = make(primitives=SEARCH_SPACES[space])
    assert net(torch.randn(2, 3, size, size)).shape == (2, 5)


@pytest.mark.parametrize("kernel_norm", [KERNEL_NORM, "none"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_a_supernet_is_of_degree_one_where_kernels_are_bounded(kernel_norm, fast):
    net = make(layers=4, steps=3, multiplier=3, num_classes=10, kernel_norm=kernel_norm, fast=fast)
    first, _, at_100, at_1000 = logits_of_scaled_images(net, size=8)
    assert math.isfinite(first)
    assert at_1000 <= 15 * at_100 if kernel_norm == KERNEL_NORM else not math.isfinite(at_1000)


@pytest.mark.parametrize("stride", STEM_STRIDES)
@pytest.mark.parametrize("size", [32, 33], ids=["even", "odd"])
def test_a_stem_reduces_images_before_the_cells(stride, size):
    net, seen = make(stem_stride=stride), []
    net.cells[0].preprocess0.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1:]))
    assert net(torch.randn(2, 3, size, size)).shape == (2, 5)
    assert seen == [(12, -(-size // stride), -(-size // stride))]
    assert {name for name, _ in net.named_parameters() if "stem" not in name} == {
        name for name, _ in make().named_parameters() if "stem" not in name
    }


def test_drop_path_drops_whole_edges_for_each_image():
    cell = make(steps=1, multiplier=1, primitives=SEARCH_SPACES["s2"]).double().cells[0]
    s0, s1 = torch.randn(2, 32, 12, 6, 6).double()
    weights = torch.rand(2, 2).double()
    states = cell.preprocess0(s0), cell.preprocess1(s1)
    edges = [op(state, alphas) for op, state, alphas in zip(cell._ops, states, weights, strict=True)]
    outcomes = torch.stack([0 * edges[0], 2 * edges[0], 2 * edges[1], 2 * (edges[0] + edges[1])])
    for fast in (True, False):
        torch.manual_seed(0)
        node = cell(s0, s1, weights, fast, drop_prob=0.5)
        found = (node - outcomes).abs().amax((2, 3, 4)) < 1e-6  # (outcomes, images)
        assert (found.sum(0) == 1).all() and (found.sum(1) > 0).all()
    cell.eval()
    assert torch.equal(cell(s0, s1, weights, drop_prob=0.5), cell(s0, s1, weights))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_mixed_edge_is_the_weighted_sum_of_its_operations(stride):
    torch.manual_seed(0)
    edge = MixedOp(4, stride).double()
    x, weights = torch.randn(2, 4, 6, 6).double(), torch.rand(len(PRIMITIVES)).double()
    expected = sum(w * op(x) for w, op in zip(weights, edge._ops, strict=True))
    assert torch.allclose(edge(x, weights), expected)


def test_none_is_never_computed(monkeypatch):
    net = make()

    def fail(self, x):
        raise AssertionError("none was computed")

    monkeypatch.setattr("operations.Zero.forward", fail)
    net(torch.randn(2, 3, 8, 8))


def test_parameters_are_the_weights_and_state_dict_holds_the_alphas():
    net = make()
    ids = {id(p) for p in net.parameters()}
    assert not ids & {id(a) for a in net.arch_parameters()}
    assert {"alphas_normal", "alphas_reduce"} <= set(net.state_dict())
    assert not {"alphas_normal", "alphas_reduce"} & {name for name, _ in net.named_parameters()}
    assert all(a.requires_grad and a.shape == (5, len(PRIMITIVES)) for a in net.arch_parameters())
    assert net.arch_parameters()[0] is net.alphas_normal and net.arch_parameters()[1] is net.alphas_reduce


def test_alphas_follow_the_network_to_another_dtype():
    net = make().double()
    assert net.alphas_normal.dtype == torch.float64 and net.alphas_normal.is_leaf and net.alphas_normal.requires_grad


def test_state_dict_round_trip_brings_the_alphas():
    net, other = make(), make(C=4)
    with torch.no_grad():
        net.alphas_normal.normal_()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.alphas_normal, net.alphas_normal)


def test_new_keeps_what_bounds_the_kernels():
    net = make()
    set_kernel_norm(net, "tanh")
    net.cells[0]._ops[0]._ops[4].op[1].kernel_norm = "none"
    forms = [[m.kernel_norm for m in n.modules() if isinstance(m, Involution2d)] for n in (net, net.new())]
    assert forms[0] == forms[1] and forms[0].count("none") == 1 and "tanh" in forms[0]


def test_new_keeps_every_argument_and_the_alphas():
    arguments = dict(C=2, num_classes=7, layers=4, steps=3, multiplier=2, stem_multiplier=5, fast=False, stem_stride=4)
    net = make(**arguments, primitives=SEARCH_SPACES["darts"])
    new = net.new()
    assert {k: v.shape for k, v in new.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert new._primitives == net._primitives and new._criterion is CRITERION
    assert new._multiplier == 2 and new._steps == 3 and not new.fast
    for a, b in zip(new.arch_parameters(), net.arch_parameters(), strict=True):
        assert torch.equal(a, b) and a is not b
    assert not torch.equal(new.stem[0].weight, net.stem[0].weight)


def test_loss():
    net, input, target = make().eval(), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    assert torch.equal(net._loss(input, target), CRITERION(net(input), target))


def test_state_dict_is_the_originals_in_the_convolutional_space():
    net = Network(8, 10, 5, CRITERION, primitives=SEARCH_SPACES["darts"])
    state = {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.startswith("alphas")}
    assert state == original_darts.search_network(8, 10, 5, SEARCH_SPACES["darts"])


def test_a_published_supernet_loads_strictly():
    shapes = original_darts.search_network(4, 10, 3, SEARCH_SPACES["darts"])
    net = Network(4, 10, 3, CRITERION, primitives=SEARCH_SPACES["darts"])
    published = {k: torch.zeros(shape) for k, shape in shapes.items()}
    missing, unexpected = net.load_state_dict(published, strict=False)
    assert set(missing) == {"alphas_normal", "alphas_reduce"} and not unexpected


def test_the_size_of_the_original_supernet():
    net = Network(16, 10, 8, CRITERION, primitives=SEARCH_SPACES["darts"])
    assert sum(p.numel() for p in net.parameters()) == 1_930_618  # what the original's log prints


def test_derivation_on_planted_alphas():
    net = make(steps=3, multiplier=2)
    with torch.no_grad():
        for alpha in net.arch_parameters():
            alpha.zero_()
            alpha[:, PRIMITIVES.index("none")] = 9  # never chosen, and no argument for or against an edge
        plant = [  # (edge, primitive, strength); edges 0-1 enter node 2, 2-4 node 3, 5-8 node 4
            (0, "sep_invo_3x3", 1), (1, "dil_invo_5x5", 2),
            (2, "skip_connect", 1), (3, "avg_pool_3x3", 3), (4, "max_pool_3x3", 2),
            (5, "sep_invo_7x7", 5), (6, "skip_connect", 1), (7, "skip_connect", 2), (8, "sep_invo_5x5", 4),
        ]  # fmt: skip
        for edge, primitive, strength in plant:
            net.alphas_normal[edge, PRIMITIVES.index(primitive)] = strength
            net.alphas_normal[edge, 0] = 0
    normal = [
        ("dil_invo_5x5", 1), ("sep_invo_3x3", 0),
        ("avg_pool_3x3", 1), ("max_pool_3x3", 2),
        ("sep_invo_7x7", 0), ("sep_invo_5x5", 3),
    ]  # fmt: skip
    first = [("max_pool_3x3", 0), ("max_pool_3x3", 1)]  # of equal alphas, the first
    assert net.genotype() == Genotype(normal, range(3, 5), first * 3, range(3, 5))
    assert parse(format(net.genotype())) == net.genotype()


def test_none_weighs_on_an_edge_through_the_softmax():
    net = make(steps=1, multiplier=1)
    net2 = make(steps=2, multiplier=2)
    with torch.no_grad():
        net2.alphas_normal.zero_()
        net2.alphas_normal[2, 0] = 5  # the edge 0 -> 3 prefers none, which takes from its skip connection
        net2.alphas_normal[2, 3] = 1
    assert {node for _, node in net2.genotype().normal[2:]} == {1, 2}
    assert len(net.genotype().normal) == 2


@pytest.mark.parametrize(
    "kwargs, says",
    [
        (dict(primitives=["none", "sep_conv_9x9"]), "sep_conv_9x9"),
        (dict(primitives=["none"]), "besides none"),
        (dict(C=0), "C must be at least 1, got 0"),
        (dict(layers=-1), "layers must be at least 1, got -1"),
        (dict(stem_stride=3), "stem_stride must be one of 1, 4, 8, got 3"),
        (dict(multiplier=3), "multiplier must be at most steps = 2, got 3"),
    ],
)
def test_bad_arguments(kwargs, says):
    with pytest.raises(ValueError, match=says):
        make(**kwargs)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_any_depth(layers):
    net = make(layers=layers)
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    assert sum(cell.reduction for cell in net.cells) == len({layers // 3, 2 * layers // 3})
