"""The three functions of fast_cell.py on the CPU: float32 and float64, in C++, differentiable once.

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

The statistics are computed in double precision. The loops over pixels are in fast_cell_cpu.cpp.
"""

import ctypes
from pathlib import Path

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import involution_cpu
from fast_cell_torch import EPS, track
from involution_cpu import BuildError

__all__ = ["BuildError", "depthwise", "heads", "library", "mix"]


def library():
    """Return the loaded library, building it first where there is none. Raises BuildError."""
    return involution_cpu.library(Path(__file__).with_suffix(".cpp"))


# ------------------------------------------------------------------------------------------------------ functions


def heads(x, weights, norms):
    """[relu(norm_k(weight_k * x))] of x (N, C, H, W) and 1x1 convolutions (C_k, C, 1, 1)."""
    return _Heads.apply(norms, x, *weights)


def depthwise(x, weight, stride, dilation):
    """Depthwise convolution of x (N, C, H, W) with weight (C, 1, K, K), padded to (N, C, ceil(H/s), ceil(W/s))."""
    return _Depthwise.apply(x, weight, stride, dilation)


def mix(plain, plain_alphas, linear, linear_alphas):
    """A node, as fast_cell_torch.mix."""
    tensors = [term.input for term in plain]
    for terms in linear:
        tensors += [term.input for term in terms] + [term.weight for term in terms]
    norms = [[term.norm for term in terms] for terms in linear]
    return _Mix.apply(norms, plain_alphas, *linear_alphas, *tensors)


class _Heads(Function):
    @staticmethod
    def forward(ctx, norms, x, *weights):
        x = _channels_last(x)
        weight = torch.cat(weights).flatten(1).double()  # (sum of C_k, C)
        stats = _Statistics([x], weight[None], norms)
        s = stats.s[0]
        hidden = [_image(x, len(w)) for w in weights]
        matrix, bias = (s[:, None] * weight).to(x.dtype), (-s * stats.mean_v[0]).to(x.dtype)
        _combine(x, [(hidden, True, bias, [(matrix, [(x, None)])])])
        ctx.stats, ctx.matrix = stats, matrix
        ctx.save_for_backward(x, *weights, *hidden)
        return tuple(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        weights, hidden = saved[: len(grads)], saved[len(grads) :]
        grads = [(_channels_last(g), h) for g, h in zip(grads, hidden, strict=True)]  # zero where h is
        M, G = _multiply(x, [(grads, [(x, None)])], sums=1)
        weight = torch.cat(weights).flatten(1).double()[None]
        _, matrix, bias, grad_weight = ctx.stats.backward(weight, M, G)
        sources = [(ctx.matrix.T.contiguous(), grads)]
        if matrix is not None:
            sources.append((matrix[0].to(x.dtype), [(x, None)]))
        bias = None if bias is None else bias[0].to(x.dtype)
        grad_x = _image(x, x.shape[1])
        _combine(x, [([grad_x], False, bias, sources)])
        grad_weight = grad_weight[0].to(x.dtype)[:, :, None, None].split([len(w) for w in weights])
        return None, grad_x, *grad_weight


class _Depthwise(Function):
    @staticmethod
    def forward(ctx, x, weight, stride, dilation):
        x, weight = _channels_last(x), weight.contiguous()
        N, C, H, W = x.shape
        ctx.problem = N, C, H, W, weight.shape[-1], stride, dilation
        ctx.save_for_backward(x, weight)
        output = x.new_empty(N, C, -(-H // stride), -(-W // stride)).to(memory_format=torch.channels_last)
        _call("depthwise", x, _numbers(ctx.problem), *_addresses(x, weight, output))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grads = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip((x, weight), ctx.needs_input_grad, strict=False)
        ]
        tensors = _channels_last(grad), x, weight, *grads
        _call("depthwise_backward", x, _numbers(ctx.problem), *_addresses(*tensors))
        return *grads, None, None


class _Mix(Function):
    """Arguments: norms of each group; alphas of the plain terms and of each group; inputs; inputs, weights of each."""

    @staticmethod
    def forward(ctx, norms, plain_alphas, *tensors):
        groups = len(norms)
        alphas, tensors = [a.contiguous() for a in tensors[:groups]], list(tensors[groups:])
        plain = [_channels_last(tensors.pop(0)) for _ in plain_alphas]
        sources = [(alpha, [(x, None)]) for alpha, x in zip(plain_alphas.contiguous(), plain, strict=True)]
        saved, ctx.stats, ctx.scaled, bias = list(plain), [], [], 0
        for group, alpha in zip(norms, alphas, strict=True):
            n = len(group)
            z, weights, tensors = [_channels_last(x) for x in tensors[:n]], tensors[n : 2 * n], tensors[2 * n :]
            weight = torch.stack(weights).flatten(2).double()  # (terms, C, K)
            stats = _Statistics(z, weight, group)
            scale = alpha.double()[:, None] * stats.s  # (terms, C)
            scaled = (scale[:, :, None] * weight).to(z[0].dtype)
            bias = bias - (scale * stats.mean_v).sum(0)
            sources += [(matrix, [(x, None)]) for matrix, x in zip(scaled, z, strict=True)]
            ctx.stats.append(stats)
            ctx.scaled.append(scaled)
            saved += [*z, *weights]
        first = saved[0]
        node = _image(first, len(saved[-1]) if groups else first.shape[1])
        _combine(first, [([node], False, bias.to(node.dtype) if groups else None, sources)])
        ctx.save_for_backward(plain_alphas, *alphas, *saved)
        return node

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        groups, grad = len(ctx.stats), _channels_last(grad)
        plain_alphas, *tensors = ctx.saved_tensors
        alphas, tensors = tensors[:groups], tensors[groups:]
        plain, tensors = tensors[: len(plain_alphas)], tensors[len(plain_alphas) :]
        combinations, grad_tensors, grad_alphas = [], [], []
        for alpha, x in zip(plain_alphas, plain, strict=True):
            grad_tensors.append(torch.empty_like(x))
            combinations.append(([grad_tensors[-1]], False, None, [(alpha, [(grad, None)])]))
        grad_alphas.append(_dot(grad, plain).to(plain_alphas.dtype))
        for alpha, stats, scaled in zip(alphas, ctx.stats, ctx.scaled, strict=True):
            n = len(alpha)
            z, weights, tensors = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
            weight = torch.stack(weights).flatten(2).double()
            M, G = _multiply(grad, [([(grad, None)], [(x, None)]) for x in z], sums=1)
            q, matrix, bias, grad_weight = stats.backward(weight, M, G)
            turned = scaled.transpose(1, 2).contiguous()
            if matrix is not None:
                factor = alpha.double()[:, None]
                matrix, bias = (factor[:, :, None] * matrix).to(grad.dtype), (factor * bias).to(grad.dtype)
            for k, x in enumerate(z):
                grad_tensors.append(torch.empty_like(x))
                sources = [(turned[k], [(grad, None)])]
                if matrix is not None:
                    sources.append((matrix[k], [(x, None)]))
                combinations.append(([grad_tensors[-1]], False, None if bias is None else bias[k], sources))
            grad_alphas.append(q.sum(1).to(alpha.dtype))
            grad_weight = alpha.double()[:, None, None] * grad_weight
            grad_tensors += grad_weight.to(grad.dtype)[:, :, :, None, None].unbind()
        _combine(grad, combinations)
        return None, *grad_alphas, *grad_tensors


class _Statistics:
    """Mean and 1/sqrt(var + eps) of W z, by the statistics of z, for candidates of equal shape.

    Args:
        z: images (N, K, H, W), one a candidate; weight: W, (candidates, C, K) in float64.
        norms: their batch norms, side by side over (candidates, C).
    """

    def __init__(self, z, weight, norms):
        self.pixels = z[0].numel() // z[0].shape[1]
        self.training = norms[0].training
        if not self.training:
            self.mean_v = torch.cat([norm.running_mean for norm in norms]).double().view(weight.shape[:2])
            var_v = torch.cat([norm.running_var for norm in norms]).double().view(weight.shape[:2])
        else:
            if self.pixels == 1:
                raise ValueError(f"batch norm needs more than one value of each channel, got {tuple(z[0].shape)}")
            products, sums = _multiply(z[0], [([(x, None)], [(x, None)]) for x in z], sums=len(z))
            self.mean_z = sums / self.pixels
            covariance = products / self.pixels - self.mean_z[:, :, None] * self.mean_z[:, None, :]
            self.WS = weight @ covariance
            self.mean_v = (weight @ self.mean_z[:, :, None])[:, :, 0]
            var_v = (self.WS * weight).sum(2).clamp_min(0)  # not below zero by rounding
            self._track(norms, var_v)
        self.s = (var_v + EPS).rsqrt()

    def _track(self, norms, var_v):
        widths, dtype = [norm.num_features for norm in norms], norms[0].running_mean.dtype
        unbiased = var_v * (self.pixels / (self.pixels - 1))
        track(norms, *(values.flatten().to(dtype).split(widths) for values in (self.mean_v, unbiased)))

    def backward(self, weight, M, G):
        """(q, A, b, d W) at alpha = 1 from the M (candidates, C, K) and G (1, C) of the gradient g at the norm's output.

        The gradient of z is Wᵀ s g + A z + b. In evaluation A and b are None: the statistics are constants.
        """
        q = self.s * ((M * weight).sum(2) - self.mean_v * G)
        if not self.training:
            return q, None, None, self.s[:, :, None] * M
        of_z = self.s**2 * q / self.pixels
        matrix = -(weight.transpose(1, 2) @ (of_z[:, :, None] * weight))
        constant = of_z * self.mean_v - self.s * G / self.pixels
        bias = (weight.transpose(1, 2) @ constant[:, :, None])[:, :, 0]
        explained = G[:, :, None] * self.mean_z[:, None, :] + (self.s * q)[:, :, None] * self.WS
        return q, matrix, bias, self.s[:, :, None] * (M - explained)


# ------------------------------------------------------------------------------------------------------ C++ calls


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def _image(x, C):
    """An uninitialised image of C channels, else like x."""
    N, _, H, W = x.shape
    return torch.empty((N, C, H, W), dtype=x.dtype, memory_format=torch.channels_last)


def _combine(like, combinations):
    """Fill images by sums of products, each: (results side by side, relu, bias or None, [(matrix, parts)]).

    The matrix is (channels of the results, channels of the parts), or a scalar. Parts are [(image, mask or None)] side
    by side; an element of the image counts where the mask is positive.
    """
    packed = [len(combinations)]
    for results, relu, bias, sources in combinations:
        packed += [relu, 0 if bias is None else bias.data_ptr(), len(results)]
        for image in results:
            packed += [image.data_ptr(), image.shape[1]]
        packed.append(len(sources))
        for matrix, parts in sources:
            packed += [matrix.data_ptr(), matrix.dim() == 0]
            packed += _parts(parts)
    _call("combine", like, ctypes.c_int64(_pixels(like)), _numbers(packed))


def _multiply(like, products, sums):
    """Sums over pixels of a bᵀ for [(parts of a, parts of b)] of equal shapes, and of the first `sums` a alone.

    Returns (products, C_a, C_b) and (sums, C_a) in float64.
    """
    width_a, width_b = (sum(image.shape[1] for image, _ in parts) for parts in products[0])
    results = torch.empty(len(products), width_a, width_b, dtype=torch.float64)
    totals = torch.empty(sums, width_a, dtype=torch.float64)
    packed = [len(products)]
    for k, (a, b) in enumerate(products):
        total = totals.data_ptr() + 8 * k * width_a if k < sums else 0
        packed += [*_parts(a), *_parts(b), results.data_ptr() + 8 * k * width_a * width_b, total, 0]
    _call("multiply", like, ctypes.c_int64(_pixels(like)), _numbers(packed))
    return results, totals


def _dot(x, others):
    """The sum over all elements of x * other, for each: (others,) in float64."""
    results = torch.empty(len(others), dtype=torch.float64)
    packed = [len(others)]
    for k, other in enumerate(others):
        packed += [*_parts([(x, None)]), *_parts([(other, None)]), results.data_ptr() + 8 * k, 0, 1]
    _call("multiply", x, ctypes.c_int64(_pixels(x)), _numbers(packed))
    return results


def _parts(parts):
    packed = [len(parts)]
    for image, mask in parts:
        packed += [image.data_ptr(), 0 if mask is None else mask.data_ptr(), image.shape[1]]
    return packed


def _pixels(image):
    return image.numel() // image.shape[1]


def _numbers(values):
    return (ctypes.c_int64 * len(values))(*values)


def _addresses(*tensors):
    return (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)


def _call(name, like, *arguments):
    if getattr(library(), f"fast_cell_{name}")(ctypes.c_int64(like.dtype == torch.float64), *arguments):
        raise MemoryError(f"fast_cell_{name} could not allocate its scratch memory")
