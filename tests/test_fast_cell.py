"""The fast cell against the plain one, edge by edge: float64, every gradient, and the running statistics."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fast_cell
import genotypes
import operations
from conftest import vary_kernels
from genotypes import SEARCH_SPACES
from involution import KERNEL_NORMS, Involution2d, set_kernel_norm
from kernels import build, fast_cell_torch
from model import NetworkCIFAR
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
    vary_kernels(net)
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
    torch.manual_seed(1)
    expected = results(plain, input, target)
    torch.manual_seed(1)
    for name, value in results(net, input, target).items():
        scale = max(1e-3, expected[name].abs().max().item())
        assert (value - expected[name]).abs().max().item() <= 1e-9 * scale, name


@pytest.mark.parametrize(
    "space, training", [("mixed", True), ("mixed", False), ("involution", True), ("darts", False), ("s4", True)]
)  # mixed has all but the noise of s4
def test_equal_to_the_plain_cell(backend, space, training, monkeypatch):
    # noise is drawn in another order
    monkeypatch.setattr(operations.Noise, "forward", lambda op, x: x[:, :, :: op.stride, :: op.stride].sin().detach())
    assert_equal_to_plain(make(SEARCH_SPACES[space], steps=2).train(training))


@pytest.mark.parametrize("primitives", [SEARCH_SPACES["darts"], ["sep_invo_3x3", "skip_connect"]], ids=["darts", "own"])
def test_the_same_paths_are_dropped(backend, primitives):
    net = make(primitives, steps=2)
    net.drop_path_prob = 0.4
    assert_equal_to_plain(net)


@pytest.mark.parametrize("kernel_norm", KERNEL_NORMS)
@pytest.mark.parametrize(
    "C, training",  # hidden features of common and of uncommon width
    [(8, False), (20, True), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((8, True), (20, False)))],
)
def test_equal_whatever_bounds_the_kernels(backend, kernel_norm, training, C):
    involutions = ["sep_invo_3x3", "dil_invo_3x3", "sep_invo_5x5"]  # two of them share the rows that they read
    assert_equal_to_plain(make(involutions, C, steps=2, kernel_norm=kernel_norm).train(training))


def test_kernels_bounded_in_two_ways_on_one_state(backend):
    net = make(["sep_invo_3x3", "dil_invo_3x3", "sep_invo_5x5"])
    for cell in net.cells:
        for edge in cell._ops:
            set_kernel_norm(edge._ops[0], "rms")
            set_kernel_norm(edge._ops[1], "tanh")
    assert_equal_to_plain(net)


def test_a_primitive_twice_on_an_edge(backend):
    assert_equal_to_plain(make(["skip_connect", "sep_invo_3x3", "max_pool_3x3", "skip_connect", "sep_invo_3x3"]))


@pytest.mark.parametrize("space", ["involution", "darts"])
@pytest.mark.parametrize("size", [7, (5, 10)], ids=["odd", "not square"])
def test_sizes_that_a_stride_does_not_divide(backend, space, size):
    assert_equal_to_plain(make(SEARCH_SPACES[space], steps=2), size)


@pytest.mark.parametrize("C", [1, 3, 6, 20], ids=lambda C: f"C={C}")
def test_channels_that_fill_no_vector(C):
    if fast_cell.choose_backend(torch.zeros(1)) is fast_cell_torch:
        pytest.skip("no C++ compiler here")
    assert_equal_to_plain(make(SEARCH_SPACES["mixed"], C, steps=2))


class Blur(nn.Module):
    """A primitive that only this test knows; it has weights, a batch norm and a non-linearity of its own."""

    def __init__(self, C, stride, affine):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 3, stride, 1), nn.BatchNorm2d(C, affine=affine)

    def forward(self, x):
        return torch.tanh(self.bn(self.conv(x)))


def test_a_new_primitive(backend, monkeypatch):
    monkeypatch.setitem(operations.OPS, "blur", Blur)
    monkeypatch.setitem(operations.OPS, "conv_1x1", lambda C, s, affine: operations.ReLUConvBN(C, C, 1, s, 0, affine))
    monkeypatch.setitem(operations.OPS, "blur_pool", lambda C, stride, affine: nn.LPPool2d(1, 3, stride))
    assert_equal_to_plain(make(["none", "blur", "sep_invo_3x3", "conv_7x1_1x7", "sep_conv_7x7"]))
    assert_equal_to_plain(make(["none", "blur", "conv_1x1"]))


def test_operations_that_are_not_as_they_were_made(backend):
    """Another batch norm, one that is frozen, a swapped layer."""
    net = make(["skip_connect", "avg_pool_3x3", "sep_invo_3x3", "dil_conv_3x3"])
    first, second, third = (net.cells[0]._ops[k]._ops for k in range(3))
    first[2].op[3] = nn.BatchNorm2d(8, momentum=0.5).double()
    second[3].op[0] = nn.Tanh()
    second[1][1] = nn.BatchNorm2d(8, eps=0.1).double()
    third[2].op[3].eval()
    third[1][1].eval()
    assert_equal_to_plain(net)


@pytest.mark.parametrize(
    "change",
    [
        lambda C, stride, affine: operations.DilConv(C, C, (1, 7), stride, (0, 3), 1, affine),
        lambda C, stride, affine: operations.DilConv(C, C, 3, stride, 1, 1, affine).apply(pad_around),
        lambda C, stride, affine: operations.DilConv(C, C, 3, stride, 1, 1, affine).apply(bias_last),
        lambda C, stride, affine: without_relu(operations.SepConv(C, C, 3, stride, 1, affine)),
    ],
    ids=["not square", "circular", "biased", "no ReLU"],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_operations_of_another_geometry(backend, monkeypatch, change, training):
    monkeypatch.setitem(operations.OPS, "dil_conv_3x3", change)
    assert_equal_to_plain(make(["skip_connect", "dil_conv_3x3", "dil_conv_5x5"]).train(training))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "stride", 1),
        lambda layer: setattr(layer, "kernel_size", layer.kernel_size + 2),
        lambda layer: set_span(layer, 1, 0),
        lambda layer: set_span(layer, 0, 2 * layer.kernel_size**2),
        lambda layer: setattr(layer.conv2.conv, "bias", nn.Parameter(layer.conv2.conv.bias.data.float())),
    ],
    ids=["stride", "kernel size", "channels", "groups", "dtype"],
)
@pytest.mark.parametrize("derived", [False, True], ids=["supernet", "derived"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_an_involution_whose_parts_do_not_fit_is_refused(backend, change, derived, training):
    """C++ would read and write what is not there."""
    net = make(["skip_connect", "sep_invo_3x3"])
    if derived:
        net = NetworkCIFAR(8, 5, 3, False, genotypes.DARTS_L20).double()
        net.drop_path_prob = 0.0
    change(next(module for module in net.modules() if isinstance(module, Involution2d) and module.stride == 2))
    with pytest.raises((ValueError, RuntimeError)):
        net.train(training)(torch.randn(2, 3, 16, 16).double())


def set_span(layer, more_inputs, more_outputs):
    span = layer.conv2.conv
    sizes = span.in_channels + more_inputs, span.out_channels + more_outputs
    layer.conv2.conv = nn.Conv2d(*sizes, 1).double()


def test_hooks_on_saved_tensors_may_change_their_layout(backend):
    """As torch.autograd.graph.save_on_cpu does."""
    for space in ("mixed", "darts"):
        net, input, target = make(SEARCH_SPACES[space], steps=2), torch.randn(4, 3, 8, 8).double(), torch.arange(4)
        expected = results(copy.deepcopy(net), input, target)
        with torch.autograd.graph.saved_tensors_hooks(in_the_usual_layout, lambda x: x):
            actual = results(net, input, target)
        for name, value in actual.items():
            assert torch.allclose(value, expected[name], rtol=1e-9, atol=1e-9), name


def in_the_usual_layout(x):
    return x.clone(memory_format=torch.contiguous_format)


def test_the_gradient_of_a_positive_part_may_have_any_layout():
    norm = nn.BatchNorm2d(8).double()
    term = fast_cell.Term(torch.randn(2, 8, 9, 9).double(), torch.randn(8, 8, 1, 1).double(), norm)
    module = fast_cell.choose_backend(term.input)
    if module is fast_cell_torch:
        pytest.skip("no C++ compiler here")
    factor, gradients = torch.randn(2, 8, 9, 9).double(), []
    for layout in (torch.channels_last, torch.contiguous_format):
        weight = term.weight.clone().requires_grad_()
        plain, positive = module.node([], [term._replace(weight=weight)], [None], (True, True))
        ((plain + positive.contiguous(memory_format=layout)) * factor.contiguous(memory_format=layout)).sum().backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_narrow_heads_are_made_once_more_instead_of_being_kept(dtype):
    if fast_cell.choose_backend(torch.zeros(1)) is fast_cell_torch:
        pytest.skip("no C++ compiler here")
    from kernels import fast_cell_cpu

    x = torch.randn(3, 16, 33, 33, dtype=dtype).to(memory_format=torch.channels_last)
    weights = [torch.randn(4, 16, 1, 1, dtype=dtype) for _ in range(2)]
    affine, stats = torch.randn(2, 8, dtype=dtype).unbind(), torch.empty(1, 3 * 8, dtype=torch.float64)
    heads, v = fast_cell_cpu._project_heads(x, weights, affine, stats, training=True)
    again, v_again = fast_cell_cpu._project_heads(x, weights, affine, stats)
    assert all(map(torch.equal, (*heads, v), (*again, v_again)))

    kept, layers = [], nn.ModuleList(Involution2d(16, kernel_size, 1) for kernel_size in (3, 5)).to(dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs = fast_cell_cpu.involutions(x, x, layers, 1e-5)
    assert {image.shape[1] for image in kept if image.shape[0] == 3} == {16}  # the state, and none of 4 or 8 channels
    assert outputs[0].grad_fn.scales is None


def test_narrow_heads_against_autograd():
    if fast_cell.choose_backend(torch.zeros(1)) is fast_cell_torch:
        pytest.skip("no C++ compiler here")
    from kernels import fast_cell_cpu

    torch.manual_seed(0)
    inputs = [torch.randn(3, 16, 9, 9), torch.randn(4, 16, 1, 1), torch.randn(3, 16, 1, 1)]
    inputs = [x.double().requires_grad_() for x in inputs]
    norms = [nn.BatchNorm2d(C).double() for C in (4, 3)]
    inputs += [weight for norm in norms for weight in norm.parameters()]
    factors, results = [torch.randn(3, C, 9, 9).double() for C in (4, 3)], []
    plain = [norm(nn.functional.conv2d(inputs[0], w)).relu() for w, norm in zip(inputs[1:3], norms, strict=True)]
    for heads in (fast_cell_cpu.heads(inputs[0], inputs[1:3], norms), plain):
        loss = sum((head * factor).sum() for head, factor in zip(heads, factors, strict=True))
        results.append([*heads, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_alphas_of_another_dtype(backend):
    net = make(["skip_connect", "sep_invo_3x3", "avg_pool_3x3"]).float()
    for alpha in net.arch_parameters():
        alpha.data = alpha.data.double()
    plain, input = copy.deepcopy(net), torch.randn(4, 3, 8, 8)
    plain.fast = False
    assert torch.allclose(net(input), plain(input), rtol=1e-4, atol=1e-4)


def test_images_side_by_side_are_of_one_size(backend):
    parsed = genotypes.DARTS_V2._replace(reduce_concat=[0, 2, 3])  # of a genotype that was not parsed, which is checked
    net = NetworkCIFAR(8, 5, 3, False, parsed).double()
    net.drop_path_prob = 0.0
    for training in (True, False):
        with pytest.raises((ValueError, RuntimeError), match="[Ss]ize"):
            net.train(training)(torch.randn(2, 3, 16, 16).double())


def pad_around(module):
    if isinstance(module, nn.Conv2d):
        module.padding_mode, module._reversed_padding_repeated_twice = "circular", [*module.padding[::-1]] * 2


def bias_last(module):
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        module.bias = nn.Parameter(torch.randn(module.out_channels))


def without_relu(op):
    op.op[0] = nn.Identity()
    return op


@pytest.mark.parametrize(
    "wrong", [lambda C, stride, affine: nn.Conv2d(C, C, 2, stride), lambda C, stride, affine: nn.AdaptiveAvgPool2d(1)]
)
def test_an_operation_that_gives_another_size_is_named(backend, monkeypatch, wrong):
    monkeypatch.setitem(operations.OPS, "wrong", wrong)
    net = make(["skip_connect", "sep_invo_3x3", "wrong"])
    with pytest.raises(ValueError, match=r"must agree in shape and dtype.*(Conv2d|AdaptiveAvgPool2d) gives"):
        net(torch.randn(2, 3, 8, 8).double())


@pytest.mark.parametrize("edge", [0, 1, -1])
def test_an_edge_in_evaluation_mode(backend, edge):
    net = make(["skip_connect", "max_pool_3x3", "sep_invo_3x3", "dil_invo_5x5", "sep_conv_3x3"], steps=2)
    for cell in net.cells:
        cell._ops[edge].eval()
    assert_equal_to_plain(net)


def test_no_images_and_no_memory():
    net = make(SEARCH_SPACES["mixed"], steps=2).eval()
    net(torch.randn(0, 3, 8, 8).double()).sum().backward()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert net(mode.from_tensor(torch.randn(2, 3, 8, 8).double())).shape == (2, 5)


def test_every_kind_of_hook_is_called(backend):
    net, seen = make(["skip_connect", "sep_invo_3x3"], steps=2), []
    net.cells[0]._ops[0]._ops[1].register_full_backward_pre_hook(lambda module, grad: seen.append("backward pre"))
    net.cells[1]._ops[0].register_full_backward_hook(lambda module, *grads: seen.append("backward"))
    input, target = torch.randn(4, 3, 8, 8).double(), torch.arange(4)
    net._loss(input, target).backward()
    assert sorted(seen) == ["backward", "backward pre"]
    seen.clear()
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module)):
        net(input)
    assert {op for cell in net.cells for edge in cell._ops for op in edge._ops} <= set(seen)


def test_hooks_are_called(backend):
    net, seen = make(["skip_connect", "max_pool_3x3", "sep_invo_3x3"]), []
    hooked = net.cells[0]._ops[0]._ops[2].op[1], net.cells[1]._ops[1], net.cells[2]
    for module in hooked:
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    assert_equal_to_plain(net)
    assert [m for m in seen if m in hooked] == list(hooked)


def _replace(net):
    net.cells[0]._ops[1]._ops[2].op[2] = nn.Conv2d(8, 8, 1, bias=False).double()


def _move(net):
    weight = net.cells[1]._ops[0]._ops[2].op[2].weight
    weight.data = 2 * weight.data


CHANGES = {
    "evaluation": lambda net: net.eval(),
    "batch norm of one operation": lambda net: setattr(net.cells[0]._ops[0]._ops[1][1], "momentum", 0.5),
    "bounds of kernels": lambda net: set_kernel_norm(net, "tanh"),
    "a layer": _replace,
    "an operation": lambda net: net.cells[0]._ops[1]._ops.__setitem__(0, nn.Dropout(0.0)),
    "an edge": lambda net: net.cells[0]._ops.__setitem__(2, copy.deepcopy(net.cells[0]._ops[1])),
    "what an edge computes": lambda net: net.cells[0]._ops[3]._computed.remove(1),
    "memory of a weight": _move,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_after_a_pass_is_seen(backend, change):
    net = make(["skip_connect", "max_pool_3x3", "sep_invo_3x3"])
    assert_equal_to_plain(net)
    change(net)
    assert_equal_to_plain(net)
    assert_equal_to_plain(net.train(not net.training))


def test_a_hook_that_comes_after_a_pass_and_goes(backend):
    net, seen = make(["skip_connect", "sep_invo_3x3"]), []
    layer = net.cells[0]._ops[0]._ops[1].op[1]
    for _ in range(2):
        assert_equal_to_plain(net)
        assert not seen
        hook = layer.register_forward_hook(lambda module, args, output: seen.append(module))
        assert_equal_to_plain(net)
        assert layer in seen
        hook.remove()
        seen.clear()


def test_transforms_of_the_weights(backend):
    """In which tensors have no address."""
    net = make(["skip_connect", "sep_invo_3x3"]).eval()
    weights, input = dict(net.named_parameters()), torch.randn(4, 3, 8, 8).double()
    expected = net(input)
    twice = {name: torch.stack([w, w]) for name, w in weights.items()}
    mapped = torch.func.vmap(lambda w: torch.func.functional_call(net, w, (input,)), randomness="same")(twice)
    for logits in mapped:
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-12)


def test_no_gradient_for_the_weights(backend):
    """As in the finite differences of the architect."""
    net = make(SEARCH_SPACES["mixed"], steps=2)
    plain = copy.deepcopy(net)
    plain.fast = False
    input, target = torch.randn(4, 3, 8, 8).double(), torch.arange(4)
    grads = []
    for each in (net, plain):
        for weight in each.parameters():
            weight.requires_grad_(False)
        grads.append(torch.autograd.grad(each._loss(input, target), each.arch_parameters()))
    for fast, expected in zip(*grads, strict=True):
        assert torch.allclose(fast, expected, rtol=1e-9, atol=1e-12)


def test_float32_is_as_exact_as_the_plain_cell():
    net = make(SEARCH_SPACES["mixed"], C=16, steps=2)
    input, target = torch.randn(8, 3, 16, 16).double(), torch.arange(8) % 5
    expected, errors = results(copy.deepcopy(net), input, target), {}
    for fast in (True, False):
        other = copy.deepcopy(net).float()
        other.fast = fast
        actual = results(other, input.float(), target)
        differences = {name: (actual[name] - value).double().norm() for name, value in expected.items()}
        errors[fast] = sum(d / (expected[name].double().norm() + 1e-3) for name, d in differences.items())
    assert errors[True] < 1.5 * errors[False]


def test_a_second_derivative_is_refused_on_the_cpu():
    if fast_cell.choose_backend(torch.zeros(1)) is fast_cell_torch:
        pytest.skip("no C++ compiler here")
    net = make(SEARCH_SPACES["mixed"], steps=2)
    loss = net._loss(torch.randn(4, 3, 8, 8).double(), torch.arange(4))
    with pytest.raises(RuntimeError, match="network.fast = False"):
        torch.autograd.grad(loss, list(net.parameters()), create_graph=True)


def test_a_single_value_of_a_channel_has_no_statistics(backend):
    with pytest.raises(ValueError, match="more than (1|one) value"):
        make(["sep_invo_3x3"])(torch.randn(1, 3, 2, 2).double())


def test_without_a_compiler(monkeypatch, caplog):
    from kernels import fast_cell_cpu

    def fail():
        raise build.BuildError("no compiler")

    monkeypatch.setattr(fast_cell_cpu, "library", fail)
    monkeypatch.setattr(fast_cell.involution, "backend", lambda: "cpu")
    fast_cell._cpu_backend.cache_clear()
    try:
        assert fast_cell.choose_backend(torch.zeros(1)) is fast_cell_torch
        assert "no C++ backend (no compiler)" in caplog.text
    finally:
        fast_cell._cpu_backend.cache_clear()


@pytest.mark.parametrize("backend, dtype", [("torch", torch.float32), ("cpu", torch.bfloat16)])
def test_backend_follows_the_involutions_and_the_dtype(monkeypatch, backend, dtype):
    monkeypatch.setenv("INVOLUTION_BACKEND", backend)
    if backend == "cpu":
        monkeypatch.setattr(fast_cell.involution, "backend", lambda: "cpu")
    assert fast_cell.choose_backend(torch.zeros(1, dtype=dtype)) is fast_cell_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_max", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 37, 5, 7), (1, 3, 1, 1), (2, 20, 1, 6)])
def test_pooling(shape, stride, is_max, dtype):
    x = torch.randn(shape, dtype=dtype).mul(2).round_().requires_grad_()  # with ties
    results = [backend.pool(x, is_max, stride) for backend in (fast_cell_torch, fast_cell.choose_backend(x))]
    grad = torch.randn_like(results[0])
    grads = [torch.autograd.grad(result, x, grad)[0] for result in results]
    for expected, actual in (results, grads):
        assert torch.allclose(actual, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


def test_pooling_passes_on_what_is_not_a_number():
    x = torch.randn(2, 5, 6, 6)
    x[0, 0, 2, 2] = torch.nan
    expected, actual = (backend.pool(x, True, 1) for backend in (fast_cell_torch, fast_cell.choose_backend(x)))
    assert torch.equal(expected.isnan(), actual.isnan())


def small_functions(x, y, weights, factors, matrix):
    """{name: (in C++, by PyTorch)} of functions of a cell that are copies, sums or products."""
    from kernels import fast_cell_cpu as cpu

    pooling, other = (nn.AvgPool2d(2, 2, ceil_mode=ceil_mode) for ceil_mode in (True, False))
    norms = [nn.BatchNorm2d(x.shape[1], affine=False).double() for _ in range(4)]
    places, rows, columns = [(2, 1), (0, 0), (1, 3), (0, 2)], [2, 0, 1, 0], [1, 0, 3, 2]
    return {
        "average": (lambda: cpu.average(x, pooling), lambda: pooling(x)),
        "another pooling": (lambda: cpu.average(x, other), lambda: other(x)),
        "scale": (lambda: cpu.scale(x, factors), lambda: x * factors),
        "side by side": (lambda: cpu.side_by_side([x, y, x]), lambda: torch.cat([x, y, x], 1)),
        "diagonal": (lambda: cpu.diagonal(x, *weights), lambda: fast_cell_torch.diagonal(x, *weights)),
        "gather": (lambda: cpu.gather(x, matrix, places, (2, 2)), lambda: matrix[rows, columns].view(2, 2)),
        "normalized": (
            lambda: torch.cat([cpu.normalized(x, norms[:2]), *statistics(norms[:2], x)]),
            lambda: torch.cat([norms[2](x), *statistics([norms[2], norms[2]], x)]),
        ),
    }


def statistics(norms, like):
    """Running statistics as images."""
    return [b.double().view(1, -1, 1, 1).expand_as(like) for norm in norms for b in norm.buffers() if b.dim()]


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (3, 37, 5, 7), (2, 4, 1, 6)])
@pytest.mark.parametrize(
    "name", ["average", "another pooling", "scale", "side by side", "diagonal", "gather", "normalized"]
)
def test_small_functions_against_autograd(name, shape):
    if fast_cell.choose_backend(torch.zeros(1)) is fast_cell_torch:
        pytest.skip("no C++ compiler here")
    if name == "another pooling" and shape[2] == 1:
        pytest.skip("leaves nothing")
    torch.manual_seed(0)
    N, C, H, W = shape
    shapes = [shape, (N, 3, H, W), (4, 3, 1, 1), (2, C, 1, 1), (N, 1, 1, 1), (3, 4)]
    inputs = [torch.randn(each).double().requires_grad_() for each in shapes]
    x, y, first, second, factors, matrix = inputs
    factors.requires_grad_(False)
    results = []
    for function in small_functions(x, y, (first, second), factors, matrix)[name]:
        result = function()
        torch.manual_seed(1)
        loss = (result * torch.randn(result.shape).double()).sum()
        wanted = [each for each in inputs if each.requires_grad]
        results.append([result, *torch.autograd.grad(loss, wanted, allow_unused=True)])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 1, 5, 7), (2, 4, 1, 6), (4, 2, 2, 1)])
def test_stem_against_autograd(shape, wanted, training, layout):
    """A 3x3 convolution of images, its batch norm and ReLU."""
    if fast_cell.choose_backend(torch.zeros(1)) is fast_cell_torch:
        pytest.skip("no C++ compiler here")
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(shape[1], 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)).double().train(training)
    stem, x, found = stem.to(memory_format=layout), torch.randn(shape).double().to(memory_format=layout), []
    nn.init.normal_(stem[1].weight), nn.init.normal_(stem[1].bias)
    assert fast_cell.is_of_images(stem[0], x)
    for is_fast in (True, False):
        net = copy.deepcopy(stem)
        if is_fast:
            state = fast_cell.state_of_stem(net, x, wanted, fast_cell.choose_backend(x))
            images = state.plain, state.relu()
        else:
            plain = net(x)
            images = plain, plain.relu()
        images = [image for image, each in zip(images, wanted, strict=True) if each]
        grads = torch.randn(2, *images[0].shape, generator=torch.Generator().manual_seed(1)).double()
        torch.autograd.backward(images, [*grads[: len(images)]])
        found.append([*images, *(w.grad for w in net.parameters()), *net.buffers()])
    for actual, expected in zip(*found, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stride, dilation", [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("K", [3, 5, 7])
@pytest.mark.parametrize("size", [(8, 8), (5, 13), (1, 9), (9, 4), (3, 1), (70, 20)])
@pytest.mark.parametrize("C", [5, 8, 16, 18, 20, 36, 40])
def test_depthwise_against_autograd(C, size, K, stride, dilation):
    """Where images are read in place, and where they are copied: channels that fill vectors or do not, narrow rows."""
    if fast_cell.choose_backend(torch.zeros(1)) is fast_cell_torch:
        pytest.skip("no C++ compiler here")
    from kernels import fast_cell_cpu

    torch.manual_seed(0)
    x, weight = torch.randn(3, C, *size).to(memory_format=torch.channels_last), torch.randn(C, 1, K, K)
    results = []
    for dtype, function in (
        (torch.float64, lambda x, w: F.conv2d(x, w, None, stride, dilation * (K // 2), dilation, C)),
        (torch.float64, lambda x, w: fast_cell_cpu.depthwise(x, w, stride, dilation)),
        (torch.float32, lambda x, w: fast_cell_cpu.depthwise(x, w, stride, dilation)),
    ):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        y = function(*tensors)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([y, *torch.autograd.grad(y, tensors, grad)])
    for exact, double, single in zip(*results, strict=True):
        assert torch.allclose(double, exact, rtol=1e-12, atol=1e-12)
        assert torch.allclose(single.double(), exact, rtol=1e-4, atol=1e-4)


def test_what_lies_side_by_side_must_fit():
    if fast_cell.choose_backend(torch.zeros(1)) is fast_cell_torch:
        pytest.skip("no C++ compiler here")
    from kernels import fast_cell_cpu

    x = torch.randn(2, 4, 6, 6)
    with pytest.raises(ValueError, match="of one size"):
        fast_cell_cpu.side_by_side([x, x[:, :, :5]])
    with pytest.raises(ValueError, match="read all its channels"):
        fast_cell_cpu.heads(x, [torch.randn(2, 4, 1, 1), torch.randn(2, 5, 1, 1)], [nn.BatchNorm2d(2)] * 2)
    with pytest.raises(ValueError, match="batch norm must fit"):
        fast_cell_cpu.normalized(x, [nn.BatchNorm2d(5, affine=False)])


def test_a_scale_that_changes_before_backward_is_noticed():
    if fast_cell.choose_backend(torch.zeros(1)) is fast_cell_torch:
        pytest.skip("no C++ compiler here")
    from kernels import fast_cell_cpu

    x, norm, layer = torch.randn(2, 8, 6, 6), nn.BatchNorm2d(4), Involution2d(8, 3, 1)
    (head,) = fast_cell_cpu.heads(x, [torch.randn(4, 8, 1, 1)], [norm])
    (output,) = fast_cell_cpu.involutions(x, x, [layer], 1e-5)
    with torch.no_grad():
        norm.weight.mul_(2)
        layer.conv1.bn.weight.mul_(2)
    for result in (head, output):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()
