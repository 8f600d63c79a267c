"""The functions of fast_cell.py on the CPU: float32 and float64, in C++, differentiable once; recorded.py records them.

A candidate ends in a 1x1 convolution and a batch norm without parameters: v = W z, then (v - mean v) / sqrt(var v).
v is linear in z, so that its statistics follow from the mean m and the covariance S of z's channels,

    mean v = W m,        var v = diag(W S Wᵀ),

and alpha * norm(v) is the product of z and one small matrix. v is neither computed nor kept: forward reads z twice,
once for m and S and once for the node, which is the sum of such products over everything that enters it. Backward
needs one more statistic, M = sum over pixels of (gradient) zᵀ: with s = 1/sqrt(var v + eps), P pixels, G the sum of the
node's gradient g and q = s (diag(M Wᵀ) - mean v * G), the sum of g * norm(v),

    d alpha = sum(q)
    d z     = alpha Wᵀ (s g - s² q/P (W z - mean v) - s G/P)
    d W     = alpha s (M - G mᵀ - s q (W S)).

Drop path has a factor m for every image, and in a derived network the batch norm has parameters: the term is
m (gamma norm(v) + beta). With alpha = gamma, g = m times the node's gradient, d gamma = q, d beta = G, and the first
summand of d z alone has the factor m.

`project` starts from the nodes of a cell before, four times as wide as its result: there S would be dearer than W z,
so that v is computed once, kept, and normalised in a second, narrow pass. With x the norm of v,

    d v = gamma s (g - G/P - x q/P),        d z = Wᵀ d v where z is positive,        d W = sum over pixels of (d v) zᵀ,

which takes one pass over g and v for G and q, and one over all for the rest. So is the stem computed, from the pixels
around each. Everything that reads a feature map is one projection; so are the heads of the involutions that read a
state, where they are together at most half as wide as it. These heads and their v are not kept: they are made once more
in backward, from the statistics of forward, bit for bit.
An image that others read through ReLU is written together with its positive part, whose gradient joins the image's
where that is read.

The statistics are computed in double precision, from sums of single precision over short tiles: in float32 norm(v) is
as exact as PyTorch's where a channel's mean is up to a hundred times its spread (2.5e-4 there, relative), and less
exact beyond (1.4e-2 at a thousand times, PyTorch's 2.3e-3). `project`, which has v, adds up squares of the distance
from a tile's mean: at a thousand times it is as exact as PyTorch's on contiguous images (2e-5), which on
channels-last ones is less so (1e-3). The loops over pixels are in fast_cell_cpu.cpp.
"""

import functools
import os
from pathlib import Path

import torch
import torch.nn as nn
from torch.autograd import Function

from . import build, involution_cpu
from .fast_cell_torch import EPS
from .involution_arguments import check_fused
from .recorded import Place, Unsupported, already, apply, bits, call, empty, empty_image, once_differentiable, total

# elements behind an image, for many small objects; none where a sanitizer is to see what reads or writes past its end
_ROOM = 0 if "-fsanitize" in os.environ.get("CXX", "") else 1024


def library():
    """Return the loaded library, building it first where there is none. Raises build.BuildError."""
    return build.library(Path(__file__).with_suffix(".cpp"))


# ------------------------------------------------------------------------------------------------------ functions


def heads(x, weights, norms):
    """[relu(norm_k(weight_k * x))] of x (N, C, H, W) and 1x1 convolutions (C_k, C, 1, 1)."""
    return apply(_Heads, x, norms, x, *weights, *_scales(norms), *_shifts(norms))


def involutions(x, pooled, layers, rms_eps):
    """[layer(x)] of `Involution2d` layers of one stride, as fast_cell_torch.involutions."""
    geometry = [(layer.kernel_size, layer.stride, layer.dilation) for layer in layers]
    spans = [layer.conv2.conv for layer in layers]
    weights = [layer.conv1.conv.weight for layer in layers]
    weights += [span.weight for span in spans] + [span.bias for span in spans]
    norms = [layer.conv1.bn for layer in layers]
    return apply(_Involutions, x, norms, geometry, rms_eps, x, pooled, *weights, *_scales(norms), *_shifts(norms))


def depthwise(x, weight, stride, dilation):
    """Depthwise convolution of x (N, C, H, W) with weight (C, 1, K, K), padded to (N, C, ceil(H/s), ceil(W/s))."""
    return apply(_Depthwise, x, x, weight, stride, dilation)


def spread(images, alphas):
    """[sum_t alphas[n, t] * images[t]] for every row n of alphas."""
    return apply(_Spread, images[0], alphas, *images)


def mix(parts, linear, linear_alphas, factors, wanted=(True, False)):
    """(y, relu(y)), or of the two what is wanted, of a node y as of fast_cell_torch.mix."""
    return _mix(parts, linear, linear_alphas, [None] * len(linear), wanted, factors)


def node(parts, terms, factors, wanted):
    """(y, relu(y)), or of the two what is wanted, of a node of a derived network

        y = sum of parts + sum_k factors_k (scale_k norm_k(weight_k * z_k) + shift_k),

    scale and shift being the norm's parameters, where it has any, and a factor None or one number for every image.
    """
    norms = [term.norm for term in terms]
    factors = [[factor] for factor in factors]
    return _mix(parts, [[term] for term in terms], _scales(norms), _shifts(norms), wanted, factors)


def _mix(parts, groups, scales, shifts, wanted, factors):
    tensors, like = list(parts), parts[0] if parts else groups[0][0].input
    for terms in groups:
        tensors += [term.input for term in terms] + [term.weight for term in terms]
    norms = [[term.norm for term in terms] for terms in groups]
    return apply(_Mix, like, norms, factors, len(parts), wanted, *scales, *shifts, *tensors)


def project(images, weights, norms, wanted):
    """[scale_k norm_k(weight_k * x) + shift_k] of 1x1 convolutions (C_k, K, 1, 1), K any number of channels.

    x (N, K, H, W) are images side by side that have been through ReLU: where they are zero, so is their gradient. Of
    every result y, `wanted` says for (y, relu(y)) whether it is needed; what is not is left out.
    """
    keep = torch.is_grad_enabled()
    return apply(
        _Project, images[0], norms, wanted, keep, len(images), *images, *weights, *_scales(norms), *_shifts(norms)
    )


def normalize(v, norm, wanted):
    """(y, relu(y)), or of the two what is wanted, of y = norm(v)."""
    return apply(_Normalize, v, [norm], wanted if any(wanted) else (True, False), v, norm.weight, norm.bias)


def normalized(v, norms):
    """As fast_cell_torch.normalized."""
    return apply(_Normalize, v, norms, (True, False), v, None, None)[0]


def convolved(x, weight, norm, wanted):
    """`normalize` of a 3x3 convolution, padded by 1, of x (N, C, H, W), without a gradient of x; weight (C2, C, 3, 3).

    It is a 1x1 convolution of the pixels around each, so that what it makes need not be read again for its statistics,
    nor its gradient be written. (They have been through no ReLU, which makes no difference without a gradient of them.)
    """
    (N, C, H, W), x = x.shape, _channels_last(x)
    around = _image(x, width_around(C))
    _call("patches", x, [N, C, H, W, around.shape[1], *map(_address, (x, around))])
    return project([around], [matrix_around(weight)], [norm], [wanted if any(wanted) else (True, False)])


def width_around(C):
    """How many numbers `convolved` makes for a pixel: those of nine, and zeros up to a multiple of four."""
    return -(-9 * C // 4) * 4


def matrix_around(weight):
    """The weight (C2, C, 3, 3) of a convolution as one of these, (C2, width_around(C), 1, 1)."""
    zeros = width_around(weight.shape[1]) - 9 * weight.shape[1]
    return nn.functional.pad(weight.permute(0, 2, 3, 1).flatten(1), (0, zeros))[:, :, None, None]


def pool(x, is_max, stride):
    """3x3 pooling of x (N, C, H, W), padded by a pixel that does not count: the maximum, or the mean."""
    return apply(_Pool, x, x, is_max, stride)


def every_second(x):
    """Every second pixel of x (N, C, H, W), and its diagonal neighbours, as fast_cell_torch.every_second."""
    return apply(_EverySecond, x, x)


def average(x, pooling):
    """What the kernels of a strided involution are made of: x after the layer's pooling."""
    if type(pooling) is nn.Identity:
        return x
    if is_usual_average(pooling):
        return apply(_Average, x, x, pooling.stride)
    if type(x) is Place:
        raise Unsupported
    return pooling(x)


def is_usual_average(pooling):
    """Whether it is one of windows that do not overlap, as involutions have."""
    border = pooling.padding, pooling.ceil_mode, pooling.count_include_pad, pooling.divisor_override
    is_usual = (pooling.kernel_size, *border) == (pooling.stride, 0, True, True, None)
    return is_usual and isinstance(pooling.stride, int)


def side_by_side(images):
    """The channels of images (N, C_k, H, W), one after the other."""
    return apply(_SideBySide, images[0], *images)


def diagonal(like, *weights):
    """As fast_cell_torch.diagonal."""
    return apply(_Diagonal, like, like, *weights)


def gather(like, weights, places, shape):
    """The weights (edges, primitives) at those places, in this shape."""
    return apply(_Gather, like, like, weights, places, shape)


def scale(x, factors):
    """x (N, C, H, W) times one number for every image, (N, 1, 1, 1)."""
    return apply(_Scale, x, x, factors)


def _scales(norms):
    return [norm.weight for norm in norms]


def _shifts(norms):
    return [norm.bias for norm in norms]


class _Heads(Function):
    @staticmethod
    def forward(ctx, norms, x, *tensors):
        x, (weights, scales, shifts) = _channels_last(x), _thirds(tensors)
        hidden, affine, ctx.stats = _heads(x, weights, scales, shifts, norms)
        ctx.training = norms[0].training
        ctx.save_for_backward(x, *affine, *weights, *_kept(hidden, weights, ctx.training))
        return tuple(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, scale, shift, *saved = _saved(ctx)
        affine, weights, hidden = (scale, shift), saved[: len(grads)], saved[len(grads) :]
        hidden, v = (hidden, None) if hidden else _project_heads(x, weights, affine, ctx.stats)
        trains = any(ctx.needs_input_grad[2 : 2 + len(weights)])
        more = already(ctx, 1)
        return None, *_heads_backward(grads, x, weights, hidden, v, affine, ctx.stats, ctx.training, trains, more)


class _Involutions(Function):
    """The heads of the layers, then each layer's involution, so that x gathers its gradient in one go."""

    @staticmethod
    def forward(ctx, norms, geometry, rms_eps, x, pooled, *weights):
        ctx.is_pooled, x, pooled = pooled is not x, _channels_last(x), _channels_last(pooled)
        affine, weights = weights[3 * len(norms) :], weights[: 3 * len(norms)]
        layers = _by_layer(weights)
        hidden, affine, ctx.stats = _heads(
            pooled, weights[: len(layers)], affine[: len(norms)], affine[len(norms) :], norms
        )
        scales = None if rms_eps is None else _rms_norm(hidden, rms_eps)
        geometry = [
            (place[0], *check_fused(x, h, span, bias, *place))
            for h, (_, span, bias), place in zip(hidden, layers, geometry, strict=True)
        ]
        outputs = [
            involution_cpu.fused_forward(x, h, span, bias, *place)
            for h, (_, span, bias), place in zip(hidden, layers, geometry, strict=True)
        ]
        ctx.geometry, ctx.rms_eps, ctx.training = geometry, rms_eps, norms[0].training
        kept = _kept(hidden, weights[: len(layers)], ctx.training)
        ctx.scales = scales if kept else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, pooled, *affine, *weights, *kept)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        n = len(grads)
        x, pooled, scale, shift, *saved = _saved(ctx)
        affine, weights, hidden, v, scales = (scale, shift), saved[: 3 * n], saved[3 * n :], None, ctx.scales
        if not hidden:
            hidden, v = _project_heads(pooled, weights[:n], affine, ctx.stats)
            scales = None if ctx.rms_eps is None else _rms_norm(hidden, ctx.rms_eps)
        used = [grad is not None for grad in grads]
        grads = [_zeros(x, *h.shape[2:]) if g is None else g for g, h in zip(grads, hidden, strict=True)]
        heads_train, *spans_train = (any(ctx.needs_input_grad[5 + k * n : 5 + (k + 1) * n]) for k in range(3))
        to_x, to_hidden, to_span, to_bias = zip(
            *(
                involution_cpu.fused_backward(_channels_last(grad), x, h, span, bias, *place, any(spans_train))
                for grad, h, (_, span, bias), place in zip(grads, hidden, _by_layer(weights), ctx.geometry, strict=True)
            ),
            strict=True,
        )
        if scales is not None:
            _rms_norm_backward(to_hidden, hidden, scales)
        more = already(ctx, 4) if ctx.is_pooled else [*to_x, *already(ctx, 3)]
        to_pooled, *to_heads = _heads_backward(
            to_hidden, pooled, weights[:n], hidden, v, affine, ctx.stats, ctx.training, heads_train, more
        )
        to_x = total([*to_x, *already(ctx, 3)]) if ctx.is_pooled else to_pooled
        to_pooled = to_pooled if ctx.is_pooled else None
        per_layer = *to_heads[:n], *to_span, *to_bias, *to_heads[n:]  # of five kinds
        return (
            None,
            None,
            None,
            to_x,
            to_pooled,
            *(to if each else None for to, each in zip(per_layer, used * 5, strict=True)),
        )


def _by_layer(weights):
    """(head, span, bias) of every layer."""
    return list(zip(*_thirds(weights), strict=True))


def _thirds(tensors):
    n = len(tensors) // 3
    return tensors[:n], tensors[n : 2 * n], tensors[2 * n :]


class _Depthwise(Function):
    @staticmethod
    def forward(ctx, x, weight, stride, dilation):
        x, weight = _channels_last(x), weight.contiguous()
        N, C, H, W = x.shape
        check_widths(C, weight.transpose(0, 1))
        ctx.problem = N, C, H, W, weight.shape[-1], stride, dilation
        ctx.save_for_backward(x, weight)
        output = _image(x, C, -(-H // stride), -(-W // stride))
        _call("depthwise", x, [*ctx.problem, *map(_address, (x, weight, output))])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = _saved(ctx)
        to_x = _like(x) if ctx.needs_input_grad[0] else None
        to_weight = empty(x, *weight.shape) if ctx.needs_input_grad[1] else None
        tensors = _channels_last(grad), x, weight, to_x, to_weight
        _call("depthwise_backward", x, [*ctx.problem, *map(_address, tensors)])
        return to_x, to_weight, None, None


class _Spread(Function):
    @staticmethod
    def forward(ctx, alphas, *images):
        images, alphas = [_channels_last(x) for x in images], alphas.contiguous()
        results = [_image(images[0], images[0].shape[1]) for _ in range(len(alphas))]
        packed = [_pixels(images[0]), *_operands(images), len(results), *map(_address, (*results, alphas))]
        _call("spread", images[0], packed)
        ctx.save_for_backward(alphas, *images)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (alphas, *images), grads = _saved(ctx), [_channels_last(g) for g in grads]
        to_images = [_like(x) if n else None for x, n in zip(images, ctx.needs_input_grad[1:], strict=True)]
        to_alphas = empty(images[0], *alphas.shape)
        packed = [_pixels(images[0]), *_operands(images), *_operands(grads)]
        _call("spread_backward", images[0], packed + [*map(_address, (alphas, to_alphas, *to_images))])
        return to_alphas, *to_images


class _Mix(Function):
    """Arguments: norms and factors of each group's terms; how many parts; what of (node, its positive part) is wanted;
    scales and shifts of each group; parts; inputs, weights of each group.

    Scales are those of the terms or, of a group of one term, of its channels; the latter where there are shifts.
    """

    @staticmethod
    def forward(ctx, norms, factors, parts, wanted, *tensors):
        n = len(norms)
        scales, shifts, tensors = tensors[:n], tensors[n : 2 * n], list(tensors[2 * n :])
        parts, tensors = [_channels_last(x) for x in tensors[:parts]], tensors[parts:]
        linear, ctx.stats, ctx.factors = [], [], factors
        for group in norms:
            n = len(group)
            z, weights = [_channels_last(x) for x in tensors[:n]], [w.contiguous() for w in tensors[n : 2 * n]]
            tensors = tensors[2 * n :]
            for x, weight, norm in zip(z, weights, group, strict=True):
                check_widths(x.shape[1], weight, [norm])
            linear.append((z, weights))
            ctx.stats.append(_statistics(z[0], group, n, *weights[0].shape[:2]))
        like, C = (parts[0], parts[0].shape[1]) if parts else (linear[0][0][0], len(linear[0][1][0]))
        plain, positive = (_image(like, C) if each else None for each in wanted)
        results = [plain if wanted[0] else positive]
        packed = [not wanted[0], *_parts(results), _address(positive if wanted[0] else None), *_operands(parts)]
        packed.append(sum(map(len, norms)))
        for (z, weights), scale, shift, of_terms, stats in zip(linear, scales, shifts, factors, ctx.stats, strict=True):
            for k, (x, weight, factor) in enumerate(zip(z, weights, of_terms, strict=True)):
                packed += _candidate(x, factor, weight, scale, shift, stats, k)
        ctx.training = any(group[0].training for group in norms)
        _call_with_statistics("mix", results[0], ctx.training, packed)
        for group, stats in zip(norms, ctx.stats, strict=True):
            _track(results[0], group, stats, C, step=stats.shape[1])
        ctx.parts, ctx.wanted = len(parts), wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*scales, *shifts, positive, *(tensor for z, w in linear for tensor in (*z, *w)))
        return tuple(image for image in (plain, positive) if image is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        n, saved = len(ctx.stats), _saved(ctx)
        scales, shifts, positive, tensors = saved[:n], saved[n : 2 * n], saved[2 * n], saved[2 * n + 1 :]
        needed = ctx.needs_input_grad[4 + 2 * n + ctx.parts :]
        gradient, mask, more = _gradient(grads, ctx.wanted, positive)
        whole = None if mask is None else _like(gradient)  # one image, for the parts too
        to_inputs = [empty_image(gradient, *x.shape) if n else None for x, n in zip(tensors, needed, strict=True)]
        left = iter(zip(tensors, to_inputs, strict=True))
        to_affine = [None if x is None else empty(gradient, *x.shape) for x in saved[: 2 * n]]
        to_scales, to_shifts = to_affine[:n], to_affine[n:]
        packed = [*_sums([(gradient, mask, more)]), _address(whole), sum(stats.shape[0] for stats in ctx.stats)]
        for scale, shift, to_scale, to_shift, factors, stats in zip(
            scales, shifts, to_scales, to_shifts, ctx.factors, ctx.stats, strict=True
        ):
            candidates = stats.shape[0]
            z, weights = ([next(left) for _ in range(candidates)] for _ in range(2))
            for k, ((x, to_x), (weight, to_weight), factor) in enumerate(zip(z, weights, factors, strict=True)):
                packed += _candidate(x, factor, weight, scale, shift, stats, k)
                to_own = _address(to_scale) if to_scale is None or candidates == 1 else _element(to_scale, k)
                packed += [to_own, _address(to_shift), _address(to_weight), _address(to_x), 0]
        _call_with_statistics("mix_backward", gradient, ctx.training, packed)
        to_parts = [gradient if whole is None else whole] * ctx.parts
        return None, None, None, None, *to_affine, *to_parts, *to_inputs


def _candidate(x, factor, weight, scale, shift, stats, k):
    """The k-th term of a group as C++ reads it."""
    (_, K, H, W), C, candidates = x.shape, weight.shape[0], stats.shape[0]
    step = int(scale is not None and candidates == 1 and scale.shape[0] == C)
    scale = _address(scale) if scale is None or step else _element(scale, k)
    operand = 1, x.data_ptr(), 0, 0, K
    numbers = _address(factor), H * W, C, weight.data_ptr(), scale, step, _address(shift)
    return *operand, *numbers, _element(stats, k * stats.shape[1])


def _gradient(grads, wanted, positive):
    """(x, mask, more), of an image whose gradient is x where the mask is positive, plus more; or None."""
    grads = iter(grads)
    plain, of_positive = (next(grads) if each else None for each in wanted)
    plain = None if plain is None else _channels_last(plain)
    if of_positive is None:
        return None if plain is None else (plain, None, None)
    return _channels_last(of_positive), positive, plain


class _Project(Function):
    @staticmethod
    def forward(ctx, norms, wanted, keep, n, *tensors):
        images = [_channels_last(x) for x in tensors[:n]]
        weights, scales, shifts = _thirds(tensors[n:])
        scale, shift, weight = (_joined(images[0], tensors) for tensors in (scales, shifts, weights))
        training, C = norms[0].training, weight.shape[0]
        check_widths(sum(x.shape[1] for x in images), weight, norms)
        check_sizes([(x.shape[0], *x.shape[2:]) for x in images])
        v, stats = _image(images[0], C) if keep or training else None, _statistics(images[0], norms, 1, C, 0)
        results = [
            [_image(images[0], w.shape[0]) if each else None for each in pair]
            for w, pair in zip(weights, wanted, strict=True)
        ]
        packed = [*_operands(images), *_projection(v, weight, scale, shift, stats)]
        packed += _results(results, [w.shape[0] for w in weights])
        _call_with_statistics("project", images[0], training, packed)
        _track(images[0], norms, stats, C)
        ctx.training, ctx.stats, ctx.wanted, ctx.n, ctx.widths = (
            training,
            stats,
            wanted,
            n,
            [w.shape[0] for w in weights],
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*images, weight, scale, shift, v)
        return tuple(image for pair in results for image in pair if image is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        saved = _saved(ctx)
        images, (weight, scale, shift, v) = saved[: ctx.n], saved[ctx.n :]
        gradients = _of_results(grads, ctx.wanted)
        to_images = [_like(x) if n else None for x, n in zip(images, ctx.needs_input_grad[4:], strict=False)]
        to_scale, to_shift = (None if x is None else empty(v, *x.shape) for x in (scale, shift))
        trains = any(ctx.needs_input_grad[4 + ctx.n : 4 + ctx.n + len(ctx.widths)])
        to_weight = empty(v, *weight.shape) if trains else None
        packed = [*_operands(images), *_projection(v, weight, scale, shift, ctx.stats)]
        packed += _results(gradients, ctx.widths)
        packed += map(_address, (to_scale, to_shift, to_weight))
        for k, to_image in enumerate(to_images):
            more = [] if to_image is None else already(ctx, 4 + k)
            packed += [_address(to_image), True, len(more), *map(_address, more)]
        _call_with_statistics("project_backward", v, ctx.training, packed)
        per_norm = (*(_split(to, ctx.widths) for to in (to_weight, to_scale, to_shift)),)
        used = [any(image is not None for image in pair) for pair in gradients]
        per_norm = [to if each else None for tos in per_norm for to, each in zip(tos, used, strict=True)]
        return None, None, None, None, *to_images, *per_norm


class _Normalize(Function):
    """A `_Project` of an image that is there, by one batch norm, or by several without parameters."""

    @staticmethod
    def forward(ctx, norms, wanted, v, scale, shift):
        v, norm = _channels_last(v), norms[0]
        if any(each.num_features != v.shape[1] for each in norms):
            raise ValueError(
                f"a batch norm must fit its images, got one of {norm.num_features} for {v.shape[1]} channels"
            )
        stats = _statistics(v, norms[:1], 1, norm.num_features, 0)
        plain, positive = (_like(v) if each else None for each in wanted)
        packed = [0, *_projection(v, None, scale, shift, stats), *_results([(plain, positive)], [v.shape[1]])]
        _call_with_statistics("project", v, norm.training, packed)
        _track(v, norms, stats, norm.num_features, step=0)
        ctx.training, ctx.stats, ctx.wanted = norm.training, stats, wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(v, scale, shift)
        return tuple(image for image in (plain, positive) if image is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        v, scale, shift = _saved(ctx)
        to_v, *to_affine = _like(v), *(None if x is None else empty(v, *x.shape) for x in (scale, shift))
        gradients = _of_results(grads, [ctx.wanted])
        packed = [0, *_projection(v, None, scale, shift, ctx.stats), *_results(gradients, [v.shape[1]])]
        packed += map(_address, (*to_affine, to_v))
        _call_with_statistics("project_backward", v, ctx.training, packed)
        return None, None, to_v, *to_affine


class _Pool(Function):
    @staticmethod
    def forward(ctx, x, is_max, stride):
        x = _channels_last(x)
        N, C, H, W = x.shape
        ctx.problem, ctx.is_max = (N, C, H, W, stride, is_max), is_max
        output = _image(x, C, -(-H // stride), -(-W // stride))
        _call("pool", x, [*ctx.problem, *map(_address, (x, output))])
        ctx.save_for_backward(*((x, output) if is_max else ()))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad, to_x = _channels_last(grad), _image(grad, *ctx.problem[1:4])
        x, output = _saved(ctx) if ctx.is_max else (None, None)
        _call("pool_backward", grad, [*ctx.problem, *map(_address, (x, output, grad, to_x))])
        return to_x, None, None


class _EverySecond(Function):
    @staticmethod
    def forward(ctx, x):
        x, (H, W) = _channels_last(x), x.shape[2:]
        first, second = (_image(x, x.shape[1], -(-H // 2), -(-W // 2)) for _ in range(2))
        _every_second(x, True, first, second)
        ctx.size = H, W
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        grads = [_channels_last(grad) for grad in grads]
        to_x = _image(grads[0], grads[0].shape[1], *ctx.size)
        _every_second(to_x, False, *grads, *(already(ctx, 0) or [None]))
        return to_x


def _every_second(x, gather, *images):
    N, C, H, W = x.shape
    _call("every_second", x, [N, H, W, C, gather, *map(_address, (x, *images))])


class _Average(Function):
    @staticmethod
    def forward(ctx, x, stride):
        x, ctx.shape, ctx.stride = _channels_last(x), x.shape, stride
        output = _image(x, x.shape[1], *(-(-size // stride) for size in x.shape[2:]))
        _call("average", x, [*x.shape, stride, False, *map(_address, (x, output))])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad, to_x = _channels_last(grad), _image(grad, *ctx.shape[1:])
        tensors = to_x, grad, *(already(ctx, 0) or [None])
        _call("average", grad, [*ctx.shape, ctx.stride, True, *map(_address, tensors)])
        return to_x, None


class _SideBySide(Function):
    @staticmethod
    def forward(ctx, *images):
        images, ctx.shapes = [_channels_last(x) for x in images], [x.shape for x in images]
        check_sizes([(len(x), *x.shape[2:]) for x in images])
        whole = _image(images[0], sum(x.shape[1] for x in images))
        _side_by_side(whole, _pixels(whole), False, map(_address, images), [x.shape[1] for x in images])
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad, grads = _channels_last(grad), [_image(grad, shape[1]) for shape in ctx.shapes]
        _side_by_side(grad, _pixels(grad), True, map(_address, grads), [shape[1] for shape in ctx.shapes])
        return tuple(grads)


class _Diagonal(Function):
    @staticmethod
    def forward(ctx, like, *weights):
        weights, ctx.shapes = [w.contiguous() for w in weights], [w.shape for w in weights]
        whole = empty(like, *map(sum, zip(*(shape[:2] for shape in ctx.shapes), strict=True)), 1, 1)
        _copy_diagonal(whole, False, weights, ctx.shapes)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad, grads = grad.contiguous(), [empty(grad, *shape) for shape in ctx.shapes]
        _copy_diagonal(grad, True, grads, ctx.shapes)
        return None, *grads


def _copy_diagonal(whole, from_whole, parts, shapes):
    """Of a matrix, the first rows begin with one part, the others end with the other one."""
    (rows, K), (more, L) = (shape[:2] for shape in shapes)
    first, second = map(_address, parts)
    _call("side_by_side", whole, [rows, from_whole, _address(whole), 2, first, K, 0, L])
    _call("side_by_side", whole, [more, from_whole, _element(whole, rows * (K + L)), 2, 0, K, second, L])


def _side_by_side(whole, rows, from_whole, addresses, widths):
    """Copy parts (rows, width) to where they lie side by side in the rows of `whole`, or from there; 0 is for zeros."""
    numbers = (number for pair in zip(addresses, widths, strict=True) for number in pair)
    _call("side_by_side", whole, [rows, from_whole, _address(whole), len(widths), *numbers])


class _Gather(Function):
    @staticmethod
    def forward(ctx, like, weights, places, shape):
        if any(row >= weights.shape[0] or column >= weights.shape[1] for row, column in places):
            raise ValueError(f"a cell reads alphas for more edges or primitives than {tuple(weights.shape)}")
        weights, chosen = weights.contiguous(), empty(like, *shape)
        ctx.places, ctx.shape = places, weights.shape
        _side_by_side(chosen, 1, False, *_elements(weights, places))
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad, to_weights = grad.contiguous(), empty(grad, *ctx.shape)
        _side_by_side(to_weights, 1, False, [0], [ctx.shape.numel()])
        _side_by_side(grad, 1, True, *_elements(to_weights, ctx.places))
        return None, to_weights, None, None


def _elements(weights, places):
    """The addresses of numbers of a matrix, and their widths."""
    return [_element(weights, row * weights.shape[1] + column) for row, column in places], [1] * len(places)


class _Scale(Function):
    @staticmethod
    def forward(ctx, x, factors):
        x = _channels_last(x)
        ctx.save_for_backward(factors)
        return _times(x, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (factors,) = _saved(ctx)
        return _times(_channels_last(grad), factors), None


def _times(x, factors):
    y = _image(x, x.shape[1])
    _call("scale", x, [len(x), x.numel() // len(x), *map(_address, (x, factors, y))])
    return y


def _of_results(grads, wanted):
    """(gradient of y, gradient of relu(y)) of every result, None where there is none."""
    grads = iter(grads)
    grads = [[next(grads) if each else None for each in pair] for pair in wanted]
    return [[None if grad is None else _channels_last(grad) for grad in pair] for pair in grads]


def _results(images, widths):
    """The `Result`s of (image of y, image of relu(y)) each, either None."""
    packed = [len(images)]
    for pair, width in zip(images, widths, strict=True):
        packed += [*map(_address, pair), width]
    return packed


def _projection(v, weight, scale, shift, stats):
    """A `Projection` without its operand."""
    return stats.shape[1] // 3, *map(_address, (weight, v, scale, shift, stats))


def _heads(x, weights, scales, shifts, norms):
    """[relu(norm_k(weight_k * x))]; and what backward needs: parameters side by side, and statistics."""
    weight, affine, training = _joined(x, weights), (_joined(x, scales), _joined(x, shifts)), norms[0].training
    check_widths(x.shape[1], weight, norms)
    C, K = weight.shape[:2]
    if _are_projected(weights, training):
        stats = _statistics(x, norms, 1, C, 0)
        hidden, _ = _project_heads(x, weights, affine, stats, training)
    else:
        hidden, stats = [_image(x, w.shape[0]) for w in weights], _statistics(x, norms, 1, C, K)
        packed = [True, *_parts(hidden), 0, 0, 1, *_candidate(x, None, weight, *affine, stats, 0)]
        _call_with_statistics("mix", x, training, packed)
    _track(x, norms, stats, C)
    return hidden, affine, stats


def _are_projected(weights, training):
    """Whether heads are so much narrower than x that to make v = weight * x, twice, is cheaper than x's covariance."""
    return training and 2 * sum(map(len, weights)) <= weights[0].shape[1]


def _kept(hidden, weights, training):
    """What is kept of heads for backward, which makes those that are projected once more."""
    return [] if _are_projected(weights, training) else hidden


def _project_heads(x, weights, affine, stats, training=False):
    """(heads, v): in backward the same bit for bit as in forward, whose statistics are given then."""
    hidden, weight = [_image(x, w.shape[0]) for w in weights], _joined(x, weights)
    v = _image(x, weight.shape[0])
    packed = [*_operands([x]), *_projection(v, weight, *affine, stats)]
    packed += _results([(None, h) for h in hidden], [h.shape[1] for h in hidden])
    _call_with_statistics("project", x, training, packed)
    return hidden, v


def _heads_backward(grads, x, weights, hidden, v, affine, stats, training, trains, more=()):
    """The gradient of x, plus all images in `more`; those of the weights, if they train, of the scales and the shifts.

    v: of projected heads.
    """
    weight, grads, more = _joined(x, weights), [_channels_last(g) for g in grads], [_channels_last(g) for g in more]
    to_weight, to_x, widths = empty(x, *weight.shape) if trains else None, _like(x), [w.shape[0] for w in weights]
    to_affine = [None if each is None else empty(x, *each.shape) for each in affine]
    if v is not None:
        packed = [*_operands([x]), *_projection(v, weight, *affine, stats)]
        packed += _results([(None, grad) for grad in grads], widths)
        packed += [*map(_address, (*to_affine, to_weight, to_x)), False, len(more), *map(_address, more)]
        _call_with_statistics("project_backward", x, training, packed)
    else:
        packed = [*_parts(grads, hidden), 0, 1, *_candidate(x, None, weight, *affine, stats, 0)]
        packed += [*map(_address, (*to_affine, to_weight, to_x)), *_operands(more)]
        _call_with_statistics("mix_backward", x, training, packed)
    return to_x, *_split(to_weight, widths), *(each for to in to_affine for each in _split(to, widths))


def _rms_norm(hidden, eps):
    """Divide images by the root of (mean square over channels + eps), in place; returns the factors."""
    scales = [_image(h, 1) for h in hidden]
    for h, scale in zip(hidden, scales, strict=True):
        _call("rms_norm", h, [_pixels(h), h.shape[1], bits(eps), *map(_address, (h, scale))])
    return scales


def _rms_norm_backward(grads, hidden, scales):
    """From gradients of the scaled images `hidden` make those of the images before, in place."""
    for grad, h, scale in zip(grads, hidden, scales, strict=True):
        _call("rms_norm_backward", h, [_pixels(h), h.shape[1], *map(_address, (grad, h, scale))])


# ------------------------------------------------------------------------------- parameters and statistics of norms


def check_widths(width, weight, norms=()):
    """Raise ValueError unless a convolution fits its images and its batch norms: C++ reads what it is given."""
    channels = sum(norm.num_features for norm in norms) if norms else weight.shape[0]
    if (channels, width) != weight.shape[:2]:
        fit = f"images of {width} channels and batch norms of {channels}"
        raise ValueError(f"a convolution must fit {fit}, got a weight {tuple(weight.shape)}")


def check_sizes(sizes):
    """Raise ValueError unless images that are to lie side by side are of one size."""
    if len(set(sizes)) > 1:
        raise ValueError(f"images side by side must be of one size, got {', '.join(map(str, sizes))}")


def _joined(like, tensors):
    """Weights, scales or shifts one after the other; None where batch norms have none."""
    if tensors[0] is None:
        return None
    tensors = [x.contiguous() for x in tensors]
    if len(tensors) == 1:
        return tensors[0]
    if len({x.shape[1:] for x in tensors}) > 1:
        raise ValueError(
            f"convolutions of one image must read all its channels, got weights {[tuple(x.shape) for x in tensors]}"
        )
    whole = empty(like, sum(map(len, tensors)), *tensors[0].shape[1:])
    _side_by_side(whole, 1, False, map(_address, tensors), [x.numel() for x in tensors])
    return whole


def _split(gradient, widths):
    """The gradients of what `_joined` has joined."""
    return [None] * len(widths) if gradient is None else list(gradient.split(widths))


def _statistics(like, norms, candidates, C, K):
    """Room for the statistics of candidates with weights (C, K): mean v, var v, s (C each), m (K), W S (C, K).

    In evaluation mean and s are those of the running statistics; else C++ fills in all, var the unbiased one.
    """
    stats = empty(like, candidates, 3 * C + K + C * K, dtype=torch.float64)
    if not norms[0].training:
        if type(like) is Place:
            raise Unsupported
        stats[:, :C] = torch.cat([norm.running_mean for norm in norms]).view(candidates, C)
        var = torch.cat([norm.running_var for norm in norms]).view(candidates, C)
        stats[:, 2 * C : 3 * C] = (var.double() + EPS).rsqrt()
    return stats


def _track(like, norms, stats, C, step=None):
    """Update the running statistics by those that C++ has filled in; from one norm's to the next one's it is a step."""
    if not norms[0].training:
        return
    packed, element = [len(norms)], 0
    for norm in norms:
        buffers = norm._buffers
        running, width = buffers["running_mean"], norm.num_features
        packed += [width, _element(stats, element), running.data_ptr()]
        packed += [_element(stats, element + C), buffers["running_var"].data_ptr()]
        packed.append(buffers["num_batches_tracked"].data_ptr())
        element += width if step is None else step
    _call("track", like, packed, again=False)


# ------------------------------------------------------------------------------------------------------ C++ calls


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def _saved(ctx):
    """What forward has saved, laid out as it was then: hooks on saved tensors may have changed that.

    Only to be asked for once, which is what torch.utils.checkpoint allows.
    """
    return [x if x is None or x.dim() != 4 else _channels_last(x) for x in ctx.saved_tensors]


def _image(x, C, H=None, W=None):
    """An uninitialised image of C channels, else like x: channels-last and dense, with some room behind it.

    glibc finds an aligned block only where there are up to 96 bytes more, which small objects take from those that are
    free: where images were, none of the same size would fit. Into these fit most gradients, which have no such room.
    """
    N, _, *size = x.shape
    H, W = H or size[0], W or size[1]
    if type(x) is Place:
        return empty_image(x, N, C, H, W)
    return torch.empty(N * C * H * W + _ROOM, dtype=x.dtype).as_strided_((N, C, H, W), (C * H * W, 1, W * C, C))


def _like(x):
    return empty_image(x, *x.shape)


def _zeros(x, H, W):
    if type(x) is Place:
        raise Unsupported
    return _image(x, x.shape[1], H, W).zero_()


def _parts(images, masks=()):
    """An `Operand`: images side by side, whose elements count where a mask is positive."""
    packed = [len(images)]
    for k, image in enumerate(images):
        packed += [image.data_ptr(), masks[k].data_ptr() if masks else 0, 0, image.shape[1]]
    return packed


def _sums(sums):
    """The same of sums (x, mask, more): x where the mask is positive, plus more; mask and more may be None."""
    packed = [len(sums)]
    for image, mask, more in sums:
        packed += [image.data_ptr(), _address(mask), _address(more), image.shape[1]]
    return packed


def _operands(images):
    """A list of an operand each."""
    return [len(images), *(number for image in images for number in _parts([image]))]


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _element(tensor, k):
    """The address of the k-th number of a contiguous tensor."""
    return tensor.data_ptr() + k * tensor.element_size()


def _call_with_statistics(name, image, training, packed):
    if training and _pixels(image) == 1:
        raise ValueError(f"batch norm needs more than one value of each channel in training, got {tuple(image.shape)}")
    _call(name, image, [_pixels(image), training, *packed])


def _pixels(image):
    return image.numel() // image.shape[1]


@functools.cache
def _function(name):
    return getattr(library(), f"fast_cell_{name}")


def _call(name, like, packed, again=True):
    call(_function(name), like.dtype == torch.float64, like, packed, again)
