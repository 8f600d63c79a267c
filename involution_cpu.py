"""The C++ backend of involution.py: builds involution_cpu.cpp at first use, loads it, and calls it.

The library is plain C with PyTorch's thread pool, so that it compiles in seconds. It is kept in
`$INVOLUTION_CACHE` (default: `$XDG_CACHE_HOME/darts_involution` or `~/.cache/darts_involution`) under a name that
holds the source, the compiler, PyTorch's version and every feature of the processor it was compiled for: a cache
shared between machines never runs the code of another one. The compiler is `$CXX`, or the first of c++, g++, clang++.

The functions have the names and arguments of those in involution_triton.py; `backward` is one more.
"""

import ctypes
import functools
import glob
import hashlib
import math
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from involution_arguments import memory_format

SOURCE = Path(__file__).with_name("involution_cpu.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
NO_TENSOR = (0,) * 6  # its address and five strides


class BuildError(RuntimeError):
    """The library cannot be built or loaded here; the message says why, in one line."""


# ---------------------------------------------------------------------------------------------------- build


@functools.cache
def library(source=SOURCE):
    """Return the loaded library of a C++ file, building it first where the cache has none. Raises BuildError."""
    try:
        import fcntl  # not on Windows, whose compiler lacks the vector types of the source too

        compiler = _compiler()
        path = _cache_folder() / f"{source.stem}-{_key(compiler, source)}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that start at once, one builds
                if not path.exists():
                    _build(compiler, path, source)
        return ctypes.CDLL(str(path))
    except (ImportError, OSError) as error:
        raise BuildError(f"{type(error).__name__}: {error}") from error


def _cache_folder():
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darts_involution"
    return Path(os.environ.get("INVOLUTION_CACHE") or default).resolve()  # the loader looks elsewhere for a bare name


def _compiler():
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def _key(compiler, source=SOURCE):
    # the predefined macros name the compiler's version and every instruction set that it may use
    macros = _run([*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    parts = (source.read_text(), macros, torch.__version__, " ".join(compiler + FLAGS))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _build(compiler, path, source):
    root = Path(torch.__file__).parent
    # PyTorch's own OpenMP runtime first: a second one would be a second pool of threads
    openmp = glob.glob(str(root / "lib" / "libgomp*")) + glob.glob(str(root.parent / "torch.libs" / "libgomp*"))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # whose file gets the permissions of any new one
        temporary = os.path.join(folder, path.name)
        _run(
            [*compiler, *FLAGS, f"-I{root / 'include'}", str(source), "-o", temporary]
            + ["-Wl,--as-needed", *openmp, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        )
        os.replace(temporary, path)


def _run(command):
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise BuildError(f"the compiler {command[0]!r} cannot be run") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines()
        # the linker's own words come before the compiler's "error: ld returned 1 exit status"
        lines = [line for line in lines if re.search("error|cannot find|undefined reference", line)] or lines
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else error}") from error


# ------------------------------------------------------------------------------------------------------ calls


def forward(input, weight, stride, dilation):
    (N, C, H, W), (_, G, KK, Ho, Wo) = input.shape, weight.shape
    output = _empty_like(input, N, C, Ho, Wo)
    _call("forward", (N, C, H, W, G, math.isqrt(KK), stride, dilation, 0), input, weight, output)
    return output


def grad_input(grad_output, weight, H, W, stride, dilation):
    (N, C), (_, G, KK) = grad_output.shape[:2], weight.shape[:3]
    to_input = _empty_like(grad_output, N, C, H, W)
    problem = (N, C, H, W, G, math.isqrt(KK), stride, dilation, 0)
    _call("backward", problem, grad_output, None, weight, to_input, None)
    return to_input


def grad_weight(grad_output, input, K, G, stride, dilation):
    to_weight = _empty_kernels(input, input.shape[0], G, K * K, *grad_output.shape[2:])
    problem = (*input.shape, G, K, stride, dilation, 0)
    _call("backward", problem, grad_output, input, None, None, to_weight)
    return to_weight


def backward(grad_output, input, weight, stride, dilation):
    """grad_input and grad_weight in one pass."""
    (N, G, KK, Ho, Wo), K = weight.shape, math.isqrt(weight.shape[2])
    to_input = _empty_like(input, *input.shape)
    to_weight = _empty_kernels(input, N, G, KK, Ho, Wo)
    problem = (*input.shape, G, K, stride, dilation, 0)
    _call("backward", problem, grad_output, input, weight, to_input, to_weight)
    return to_input, to_weight


def fused_forward(input, hidden, span_weight, span_bias, kernel_size, stride, dilation):
    output = _empty_like(input, *input.shape[:2], *hidden.shape[2:])
    problem = _fused_problem(input, span_weight, kernel_size, stride, dilation)
    _call("fused_forward", problem, input, hidden, span_weight.contiguous(), span_bias.contiguous(), output)
    return output


def fused_backward(grad_output, input, hidden, span_weight, span_bias, kernel_size, stride, dilation):
    gradients = (
        _empty_like(input, *input.shape),
        _empty_like(hidden, *hidden.shape),
        torch.empty(span_weight.shape, dtype=input.dtype),
        torch.empty(span_bias.shape, dtype=input.dtype),
    )
    problem = _fused_problem(input, span_weight, kernel_size, stride, dilation)
    span = span_weight.contiguous(), span_bias.contiguous()
    _call("fused_backward", problem, grad_output, input, hidden, *span, *gradients)
    return gradients


def _fused_problem(input, span_weight, K, stride, dilation):
    return (*input.shape, span_weight.shape[0] // (K * K), K, stride, dilation, span_weight.shape[1])


def _empty_like(image, *shape):
    """An uninitialised tensor of `image`'s dtype that is channels-last where `image` is."""
    return torch.empty(shape, dtype=image.dtype, memory_format=memory_format(image))


def _empty_kernels(image, N, G, KK, Ho, Wo):
    """The same for (N, G, K*K, Ho, Wo), whose channels are the taps of all groups."""
    if memory_format(image) == torch.contiguous_format:
        return torch.empty((N, G, KK, Ho, Wo), dtype=image.dtype)
    taps = G * KK
    return torch.empty_strided((N, G, KK, Ho, Wo), (Ho * Wo * taps, KK, 1, Wo * taps, taps), dtype=image.dtype)


@functools.cache
def _function(name):
    return getattr(library(), f"involution_{name}")


def _call(name, problem, *tensors):
    """Call involution_NAME of the library; None is a tensor not wanted."""
    arguments = []  # six numbers a tensor, as one array: what costs time in ctypes is every object
    for tensor in tensors:
        if tensor is None:
            arguments += NO_TENSOR
        else:
            arguments.append(tensor.data_ptr())
            arguments += tensor.stride()
            arguments += NO_TENSOR[tensor.dim() + 1 :]
    numbers = (ctypes.c_int64 * 9)(*problem), ctypes.c_int64(DTYPES[tensors[0].dtype])
    if _function(name)(*numbers, (ctypes.c_int64 * len(arguments))(*arguments)):
        raise MemoryError(f"involution_{name} could not allocate its scratch memory")
