"""Involution: spatial kernels generated from each pixel's own features (arXiv 2103.06255).

    out[n, c, y, x] = sum_{i, j} weight[n, g(c), i*K + j, y, x]
                      * input[n, c, y*s + (i - K//2)*d, x*s + (j - K//2)*d]        g(c) = floor(c*G/C)

with zeros outside the image, s the stride and d the dilation (eq. 4 of the paper). The operator is bilinear, and
the three passes below (forward, grad_input, grad_weight) are each other's derivatives, so that it can be
differentiated any number of times. None of them builds the N x C x K*K x H x W tensor of unfolded patches: they
add K*K shifted products in place.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------- reference


def involution2d_reference(input, weight, stride=1, dilation=1):
    """Involution written like its equation; plain autograd, slow. Arguments as `involution2d`."""
    K, (Ho, Wo) = _check(input, weight, stride, dilation)
    padded = F.pad(input, [dilation * (K // 2)] * 4)
    channels_per_group = input.shape[1] // weight.shape[1]
    output = 0
    for i, j in _taps(K):
        kernel = weight[:, :, i * K + j].repeat_interleave(channels_per_group, dim=1)
        output = output + kernel * _shifted(padded, i, j, Ho, Wo, stride, dilation)
    return output


# ------------------------------------------------------------------------------- plain PyTorch, memory-light


def _forward(input, weight, stride, dilation):
    K = math.isqrt(weight.shape[2])
    N, C, G, (Ho, Wo) = *input.shape[:2], weight.shape[1], weight.shape[3:]
    padded = F.pad(input, [dilation * (K // 2)] * 4)
    output = input.new_zeros(N, G, C // G, Ho, Wo)
    for i, j in _taps(K):
        pixels = _shifted(padded, i, j, Ho, Wo, stride, dilation).unflatten(1, (G, C // G))
        output.addcmul_(pixels, weight[:, :, i * K + j].unsqueeze(2))
    return output.flatten(1, 2)


def _grad_input(grad_output, weight, H, W, stride, dilation):
    K = math.isqrt(weight.shape[2])
    N, C, G, (Ho, Wo) = *grad_output.shape[:2], weight.shape[1], weight.shape[3:]
    pad = dilation * (K // 2)
    padded = grad_output.new_zeros(N, C, H + 2 * pad, W + 2 * pad)
    grad_output = grad_output.unflatten(1, (G, C // G))
    for i, j in _taps(K):
        pixels = _shifted(padded, i, j, Ho, Wo, stride, dilation).unflatten(1, (G, C // G))
        pixels.addcmul_(grad_output, weight[:, :, i * K + j].unsqueeze(2))
    return padded[:, :, pad : pad + H, pad : pad + W].contiguous()


def _grad_weight(grad_output, input, K, G, stride, dilation):
    N, C, Ho, Wo = grad_output.shape
    padded = F.pad(input, [dilation * (K // 2)] * 4)
    grad_weight = input.new_empty(N, G, K * K, Ho, Wo)
    for i, j in _taps(K):
        pixels = _shifted(padded, i, j, Ho, Wo, stride, dilation)
        grad_weight[:, :, i * K + j] = (grad_output * pixels).unflatten(1, (G, C // G)).sum(2)
    return grad_weight


def _taps(K):
    return ((i, j) for i in range(K) for j in range(K))


def _shifted(padded, i, j, Ho, Wo, stride, dilation):
    """The pixel that tap (i, j) reads for every output position: a view (N, C, Ho, Wo) of the padded image."""
    y, x = i * dilation, j * dilation
    return padded[:, :, y : y + (Ho - 1) * stride + 1 : stride, x : x + (Wo - 1) * stride + 1 : stride]


# -------------------------------------------------------------------------------------------------- autograd


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, stride, dilation):
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.dilation = stride, dilation
        return _forward(input, weight, stride, dilation)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        s, d = ctx.stride, ctx.dilation
        K, G, (H, W) = math.isqrt(weight.shape[2]), weight.shape[1], input.shape[2:]
        grad_input = _GradInput.apply(grad, weight, H, W, s, d) if ctx.needs_input_grad[0] else None
        grad_weight = _GradWeight.apply(grad, input, K, G, s, d) if ctx.needs_input_grad[1] else None
        return grad_input, grad_weight, None, None


class _GradInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, weight, H, W, stride, dilation):
        ctx.save_for_backward(grad, weight)
        ctx.stride, ctx.dilation = stride, dilation
        return _grad_input(grad, weight, H, W, stride, dilation)

    @staticmethod
    def backward(ctx, u):
        grad, weight = ctx.saved_tensors
        s, d = ctx.stride, ctx.dilation
        K, G = math.isqrt(weight.shape[2]), weight.shape[1]
        to_grad = _Forward.apply(u, weight, s, d) if ctx.needs_input_grad[0] else None
        to_weight = _GradWeight.apply(grad, u, K, G, s, d) if ctx.needs_input_grad[1] else None
        return to_grad, to_weight, None, None, None, None


class _GradWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, input, K, G, stride, dilation):
        ctx.save_for_backward(grad, input)
        ctx.stride, ctx.dilation = stride, dilation
        return _grad_weight(grad, input, K, G, stride, dilation)

    @staticmethod
    def backward(ctx, u):
        grad, input = ctx.saved_tensors
        s, d = ctx.stride, ctx.dilation
        to_grad = _Forward.apply(input, u, s, d) if ctx.needs_input_grad[0] else None
        to_input = _GradInput.apply(grad, u, *input.shape[2:], s, d) if ctx.needs_input_grad[1] else None
        return to_grad, to_input, None, None, None, None


# --------------------------------------------------------------------------------------------------- public


def involution2d(input, weight, stride=1, dilation=1):
    """Apply per-pixel kernels `weight` to `input`.

    Args:
        input: (N, C, H, W).
        weight: (N, G, K*K, Ho, Wo), K odd, G a divisor of C, Ho = ceil(H/stride), Wo = ceil(W/stride); the
            input's dtype and device.
        stride, dilation: positive integers.

    Returns:
        (N, C, Ho, Wo), differentiable any number of times.

    Raises:
        ValueError: an argument of another shape, dtype or device.
    """
    _check(input, weight, stride, dilation)
    return _Forward.apply(input, weight, stride, dilation)


def _check(input, weight, stride, dilation):
    """Return K and the output size (Ho, Wo); raise ValueError on arguments that do not belong together."""
    for name, value in (("stride", stride), ("dilation", dilation)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if input.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W), got shape {tuple(input.shape)}")
    if weight.dim() != 5:
        raise ValueError(f"weight must be (N, G, K*K, Ho, Wo), got shape {tuple(weight.shape)}")
    if not input.is_floating_point():
        raise ValueError(f"input must be of a floating-point dtype, got {input.dtype}")
    if weight.dtype != input.dtype:
        raise ValueError(f"weight must have the input's dtype {input.dtype}, got {weight.dtype}")
    if weight.device != input.device:
        raise ValueError(f"weight must be on the input's device {input.device}, got {weight.device}")
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


class _ConvBN(nn.Module):
    """1x1 convolution, batch norm, ReLU under the names of the involution authors' module (`conv`, `bn`)."""

    def __init__(self, C_in, C_out, affine):
        super().__init__()
        self.conv = nn.Conv2d(C_in, C_out, 1, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class _Conv(nn.Module):
    """1x1 convolution with bias under the name of the involution authors' module (`conv`)."""

    def __init__(self, C_in, C_out):
        super().__init__()
        self.conv = nn.Conv2d(C_in, C_out, 1)

    def forward(self, x):
        return self.conv(x)


class Involution2d(nn.Module):
    """Involution whose kernels are generated from its own input (Algorithm 1 of the paper).

    Pooling by the stride, `conv1` (1x1, C -> C/r, batch norm, ReLU) and `conv2` (1x1, C/r -> K*K*G, bias) make the
    weight (N, G, K*K, Ho, Wo). The groups are the largest divisor of C that is at most max(1, C // group_channels).
    (N, C, H, W) -> (N, C, ceil(H/stride), ceil(W/stride)). State-dict keys are those of the authors' module.

    Raises:
        ValueError: an even kernel size, or a count below one.
    """

    def __init__(
        self, channels, kernel_size, stride=1, dilation=1, group_channels=16, reduction_ratio=4, affine=True
    ):
        super().__init__()
        counts = dict(
            channels=channels,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            group_channels=group_channels,
            reduction_ratio=reduction_ratio,
        )
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
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
        weight = self.conv2(self.conv1(self.avgpool(x)))
        weight = weight.unflatten(1, (self.groups, self.kernel_size**2))
        return involution2d(x, weight, self.stride, self.dilation)

    def extra_repr(self):
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, groups={self.groups}"
        )
