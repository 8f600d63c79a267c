"""The functions of fast_cell.py in plain PyTorch, for every device and dtype, differentiable any number of times.

Batch norms here are those of a supernet: no parameters, default constants.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .involution_arguments import autocast, check_fused
from .involution_ops import involution_fused
from .involution_torch import rms_norm

EPS, MOMENTUM = nn.BatchNorm2d(1).eps, nn.BatchNorm2d(1).momentum


def heads(x, weights, norms):
    """[relu(norm_k(weight_k * x))] of x (N, C, H, W) and 1x1 convolutions (C_k, C, 1, 1)."""
    hidden = F.relu(_normalized(F.conv2d(x, torch.cat(weights)), norms))
    return hidden.split([len(weight) for weight in weights], dim=1)


def involutions(x, pooled, layers, rms_eps):
    """[layer(x)] of `Involution2d` layers of one stride; `pooled` is x after their pooling.

    rms_eps: what their hidden features are divided by, as `rms_norm`; None for nothing.
    """
    firsts = [layer.conv1 for layer in layers]
    hidden = heads(pooled, [first.conv.weight for first in firsts], [first.bn for first in firsts])
    if rms_eps is not None:
        hidden = [rms_norm(h, rms_eps) for h in hidden]
    return [_involution(x, h, layer) for h, layer in zip(hidden, layers, strict=True)]


def _involution(x, hidden, layer):
    span = layer.conv2.conv
    tensors = autocast(x, hidden, span.weight, span.bias)
    steps = check_fused(*tensors, layer.kernel_size, layer.stride, layer.dilation)
    return involution_fused(*tensors, layer.kernel_size, *steps)


def depthwise(x, weight, stride, dilation):
    """Depthwise convolution of x (N, C, H, W) with weight (C, 1, K, K), padded to (N, C, ceil(H/s), ceil(W/s))."""
    return F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation, groups=x.shape[1])


def pool(x, is_max, stride):
    """3x3 pooling of x (N, C, H, W), padded by a pixel that does not count: the maximum, or the mean."""
    if is_max:
        return F.max_pool2d(x, 3, stride, padding=1)
    return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)


def every_second(x):
    """Every second pixel of x (N, C, H, W), and its diagonal neighbours, zero past the edge of an odd-sized image."""
    H, W = x.shape[2:]
    return x[:, :, ::2, ::2], F.pad(x, (-1, W % 2, -1, H % 2))[:, :, ::2, ::2]


def side_by_side(images):
    """The channels of images (N, C_k, H, W), one after the other."""
    return torch.cat(images, dim=1)


def average(x, pooling):
    """What the kernels of a strided involution are made of: x after the layer's pooling."""
    return pooling(x)


def diagonal(like, *weights):
    """The weight (C_1 + C_2, K_1 + K_2, 1, 1) of two 1x1 convolutions side by side, each reading its own channels.

    like: an image; its backend makes the weight.
    """
    first, second = weights
    first, second = F.pad(first, (0, 0, 0, 0, 0, second.shape[1])), F.pad(second, (0, 0, 0, 0, first.shape[1], 0))
    return torch.cat([first, second])


def spread(images, alphas):
    """[sum_t alphas[n, t] * images[t]] for every row n of alphas (nodes, images)."""
    return [sum(alpha * x for alpha, x in zip(row, images, strict=True)) for row in alphas.unbind()]


def mix(parts, linear, linear_alphas, factors):
    """A node, as the only result: the sum of its parts (N, C, H, W), + sum_k factor_k alpha_k norm_k(weight_k * z_k).

    Args:
        linear: groups of terms whose inputs z_k (N, K, H, W) are equally wide; linear_alphas: (terms,) of each group.
        factors: of each term of each group one number for every image, (N, 1, 1, 1); or None for all.
    """
    node = sum(parts)
    for terms, alphas, of_terms in zip(linear, linear_alphas, factors, strict=True):
        convolved = F.conv2d(
            torch.cat([term.input for term in terms], 1), torch.cat([term.weight for term in terms]), groups=len(terms)
        )
        # the alphas stand where a batch norm has its weight, which PyTorch's backward takes to be contiguous
        C = len(terms[0].weight)
        weight = alphas[:, None].expand(-1, C).flatten().contiguous()
        weighted = _normalized(convolved, [term.norm for term in terms], weight)
        weighted = weighted.unflatten(1, (len(terms), C))
        if of_terms[0] is not None:
            weighted = weighted * torch.stack(of_terms, dim=1)
        node = node + weighted.sum(1)
    return (node,)


def normalized(x, norms):
    """x (N, C, H, W) normalised by its own statistics, which all of the norms, none with parameters, then follow."""
    normalized, mean, var = batch_norm(x)
    track(norms, [mean] * len(norms), [var] * len(norms))
    return normalized


def batch_norm(x, weight=None):
    """x (N, C, H, W) normalised by its own statistics; and those: mean and unbiased variance, (C,)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = x.new_zeros(2, x.shape[1], dtype=dtype)
    return F.batch_norm(x, mean, var, weight, None, True, 1.0, EPS), mean, var


@torch.no_grad()
def track(norms, means, variances):
    """Update running statistics by those of a batch, as nn.BatchNorm2d does."""
    torch._foreach_lerp_([norm.running_mean for norm in norms], means, MOMENTUM)
    torch._foreach_lerp_([norm.running_var for norm in norms], variances, MOMENTUM)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def _normalized(x, norms, weight=None):
    """Batch norms side by side: x (N, sum of their channels, H, W)."""
    if not norms[0].training:
        mean = torch.cat([norm.running_mean for norm in norms])
        var = torch.cat([norm.running_var for norm in norms])
        return F.batch_norm(x, mean, var, weight, None, False, 0.0, EPS)
    x, mean, var = batch_norm(x, weight)
    widths = [norm.num_features for norm in norms]
    track(norms, mean.split(widths), var.split(widths))
    return x
