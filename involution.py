"""Involution: spatial kernels generated from each pixel's own features (arXiv 2103.06255).

    out[n, c, y, x] = sum_{i, j} weight[n, g(c), i*K + j, y, x]
                      * input[n, c, y*s + (i - K//2)*d, x*s + (j - K//2)*d]        g(c) = floor(c*G/C)

with zeros outside the image, s the stride and d the dilation (eq. 4 of the paper). The fused operator makes each
pixel's weight from its `hidden` features where it is used, in forward and again in backward, and never writes it to
memory.

Backends, each with the same five functions (cpu has a sixth, both gradients in one pass); `backend` chooses, and
INVOLUTION_BACKEND forces one:
    cpu: kernels/involution_cpu.py, C++ built at first use; float32, bfloat16 and float64 on a CPU with a compiler.
    triton: kernels/involution_triton.py; CUDA, or any device under TRITON_INTERPRET=1.
    torch: kernels/involution_torch.py; every device and dtype.
    reference: the equation below, differentiated by autograd. Slow; to compare with.

A pixel's kernel is a function of the pixel, so that an involution is of degree two in its input: a pixel of twice the
usual size leaves it four times the usual size, and a chain of them, one after the other through all cells, overflows
for single images that batch norm's running statistics do not know. `KERNEL_NORMS` lists forms of the module whose
kernels are bounded whatever the pixel; with those an involution is of degree one, as a convolution is.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

from kernels import involution_ops
from kernels.involution_arguments import autocast, check, check_counts, check_fused, check_odd, kernel_size_of
from kernels.involution_ops import backend
from kernels.involution_torch import rms_norm, shifted, span, taps

__all__ = [
    "KERNEL_NORMS",
    "Involution2d",
    "backend",
    "involution2d",
    "involution2d_fused",
    "involution2d_reference",
    "set_kernel_norm",
]

# What bounds the kernels of an `Involution2d`; h are a pixel's hidden features, v what `conv1` normalises.
KERNEL_NORMS = {
    "none": "h = relu(v): the involution authors' module; kernels grow with the pixel",
    "relu6": "h = min(relu(v), 6)",
    "tanh": "h = tanh(v)",
    "rms": "h = relu(v), then h / sqrt(mean over channels of h^2 + 0.001): always of length one",
    "soft_rms": "h = relu(v), then h / sqrt(mean over channels of h^2 + 1): small features stay as they are",
    "filter": "kernels less their mean over the taps, divided by their length (arXiv 2104.14107, section 3.2)",
}
RMS_EPS = {"rms": 1e-3, "soft_rms": 1.0}
_FILTER_EPS = 1e-5  # of a kernel's squared length


# ------------------------------------------------------------------------------------------------ functions


def involution2d_reference(input, weight, stride=1, dilation=1):
    """Involution written like its equation; plain autograd, slow. Arguments as `involution2d`."""
    stride, dilation = check(input, weight, stride, dilation)
    K, (Ho, Wo) = kernel_size_of(weight), weight.shape[3:]
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
    input, weight = autocast(input, weight)
    stride, dilation = check(input, weight, stride, dilation)
    if is_reference_forced():
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
    input, hidden, span_weight, span_bias = autocast(input, hidden, span_weight, span_bias)
    stride, dilation = check_fused(input, hidden, span_weight, span_bias, kernel_size, stride, dilation)
    if is_reference_forced():
        weight = span(hidden, span_weight, span_bias, kernel_size)
        return involution2d_reference(input, weight, stride, dilation)
    return involution_ops.involution_fused(input, hidden, span_weight, span_bias, kernel_size, stride, dilation)


def is_reference_forced():
    return os.environ.get("INVOLUTION_BACKEND") == "reference"


# --------------------------------------------------------------------------------------------------- module


class _ConvBN(nn.Module):
    """1x1 convolution, batch norm, activation under the names of the involution authors' module (`conv`, `bn`)."""

    kernel_norm = "none"

    def __init__(self, C_in, C_out, affine):
        super().__init__()
        self.conv = nn.Conv2d(C_in, C_out, 1, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):
        x = self.conv(x)
        if x.device.type == "cpu":
            # PyTorch's channels-last batch norm takes up to seven times as long where there are few channels
            x = x.contiguous()
        return hidden_features(self.bn(x), self.kernel_norm)


class _Conv(nn.Module):
    """1x1 convolution with bias under the name of the involution authors' module (`conv`)."""

    def __init__(self, C_in, C_out):
        super().__init__()
        self.conv = nn.Conv2d(C_in, C_out, 1)

    def forward(self, x):
        return self.conv(x)


def hidden_features(v, kernel_norm):
    """The features (N, C_hidden, H, W) that kernels are made of, bounded as `kernel_norm` says, from normalised v."""
    if kernel_norm == "relu6":
        return F.relu6(v)
    if kernel_norm == "tanh":
        return torch.tanh(v)
    return rms_norm(F.relu(v), RMS_EPS[kernel_norm]) if kernel_norm in RMS_EPS else F.relu(v)


def filter_norm(weight):
    """Kernels (N, G, K*K, H, W) less their mean over the taps, of length one."""
    centered = weight - weight.mean(2, keepdim=True)
    squares = centered.to(torch.promote_types(weight.dtype, torch.float32)).square()
    return centered * torch.rsqrt(squares.sum(2, keepdim=True) + _FILTER_EPS).to(weight.dtype)


def set_kernel_norm(module, kernel_norm):
    """Bound the kernels of every `Involution2d` in `module` as `kernel_norm` says.

    Raises:
        ValueError: not one of KERNEL_NORMS, or one that a layer cannot take.
    """
    _check_kernel_norm(kernel_norm)
    for layer in module.modules():
        if isinstance(layer, Involution2d):
            layer.kernel_norm = kernel_norm


def _check_kernel_norm(kernel_norm):
    if kernel_norm not in KERNEL_NORMS:
        raise ValueError(f"kernel_norm must be one of {', '.join(KERNEL_NORMS)}, got {kernel_norm!r}")


def is_watched(module):
    """Whether a hook waits for this module to be called, or something else takes the place of its forward."""
    replaced = "forward" in vars(module) or module._compiled_call_impl is not None
    return replaced or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def all_are_watched():
    """Whether a hook waits for every module."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(torch.nn.modules.module, f"_global_{kind}") for kind in kinds)


def _fusable(conv2):
    """Whether this is the 1x1 convolution that Involution2d makes and nobody watches it: its work can be fused."""
    if type(conv2) is not _Conv or type(conv2.conv) is not nn.Conv2d:
        return False
    span = conv2.conv
    if is_watched(conv2) or is_watched(span) or all_are_watched():
        return False
    plain = (span.kernel_size, span.stride, span.padding, span.groups) == ((1, 1), (1, 1), (0, 0), 1)
    return plain and span.bias is not None


class Involution2d(nn.Module):
    """Involution whose kernels are generated from its own input (Algorithm 1 of the paper).

    Pooling by the stride, `conv1` (1x1, C -> C/r, batch norm, ReLU) and `conv2` (1x1, C/r -> K*K*G, bias) make the
    weight (N, G, K*K, Ho, Wo). The groups are the largest divisor of C that is at most max(1, C // group_channels).
    (N, C, H, W) -> (N, C, ceil(H/stride), ceil(W/stride)). State-dict keys are those of the authors' module, whatever
    bounds the kernels: `kernel_norm`, one of KERNEL_NORMS, an attribute that may be changed at any time.

    Raises:
        ValueError: an even kernel size, a count below one, an unknown kernel_norm, or "filter" for a single tap.
    """

    _kernel_norm = "none"  # of modules that were pickled whole before there was the choice

    def __init__(
        self,
        channels,
        kernel_size,
        stride=1,
        dilation=1,
        group_channels=16,
        reduction_ratio=4,
        affine=True,
        kernel_norm="none",
    ):
        super().__init__()
        check_counts(
            channels=channels,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            group_channels=group_channels,
            reduction_ratio=reduction_ratio,
        )
        check_odd(kernel_size=kernel_size)
        self.channels, self.kernel_size, self.stride, self.dilation = channels, kernel_size, stride, dilation
        most = max(1, channels // group_channels)
        self.groups = max(g for g in range(1, most + 1) if channels % g == 0)
        hidden = max(1, channels // reduction_ratio)
        # ceil mode: one kernel for every output pixel of an odd-sized image too
        self.avgpool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.conv1 = _ConvBN(channels, hidden, affine)
        self.conv2 = _Conv(hidden, kernel_size**2 * self.groups)
        self.kernel_norm = kernel_norm

    @property
    def kernel_norm(self):
        return self._kernel_norm

    @kernel_norm.setter
    def kernel_norm(self, kernel_norm):
        _check_kernel_norm(kernel_norm)
        if kernel_norm == "filter" and self.kernel_size == 1:
            raise ValueError("kernel_norm 'filter' needs a kernel of more than one tap, got kernel_size 1")
        self._kernel_norm = self.conv1.kernel_norm = kernel_norm

    def forward(self, x):
        if self.kernel_norm == "filter" or not _fusable(self.conv2):
            return involution2d(x, self.kernels(x), self.stride, self.dilation)
        span = self.conv2.conv
        hidden = self.conv1(self.avgpool(x))
        return involution2d_fused(x, hidden, span.weight, span.bias, self.kernel_size, self.stride, self.dilation)

    def kernels(self, x):
        """The weight (N, G, K*K, Ho, Wo) that is made of an input (N, C, H, W)."""
        weight = self.conv2(self.conv1(self.avgpool(x))).unflatten(1, (self.groups, self.kernel_size**2))
        return filter_norm(weight) if self.kernel_norm == "filter" else weight

    def extra_repr(self):
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, groups={self.groups}, kernel_norm={self.kernel_norm}"
        )
