"""involution.py and its torch and cpu backends; tests/test_involution_triton.py has the third."""

import logging
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import scripts
from benchmarks import cuda_peer
from benchmarks.bench_involution import peak_memory
from involution import (
    KERNEL_NORMS,
    Involution2d,
    backend,
    involution2d,
    involution2d_fused,
    involution2d_reference,
    set_kernel_norm,
)
from kernels import build, involution_cpu, involution_ops

# bfloat16 keeps eight bits of each input and result; float32 sums up to 81 taps, and whole batches for the span
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
CASES = [  # N, C, G, H, W, K, stride, dilation
    (2, 16, 1, 8, 8, 3, 1, 1),  # the size of the digits
    (1, 32, 2, 32, 32, 7, 1, 1),  # batch 1 is cut into blocks of rows
    (3, 36, 2, 14, 14, 5, 1, 1),  # 18 channels in a group, as with --init_channels 36
    (2, 64, 4, 7, 9, 5, 1, 2),  # odd sizes, dilated
    (2, 16, 1, 9, 16, 3, 2, 1),  # odd to even
    (2, 36, 4, 11, 5, 7, 2, 1),  # 9 channels in a group
    (2, 18, 9, 6, 13, 3, 2, 2),  # groups of two channels
    (1, 8, 2, 10, 45, 3, 1, 2),  # a row longer than a tile
    (2, 12, 4, 5, 6, 1, 1, 1),  # a single tap
    (2, 12, 1, 5, 6, 1, 2, 1),  # pixels that no tap reads
    (1, 8, 4, 7, 6, 9, 1, 1),  # a kernel larger than the image
    (1, 9, 9, 8, 11, 5, 3, 2),  # stride and dilation without a common divisor
    (2, 80, 1, 4, 4, 3, 1, 3),  # more channels in a group than registers hold
    (1, 4, 1, 1, 1, 7, 1, 2),  # one pixel
]


@pytest.fixture(autouse=True)
def one_thread():
    """Small operators on a busy machine: two threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["torch", "cpu"])
def each_backend(request, monkeypatch):
    monkeypatch.setenv("INVOLUTION_BACKEND", request.param)
    if request.param == "cpu":
        try:
            involution_cpu.library()
        except build.BuildError as error:
            pytest.skip(f"no C++ compiler: {error}")
    return request.param


@pytest.fixture
def cpu_backend(monkeypatch):
    try:
        involution_cpu.library()
    except build.BuildError as error:
        pytest.skip(f"no C++ compiler: {error}")
    monkeypatch.setenv("INVOLUTION_BACKEND", "cpu")


def images(*shapes, dtype=torch.float64, layout=torch.contiguous_format, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(dtype).contiguous(memory_format=layout) for tensor in tensors]


def operands(case, dtype=torch.float64, layout=torch.contiguous_format, hidden=5):
    """input, weight, grad_output, hidden, span_weight, span_bias of a case."""
    N, C, G, H, W, K, stride, _ = case
    Ho, Wo = -(-H // stride), -(-W // stride)
    input, weight, grad_output, features, span_weight = images(
        (N, C, H, W),
        (N, G * K * K, Ho, Wo),
        (N, C, Ho, Wo),
        (N, hidden, Ho, Wo),
        (G * K * K, hidden, 1, 1),
        dtype=dtype,
        layout=layout,
    )
    (span_bias,) = images((G * K * K,), dtype=dtype, seed=1)
    return input, weight.unflatten(1, (G, K * K)), grad_output, features, span_weight, span_bias


def run(function, inputs, grad_output):
    """The output and the gradient of every input."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    return output, *torch.autograd.grad(output, inputs, grad_output)


def assert_close(actual, expected, dtype):
    """Within the tolerance of the largest value; of one product where sums of them cancel."""
    for result, wanted in zip(actual, expected, strict=True):
        assert result.dtype == dtype
        error = (result.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1.0)
        assert error <= TOLERANCE[dtype]


def fused_reference(K, stride, dilation):
    def function(input, hidden, span_weight, span_bias):
        weight = F.conv2d(hidden, span_weight, span_bias)
        return involution2d_reference(input, weight.unflatten(1, (-1, K * K)), stride, dilation)

    return function


# --------------------------------------------------------------------------------- values and first derivatives


def test_reference_is_the_equation():
    _N, C, G, H, W, K, s, d = case = (2, 4, 2, 5, 6, 3, 2, 2)
    input, weight, *_ = operands(case)
    output = involution2d_reference(input, weight, s, d)
    for n, c, y, x in [(0, 0, 0, 0), (1, 3, 2, 2), (0, 2, 1, 2), (1, 1, 2, 0)]:
        total = 0.0
        for i in range(K):
            for j in range(K):
                h, w = y * s + (i - K // 2) * d, x * s + (j - K // 2) * d
                if 0 <= h < H and 0 <= w < W:
                    total += weight[n, c * G // C, i * K + j, y, x] * input[n, c, h, w]
        torch.testing.assert_close(output[n, c, y, x], torch.as_tensor(total))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(each_backend, case, dtype, layout):
    K, s, d = case[5:]
    input, weight, grad_output, *spans = operands(case, dtype, layout)
    exact = [tensor.double() for tensor in (input, weight, grad_output, *spans)]
    actual = run(lambda *a: involution2d(*a, s, d), [input, weight], grad_output)
    assert_close(actual, run(lambda *a: involution2d_reference(*a, s, d), exact[:2], exact[2]), dtype)
    actual = run(lambda *a: involution2d_fused(*a, K, s, d), [input, *spans], grad_output)
    expected = run(fused_reference(K, s, d), [exact[0], *exact[3:]], exact[2])
    if each_backend == "cpu" or dtype != torch.bfloat16:  # plain PyTorch rounds the weights between its two steps
        assert_close(actual, expected, dtype)


@settings(max_examples=40, deadline=None)
@given(
    K=st.sampled_from([1, 3, 5, 7]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    G=st.sampled_from([1, 2, 4, 9]),
    width=st.integers(1, 20),
    size=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 40)),
)
def test_any_shape(K, stride, dilation, G, width, size):
    N, H, W = size
    case = (N, G * width, G, H, W, K, stride, dilation)
    input, weight, grad_output, *_ = operands(case)
    actual = run(lambda *a: involution2d(*a, stride, dilation), [input, weight], grad_output)
    expected = run(lambda *a: involution2d_reference(*a, stride, dilation), [input, weight], grad_output)
    assert_close(actual, expected, torch.float64)


def test_strided_views_are_read_in_place(each_backend):
    case = (2, 16, 2, 6, 10, 3, 1, 1)
    input, weight, grad_output, *spans = operands(case)
    twice = [torch.stack([t, torch.full_like(t, torch.nan)], dim=-1) for t in (input, weight, grad_output)]
    views = [t[..., 0] for t in twice]
    expected = run(involution2d, [input, weight], grad_output)
    assert_close(run(involution2d, views[:2], views[2]), expected, torch.float64)
    expanded = torch.ones(1, dtype=torch.float64).expand_as(grad_output)  # what sum().backward() gives
    fused = [involution2d_fused(input, *spans, 3), involution2d_fused(views[0], *spans, 3)]
    torch.testing.assert_close(*fused)
    actual = run(lambda *a: involution2d_fused(*a, 3), [views[0], *spans], expanded)
    assert_close(actual, run(fused_reference(3, 1, 1), [input, *spans], expanded), torch.float64)


@pytest.mark.parametrize("K", [3, 5, 7])
@pytest.mark.parametrize("size", [(1, 8), (8, 8), (5, 7), (2, 9), (19, 13)], ids=str)
@pytest.mark.parametrize("width", [8, 16, 24, 32, 48])  # of a group: one to three vectors of eight, or of sixteen
def test_channels_last_without_copies(cpu_backend, K, size, width):
    """The loops that read images and kernels where they lie: strips that overlap, borders on all sides, NaN around."""
    N, G = 2, 3
    case = (N, G * width, G, *size, K, 1, 1)
    input, weight, grad_output, *_ = operands(case, torch.float32, torch.channels_last)
    around = [F.pad(t, [2, 2, 2, 2], value=torch.nan) for t in (input, weight.flatten(1, 2), grad_output)]
    views = [t.contiguous(memory_format=torch.channels_last)[..., 2:-2, 2:-2] for t in around]
    exact = [t.double() for t in (input, weight, grad_output)]
    expected = run(involution2d_reference, exact[:2], exact[2])
    assert_close(run(involution2d, [input, weight], grad_output), expected, torch.float32)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        actual = run(involution2d, [views[0], views[1].unflatten(1, (G, K * K))], views[2])
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(actual, expected, torch.float32)
    for result in (actual[0], actual[1], actual[2].flatten(1, 2)):  # as the loops require of what they write
        assert result.is_contiguous(memory_format=torch.channels_last)


SIZES = [(1, 8), (8, 8), (30, 16), (19, 13), (9, 32), (5, 33), (3, 64), (18, 31), (37, 57)]


@pytest.mark.parametrize(
    "K, stride, dilation",
    [(3, 1, 1), (5, 1, 1), (7, 1, 1), (3, 1, 2), (5, 1, 2), (3, 2, 1), (5, 2, 1), (7, 2, 1), (3, 2, 2)],
)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("width", [8, 16, 18, 24, 40, 48])  # of a group: the last vector may repeat channels
@pytest.mark.parametrize("N", [1, 2])  # a single image is cut into blocks of rows
def test_fused_without_copies_of_images(cpu_backend, K, stride, dilation, size, width, N):
    """The loops that gather from images where they lie: strips that overlap, borders on all sides, NaN around."""
    G = 2
    case = (N, G * width, G, *size, K, stride, dilation)
    input, _, grad_output, *spans = operands(case, torch.float32, torch.channels_last)
    around = [F.pad(t, [2, 2, 2, 2], value=torch.nan) for t in (input, grad_output)]
    views = [t.contiguous(memory_format=torch.channels_last)[..., 2:-2, 2:-2] for t in around]
    exact = [t.double() for t in (input, grad_output, *spans)]
    expected = run(fused_reference(K, stride, dilation), [exact[0], *exact[2:]], exact[1])
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        actual = run(lambda *a: involution2d_fused(*a, K, stride, dilation), [views[0], *spans], views[1])
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(actual, expected, torch.float32)
    assert actual[1].is_contiguous(memory_format=torch.channels_last)  # as the loops require of what they write


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_output_has_the_layout_of_the_input(each_backend, layout):
    input, weight, *_ = operands((2, 16, 1, 6, 6, 3, 1, 1), torch.float32, layout)
    assert involution2d(input, weight).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_is_written(cpu_backend, case):
    K, s, d = case[5:]
    input, weight, grad_output, *spans = operands(case, torch.float32)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        results = run(lambda *a: involution2d(*a, s, d), [input, weight], grad_output)
        results += run(lambda *a: involution2d_fused(*a, K, s, d), [input, *spans], grad_output)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)


def test_nan_stays_in_its_neighbourhood(cpu_backend):
    input, weight, *_ = operands((2, 16, 2, 8, 10, 3, 1, 1), torch.float32)
    input[0, 3, 4, 4] = torch.nan
    broken = involution2d(input, weight).isnan()
    assert broken.sum() == 9 and broken[0, 3, 3:6, 3:6].all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(0, 16, 8, 8), (2, 0, 8, 8), (2, 16, 0, 8), (2, 16, 8, 0)], ids=str)
def test_no_pixel(each_backend, size, stride, layout):
    (N, C, H, W), G = size, 1
    input, weight, grad_output, *spans = operands((N, C, G, H, W, 3, stride, 1), torch.float32, layout)
    results = run(lambda *a: involution2d(*a, stride), [input, weight], grad_output)
    results += run(lambda *a: involution2d_fused(*a, 3, stride), [input, *spans], grad_output)
    assert not any(result.any() for result in results)
    assert [result.shape for result in results[:3]] == [grad_output.shape, input.shape, weight.shape]
    assert [result.shape for result in results[4:]] == [tensor.shape for tensor in (input, *spans)]


@pytest.mark.parametrize("stride, dilation", [(1, 2**40), (1, 2**62), (2**40, 1), (2**62, 2**62), (9, 11)])
def test_steps_past_the_image(each_backend, stride, dilation):
    """Are those of the longer side: one output pixel, one tap that reads; however many bits the offsets would take."""
    s, d = min(stride, 8), min(dilation, 8)
    input, weight, grad_output, *spans = operands((2, 4, 2, 5, 8, 3, stride, dilation))
    for actual, expected, inputs in (
        (lambda *a: involution2d(*a, stride, dilation), lambda *a: involution2d_reference(*a, s, d), [input, weight]),
        (lambda *a: involution2d_fused(*a, 3, stride, dilation), fused_reference(3, s, d), [input, *spans]),
    ):
        assert_close(run(actual, inputs, grad_output), run(expected, inputs, grad_output), torch.float64)
    direct = torch.ops.darts_involution.forward(input, weight, stride, dilation)
    torch.testing.assert_close(direct, involution2d_reference(input, weight, s, d))
    if dilation > 8:
        centre = weight[:, :, 4].repeat_interleave(2, dim=1) * input[:, :, ::s, ::s]
        torch.testing.assert_close(involution2d(input, weight, stride, dilation), centre)


def test_lazily_negated_tensors(each_backend):
    input, weight, grad_output, *spans = operands((2, 8, 2, 5, 6, 3, 1, 1))
    lazy = [torch.complex(t, -t).conj().imag for t in (input, weight, grad_output, *spans)]
    assert all(t.is_neg() for t in lazy)
    expected = run(involution2d, [input, weight], grad_output)
    assert_close(run(involution2d, lazy[:2], lazy[2]), expected, torch.float64)
    fused = run(lambda *a: involution2d_fused(*a, 3), [input, *spans], grad_output)
    assert_close(run(lambda *a: involution2d_fused(*a, 3), [lazy[0], *lazy[3:]], lazy[2]), fused, torch.float64)


def test_zeros_without_memory(each_backend):
    input, weight, _, *spans = (t.requires_grad_() for t in operands((2, 8, 2, 5, 6, 3, 1, 1)))
    zeros = torch._efficientzerotensor(input.shape, dtype=input.dtype)
    assert not involution2d(zeros, weight).any() and not involution2d_fused(zeros, *spans, 3).any()
    for output, inputs in (
        (involution2d(input, weight), (input, weight)),
        (involution2d_fused(input, *spans, 3), (input, *spans)),
    ):
        assert not any(gradient.any() for gradient in torch.autograd.grad(output, inputs, zeros))


@pytest.mark.parametrize("batch", [1, 2, 37])
@pytest.mark.parametrize("C, G", [(36, 2), (32, 2)], ids=["through scratch memory", "in place"])
def test_thread_counts_agree(cpu_backend, batch, C, G):
    case, K = (batch, C, G, 30, 21, 5, 1, 1), 5
    input, weight, grad_output, *spans = operands(case, torch.float32, torch.channels_last)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run(involution2d, [input, weight], grad_output))
        results[-1] += run(lambda *a: involution2d_fused(*a, K), [input, *spans], grad_output)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.slow
def test_soak(cpu_backend):
    """10,000 random shapes, each pass against plain PyTorch in float64."""
    choose = random.Random(0)
    for _ in range(10_000):
        K, G = choose.choice([1, 3, 5, 7, 9]), choose.choice([1, 2, 4, 9])
        stride, dilation = choose.choice([1, 1, 2, 3]), choose.choice([1, 1, 2, 3])
        width, (H, W) = choose.choice([1, 3, 8, 16, 18, 40]), (choose.randint(1, 24), choose.randint(1, 40))
        case = (choose.choice([1, 2, 5]), G * width, G, H, W, K, stride, dilation)
        dtype, layout = (
            choose.choice(list(TOLERANCE)),
            choose.choice([torch.contiguous_format, torch.channels_last]),
        )
        input, weight, grad_output, *spans = operands(case, dtype, layout, hidden=choose.choice([1, 4, 7]))
        exact = [tensor.double() for tensor in (input, weight, grad_output, *spans)]
        calls = [
            (lambda *a: involution2d(*a, stride, dilation), [0, 1]),  # noqa: B023 (called in this iteration)
            (lambda *a: involution2d_fused(*a, K, stride, dilation), [0, 3, 4, 5]),  # noqa: B023
        ]
        for function, chosen in calls:
            actual = run(function, [(input, weight, grad_output, *spans)[i] for i in chosen], grad_output)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("INVOLUTION_BACKEND", "torch")
                expected = run(function, [exact[i] for i in chosen], exact[2])
            assert_close(actual, expected, dtype)


# ------------------------------------------------------------------------------------------ higher derivatives


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2)])
def test_two_derivatives(each_backend, stride, dilation):
    case = (2, 4, 2, 3, 4, 3, stride, dilation)
    input, weight, _, *spans = (t.requires_grad_() for t in operands(case, hidden=2))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *a: involution2d(*a, stride, dilation), (input, weight), fast_mode=True)
        assert check(lambda *a: involution2d_fused(*a, 3, stride, dilation), (input, *spans), fast_mode=True)


def test_two_derivatives_elementwise(each_backend):
    input, weight, _, *spans = (t.requires_grad_() for t in operands((1, 2, 1, 2, 3, 3, 1, 1), hidden=1))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(involution2d, (input, weight))
        assert check(lambda *a: involution2d_fused(*a, 3), (input, *spans))


def test_gradient_of_one_operand_alone(each_backend):
    input, weight, grad_output, *_ = (t.requires_grad_() for t in operands((2, 8, 2, 5, 5, 3, 2, 1)))
    both = torch.autograd.grad(involution2d(input, weight, 2), (input, weight), grad_output)
    for operand, expected in zip((input, weight), both, strict=True):
        output = involution2d(*(t if t is operand else t.detach() for t in (input, weight)), 2)
        torch.testing.assert_close(torch.autograd.grad(output, operand, grad_output)[0], expected)


def test_fused_gradient_is_the_same_with_a_graph(each_backend):
    input, _, grad_output, *spans = (t.requires_grad_() for t in operands((2, 8, 2, 5, 5, 3, 1, 1)))
    output = involution2d_fused(input, *spans, 3)
    plain = torch.autograd.grad(output, (input, *spans), grad_output, retain_graph=True)
    with_graph = torch.autograd.grad(output, (input, *spans), grad_output, create_graph=True)
    assert_close(with_graph, plain, torch.float64)


# ------------------------------------------------------------------------------------------------------ memory


def test_peak_memory(each_backend):
    input, weight, *_ = operands((16, 16, 1, 32, 32, 7, 1, 1), torch.float32)
    input, weight = input.requires_grad_(), weight.requires_grad_()
    peak = peak_memory(lambda: involution2d(input, weight).sum().backward())
    output = input
    # the gradients themselves are a weight and an input; unfolded patches would be 49 inputs
    assert peak < 4 * 4 * (input.numel() + weight.numel() + output.numel())
    assert peak > 4 * (weight.numel() + input.numel())  # the measurement sees the gradients


def test_module_keeps_no_kernels(cpu_backend):
    module = Involution2d(16, 7)
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)
    assert sum(kept.values()) <= 3 * x.untyped_storage().nbytes()
    peak = peak_memory(lambda: module(x).sum().backward())
    assert peak <= 5 * x.untyped_storage().nbytes() and output.shape == x.shape  # 49 floats a pixel are 3 inputs


# ------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": torch.zeros(16, 8, 8)}, r"input must be \(N, C, H, W\), got shape \(16, 8, 8\)"),
        ({"input": torch.zeros(2, 16, 8, 8, dtype=torch.int64)}, "floating-point dtype, got torch.int64"),
        ({"weight": torch.zeros(2, 9, 8, 8)}, r"weight must be .*, got shape \(2, 9, 8, 8\)"),
        ({"weight": torch.zeros(2, 1, 8, 8, 8)}, "K odd in dimension 2, got 8"),
        ({"weight": torch.zeros(2, 1, 16, 8, 8)}, "K odd in dimension 2, got 16"),
        ({"weight": torch.zeros(2, 3, 9, 8, 8)}, "divide the input's 16 channels, got 3"),
        (
            {"weight": torch.zeros(2, 1, 9, 4, 4)},
            r"weight must have shape \(2, 1, 9, 8, 8\).*\(2, 1, 9, 4, 4\)",
        ),
        ({"weight": torch.zeros(2, 1, 9, 8, 8).half()}, "weight must have the input's dtype.*torch.float16"),
        (
            {"weight": torch.zeros(2, 1, 9, 8, 8, device="meta")},
            "weight must be on the input's device.*meta",
        ),
        ({"stride": 0}, "stride must be a positive integer, got 0"),
        ({"stride": 1.0}, "stride must be a positive integer, got 1.0"),
        ({"dilation": -1}, "dilation must be a positive integer, got -1"),
    ],
    ids=str,
)
def test_bad_argument(change, message):
    arguments = {"input": torch.zeros(2, 16, 8, 8), "weight": torch.zeros(2, 1, 9, 8, 8)}
    with pytest.raises(ValueError, match=message):
        involution2d(**{**arguments, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": torch.zeros(2, 16, 8)}, r"input must be \(N, C, H, W\), got shape \(2, 16, 8\)"),
        ({"hidden": torch.zeros(2, 4, 4, 8)}, r"hidden must have shape \(2, 4, 8, 8\).*\(2, 4, 4, 8\)"),
        ({"hidden": torch.zeros(2, 4, 8)}, r"hidden must be .*, got shape \(2, 4, 8\)"),
        ({"hidden": torch.zeros(2, 4, 8, 8).double()}, "hidden must have the input's dtype.*torch.float64"),
        ({"span_weight": torch.zeros(9, 3)}, r"span_weight must be \(K\*K\*G, 4\).*\(9, 3\)"),
        ({"span_weight": torch.zeros(9, 4, 3, 3)}, r"span_weight must be .*\(9, 4, 3, 3\)"),
        ({"span_weight": torch.zeros(10, 4)}, "K = 3 and G a divisor of 16, got 10 rows"),
        ({"span_weight": torch.zeros(27, 4)}, "K = 3 and G a divisor of 16, got 27 rows"),
        ({"span_bias": torch.zeros(8)}, r"span_bias must have shape \(9,\), got \(8,\)"),
        ({"kernel_size": 2}, "kernel_size must be odd, got 2"),
        ({"kernel_size": 5}, "K = 5 and G a divisor of 16, got 9 rows"),
        ({"stride": 2}, r"hidden must have shape \(2, 4, 4, 4\)"),
    ],
    ids=str,
)
def test_bad_fused_argument(change, message):
    arguments = {"input": torch.zeros(2, 16, 8, 8), "hidden": torch.zeros(2, 4, 8, 8), "kernel_size": 3}
    arguments.update(span_weight=torch.zeros(9, 4), span_bias=torch.zeros(9))
    with pytest.raises(ValueError, match=message):
        involution2d_fused(**{**arguments, **change})


WRONG = {  # pass: its arguments by name, a wrong value for one of them, and the message
    "forward": ("input weight stride dilation", "weight", torch.zeros(2, 1, 9, 4, 4), "weight must have shape"),
    "grad_input": ("grad_output weight H W stride dilation", "H", 800, r"weight must have shape \(2, 1, 9, 800, 8\)"),
    "grad_weight": ("grad_output input K G stride dilation", "G", 3, "G must divide the input's 16 channels, got 3"),
    "backward": (
        "grad_output input weight stride dilation",
        "grad_output",
        torch.zeros(2, 16, 4, 8),
        r"grad_output must have shape \(2, 16, 8, 8\), got \(2, 16, 4, 8\)",
    ),
    "fused_forward": (
        "input hidden span_weight span_bias kernel_size stride dilation",
        "span_bias",
        torch.zeros(9).double(),
        "span_bias must have the input's dtype torch.float32, got torch.float64",
    ),
    "fused_backward": (
        "grad_output input hidden span_weight span_bias kernel_size stride dilation",
        "grad_output",
        torch.zeros(2, 16, 8, 8).double(),
        "grad_output must have the input's dtype torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_argument_of_an_operator(name):
    """What the dispatcher is called with directly is checked too."""
    image, counts = torch.zeros(2, 16, 8, 8), {"H": 8, "W": 8, "K": 3, "G": 1, "kernel_size": 3}
    right = {"input": image, "grad_output": image, "weight": torch.zeros(2, 1, 9, 8, 8), "hidden": image[:, :4]}
    right |= {"span_weight": torch.zeros(9, 4), "span_bias": torch.zeros(9), "stride": 1, "dilation": 1} | counts
    names, bad, value, message = WRONG[name]
    operator = getattr(torch.ops.darts_involution, name)
    operator(*(right[key] for key in names.split()))
    with pytest.raises(ValueError, match=message):
        operator(*({**right, bad: value}[key] for key in names.split()))


# ------------------------------------------------------------------------------------------- a citizen of PyTorch


@pytest.mark.parametrize(
    "stride, layout", [(1, torch.contiguous_format), (2, torch.channels_last)], ids=["nchw", "nhwc"]
)
def test_opcheck(each_backend, stride, layout):
    case = (2, 8, 2, 5, 7, 3, stride, 1)
    _N, _C, G, H, W, K, s, d = case
    input, weight, grad_output, *spans = (t.requires_grad_() for t in operands(case, layout=layout))
    ops = torch.ops.darts_involution
    opcheck(ops.forward.default, (input, weight, s, d))
    opcheck(ops.grad_input.default, (grad_output, weight, H, W, s, d))
    opcheck(ops.grad_weight.default, (grad_output, input, K, G, s, d))
    opcheck(ops.backward.default, tuple(t.detach() for t in (grad_output, input, weight)) + (s, d))
    opcheck(ops.fused_forward.default, (input, *spans, K, s, d))
    detached = (t.detach() for t in (grad_output, input, *spans))
    opcheck(ops.fused_backward.default, (*detached, K, s, d))  # is never differentiated itself


@pytest.mark.parametrize(
    "name, kernel_norm", [*(("cpu", form) for form in KERNEL_NORMS), ("torch", "soft_rms"), ("reference", "soft_rms")]
)
def test_compile_without_a_graph_break(monkeypatch, name, kernel_norm):
    monkeypatch.setenv("INVOLUTION_BACKEND", name)
    K = 3 if name == "reference" else 5  # which has operations by the tap
    module, x = Involution2d(32, K, stride=2, kernel_norm=kernel_norm), torch.randn(2, 32, 9, 9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters = list(module.parameters())
    results = [torch.autograd.grad(f(x).square().sum(), parameters) for f in (module, compiled)]
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(eager, graph)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name, dynamic",
    [
        *((name, dynamic) for name in ("torch", "cpu") for dynamic in (None, True)),
        *(pytest.param("reference", dynamic, marks=pytest.mark.slow) for dynamic in (None, True)),  # an operation a tap
    ],
)
def test_compile_for_several_kernel_sizes(monkeypatch, name, dynamic):
    monkeypatch.setenv("INVOLUTION_BACKEND", name)
    compiled = torch.compile(involution2d, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    few = name == "reference"  # which has operations by the tap
    for K, H in ((1, 6), (3, 6)) if few else ((3, 6), (5, 6), (7, 9)):
        input, weight, grad_output, *_ = operands((2, 8, 2, H, 7, K, 1, 1))
        inputs = [input, weight]
        assert_close(run(compiled, inputs, grad_output), run(involution2d, inputs, grad_output), torch.float64)
    torch._dynamo.reset()


def test_on_the_meta_device():
    assert Involution2d(16, 3, stride=2).to("meta")(torch.empty(2, 16, 5, 7, device="meta")).shape == (2, 16, 3, 4)
    input, weight = (t.to("meta").requires_grad_() for t in operands((2, 16, 2, 5, 7, 3, 1, 1))[:2])
    output = involution2d(input, weight)
    gradients = torch.autograd.grad(output.sum(), (input, weight))
    assert [g.shape for g in gradients] == [input.shape, weight.shape]


@pytest.mark.parametrize("kernel_norm", KERNEL_NORMS)
def test_export(kernel_norm):
    module, x = Involution2d(16, 3, kernel_norm=kernel_norm).eval(), torch.randn(2, 16, 8, 8)
    program = torch.export.export(module, (x,))
    operator = "darts_involution.forward" if kernel_norm == "filter" else "darts_involution.fused_forward"
    assert any(operator in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x))


def test_autocast_runs_in_low_precision(each_backend):
    module, x = Involution2d(16, 3), torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
        assert involution2d(x, torch.zeros(2, 1, 9, 8, 8)).dtype == torch.bfloat16
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert module.conv2.conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(output.float(), module(x), rtol=0.1, atol=0.1)


def test_autocast_leaves_float64():
    input, weight, *_ = operands((2, 16, 1, 8, 8, 3, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(involution2d(input, weight), involution2d(input, weight))
        assert involution2d(input, weight).dtype == F.conv2d(input, input[:, :, :1, :1]).dtype == torch.float64


def test_transforms_of_torch_func(each_backend):
    input, weight, grad_output, *spans = operands((2, 4, 2, 4, 5, 3, 1, 1))
    for function, inputs in (
        (involution2d, (input, weight)),
        (lambda *a: involution2d_fused(*a, 3), (input, *spans)),
    ):
        everything = tuple(range(len(inputs)))
        output, *expected = run(function, inputs, grad_output)
        value, pull = torch.func.vjp(function, *inputs)
        assert_close((value, *pull(grad_output)), (output, *expected), torch.float64)
        energy = lambda *a, function=function: function(*a).square().sum()  # noqa: E731 (of this iteration)
        gradient = torch.func.grad(energy, everything)
        many = torch.stack([inputs[0], -2 * inputs[0]])
        batched = torch.func.vmap(gradient, in_dims=(0, *[None] * (len(inputs) - 1)))(many, *inputs[1:])
        one_by_one = zip(*(gradient(one, *inputs[1:]) for one in many), strict=True)
        assert_close(batched, [torch.stack(gradients) for gradients in one_by_one], torch.float64)
        length = lambda *a, gradient=gradient: sum(g.square().sum() for g in gradient(*a))  # noqa: E731
        leaves = [t.detach().requires_grad_() for t in inputs]
        first = torch.autograd.grad(energy(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        assert_close(torch.func.grad(length, everything)(*inputs), second, torch.float64)


def test_vmap_over_no_item():
    input, weight, *_ = operands((2, 8, 2, 5, 5, 3, 1, 1))
    with pytest.raises(ValueError, match="at least one item, got a batch of 0"):
        torch.func.vmap(involution2d, in_dims=(0, None))(input.new_empty(0, *input.shape), weight)


def test_vmap_is_a_loop_over_the_operator(each_backend):
    input, weight, _, *spans = operands((2, 8, 2, 5, 5, 3, 1, 1))
    many = torch.stack([input, 2 * input, -input])
    batched = torch.func.vmap(involution2d, in_dims=(0, None))(many, weight)
    torch.testing.assert_close(batched, torch.stack([involution2d(one, weight) for one in many]))
    fused = torch.func.vmap(lambda one: involution2d_fused(one, *spans, 3), in_dims=1)(many.transpose(0, 1))
    torch.testing.assert_close(fused, torch.stack([involution2d_fused(one, *spans, 3) for one in many]))


def test_flops_are_counted():
    N, C, G, H, W, K = 2, 16, 2, 8, 6, 3
    input, weight, _, *spans = (t.requires_grad_() for t in operands((N, C, G, H, W, K, 1, 1), hidden=4))
    one_pass, span = 2 * N * C * K * K * H * W, 2 * N * 4 * G * K * K * H * W
    with FlopCounterMode(display=False) as counter:
        involution2d(input, weight).sum().backward()
    assert counter.get_total_flops() == 3 * one_pass
    with FlopCounterMode(display=False) as counter:
        involution2d_fused(input, *spans, K).sum().backward()
    assert counter.get_total_flops() == 3 * one_pass + 4 * span


def test_the_shortcut_is_the_operator_where_nobody_watches(cpu_backend):
    N, C, G, H, W, K = case = 2, 16, 2, 8, 6, 3
    inputs = [t.requires_grad_() for t in operands((*case, 1, 1), torch.float32, torch.channels_last)]
    (input, weight), grad_output, spans = inputs[:2], inputs[2].detach(), inputs[3:]
    for shortcut, operator, arguments in (
        (involution2d, torch.ops.darts_involution.forward, (input, weight)),
        (
            lambda *a: involution2d_fused(*a, K),
            lambda *a: torch.ops.darts_involution.fused_forward(*a[:4], K, *a[4:]),
            (input, *spans),
        ),
    ):
        outputs = shortcut(*arguments), operator(*arguments, 1, 1)
        assert outputs[0].grad_fn.name() in ("InvolutionBackward", "InvolutionFusedBackward")
        assert "darts_involution" in outputs[1].grad_fn.name()
        gradients = [torch.autograd.grad(output, arguments, grad_output, retain_graph=True) for output in outputs]
        for one, two in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
            assert torch.equal(one, two) and one.stride() == two.stride()
    output = involution2d(input, weight)
    with FlopCounterMode(display=False) as counter:  # one who looks at the backward pass only
        output.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * N * C * K * K * H * W


def test_an_import_builds_nothing_and_in_a_mode_flops_are_counted_after_it(tmp_path):
    code = """
import os
import torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False):
    from involution import involution2d
print(os.listdir())
os.environ["INVOLUTION_BACKEND"] = "torch"
with FlopCounterMode(display=False) as counter:
    involution2d(torch.ones(2, 4, 5, 5), torch.ones(2, 1, 9, 5, 5))
print(counter.get_total_flops())
"""
    (tmp_path / "program.py").write_text(code)
    own = dict(INVOLUTION_BACKEND="", INVOLUTION_CACHE="cache", CXX="no-such-compiler", PYTHONPATH=str(scripts.ROOT))
    command = [sys.executable, "-B", "program.py"]  # a process that has not imported involution
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True)
    assert done.stdout == f"['program.py']\n{2 * 2 * 4 * 9 * 25}\n" and done.stderr == ""


# ------------------------------------------------------------------------------------- choice of backend, building


def start(folder, code, **environment):
    """A program in a process that has not chosen a backend."""
    (folder / "program.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        return scripts.Script(folder, folder / "program.py")


RUN = """
import torch, involution
for _ in range(2):
    involution.Involution2d(16, 3)(torch.randn(2, 16, 8, 8)).sum().backward()
print(involution.backend("cpu"))
"""


def test_processes_that_start_at_once_build_once(cpu_backend, tmp_path):
    compiler = tmp_path / "compiler"
    real = " ".join(build._compiler())
    count = f'case "$*" in *-dM*) ;; *) echo >> {tmp_path}/builds ;; esac'
    compiler.write_text(f'#!/bin/sh\n{count}\nexec {real} "$@" -O0\n')
    compiler.chmod(0o755)
    environment = {"CXX": compiler, "INVOLUTION_CACHE": tmp_path / "cache", "INVOLUTION_BACKEND": ""}
    for process in [start(tmp_path, RUN, **environment) for _ in range(2)]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == "cpu", err
    assert (tmp_path / "builds").read_text().count("\n") == 1
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])  # not there; there and failing
def test_without_a_compiler_one_warning_and_plain_torch(tmp_path, compiler):
    process = start(tmp_path, RUN, CXX=compiler, INVOLUTION_CACHE=tmp_path / "cache", INVOLUTION_BACKEND="")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.strip() == "torch"
    assert err.count("\n") == 1 and "plain PyTorch" in err and compiler in err


def test_without_a_library_the_warning_names_it(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", " ".join(build._compiler()) + " -lnosuch")
    monkeypatch.setenv("INVOLUTION_CACHE", str(tmp_path))
    source = tmp_path / "empty.cpp"
    source.touch()
    with pytest.raises(build.BuildError, match="nosuch"):
        build.library(source)
    assert [path.suffix for path in tmp_path.iterdir() if path != source] == [".lock"]


def test_cache_in_the_working_folder_that_others_can_read(cpu_backend, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INVOLUTION_CACHE", ".")
    source = tmp_path / "empty.cpp"
    source.touch()
    old = os.umask(0o022)
    try:
        build.library(source)
    finally:
        os.umask(old)
    (built,) = tmp_path.glob("*.so")
    assert built.stat().st_mode & 0o444 == 0o444


def test_cache_name_holds_the_processor(cpu_backend, monkeypatch):
    compiler, source = build._compiler(), Path(involution_cpu.__file__).with_suffix(".cpp")
    native = build._key(compiler, source)
    assert native == build._key(compiler, source)
    # as on a machine with other instruction sets, where -march=native defines other macros
    monkeypatch.setattr(build, "_run", lambda command: "#define __AVX10__ 1")
    assert native != build._key(compiler, source)


def test_backend_by_device(monkeypatch, caplog):
    monkeypatch.delenv("INVOLUTION_BACKEND", raising=False)
    with caplog.at_level(logging.WARNING):
        assert backend() == backend("cpu") == backend(torch.device("cpu"))
        assert backend("meta") == "torch"
    for name in ("reference", "torch"):
        monkeypatch.setenv("INVOLUTION_BACKEND", name)
        assert backend("cpu") == backend("cuda") == name


@pytest.mark.parametrize(
    "forced, device, message",
    [
        ("cuda", "cpu", "must be one of reference, torch, cpu, triton, got 'cuda'"),
        ("cpu", "cuda", "INVOLUTION_BACKEND=cpu cannot run on cuda"),
        ("triton", "cpu", "INVOLUTION_BACKEND=triton cannot run on cpu"),
    ],
)
def test_backend_that_cannot_be(monkeypatch, forced, device, message):
    monkeypatch.setenv("INVOLUTION_BACKEND", forced)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    involution_ops._choose.cache_clear()
    with pytest.raises(ValueError, match=message):
        backend(device)


def test_a_dtype_the_library_lacks_is_served_by_plain_torch(cpu_backend):
    input, weight, *_ = operands((2, 8, 1, 5, 5, 3, 1, 1), torch.float16)
    expected = involution2d_reference(input.float(), weight.float())
    torch.testing.assert_close(involution2d(input, weight).float(), expected, rtol=1e-2, atol=1e-2)


def test_the_cuda_peer_needs_a_pytorch_that_compiles_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_compile_kernel", None, raising=False)
    assert cuda_peer.available()
    for name in ("compile_kernel", "_compile_kernel"):
        monkeypatch.delattr(torch.cuda, name, raising=False)
    assert not cuda_peer.available()


# ------------------------------------------------------------------------------------------------------ module


def test_module_loads_the_authors_weights_strictly():
    C, r, K = 32, 4, 7  # shapes of the authors' block: group_channels 16, reduction_ratio 4
    state = {
        "conv1.conv.weight": torch.randn(C // r, C, 1, 1),
        "conv1.bn.weight": torch.rand(C // r),
        "conv1.bn.bias": torch.randn(C // r),
        "conv1.bn.running_mean": torch.randn(C // r),
        "conv1.bn.running_var": torch.rand(C // r),
        "conv1.bn.num_batches_tracked": torch.tensor(3),
        "conv2.conv.weight": torch.randn(K * K * 2, C // r, 1, 1),
        "conv2.conv.bias": torch.randn(K * K * 2),
    }
    module = Involution2d(C, K)
    module.load_state_dict(state, strict=True)
    assert list(module.state_dict()) == list(state)


def test_module_without_bounds_is_the_authors(cpu_backend):
    module, x = Involution2d(16, 3, stride=2), torch.randn(2, 16, 8, 8)
    bn, pooled = module.conv1.bn, F.avg_pool2d(x, 2)
    hidden = torch.relu(F.batch_norm(module.conv1.conv(pooled), None, None, bn.weight, bn.bias, True))
    span = module.conv2.conv
    assert torch.equal(module(x), involution2d_fused(x, hidden, span.weight, span.bias, 3, 2))
    assert module.kernel_norm == "none"


@pytest.mark.parametrize("kernel_norm", KERNEL_NORMS)
def test_bounded_kernels_are_what_the_table_says(kernel_norm):
    """Each form from its definition, on pixels from tiny to huge."""
    torch.manual_seed(0)
    module = Involution2d(16, 3, group_channels=8, kernel_norm=kernel_norm).double().eval()
    x = torch.randn(3, 16, 5, 5).double() * torch.tensor([1e-3, 1.0, 1e5]).view(3, 1, 1, 1)
    v = module.conv1.bn(module.conv1.conv(x))
    h = torch.where(v > 0, v, 0)
    mean_square = (h**2).sum(1, keepdim=True) / h.shape[1]
    hidden = {
        "relu6": torch.where(h < 6, h, 6),
        "tanh": 1 - 2 / ((2 * v).exp() + 1),
        "rms": h / (mean_square + 0.001).sqrt(),
        "soft_rms": h / (mean_square + 1).sqrt(),
    }.get(kernel_norm, h)
    weight = module.conv2.conv(hidden).view(3, 2, 9, 5, 5)
    if kernel_norm == "filter":
        weight = weight - weight.mean(2, keepdim=True)
        weight = weight / ((weight**2).sum(2, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(module(x), involution2d_reference(x, weight))
    bound = {"none": math.inf, "filter": 1}.get(kernel_norm, 100)
    assert weight[2].abs().max() <= bound and (kernel_norm != "none" or weight[2].abs().max() > 1000)


@pytest.mark.parametrize("kernel_norm", KERNEL_NORMS)
@pytest.mark.parametrize("stride", [1, 2])
def test_two_derivatives_of_the_module(each_backend, kernel_norm, stride):
    torch.manual_seed(0)
    module = Involution2d(4, 3, stride, reduction_ratio=1, kernel_norm=kernel_norm).double().eval()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x) and torch.autograd.gradgradcheck(module, x, fast_mode=True)


@pytest.mark.parametrize("kernel_norm", [name for name in KERNEL_NORMS if name != "none"])
def test_bounded_kernels_in_low_precision(each_backend, kernel_norm):
    torch.manual_seed(0)
    module = Involution2d(16, 3, kernel_norm=kernel_norm).eval()
    x = 300 * torch.randn(2, 16, 8, 8)  # the squares of its hidden features are past float16
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            output = module(x)
        assert output.dtype == dtype
        assert (output - module(x)).norm() < 0.2 * module(x).norm()  # tanh amplifies the rounding of small features


def test_a_conv1_of_ones_own_is_called_with_the_image_alone():
    module, x = Involution2d(16, 3, kernel_norm="tanh"), torch.randn(2, 16, 8, 8)
    expected = module(x)
    module.conv1.register_forward_pre_hook(lambda conv1, args: (args[0],))
    torch.testing.assert_close(module(x), expected)
    module.conv1 = torch.nn.Sequential(module.conv1.conv, module.conv1.bn, torch.nn.Tanh())
    torch.testing.assert_close(module(x), expected)


def test_a_module_from_before_there_were_bounds():
    module = Involution2d(16, 3)
    del module._kernel_norm, module.conv1.kernel_norm  # as in an older pickle
    assert module.kernel_norm == "none" and module(torch.randn(2, 16, 8, 8)).isfinite().all()


def test_an_unknown_bound_of_the_kernels():
    with pytest.raises(ValueError, match="kernel_norm must be one of none, relu6, .*, got 'layer'"):
        Involution2d(16, 3, kernel_norm="layer")
    module = Involution2d(16, 1)
    with pytest.raises(ValueError, match="'filter' needs a kernel of more than one tap"):
        module.kernel_norm = "filter"
    with pytest.raises(ValueError, match="got 'layer'"):
        set_kernel_norm(torch.nn.Sequential(module), "layer")
    set_kernel_norm(torch.nn.Sequential(module), "rms")
    assert module.kernel_norm == "rms" and "kernel_norm=rms" in repr(module)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 9), (15, 4)], ids=str)
def test_module_at_any_image_size(each_backend, stride, size):
    module = Involution2d(16, 5, stride, dilation=2).double().eval()
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    output = module(x)
    assert output.shape == (2, 16, *(-(-n // stride) for n in size))
    weight = module.conv2(module.conv1(module.avgpool(x))).unflatten(1, (1, 25))
    torch.testing.assert_close(output, involution2d_reference(x, weight, stride, 2))


@pytest.mark.parametrize("C, groups", [(16, 1), (36, 2), (72, 4), (144, 9), (8, 1), (17, 1)])
def test_module_groups_divide_the_channels(C, groups):
    assert Involution2d(C, 3).groups == groups


def test_module_in_bfloat16(each_backend):
    module = Involution2d(16, 3).bfloat16()
    output = module(torch.randn(2, 16, 9, 9, dtype=torch.bfloat16))
    output.sum().backward()
    assert output.dtype == torch.bfloat16 and module.conv2.conv.weight.grad.isfinite().all()


HOOKS = {
    "the convolution": lambda module, hook: module.conv2.conv.register_forward_hook(hook),
    "the module around it": lambda module, hook: module.conv2.register_forward_hook(hook),
    "before it": lambda module, hook: module.conv2.register_forward_pre_hook(hook),
    "all modules": lambda module, hook: torch.nn.modules.module.register_module_forward_hook(hook),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_module_with_a_hook_on_its_span_still_calls_it(register):
    module, seen = Involution2d(16, 3).eval(), []
    x = torch.randn(2, 16, 8, 8)
    fused = module(x)
    handle = register(module, lambda called, *_: seen.append(called))
    try:
        torch.testing.assert_close(module(x), fused)
    finally:
        handle.remove()
    assert module.conv2 in seen or module.conv2.conv in seen


def test_module_with_another_span_calls_it():
    module, x = Involution2d(16, 3).eval(), torch.randn(2, 16, 8, 8)
    wide = torch.nn.Conv2d(4, 9, 3, padding=1)
    for conv2, conv in ((wide, None), (module.conv2, wide)):
        if conv:
            conv2.conv = conv
        module.conv2 = conv2
        weight = wide(module.conv1(x)).unflatten(1, (1, 9))
        torch.testing.assert_close(module(x), involution2d_reference(x, weight))
        module.conv2 = Involution2d(16, 3).conv2


@pytest.mark.parametrize("name", ["channels", "kernel_size", "stride", "dilation", "reduction_ratio"])
def test_module_with_a_bad_count(name):
    arguments = {"channels": 16, "kernel_size": 3}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
        Involution2d(**{**arguments, name: 0})
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        Involution2d(16, 4)
