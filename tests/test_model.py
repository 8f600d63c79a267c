"""The derived network: shapes, the original's state-dict keys, drop-path, the auxiliary head."""

import copy
import math
import os
import pickle
import random
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.utils.checkpoint

import fast_cell
import original_darts
from conftest import logits_of_scaled_images, vary_kernels
from genotypes import NAMED, Genotype, known_primitives
from involution import KERNEL_NORMS, Involution2d, set_kernel_norm
from model import NETWORKS, NetworkCIFAR, NetworkImageNet
from operations import KERNEL_NORM, OPS, ReLUConvBN
from scripts import ROOT


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("size", [32, 33], ids=["even", "odd"])
def test_logits_of_every_named_genotype(name, size):
    torch.manual_seed(0)
    net = NetworkCIFAR(4, 10, 3, True, NAMED[name])
    input = torch.randn(2, 3, size, size)
    logits, logits_aux = net(input)
    assert logits.shape == logits_aux.shape == (2, 10)
    logits, logits_aux = net.eval()(input)
    assert logits.shape == (2, 10) and logits_aux is None


@pytest.mark.parametrize("name", ["DARTS_V2", "DARTS_L8", "DARTS_L10", "DARTS_L20"])
def test_a_network_of_bounded_kernels_is_of_degree_one(name):
    torch.manual_seed(0)
    *_, at_100, at_1000 = logits = logits_of_scaled_images(NetworkCIFAR(4, 10, 20, False, NAMED[name]))
    assert all(map(math.isfinite, logits)) and at_1000 <= 15 * at_100


@pytest.mark.parametrize("name", ["DARTS", "DARTS_L20"])
def test_a_network_of_kernels_without_bounds_overflows(name):
    torch.manual_seed(0)
    logits = logits_of_scaled_images(NetworkCIFAR(4, 10, 20, False, NAMED[name], kernel_norm="none"))
    assert math.isfinite(logits[0]) and not math.isfinite(logits[-1])


def spread_of_gradients(name, kernel_norm=KERNEL_NORM, prepare=lambda layer: None):
    """The largest norm of a parameter's gradient over the median one, at first, in 20 cells."""
    torch.manual_seed(0)
    net = NetworkCIFAR(4, 10, 20, False, NAMED[name], kernel_norm)
    for layer in net.modules():
        if isinstance(layer, Involution2d):
            prepare(layer)
    torch.nn.functional.cross_entropy(net(torch.randn(8, 3, 16, 16))[0], torch.arange(8)).backward()
    norms = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None])
    return (norms.max() / norms[norms > 0].median()).item()  # while all pixels share a kernel, conv1 has no gradient


@pytest.mark.parametrize("name", ["DARTS", "DARTS_L20"])
def test_first_gradients_spread_no_more_than_those_of_convolutions(name):
    assert spread_of_gradients(name) <= spread_of_gradients("DARTS_V2")
    own_kernels = spread_of_gradients(name, "rms", lambda layer: layer.conv2.conv.reset_parameters())
    assert own_kernels > 5 * spread_of_gradients("DARTS_V2")


def test_a_bound_of_the_kernels_reaches_every_involution():
    net = NetworkCIFAR(4, 10, 3, False, NAMED["DARTS"], kernel_norm="tanh")
    assert {m.kernel_norm for m in net.modules() if isinstance(m, Involution2d)} == {"tanh"}
    default = NetworkCIFAR(4, 10, 3, False, NAMED["DARTS"])
    assert {m.kernel_norm for m in default.modules() if isinstance(m, Involution2d)} == {KERNEL_NORM}
    assert list(net.state_dict()) == list(default.state_dict())
    with pytest.raises(ValueError, match="kernel_norm must be one of"):
        NetworkCIFAR(4, 10, 3, False, NAMED["DARTS_V2"], kernel_norm="layer")


@pytest.mark.parametrize("name", ["DARTS_V1", "DARTS_V2", "NASNet", "AmoebaNet", "DARTS_L8"])
@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_state_dict_is_the_originals_for_convolutional_genotypes(name, auxiliary, network):
    net = NETWORKS[network](8, 10, 6, auxiliary, NAMED[name])
    expected = getattr(original_darts, f"network_{network}")(8, 10, 6, auxiliary, NAMED[name])
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == expected


PUBLISHED = {  # C, classes, layers, and the parameters that the original's scripts print, without the auxiliary head
    "cifar": (36, 10, 20, 3_349_342),
    "imagenet": (48, 1000, 14, 4_718_752),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_published_weights_load_strictly_also_without_batch_counters(network):
    *sizes, count = PUBLISHED[network]
    shapes = getattr(original_darts, f"network_{network}")(*sizes, True, NAMED["DARTS_V2"])
    published = {k: torch.zeros(s) for k, s in shapes.items() if not k.endswith("num_batches_tracked")}
    net = NETWORKS[network](*sizes, True, NAMED["DARTS_V2"])
    net.load_state_dict(published, strict=True)
    assert sum(p.numel() for name, p in net.named_parameters() if "auxiliary" not in name) == count


@pytest.mark.parametrize("network, layers, auxiliary, smallest", [
    ("cifar", 1, True, 15), ("cifar", 2, True, 29), ("cifar", 20, True, 29), ("cifar", 20, False, 4),
    ("imagenet", 1, True, 97), ("imagenet", 14, True, 193), ("imagenet", 14, False, 32),
])  # fmt: skip
def test_the_smallest_image(network, layers, auxiliary, smallest):
    """Nothing is halved that is a single pixel, and the auxiliary head has its 2x2."""
    kind = NETWORKS[network]
    assert kind.smallest_image(layers, auxiliary) == smallest
    net = kind(2, 10, min(layers, 3), auxiliary, NAMED["DARTS_V2"])
    assert net(torch.randn(2, 3, smallest, smallest))[0].shape == (2, 10)
    if auxiliary:
        with pytest.raises(RuntimeError):
            net(torch.randn(2, 3, smallest - 1, smallest - 1))


@pytest.mark.parametrize("size", [224, 96])
def test_cells_for_large_images_begin_at_an_eighth(size):
    net, seen = NetworkImageNet(4, 7, 3, False, NAMED["DARTS_V2"]).eval(), []
    for cell in net.cells:
        cell.register_forward_hook(lambda module, args, output: seen.append([x.shape[2] for x in (*args[:2], output)]))
    assert net(torch.randn(1, 3, size, size))[0].shape == (1, 7)
    assert [[size // x for x in found] for found in seen] == [[4, 8, 8], [8, 8, 16], [8, 16, 32]]


def test_the_auxiliary_head_of_large_images_reads_what_two_thirds_of_the_cells_leave():
    net = NetworkImageNet(4, 7, 4, True, NAMED["DARTS_V2"])
    logits, logits_aux = net(torch.randn(2, 3, 224, 224))
    assert logits.shape == logits_aux.shape == (2, 7)
    cells = [cell.preprocess1.op[1].weight for cell in net.cells]
    grads = torch.autograd.grad(logits_aux.sum(), cells, allow_unused=True)
    assert [grad is not None and bool(grad.any()) for grad in grads] == [True, True, True, False]


@pytest.mark.parametrize("size", [32, 40, 64])
def test_auxiliary_head_takes_larger_images(size):
    logits, logits_aux = NetworkCIFAR(4, 10, 3, True, NAMED["DARTS"])(torch.randn(2, 3, size, size))
    assert logits_aux.shape == (2, 10)


def test_drop_path_acts_in_training_only():
    torch.manual_seed(0)
    net, input = NetworkCIFAR(4, 10, 3, False, NAMED["DARTS_V2"]), torch.randn(2, 3, 16, 16)
    assert net.drop_path_prob == 0
    assert torch.equal(net(input)[0], net(input)[0])
    net.drop_path_prob = 0.5
    assert not torch.equal(net(input)[0], net(input)[0])
    net.eval()
    assert torch.equal(net(input)[0], net(input)[0])


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_any_depth(layers):
    assert NetworkCIFAR(4, 10, layers, False, NAMED["DARTS_L20"])(torch.randn(2, 3, 8, 8))[0].shape == (2, 10)


# ------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", ["DARTS_L20", "DARTS_V2", "NASNet"])
def test_compiles_without_a_graph_break(name):
    """A network with fast cells, drop path and auxiliary head: once, for the drop path of every epoch."""
    torch._dynamo.reset()
    plain = NetworkCIFAR(4, 10, 3, True, NAMED[name], fast=False)
    net, input = copy.deepcopy(plain), torch.randn(4, 3, 29, 29)
    net.fast = True
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in range(3):
            outputs = []
            for module, forward in ((plain, plain), (net, compiled)):
                torch.manual_seed(epoch)
                module.drop_path_prob = torch.tensor(0.3 * epoch)
                outputs.append(forward(input))
            torch.testing.assert_close(outputs[1], outputs[0])


def test_the_compiled_step_is_the_plain_one():
    """On the CPU's inductor: logits and gradients of a network of one cell."""
    torch._dynamo.reset()
    edges = [("sep_invo_3x3", 0), ("skip_connect", 1)]
    net = vary_kernels(NetworkCIFAR(4, 10, 1, False, Genotype(edges, [2], edges, [2])))
    input, results = torch.randn(4, 3, 8, 8), []
    with torch._inductor.config.patch(compile_threads=1):  # no pool of processes for a single network
        for forward in (net, torch.compile(net, fullgraph=True, dynamic=False)):
            logits, _ = forward(input)
            results.append([logits, *torch.autograd.grad(logits.square().sum(), list(net.parameters()))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------- fast cells against plain ones


def make(genotype, C=8, layers=3, drop_path_prob=0.4, auxiliary=False, kind=NetworkCIFAR):
    """A float64 network with a reduction cell after a normal one; weights and running statistics at random."""
    torch.manual_seed(0)
    net = vary_kernels(kind(C, 5, layers, auxiliary, genotype))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.uniform_(0.5, 1.5)
            module.running_var.uniform_(0.5, 1.5)
    net.drop_path_prob = drop_path_prob
    return net.double().to(memory_format=torch.channels_last)


def batch_of(net, size, batch=4):
    torch.manual_seed(1)
    input = torch.randn(batch, 3, *(size if isinstance(size, tuple) else (size, size))).double()
    return input.to(net.classifier.weight.dtype)


def results(net, size, batch=4):
    """Everything that a step can see: logits, gradients by name, and buffers."""
    outputs = [logits for logits in net(batch_of(net, size, batch)) if logits is not None]
    grads = torch.autograd.grad(
        sum(logits.square().sum() for logits in outputs), list(net.parameters()), allow_unused=True
    )
    grads = {f"grad {name}": grad for (name, _), grad in zip(net.named_parameters(), grads, strict=True)}
    return dict(enumerate(outputs)) | grads | {name: buffer.clone() for name, buffer in net.named_buffers()}


def assert_equal_to_plain(net, size=8):
    plain = copy.deepcopy(net)
    plain.fast = False
    expected = results(plain, size)
    largest = max(value.abs().max().item() for value in expected.values() if value is not None)
    for name, value in results(net, size).items():
        assert (value is None) == (expected[name] is None), name
        if value is not None:  # what is zero in exact arithmetic is the rounding of what is not
            scale = max(1e-3 * max(1, largest), expected[name].abs().max().item())
            assert (value - expected[name]).abs().max().item() <= 1e-9 * scale, name
    if not net.training:  # where no gradient is wanted, there is another way
        with torch.no_grad():
            torch.testing.assert_close(net(batch_of(net, size))[0], expected[0], rtol=1e-9, atol=1e-12)


def of_primitives(normal, reduce):
    """A genotype of two nodes whose edges have these primitives in turn."""
    normal, reduce = (
        [(primitives[k % len(primitives)], node) for k, node in enumerate((0, 1, 2, 1))]
        for primitives in (normal, reduce)
    )
    return Genotype(normal, [2, 3], reduce, [2, 3])


@pytest.mark.parametrize("name", NAMED)
def test_fast_cells_are_equal_to_plain_ones(name):
    assert_equal_to_plain(make(NAMED[name]))
    assert_equal_to_plain(make(NAMED[name]).eval())


@pytest.mark.parametrize(
    "name, auxiliary, size", [("DARTS", True, 193), ("DARTS_L20", False, 41), ("NASNet", False, 32)]
)
def test_fast_cells_of_large_images(name, auxiliary, size):
    net = make(NAMED[name], C=4, auxiliary=auxiliary, kind=NetworkImageNet)
    assert_equal_to_plain(net, size)
    assert_equal_to_plain(net.eval(), size)


def test_stems_of_large_images_that_are_not_as_they_were_made():
    net, seen = make(NAMED["DARTS"], kind=NetworkImageNet), []
    hooked = net.stem0[0], net.stem1[0], net.stem1[2], net.cells[0]
    for module in hooked:
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    net.stem0[4] = nn.BatchNorm2d(8, momentum=0.5).double()
    assert_equal_to_plain(net, 32)
    assert set(hooked) <= set(seen)
    net.stem1 = nn.Sequential(nn.Conv2d(8, 8, 2, 2), nn.Tanh()).double()
    assert_equal_to_plain(net, 32)


# noise is drawn by one edge after the other, and fast cells take edges in another order
@pytest.mark.parametrize("primitive", sorted({*known_primitives()} - {"noise"}))
def test_fast_cells_of_every_primitive(primitive):
    assert_equal_to_plain(make(of_primitives([primitive, "skip_connect"], [primitive])))
    assert_equal_to_plain(make(of_primitives([primitive], [primitive, "dil_conv_3x3"])).eval())


@pytest.mark.slow
def test_soak_of_derived_cells():
    """10,000 random networks: genotype, channels, sizes, layers, drop path, training or evaluation."""
    choose, primitives = random.Random(0), sorted({*known_primitives()} - {"noise"})

    def edges():
        return [(choose.choice(primitives), choose.randrange(2 + k // 2)) for k in range(2 * steps)]

    for _ in range(10_000):
        steps = choose.choice([1, 2, 3])
        concat = sorted(choose.sample(range(2, 2 + steps), choose.randint(1, steps)))
        genotype = Genotype(edges(), concat, edges(), concat)
        net = make(genotype, choose.choice([3, 4, 8, 9, 16, 20, 36]), choose.randint(1, 4), choose.choice([0.0, 0.3]))
        set_kernel_norm(net, choose.choice(list(KERNEL_NORMS)))
        net.train(choose.random() < 0.7)
        assert_equal_to_plain(net, (choose.randint(4, 12), choose.randint(4, 17)))


@pytest.mark.parametrize("kernel_norm", KERNEL_NORMS)
def test_fast_cells_whatever_bounds_the_kernels(kernel_norm):
    net = make(NAMED["DARTS"])
    set_kernel_norm(net, kernel_norm)
    assert_equal_to_plain(net)
    assert_equal_to_plain(net.eval())


@pytest.mark.parametrize("C, K", [(8, 1), (8, 3), (1, 3)])
def test_fast_cells_of_a_convolution_of_ones_own(monkeypatch, C, K):
    monkeypatch.setitem(OPS, "conv", lambda C, stride, affine: ReLUConvBN(C, C, K, stride, K // 2, affine))
    assert_equal_to_plain(make(of_primitives(["conv", "sep_conv_3x3"], ["conv"]), C))


def test_hooks_of_derived_cells_are_called():
    net, seen = make(NAMED["DARTS"], auxiliary=True), []
    first, second, third = net.cells
    hooked = first.preprocess1, first._ops[1].op[1].conv2, second, third._ops[1].op[0], third.preprocess0.bn
    for module in hooked:
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    assert_equal_to_plain(net, 32)
    assert sorted(id(module) for module in seen if module in hooked) == sorted(map(id, hooked))


def test_every_kind_of_hook_of_derived_cells_is_called():
    net, seen = make(NAMED["DARTS"]), []
    first, second, _ = net.cells
    first._ops[0].register_forward_pre_hook(lambda module, args: seen.append("forward pre"))
    first._ops[1].register_full_backward_pre_hook(lambda module, grad: seen.append("backward pre"))
    second.register_full_backward_hook(lambda module, *grads: seen.append("backward"))
    input = torch.randn(4, 3, 8, 8).double()
    net(input)[0].sum().backward()
    assert sorted(seen) == ["backward", "backward pre", "forward pre"]
    seen.clear()
    with nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module)):
        net(input)
    assert {op for cell in net.cells for op in cell._ops} <= set(seen)


def test_without_its_hooks_a_network_is_fast_again(monkeypatch):
    net, seen = make(NAMED["DARTS"]), []
    involution = net.cells[0]._ops[1]
    hook = involution.register_forward_hook(lambda module, args, output: seen.append(module))
    results(net, 8)
    assert seen
    hook.remove()
    monkeypatch.delattr(type(involution), "forward")  # nothing calls it
    results(net, 8)


@pytest.mark.parametrize("size", [7, (5, 10)], ids=["odd", "not square"])
@pytest.mark.parametrize("C", [3, 20], ids=lambda C: f"C={C}")
def test_fast_cells_of_sizes_that_fill_no_vector(size, C):
    assert_equal_to_plain(make(NAMED["DARTS"], C), size)
    assert_equal_to_plain(make(NAMED["NASNet"], C), size)


def test_operations_of_derived_cells_that_are_not_as_they_were_made():
    net = make(NAMED["DARTS"])
    first, second, third = net.cells
    first.preprocess1.op[2] = nn.BatchNorm2d(8, momentum=0.5).double()
    first._ops[0].op[3] = nn.BatchNorm2d(8, affine=False).double()
    first._ops[1].op[1].conv1.bn = nn.BatchNorm2d(2, affine=False).double()
    second._ops[1].op[0] = nn.Tanh()
    second.preprocess0.op[2].eval()
    third._ops[0] = nn.LPPool2d(1, 3, 2, ceil_mode=True)
    assert_equal_to_plain(net)
    net.cells[1].eval()
    assert_equal_to_plain(net)
    net = make(NAMED["DARTS"])
    net.cells[0].preprocess1.op[2] = nn.BatchNorm2d(8, affine=False).double()
    assert_equal_to_plain(net)


def test_a_primitive_that_pools_and_normalises(monkeypatch):
    """As the supernet's edges do, but with a batch norm that has parameters."""
    pool = {2: nn.MaxPool2d(3, 2, padding=1), 1: nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)}
    monkeypatch.setitem(
        OPS, "pool", lambda C, stride, affine: nn.Sequential(pool[stride], nn.BatchNorm2d(C, affine=affine))
    )
    assert_equal_to_plain(make(of_primitives(["pool", "sep_conv_3x3"], ["pool"])))


@pytest.mark.parametrize("missing", ["weight", "bias", "num_batches_tracked"])
def test_batch_norms_that_lack_something(missing):
    net = make(NAMED["DARTS"])
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)][::2]:
        setattr(norm, missing, None)
    assert_equal_to_plain(net)


def test_parameters_and_statistics_that_do_not_lie_side_by_side():
    """As load_state_dict(assign=True) makes them from slices of a larger tensor."""
    net = make(NAMED["DARTS"])
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        for name, statistic in list(norm.named_buffers())[:2]:
            norm._buffers[name] = torch.stack([statistic, statistic + 1], 1)[:, 0]
    assert_equal_to_plain(net)
    plain = copy.deepcopy(net).eval()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight, norm.bias = (nn.Parameter(torch.stack([p, p + 1], 1)[:, 0]) for p in (norm.weight, norm.bias))
    input, plain.fast = torch.randn(2, 3, 8, 8).double(), False
    torch.testing.assert_close(net.eval()(input)[0], plain(input)[0], rtol=1e-9, atol=1e-12)


def test_separable_convolutions_in_another_order():
    net = make(of_primitives(["dil_conv_3x3", "skip_connect"], ["skip_connect"]))
    op = net.cells[0]._ops[0].op
    op[1], op[2] = op[2], nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False).double()
    assert_equal_to_plain(net)


def test_a_layer_of_another_dtype_is_refused_as_by_plain_cells():
    for layer in (1, 2, 3):  # depthwise, 1x1, batch norm
        net = make(of_primitives(["dil_conv_3x3", "skip_connect"], ["skip_connect"]))
        net.cells[0]._ops[0].op[layer].float()
        with pytest.raises(RuntimeError, match="type"):
            net(torch.randn(2, 3, 8, 8).double())


@pytest.mark.parametrize(
    "place, layer",
    [
        ("stem.1", nn.BatchNorm2d(12)),
        ("cells.0.preprocess1.op.1", nn.Conv2d(40, 8, 1, bias=False)),
        ("cells.0.preprocess1.op.2", nn.BatchNorm2d(9)),
        ("cells.0._ops.0.op.1", nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12, bias=False)),
        ("cells.0._ops.0.op.2", nn.Conv2d(80, 8, 1, bias=False)),
        ("cells.0._ops.0.op.3", nn.BatchNorm2d(9)),
        ("cells.0._ops.1.op.2", nn.Conv2d(80, 8, 1, bias=False)),
    ],
)
def test_layers_that_do_not_fit_each_other_are_refused(place, layer):
    net = make(of_primitives(["dil_conv_3x3", "sep_conv_3x3"], ["skip_connect"]))
    net.set_submodule(place, layer.double())
    for net.fast in (True, False):
        with pytest.raises((RuntimeError, ValueError)):
            net(torch.randn(2, 3, 8, 8).double())


class Stop(nn.Module):
    """Hands on images, but no gradient."""

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    def forward(self, x):
        return self._Function.apply(x)


def test_a_primitive_that_hands_on_no_gradient(monkeypatch):
    monkeypatch.setitem(OPS, "stop", lambda C, stride, affine: Stop())
    edges = [("sep_conv_3x3", 0), ("skip_connect", 1), ("stop", 2), ("stop", 2)]
    found = results(make(Genotype(edges, [3], edges, [3]), layers=1), 8)
    assert not any(grad.any() for name, grad in found.items() if "grad cells" in str(name) and grad is not None)
    assert found["grad classifier.weight"].any()


def test_a_derived_state_that_nobody_reads():
    normal = [("sep_invo_3x3", 1), ("sep_conv_3x3", 1), ("skip_connect", 1), ("dil_conv_3x3", 1)]
    reduce = [("max_pool_3x3", 1), ("sep_invo_3x3", 1), ("none", 2), ("avg_pool_3x3", 1)]
    genotype = Genotype(normal, [3], reduce, [2, 3])
    assert_equal_to_plain(make(genotype, layers=6))


DEAD_READER = """
from test_model import Genotype, assert_equal_to_plain, make

edges = [("skip_connect", 0), ("sep_conv_3x3", 0), ("skip_connect", 1), ("sep_invo_3x3", 1)]
assert_equal_to_plain(make(Genotype(edges, [3], edges, [3]), layers=5))
"""


def test_a_preprocessing_that_only_a_dead_node_reads():
    """In a process whose allocator fills what is freed, so that no gradient can come from there."""
    environment = os.environ | {
        "MALLOC_PERTURB_": "65",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run([sys.executable, "-c", DEAD_READER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dead_layers_have_no_gradient():
    edges = [("sep_invo_3x3", 0), ("sep_invo_5x5", 1), ("sep_invo_3x3", 0), ("sep_invo_5x5", 1)]
    net = make(Genotype(edges, [3], edges, [3]), layers=3)  # in which nobody reads the first node
    assert_equal_to_plain(net)
    assert sum(grad is None for name, grad in results(net, 8).items() if "grad" in str(name)) > 0


def test_a_gradient_in_another_layout():
    norm, v = nn.BatchNorm2d(6).double(), torch.randn(3, 6, 4, 5).double().requires_grad_()
    grad = torch.randn(3, 6, 4, 5).double()  # not channels-last
    fast = fast_cell.choose_backend(v).normalize(v, copy.deepcopy(norm), (True, False))[0]
    for one, other in zip(*(torch.autograd.grad(y, v, grad) for y in (fast, norm(v))), strict=True):
        assert torch.allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize("mean", [1, 1000])
def test_a_norm_of_channels_far_from_zero_is_as_exact_as_pytorchs(mean):
    v, grad = (x.to(memory_format=torch.channels_last) for x in torch.randn(2, 4, 16, 8, 8))
    v, errors, expected = (v + mean).requires_grad_(), [], None
    for dtype, fast in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        norm, x = nn.BatchNorm2d(16).to(dtype), v.to(dtype)
        y = fast_cell.choose_backend(x).normalize(x, norm, (True, False))[0] if fast else norm(x)
        found = torch.cat(
            [y.flatten(), *(g.flatten() for g in torch.autograd.grad(y, [v, norm.weight], grad.to(dtype)))]
        )
        expected = found.double() if expected is None else expected
        errors.append((found.double() - expected).norm())
    assert errors[2] <= errors[1]


def test_one_pixel_in_evaluation():
    net = make(of_primitives(["skip_connect", "max_pool_3x3"], ["max_pool_3x3"])).eval()
    input = torch.randn(1, 3, 1, 1).double()
    fast, net.fast = net(input)[0], False
    assert torch.allclose(fast, net(input)[0], rtol=1e-9)


def test_a_forward_that_was_replaced_is_called():
    net, seen = make(NAMED["DARTS"]), []
    cell, op = net.cells[0], net.cells[1]._ops[0]
    for module in (cell, op):
        module.forward = lambda *args, module=module: (seen.append(module), type(module).forward(module, *args))[1]
    net(torch.randn(4, 3, 8, 8).double())
    assert seen == [cell, op]


@pytest.mark.parametrize("normal", [[("none", 0), ("none", 2)], [("none", 0)]])
def test_edges_that_no_cell_can_have(normal):
    with pytest.raises(ValueError, match="two operations on earlier nodes"):
        NetworkCIFAR(4, 10, 3, False, Genotype(normal, [2], [("none", 0), ("none", 1)], [2]))


def test_fast_derived_cells_in_float32_are_as_exact_as_plain_ones():
    net, errors = make(NAMED["DARTS"], C=16, drop_path_prob=0.0), {}
    expected = results(copy.deepcopy(net), 16)
    for fast in (True, False):
        other = copy.deepcopy(net).float()
        other.fast = fast
        differences = {name: value.double() - expected[name] for name, value in results(other, 16).items()}
        errors[fast] = sum(d.norm() / (expected[name].double().norm() + 1e-3) for name, d in differences.items())
    assert errors[True] < 1.5 * errors[False]


def test_a_step_is_the_same_for_any_number_of_threads():
    found = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(results(make(NAMED["DARTS"], C=16).float(), 32))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    for name in found[0].keys() - {"grad classifier.weight"}:  # which PyTorch sums up by thread
        assert torch.equal(found[0][name], found[2][name]), name


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("name, layers", [("DARTS", 3), ("DARTS_V2", 1)])
def test_derived_network_is_compiled_exported_and_pickled(name, layers, fast):
    net = make(NAMED[name], layers=layers, drop_path_prob=0.0).eval()
    net.fast = fast
    input = torch.randn(2, 3, 8, 8).double()
    expected = net(input)[0]
    exported = torch.export.export(net, (input,)).module()
    for other in (pickle.loads(pickle.dumps(net)), torch.compile(net, backend="eager", fullgraph=True), exported):
        assert torch.allclose(other(input)[0], expected, rtol=1e-9)


def test_checkpointed_derived_network():
    """torch.utils.checkpoint, which computes it once more in backward."""
    net = make(NAMED["DARTS"], drop_path_prob=0.0)
    input, found = torch.randn(4, 3, 8, 8).double(), []
    for forward in (net, lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)):
        loss = forward(input)[0].square().sum()
        found.append(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
    for expected, actual in zip(*found, strict=True):
        assert (actual is None) == (expected is None) and (expected is None or torch.equal(actual, expected))


def test_a_second_derivative_of_fast_derived_cells_is_refused():
    net = make(NAMED["DARTS_V2"], layers=1)
    loss = net(torch.randn(4, 3, 8, 8).double())[0].square().sum()
    with pytest.raises(RuntimeError, match="network.fast = False"):
        torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
