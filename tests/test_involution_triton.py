"""The Triton backend: each launcher against the float64 reference and its autograd.

Without a GPU the kernels run in Triton's interpreter, in a process of its own, as TRITON_INTERPRET must be
set before triton is first imported. `pytest -m gpu` runs the same tests compiled, and larger shapes.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import involution
import scripts
from involution import Involution2d, involution2d_reference
from kernels import involution_ops

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCES = {  # relative and absolute: rounding of the result, and of float32 sums of up to 10^3 terms
    torch.float64: (1e-11, 1e-11),
    torch.float32: (1e-5, 5e-5),
    torch.float16: (2**-10, 5e-5),
    torch.bfloat16: (2**-7, 5e-5),
}
CASES = {  # K, stride, dilation, G, (N, C, H, W), R
    "one tap": (1, 1, 1, 1, (2, 3, 4, 5), 2),
    "one tap, stride 2, odd": (1, 2, 1, 2, (1, 8, 5, 5), 1),
    # batch 1, and strips cut by the end of a row
    "several blocks": (3, 1, 1, 1, (1, 4, 17, 15), 3),
    "batch of 2, even": (3, 1, 1, 1, (2, 16, 4, 4), 4),
    "3 groups, stride 2": (3, 2, 1, 3, (1, 6, 5, 6), 5),
    "2 groups, dilation 2": (3, 1, 2, 2, (1, 6, 5, 4), 3),
    "5 channels a group, several blocks of pixels": (3, 2, 2, 1, (1, 5, 17, 17), 2),
    "more columns of span_weight than one program sums": (3, 2, 1, 1, (1, 2, 5, 5), 18),
    "40 channels a group, strips of 2": (3, 1, 1, 1, (1, 40, 2, 5), 1),
    "even height, odd width": (5, 1, 1, 1, (1, 5, 4, 7), 2),
    "stride 2, even and odd": (5, 2, 1, 1, (1, 6, 6, 5), 1),
    "window wider than the image": (5, 1, 2, 1, (1, 4, 6, 3), 2),
    "largest kernel": (7, 1, 1, 1, (1, 3, 5, 6), 2),
    "largest kernel, stride and dilation": (7, 2, 2, 1, (1, 2, 5, 4), 2),
}
LARGE = {
    "C=16 at 32x32": (7, 1, 1, 1, (8, 16, 32, 32), 4),
    "C=32 at 16x16": (5, 1, 1, 2, (16, 32, 16, 16), 8),
    "C=64 at 8x8": (3, 1, 1, 4, (64, 64, 8, 8), 16),
    "C=144 in 9 groups": (3, 1, 2, 9, (4, 144, 16, 16), 36),
    "C=36, 18 channels a group": (5, 2, 1, 2, (4, 36, 31, 33), 9),
    "an ImageNet stem": (7, 2, 1, 4, (2, 64, 112, 111), 16),
    "256 channels in one group": (3, 1, 1, 1, (2, 256, 14, 14), 64),
}
SMALL = (3, 2, 1, 1, (1, 16, 5, 3), 4)
MANY_BLOCKS = (3, 2, 1, 1, (1, 1, 17, 17), 1)
FORMATS = {
    "NCHW": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "neither": lambda x: torch.stack([x, x], dim=-1).transpose(2, 3).contiguous().transpose(2, 3)[..., 1],
}
PASSES = ["forward", "grad_input", "grad_weight", "fused_forward", "fused_backward"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("runs compiled, on a CUDA device")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("runs in the process of test_in_the_interpreter")
    return request.param


@pytest.fixture
def triton_backend(device, monkeypatch):
    """The module, with every memory that it allocates filled with NaN."""
    from kernels import involution_triton

    def poisoned(*args, **kwargs):
        memory = allocate(*args, **kwargs)
        return memory.fill_(float("nan")) if memory.is_floating_point() else memory

    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", poisoned)
    return involution_triton


def make_case(case, dtype=torch.float32, memory_format="NCHW", device="cpu", seed=0):
    """Arguments of the five launchers by name, in `dtype`, and their results in float64 by autograd."""
    K, stride, dilation, G, (N, C, H, W), R = case
    generator = torch.Generator().manual_seed(seed)
    Ho, Wo = -(-H // stride), -(-W // stride)
    shapes = [
        (N, C, H, W),
        (N, R, Ho, Wo),
        (G * K * K, R),
        (G * K * K,),
        (N, C, Ho, Wo),
        (N, G, K * K, Ho, Wo),
    ]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    tensors = [FORMATS[memory_format](tensor) if tensor.dim() == 4 else tensor for tensor in tensors]
    input, hidden, span_weight, span_bias, grad, weight = tensors
    arguments = {
        "forward": (input, weight, stride, dilation),
        "grad_input": (grad, weight, H, W, stride, dilation),
        "grad_weight": (grad, input, K, G, stride, dilation),
        "fused_forward": (input, hidden, span_weight, span_bias, K, stride, dilation),
        "fused_backward": (grad, input, hidden, span_weight, span_bias, K, stride, dilation),
    }
    x, h, s, b, grad, w = (tensor.detach().double().requires_grad_() for tensor in tensors)
    output = involution2d_reference(x, w, stride, dilation)
    made = torch.einsum("tr,nrhw->nthw", s, h) + b[:, None, None]
    fused = involution2d_reference(x, made.unflatten(1, (G, K * K)), stride, dilation)
    grad_input, grad_weight = torch.autograd.grad(output, (x, w), grad)
    results = [output], [grad_input], [grad_weight], [fused], torch.autograd.grad(fused, (x, h, s, b), grad)
    return arguments, dict(zip(PASSES, results, strict=True))


def run(module, name, arguments):
    results = getattr(module, name)(*arguments[name])
    return [results] if isinstance(results, torch.Tensor) else list(results)


def check(module, case, dtype=torch.float32, memory_format="NCHW", device="cpu"):
    arguments, expected = make_case(case, dtype, memory_format, device)
    rtol, atol = TOLERANCES[dtype]
    for name in PASSES:
        pairs = zip(run(module, name, arguments), expected[name], strict=True)
        for index, (actual, right) in enumerate(pairs):
            assert actual.dtype == dtype
            where = f"{name}, result {index}: ".__add__
            scale = max(1.0, right.abs().max().item())  # long sums cancel: their terms set the error
            torch.testing.assert_close(actual.double(), right, rtol=rtol, atol=atol * scale, msg=where)


SLOW_IN_THE_INTERPRETER = {  # and met in other cases: their kernel size, their blocks, their strips
    "several blocks",
    "batch of 2, even",
    "even height, odd width",
    "largest kernel",
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW_IN_THE_INTERPRETER))
        for name, case in CASES.items()
    ],
)
def test_every_pass_against_the_reference(case, triton_backend, device):
    check(triton_backend, case, device=device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype(dtype, triton_backend, device):
    check(triton_backend, SMALL, dtype, "channels-last", device)


@pytest.mark.parametrize("memory_format", ["channels-last", "neither"])
def test_every_memory_format(memory_format, triton_backend, device):
    check(triton_backend, SMALL, memory_format=memory_format, device=device)


def test_results_have_the_memory_format_of_the_input(triton_backend, device):
    arguments, _ = make_case(CASES["one tap, stride 2, odd"], memory_format="channels-last", device=device)
    for name in ("forward", "grad_input", "fused_forward", "fused_backward"):
        result = run(triton_backend, name, arguments)[0]
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_offsets_in_64_bits(triton_backend, device, monkeypatch):
    """The kernels as they are compiled for images of 2^31 elements and more, on a small one."""
    options = triton_backend._options
    index = triton_backend.tl.int64
    monkeypatch.setattr(triton_backend, "_options", lambda *args: options(*args) | {"INDEX": index})
    check(triton_backend, SMALL, device=device)


def test_an_image_past_2_to_the_31_elements_asks_for_64_bits(triton_backend):
    for C, index in ((2, triton_backend.tl.int32), (3, triton_backend.tl.int64)):
        image = torch.empty((1, C, 2**15, 2**15), device="meta")
        assert triton_backend._options([image], C, 3, 1, 1)["INDEX"] == index


@pytest.mark.parametrize("block", ["small", "spread", "middle", "large"])
def test_every_block(block, triton_backend, device, monkeypatch):
    assert block in triton_backend.BLOCKS
    for name, kernel in vars(triton_backend).items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernel, "configs", [triton_backend.BLOCKS[block]])
    check(triton_backend, (3, 2, 1, 1, (1, 3, 7, 7), 1), device=device)


def test_two_runs_give_the_same_bits(triton_backend, device):
    arguments, _ = make_case(MANY_BLOCKS, device=device)
    for name in ("grad_input", "fused_backward"):  # whose sums run over several pixels
        first, second = (run(triton_backend, name, arguments) for _ in range(2))
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_sums_over_pixels_in_shares(triton_backend, device, monkeypatch):
    """span_weight's gradient where each program takes several blocks of pixels, and where one takes all."""
    for programs in (1, 6):
        monkeypatch.setattr(triton_backend, "SPAN_PROGRAMS", programs)
        arguments, expected = make_case(MANY_BLOCKS, device=device)
        results = run(triton_backend, "fused_backward", arguments)
        for actual, right in zip(results, expected["fused_backward"], strict=True):
            torch.testing.assert_close(actual.double(), right, rtol=1e-5, atol=5e-5)


def test_a_batch_of_none(triton_backend, device):
    arguments, expected = make_case((3, 1, 1, 2, (0, 8, 5, 4), 2), device=device)
    for name in PASSES:
        for actual, right in zip(run(triton_backend, name, arguments), expected[name], strict=True):
            torch.testing.assert_close(actual.double(), right)


@pytest.mark.parametrize("kernel_norm", ["none", "filter", "soft_rms"])  # which take three ways
def test_the_module(triton_backend, device, monkeypatch, kernel_norm):
    """Involution2d by this backend gives the output and gradients that it gives by plain PyTorch."""
    module = Involution2d(4, 3, stride=2, kernel_norm=kernel_norm).to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("INVOLUTION_BACKEND", backend)
        output = module(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), module.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_span_weight_of_a_1x1_convolution(triton_backend, device):
    arguments, expected = make_case(CASES["one tap"], device=device)
    grad, input, hidden, span_weight, *rest = arguments["fused_backward"]
    results = triton_backend.fused_backward(grad, input, hidden, span_weight[:, :, None, None], *rest)
    right = expected["fused_backward"][2][:, :, None, None]
    torch.testing.assert_close(results[2].double(), right, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
@pytest.mark.gpu
def test_large_shapes(case, dtype, triton_backend, device):
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    for memory_format in ("NCHW", "channels-last"):
        check(triton_backend, case, dtype, memory_format, device)


@pytest.mark.parametrize("shape", [(2**16 + 2, 16, 46, 46), (1, 16, 11600, 11600)], ids=["batch", "image"])
@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(shape, triton_backend, device):
    """The last image and the last rows, where offsets in 32 bits would have wrapped."""
    if device == "cpu" or torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs a CUDA device with 24 GiB")
    N, C, H, W = shape
    input = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    input[-1, :, -4:] = torch.randn(C, 4, W, device=device)
    weight = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16, device=device).expand(N, 1, 9, H, W)
    output = triton_backend.forward(input, weight, 1, 1)
    last = input[-1:, :, -4:].double()
    expected = involution2d_reference(last, last.new_ones(1, 1, 9, 4, W), 1, 1)
    torch.testing.assert_close(output[-1:, :, -3:].double(), expected[:, :, -3:], rtol=2**-7, atol=1e-2)
    assert not output[0, :, : H // 2].any()


@pytest.mark.skipif(INTERPRETED, reason="it starts the interpreter")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(tmp_path, which):
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-m", which, "-p", "no:cacheprovider", __file__]
    result = start(tmp_path, pytest_here, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout, result.stdout


@pytest.mark.skipif(INTERPRETED, reason="compiles, and needs no interpreter")
@pytest.mark.parametrize(
    "archs, dtype, channels, size, spilled",
    [  # ptxas keeps a few numbers of its own in memory, outside of the loops
        (["80"], "bfloat16", 32, 3, 32),
        (["90"], "float32", 64, 7, 32),
        (["100"], "float16", 36, 3, 128),  # groups of 18 channels, which take the room of 32
        pytest.param(["75", "120"], "bfloat16", 32, 3, 32, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_without_a_gpu(tmp_path, archs, dtype, channels, size, spilled):
    """Each kernel, for cards of these generations: the interpreter forgives what the compiler does not."""
    few = f"--dtypes {dtype} --channels {channels} --kernel_sizes {size} --blocks spread --jobs 1".split()
    few += ["--archs", *archs]
    where = ["--csv", str(tmp_path / "rows.csv"), "--out", str(tmp_path)]
    command = [sys.executable, "benchmarks/bench_triton.py", *few, *where]
    result = start(tmp_path / "cache", command, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]
    with open(tmp_path / "rows.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["arch"] for row in rows] == [arch for arch in archs for _ in range(7)]
    assert len({row["kernel"] for row in rows}) == 7
    for row in rows:
        assert 16 <= int(row["registers"]) <= 255 and int(row["spilled"]) <= spilled, row
        assert 0 < float(row["occupancy"]) <= 1 and int(row["shared"]) < 48 * 1024, row
    table = (tmp_path / "bench_triton.md").read_text()
    assert f"| fused_grad_span | sm_{archs[-1]} | 1 of 1 |" in table
    assert "| 64, 8×8 | 7 | fused |" in table  # of the prediction


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
@pytest.mark.parametrize(
    "arch, warps, registers, shared, expected",
    [
        (80, 4, 128, 0, 16 / 64),  # registers: 4 blocks of 128 threads
        (80, 1, 168, 0, 12 / 64),  # 3 warps in each of the four partitions
        (80, 1, 33, 0, 32 / 64),  # 32 blocks
        (75, 4, 64, 0, 32 / 32),
        (90, 2, 32, 100 * 1024, 4 / 64),  # shared memory: 2 blocks, with what is reserved for them
        (120, 4, 40, 0, 48 / 48),
    ],
)
def test_occupancy(arch, warps, registers, shared, expected):
    from benchmarks.bench_triton import occupancy

    assert occupancy(arch, warps, registers, shared) == expected


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
@pytest.mark.parametrize(
    "change, message",
    [
        ("import sys; sys.modules['triton'] = None", "the triton backend needs the triton package"),
        ("import triton; triton.__version__ = '3.2.0'", "the triton backend needs Triton 3.3 or later, got 3.2.0"),
    ],
    ids=["none", "old"],
)
def test_without_triton(tmp_path, monkeypatch, change, message):
    monkeypatch.setenv("INVOLUTION_BACKEND", "")
    program = tmp_path / "warns.py"
    program.write_text(f"{change}; import involution; print(involution.backend('cuda'), involution.backend('cuda'))")
    result = scripts.run(tmp_path, program)
    assert result.stdout == "torch torch\n", result.stderr
    (warning,) = (line for line in result.stderr.splitlines() if "involution" in line)  # PyTorch has one of its own
    assert message in warning


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
def test_where_no_kernel_can_be_launched(monkeypatch, caplog):
    """As on a GPU machine without a C compiler, for Triton's launcher."""
    from kernels import involution_triton

    def launch(*_, **__):
        raise OSError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.delenv("INVOLUTION_BACKEND", raising=False)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(involution_triton._probe, "run", launch)
    involution_ops._choose.cache_clear()
    assert involution.backend("cuda") == involution.backend("cuda") == "torch"
    involution_ops._choose.cache_clear()
    (record,) = caplog.records
    assert "no triton backend (Failed to find C compiler.)" in record.getMessage()


def test_the_probe_launches(triton_backend, device):
    triton_backend.probe(device)


def start(cache, command, **environment):
    """Run a command in the repository's root, with an empty cache of compiled kernels."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(cache), **environment}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
