"""Involution in plain PyTorch: the passes for every device and dtype, with little memory.

K*K shifted products are added in place; the N x C x K*K x H x W tensor of unfolded patches is never built. The fused
passes make the weight tensor, but nobody keeps it: backward makes it again. Equation and names as in involution.py.
"""

import math

import torch
import torch.nn.functional as F


def forward(input, weight, stride, dilation):
    K = math.isqrt(weight.shape[2])
    N, C, G, (Ho, Wo) = *input.shape[:2], weight.shape[1], weight.shape[3:]
    padded = F.pad(input, [dilation * (K // 2)] * 4)
    output = input.new_zeros(N, G, C // G, Ho, Wo, dtype=_accumulator(input))
    for i, j in taps(K):
        pixels = shifted(padded, i, j, Ho, Wo, stride, dilation).unflatten(1, (G, C // G))
        output.addcmul_(pixels, weight[:, :, i * K + j].unsqueeze(2))
    return output.flatten(1, 2).to(input.dtype)


def grad_input(grad_output, weight, H, W, stride, dilation):
    K = math.isqrt(weight.shape[2])
    N, C, G, (Ho, Wo) = *grad_output.shape[:2], weight.shape[1], weight.shape[3:]
    pad = dilation * (K // 2)
    padded = grad_output.new_zeros(N, C, H + 2 * pad, W + 2 * pad, dtype=_accumulator(grad_output))
    grad_output = grad_output.unflatten(1, (G, C // G))
    for i, j in taps(K):
        pixels = shifted(padded, i, j, Ho, Wo, stride, dilation).unflatten(1, (G, C // G))
        pixels.addcmul_(grad_output, weight[:, :, i * K + j].unsqueeze(2))
    return padded[:, :, pad : pad + H, pad : pad + W].to(grad_output.dtype).contiguous()


def grad_weight(grad_output, input, K, G, stride, dilation):
    N, C, Ho, Wo = grad_output.shape
    padded = F.pad(input, [dilation * (K // 2)] * 4)
    output = input.new_empty(N, G, K * K, Ho, Wo)
    for i, j in taps(K):
        pixels = shifted(padded, i, j, Ho, Wo, stride, dilation)
        output[:, :, i * K + j] = (grad_output * pixels).unflatten(1, (G, C // G)).sum(2)
    return output


def fused_forward(input, hidden, span_weight, span_bias, kernel_size, stride, dilation):
    weight = span(hidden, span_weight, span_bias, kernel_size)
    return forward(input, weight, stride, dilation)


def fused_backward(grad_output, input, hidden, span_weight, span_bias, kernel_size, stride, dilation):
    weight = span(hidden, span_weight, span_bias, kernel_size)
    to_input = grad_input(grad_output, weight, *input.shape[2:], stride, dilation)
    to_weight = grad_weight(grad_output, input, kernel_size, weight.shape[1], stride, dilation)
    return to_input, *span_backward(to_weight, hidden, span_weight)


def span(hidden, span_weight, span_bias, K):
    """The weight (N, G, K*K, Ho, Wo) that the 1x1 convolution `span` makes from hidden (N, C_hidden, Ho, Wo)."""
    weight = F.conv2d(hidden, span_weight.flatten(1)[:, :, None, None], span_bias)
    return weight.unflatten(1, (span_weight.shape[0] // (K * K), K * K))


def span_backward(grad_weight, hidden, span_weight):
    """The gradients of hidden, span weight and span bias; in differentiable operations."""
    grad = grad_weight.flatten(1, 2)
    grad_hidden = F.conv_transpose2d(grad, span_weight.flatten(1)[:, :, None, None])
    grad_span_weight = torch.einsum("nkyx,ncyx->kc", grad, hidden).view_as(span_weight)
    return grad_hidden, grad_span_weight, grad.sum((0, 2, 3))


def rms_norm(hidden, eps):
    """hidden (N, C, H, W) / sqrt(mean over channels of hidden^2 + eps): shorter than sqrt(C) at every pixel."""
    squares = hidden.to(_accumulator(hidden)).square()  # float16 ends at 256^2
    return hidden * torch.rsqrt(squares.mean(1, keepdim=True) + eps).to(hidden.dtype)


def taps(K):
    return ((i, j) for i in range(K) for j in range(K))


def shifted(padded, i, j, Ho, Wo, stride, dilation):
    """The pixel that tap (i, j) reads for every output position: a view (N, C, Ho, Wo) of the padded image."""
    y, x = i * dilation, j * dilation
    return padded[:, :, y : y + (Ho - 1) * stride + 1 : stride, x : x + (Wo - 1) * stride + 1 : stride]


def _accumulator(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)
