"""The C++ backend of involution.py: calls the functions of involution_cpu.cpp.

They have the names and arguments of those in involution_triton.py; `backward` is one more.
"""

import functools
import math
from pathlib import Path

import torch

from . import build
from .involution_arguments import memory_format
from .recorded import Place, call, empty, empty_image

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
NO_TENSOR = (0,) * 6  # its address and five strides


def library():
    """Return the loaded library, building it first where there is none. Raises build.BuildError."""
    return build.library(Path(__file__).with_suffix(".cpp"))


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


def fused_backward(grad_output, input, hidden, span_weight, span_bias, kernel_size, stride, dilation, to_span=True):
    """The gradients; of span weight and bias only where they are wanted."""
    gradients = (
        _empty_like(input, *input.shape),
        _empty_like(hidden, *hidden.shape),
        empty(input, *span_weight.shape) if to_span else None,
        empty(input, *span_bias.shape) if to_span else None,
    )
    problem = _fused_problem(input, span_weight, kernel_size, stride, dilation)
    span = span_weight.contiguous(), span_bias.contiguous()
    _call("fused_backward", problem, grad_output, input, hidden, *span, *gradients)
    return gradients


def _fused_problem(input, span_weight, K, stride, dilation):
    return (*input.shape, span_weight.shape[0] // (K * K), K, stride, dilation, span_weight.shape[1])


def _empty_like(image, *shape):
    """An uninitialised tensor of `image`'s dtype that is channels-last where `image` is."""
    if type(image) is Place:
        return empty_image(image, *shape)
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
    packed = [*problem]
    for tensor in tensors:
        if tensor is None:
            packed += NO_TENSOR
        else:
            packed.append(tensor.data_ptr())
            packed += tensor.stride()
            packed += NO_TENSOR[tensor.dim() + 1 :]
    call(_function(name), DTYPES[tensors[0].dtype], tensors[0], packed)
