"""Involution: spatial kernels generated from each pixel's own features (arXiv 2103.06255).

    out[n, c, y, x] = sum_{i, j} weight[n, g(c), i*K + j, y, x]
                      * input[n, c, y*s + (i - K//2)*d, x*s + (j - K//2)*d]        g(c) = floor(c*G/C)

with zeros outside the image, s the stride and d the dilation (eq. 4 of the paper). The fused operator makes each
pixel's weight from its `hidden` features where it is used, in forward and again in backward, and never writes it to
memory.

Backends, each with the same five functions; `backend` chooses, and INVOLUTION_BACKEND forces one:
    cpu: involution_cpu.py, C++ built at first use; float32, bfloat16 and float64 on a CPU with a compiler.
    triton: involution_triton.py; CUDA, or any device under TRITON_INTERPRET=1.
    torch: involution_torch.py; every device and dtype.
    reference: the equation below, differentiated by autograd. Slow; to compare with.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import nn

import involution_ops
from involution_ops import backend
from involution_torch import shifted, span, taps

__all__ = ["Involution2d", "backend", "involution2d", "involution2d_fused", "involution2d_reference"]


# ------------------------------------------------------------------------------------------------ functions


def involution2d_reference(input, weight, stride=1, dilation=1):
    """Involution written like its equation; plain autograd, slow. Arguments as `involution2d`."""
    K, (Ho, Wo) = _check(input, weight, stride, dilation)
    padded = F.pad(input, [dilation * (K // 2)] * 4)
    channels_per_group = input.shape[1] // weight.shape[1]
    output = 0
    for i, j in taps(K):
        kernel = weight[:, :, i * K + j].repeat_interleave(channels_per_group, dim=1)
        output = output + kernel * shifted(padded, i, j, Ho, Wo, stride, dilation)
    return output


def involution2d(input, weight, stride=1, dilation=1):
    """Apply per-pixel kernels `weight` to `input`.

    Args:
        input: (N, C, H, W), in any layout; channels-last is the fastest.
        weight: (N, G, K*K, Ho, Wo), K odd, G a divisor of C, Ho = ceil(H/stride), Wo = ceil(W/stride); the
            input's dtype and device (under autocast, both are cast).
        stride, dilation: positive integers.

    Returns:
        (N, C, Ho, Wo) in the input's layout, differentiable any number of times.

    Raises:
        ValueError: an argument of another shape, dtype or device; INVOLUTION_BACKEND asks for the impossible.
    """
    input, weight = _autocast(input, weight)
    _check(input, weight, stride, dilation)
    if _reference_forced():
        return involution2d_reference(input, weight, stride, dilation)
    return involution_ops.involution(input, weight, stride, dilation)


def involution2d_fused(input, hidden, span_weight, span_bias, kernel_size, stride=1, dilation=1):
    """Apply to `input` the kernels that a 1x1 convolution makes from `hidden`, without writing them to memory.

    Equal to `involution2d` with weight[n, g, t] = span_bias[g*K*K + t] + sum_r span_weight[g*K*K + t, r] hidden[n, r].

    Args:
        input: (N, C, H, W), in any layout; channels-last is the fastest.
        hidden: (N, C_hidden, Ho, Wo), Ho = ceil(H/stride), Wo = ceil(W/stride).
        span_weight: (K*K*G, C_hidden) or (K*K*G, C_hidden, 1, 1), G a divisor of C.
        span_bias: (K*K*G,).
        kernel_size: K, odd.
        stride, dilation: positive integers.

    Returns:
        (N, C, Ho, Wo) in the input's layout. A second derivative is right, but makes the weight tensor.

    Raises:
        ValueError: as `involution2d`.
    """
    input, hidden, span_weight, span_bias = _autocast(input, hidden, span_weight, span_bias)
    _check_fused(input, hidden, span_weight, span_bias, kernel_size, stride, dilation)
    if _reference_forced():
        weight = span(hidden, span_weight, span_bias, kernel_size)
        return involution2d_reference(input, weight, stride, dilation)
    return involution_ops.involution_fused(input, hidden, span_weight, span_bias, kernel_size, stride, dilation)


def _reference_forced():
    return os.environ.get("INVOLUTION_BACKEND") == "reference"


def _autocast(*tensors):
    """Under autocast an involution runs in the low precision, as convolutions do."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device_type)) for tensor in tensors)


# ----------------------------------------------------------------------------------------- checks of arguments


def _check(input, weight, stride, dilation):
    """Return K and the output size (Ho, Wo); raise ValueError on arguments that do not belong together."""
    _check_counts(stride=stride, dilation=dilation)
    _check_image(input)
    if weight.dim() != 5:
        raise ValueError(f"weight must be (N, G, K*K, Ho, Wo), got shape {tuple(weight.shape)}")
    _check_same(input, weight=weight)
    N, C, H, W = input.shape
    G, K = weight.shape[1], math.isqrt(weight.shape[2])
    Ho, Wo = -(-H // stride), -(-W // stride)
    if K * K != weight.shape[2] or K % 2 == 0:
        raise ValueError(f"weight must hold K*K taps with K odd in dimension 2, got {weight.shape[2]}")
    if G < 1 or C % G:
        raise ValueError(f"weight's groups must divide the input's {C} channels, got {G} groups")
    if weight.shape[0] != N or weight.shape[3:] != (Ho, Wo):
        expected = (N, G, K * K, Ho, Wo)
        raise ValueError(f"weight must have shape {expected} for this input and stride, got {tuple(weight.shape)}")
    return K, (Ho, Wo)


def _check_fused(input, hidden, span_weight, span_bias, kernel_size, stride, dilation):
    """Raise ValueError on arguments that do not belong together."""
    _check_counts(kernel_size=kernel_size, stride=stride, dilation=dilation)
    _check_image(input)
    K, (N, C, H, W) = kernel_size, input.shape
    if K % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {K}")
    if hidden.dim() != 4 or hidden.shape[1] < 1:
        raise ValueError(f"hidden must be (N, C_hidden, Ho, Wo), got shape {tuple(hidden.shape)}")
    expected = (N, hidden.shape[1], -(-H // stride), -(-W // stride))
    if hidden.shape != expected:
        raise ValueError(f"hidden must have shape {expected} for this input and stride, got {tuple(hidden.shape)}")
    outputs = span_weight.shape[0] if span_weight.dim() in (2, 4) else 0
    if outputs < 1 or span_weight.shape[1:] not in (expected[1:2], (*expected[1:2], 1, 1)):
        shape = tuple(span_weight.shape)
        raise ValueError(f"span_weight must be (K*K*G, {expected[1]}) or that of a 1x1 convolution, got shape {shape}")
    if outputs % (K * K) or C % (outputs // (K * K)):
        raise ValueError(f"span_weight must have K*K*G rows with K = {K} and G a divisor of {C}, got {outputs} rows")
    if span_bias.shape != (outputs,):
        raise ValueError(f"span_bias must have shape {(outputs,)}, got {tuple(span_bias.shape)}")
    _check_same(input, hidden=hidden, span_weight=span_weight, span_bias=span_bias)


def _check_counts(**counts):
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_image(input):
    if input.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W), got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise ValueError(f"input must be of a floating-point dtype, got {input.dtype}")


def _check_same(input, **others):
    for name, tensor in others.items():
        if tensor.dtype != input.dtype:
            raise ValueError(f"{name} must have the input's dtype {input.dtype}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on the input's device {input.device}, got {tensor.device}")


# --------------------------------------------------------------------------------------------------- module


class _ConvBN(nn.Module):
    """1x1 convolution, batch norm, ReLU under the names of the involution authors' module (`conv`, `bn`)."""

    def __init__(self, C_in, C_out, affine):
        super().__init__()
        self.conv = nn.Conv2d(C_in, C_out, 1, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):
        x = self.conv(x)
        if x.device.type == "cpu":
            # PyTorch's channels-last batch norm takes up to seven times as long where there are few channels
            x = x.contiguous()
        return F.relu(self.bn(x))


class _Conv(nn.Module):
    """1x1 convolution with bias under the name of the involution authors' module (`conv`)."""

    def __init__(self, C_in, C_out):
        super().__init__()
        self.conv = nn.Conv2d(C_in, C_out, 1)

    def forward(self, x):
        return self.conv(x)


def _fusable(span):
    """Whether the module is a plain convolution that nobody watches, whose work the fused operator can do."""
    watched = span._forward_hooks or span._forward_pre_hooks or span._backward_hooks or span._backward_pre_hooks
    return type(span) is nn.Conv2d and span.bias is not None and not watched


class Involution2d(nn.Module):
    """Involution whose kernels are generated from its own input (Algorithm 1 of the paper).

    Pooling by the stride, `conv1` (1x1, C -> C/r, batch norm, ReLU) and `conv2` (1x1, C/r -> K*K*G, bias) make the
    weight (N, G, K*K, Ho, Wo). The groups are the largest divisor of C that is at most max(1, C // group_channels).
    (N, C, H, W) -> (N, C, ceil(H/stride), ceil(W/stride)). State-dict keys are those of the authors' module.

    Raises:
        ValueError: an even kernel size, or a count below one.
    """

    def __init__(self, channels, kernel_size, stride=1, dilation=1, group_channels=16, reduction_ratio=4, affine=True):
        super().__init__()
        _check_counts(
            channels=channels,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            group_channels=group_channels,
            reduction_ratio=reduction_ratio,
        )
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.channels, self.kernel_size, self.stride, self.dilation = channels, kernel_size, stride, dilation
        most = max(1, channels // group_channels)
        self.groups = max(g for g in range(1, most + 1) if channels % g == 0)
        hidden = max(1, channels // reduction_ratio)
        # ceil mode: one kernel for every output pixel of an odd-sized image too
        self.avgpool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.conv1 = _ConvBN(channels, hidden, affine)
        self.conv2 = _Conv(hidden, kernel_size**2 * self.groups)

    def forward(self, x):
        hidden, span = self.conv1(self.avgpool(x)), self.conv2.conv
        if _fusable(span):
            return involution2d_fused(x, hidden, span.weight, span.bias, self.kernel_size, self.stride, self.dilation)
        weight = self.conv2(hidden).unflatten(1, (self.groups, self.kernel_size**2))
        return involution2d(x, weight, self.stride, self.dilation)

    def extra_repr(self):
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, groups={self.groups}"
        )
