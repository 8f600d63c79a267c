"""The functions of fast_cell.py on the CPU: float32 and float64, in C++, differentiable once.

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

The statistics are computed in double precision, from sums of single precision over short tiles: in float32 norm(v) is
as exact as PyTorch's where a channel's mean is up to a hundred times its spread (2.5e-4 there, relative), and less
exact beyond (1.4e-2 at a thousand times, PyTorch's 2.3e-3). The loops over pixels are in fast_cell_cpu.cpp.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch.autograd import Function

import involution_cpu
from fast_cell_torch import track
from involution_cpu import BuildError

__all__ = ["BuildError", "depthwise", "heads", "involutions", "library", "mix", "spread"]


def library():
    """Return the loaded library, building it first where there is none. Raises BuildError."""
    return involution_cpu.library(Path(__file__).with_suffix(".cpp"))


# ------------------------------------------------------------------------------------------------------ functions


def heads(x, weights, norms):
    """[relu(norm_k(weight_k * x))] of x (N, C, H, W) and 1x1 convolutions (C_k, C, 1, 1)."""
    return _Heads.apply(norms, x, *weights)


def involutions(x, pooled, layers, rms_eps):
    """[layer(x)] of `Involution2d` layers of one stride, as fast_cell_torch.involutions."""
    geometry = [(layer.kernel_size, layer.stride, layer.dilation) for layer in layers]
    spans = [layer.conv2.conv for layer in layers]
    weights = [layer.conv1.conv.weight for layer in layers]
    weights += [span.weight for span in spans] + [span.bias for span in spans]
    return _Involutions.apply([layer.conv1.bn for layer in layers], geometry, rms_eps, x, pooled, *weights)


def depthwise(x, weight, stride, dilation):
    """Depthwise convolution of x (N, C, H, W) with weight (C, 1, K, K), padded to (N, C, ceil(H/s), ceil(W/s))."""
    return _Depthwise.apply(x, weight, stride, dilation)


def spread(images, alphas):
    """[sum_t alphas[n, t] * images[t]] for every row n of alphas."""
    return _Spread.apply(alphas, *images)


def mix(parts, linear, linear_alphas):
    """A node, as fast_cell_torch.mix."""
    tensors = list(parts)
    for terms in linear:
        tensors += [term.input for term in terms] + [term.weight for term in terms]
    norms = [[term.norm for term in terms] for terms in linear]
    return _Mix.apply(norms, len(parts), *linear_alphas, *tensors)


def _once_differentiable(backward):
    """Refuse create_graph=True: PyTorch's decorator of this name lets through what reaches no inner input."""

    @functools.wraps(backward)
    def once(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("the fast cells can be differentiated once only on the CPU; set network.fast = False")
        return backward(ctx, *grads)

    return once


class _Heads(Function):
    @staticmethod
    def forward(ctx, norms, x, *weights):
        x = _channels_last(x)
        hidden, ctx.stats = _heads(x, weights, norms)
        ctx.training = norms[0].training
        ctx.save_for_backward(x, *weights, *hidden)
        return tuple(hidden)

    @staticmethod
    @_once_differentiable
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        weights, hidden = saved[: len(grads)], saved[len(grads) :]
        return None, *_heads_backward(grads, x, weights, hidden, ctx.stats, ctx.training)


class _Involutions(Function):
    """The heads of the layers, then each layer's involution, so that x gathers its gradient in one go."""

    @staticmethod
    def forward(ctx, norms, geometry, rms_eps, x, pooled, *weights):
        ctx.is_pooled, x, pooled = pooled is not x, _channels_last(x), _channels_last(pooled)
        layers = _by_layer(weights, geometry)
        hidden, ctx.stats = _heads(pooled, weights[: len(layers)], norms)
        ctx.scales = None if rms_eps is None else _rms_norm(hidden, rms_eps)
        outputs = [
            involution_cpu.fused_forward(x, h, span, bias, *place)
            for h, (_, span, bias), place in zip(hidden, layers, geometry, strict=True)
        ]
        ctx.geometry, ctx.training = geometry, norms[0].training
        ctx.save_for_backward(x, pooled, *hidden, *weights)
        return tuple(outputs)

    @staticmethod
    @_once_differentiable
    def backward(ctx, *grads):
        n = len(grads)
        x, pooled, *saved = ctx.saved_tensors
        hidden, weights = saved[:n], saved[n:]
        to_x, to_hidden, to_span, to_bias = zip(
            *(
                involution_cpu.fused_backward(_channels_last(grad), x, h, span, bias, *place)
                for grad, h, (_, span, bias), place in zip(
                    grads, hidden, _by_layer(weights, ctx.geometry), ctx.geometry, strict=True
                )
            ),
            strict=True,
        )
        if ctx.scales is not None:
            _rms_norm_backward(to_hidden, hidden, ctx.scales)
        more = () if ctx.is_pooled else to_x
        to_pooled, *to_weight = _heads_backward(to_hidden, pooled, weights[:n], hidden, ctx.stats, ctx.training, more)
        to_x = sum(to_x[1:], to_x[0]) if ctx.is_pooled else to_pooled
        return None, None, None, to_x, to_pooled if ctx.is_pooled else None, *to_weight, *to_span, *to_bias


def _by_layer(weights, geometry):
    """(head, span, bias) of every layer."""
    n = len(geometry)
    return list(zip(weights[:n], weights[n : 2 * n], weights[2 * n :], strict=True))


class _Depthwise(Function):
    @staticmethod
    def forward(ctx, x, weight, stride, dilation):
        x, weight = _channels_last(x), weight.contiguous()
        N, C, H, W = x.shape
        ctx.problem = N, C, H, W, weight.shape[-1], stride, dilation
        ctx.save_for_backward(x, weight)
        output = _image(x, C, -(-H // stride), -(-W // stride))
        _call("depthwise", x, _numbers(ctx.problem), *_addresses(x, weight, output))
        return output

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grads = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip((x, weight), ctx.needs_input_grad, strict=False)
        ]
        tensors = _channels_last(grad), x, weight, *grads
        _call("depthwise_backward", x, _numbers(ctx.problem), *_addresses(*tensors))
        return *grads, None, None


class _Spread(Function):
    @staticmethod
    def forward(ctx, alphas, *images):
        images, alphas = [_channels_last(x) for x in images], alphas.contiguous()
        results = [_image(images[0], images[0].shape[1]) for _ in alphas]
        packed = [*_operands(images), len(results), *(x.data_ptr() for x in results), alphas.data_ptr()]
        _call_on_pixels("spread", images[0], packed)
        ctx.save_for_backward(alphas, *images)
        return tuple(results)

    @staticmethod
    @_once_differentiable
    def backward(ctx, *grads):
        (alphas, *images), grads = ctx.saved_tensors, [_channels_last(g) for g in grads]
        to_images = [torch.empty_like(x) if n else None for x, n in zip(images, ctx.needs_input_grad[1:], strict=True)]
        to_alphas = torch.empty_like(alphas, dtype=torch.float64)
        packed = [*_operands(images), *_operands(grads), alphas.data_ptr(), to_alphas.data_ptr()]
        _call_on_pixels("spread_backward", images[0], packed + [_address(x) for x in to_images])
        return to_alphas.to(alphas.dtype), *to_images


class _Mix(Function):
    """Arguments: norms of each group; how many parts; alphas of each group; parts; inputs, weights of each group."""

    @staticmethod
    def forward(ctx, norms, parts, *tensors):
        alphas, tensors = tensors[: len(norms)], list(tensors[len(norms) :])
        parts, tensors = [_channels_last(x) for x in tensors[:parts]], tensors[parts:]
        sizes, linear, ctx.stats = [len(group) for group in norms], [], []
        for group, n in zip(norms, sizes, strict=True):
            z, weights = [_channels_last(x) for x in tensors[:n]], [w.contiguous() for w in tensors[n : 2 * n]]
            tensors = tensors[2 * n :]
            linear.append((z, weights))
            ctx.stats.append(_statistics(group, n, *weights[0].shape[:2]))
        like, C = (parts[0], parts[0].shape[1]) if parts else (linear[0][0][0], len(linear[0][1][0]))
        node = _image(like, C)
        packed = [False, *_parts([node]), *_operands(parts), sum(sizes)]
        for (z, weights), alpha, stats in zip(linear, alphas, ctx.stats, strict=True):
            for x, weight, a, s in zip(z, weights, _items(alpha), _items(stats), strict=True):
                packed += [*_parts([x]), C, weight.data_ptr(), a, s]
        ctx.training = all(group[0].training for group in norms)
        _call_with_statistics("mix", node, ctx.training, packed)
        for group, stats in zip(norms, ctx.stats, strict=True):
            _track(group, stats, C)
        ctx.parts = len(parts)
        ctx.save_for_backward(*alphas, *(tensor for z, w in linear for tensor in (*z, *w)))
        return node

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad):
        grad, groups, needed = _channels_last(grad), len(ctx.stats), ctx.needs_input_grad[2:]
        alphas, tensors = ctx.saved_tensors[:groups], ctx.saved_tensors[groups:]
        grads = [torch.empty_like(x) if n else None for x, n in zip(tensors, needed[groups + ctx.parts :], strict=True)]
        left = iter(zip(tensors, grads, strict=True))
        to_alphas = [torch.empty_like(alpha, dtype=torch.float64) for alpha in alphas]
        packed = [*_parts([grad]), sum(len(alpha) for alpha in alphas)]
        for alpha, to_alpha, stats in zip(alphas, to_alphas, ctx.stats, strict=True):
            z, weights = [next(left) for _ in alpha], [next(left) for _ in alpha]
            places = zip(z, weights, _items(alpha), _items(to_alpha), _items(stats), strict=True)
            for (x, to_x), (weight, to_weight), a, to_a, s in places:
                packed += [*_parts([x]), len(weight), weight.data_ptr(), a, s]
                packed += [to_a, _address(to_weight), _address(to_x), 0]
        _call_with_statistics("mix_backward", grad, ctx.training, packed)
        return None, None, *(to_alpha.to(grad.dtype) for to_alpha in to_alphas), *[grad] * ctx.parts, *grads


def _heads(x, weights, norms):
    """[relu(norm_k(weight_k * x))], and the statistics that `_heads_backward` needs."""
    weight = torch.cat(weights)
    hidden, stats = [_image(x, len(w)) for w in weights], _statistics(norms, 1, *weight.shape[:2])
    packed = [True, *_parts(hidden), 0, 1, *_parts([x]), len(weight), weight.data_ptr(), 0, stats.data_ptr()]
    _call_with_statistics("mix", x, norms[0].training, packed)
    _track(norms, stats, len(weight))
    return hidden, stats


def _heads_backward(grads, x, weights, hidden, stats, training, more=()):
    """The gradient of x, plus all images in `more`, and those of the weights."""
    weight, grads, more = torch.cat(weights), [_channels_last(g) for g in grads], [_channels_last(g) for g in more]
    to_x, to_weight, to_alpha = torch.empty_like(x), torch.empty_like(weight), x.new_empty(1, dtype=torch.float64)
    packed = [*_parts(grads, hidden), 1, *_parts([x]), len(weight), weight.data_ptr(), 0, stats.data_ptr()]
    packed += [to_alpha.data_ptr(), to_weight.data_ptr(), to_x.data_ptr(), *_operands(more)]
    _call_with_statistics("mix_backward", x, training, packed)
    return to_x, *to_weight.split([len(w) for w in weights])


def _rms_norm(hidden, eps):
    """Divide images by the root of (mean square over channels + eps), in place; returns the factors."""
    scales = [_image(h, 1) for h in hidden]
    for h, scale in zip(hidden, scales, strict=True):
        numbers = ctypes.c_int64(_pixels(h)), ctypes.c_int64(h.shape[1]), ctypes.c_double(eps)
        _call("rms_norm", h, *numbers, *_addresses(h, scale))
    return scales


def _rms_norm_backward(grads, hidden, scales):
    """From gradients of the scaled images `hidden` make those of the images before, in place."""
    for grad, h, scale in zip(grads, hidden, scales, strict=True):
        numbers = ctypes.c_int64(_pixels(h)), ctypes.c_int64(h.shape[1])
        _call("rms_norm_backward", h, *numbers, *_addresses(grad, h, scale))


# ----------------------------------------------------------------------------------------- statistics of candidates


def _statistics(norms, candidates, C, K):
    """Room for the statistics of candidates with weights (C, K): mean v, var v, s (C each), m (K), W S (C, K).

    In evaluation the first two are the running statistics; else mix fills in all.
    """
    stats = torch.empty(candidates, 3 * C + K + C * K, dtype=torch.float64)
    if not norms[0].training:
        stats[:, :C] = torch.cat([norm.running_mean for norm in norms]).view(candidates, C)
        stats[:, C : 2 * C] = torch.cat([norm.running_var for norm in norms]).view(candidates, C)
    return stats


def _track(norms, stats, C):
    """Update the running statistics by those that mix has filled in."""
    if norms[0].training:
        widths, dtype = [norm.num_features for norm in norms], norms[0].running_mean.dtype
        mean, var = stats[:, :C].to(dtype).flatten(), stats[:, C : 2 * C].to(dtype).flatten()
        track(norms, mean.split(widths), var.split(widths))


# ------------------------------------------------------------------------------------------------------ C++ calls


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def _image(x, C, H=None, W=None):
    """An uninitialised image of C channels, else like x."""
    shape = len(x), C, H or x.shape[2], W or x.shape[3]
    return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)


def _parts(images, masks=()):
    """An `Operand`: images side by side, whose elements count where a mask is positive."""
    packed = [len(images)]
    for k, image in enumerate(images):
        packed += [image.data_ptr(), masks[k].data_ptr() if masks else 0, image.shape[1]]
    return packed


def _operands(images):
    """A list of an operand each."""
    return [len(images), *(number for image in images for number in _parts([image]))]


def _items(tensor):
    """The addresses of the slices of a contiguous tensor."""
    step = tensor.stride(0) * tensor.element_size()
    return range(tensor.data_ptr(), tensor.data_ptr() + step * len(tensor), step) if len(tensor) else ()


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(*tensors):
    return (ctypes.c_void_p(_address(tensor)) for tensor in tensors)


def _numbers(values):
    return (ctypes.c_int64 * len(values))(*values)


def _call_with_statistics(name, image, training, packed):
    if training and _pixels(image) == 1:
        raise ValueError(f"batch norm needs more than one value of each channel in training, got {tuple(image.shape)}")
    _call(name, image, ctypes.c_int64(_pixels(image)), ctypes.c_int64(training), _numbers(packed))


def _call_on_pixels(name, image, packed):
    _call(name, image, ctypes.c_int64(_pixels(image)), _numbers(packed))


def _pixels(image):
    return image.numel() // image.shape[1]


def _call(name, like, *arguments):
    if getattr(library(), f"fast_cell_{name}")(ctypes.c_int64(like.dtype == torch.float64), *arguments):
        raise MemoryError(f"fast_cell_{name} could not allocate its scratch memory")
