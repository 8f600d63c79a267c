"""The operators `torch.ops.darts_involution.*`: choice of backend, registration with PyTorch, and derivatives.

    forward, grad_input, grad_weight: the passes of `involution.involution2d`, each other's derivatives.
    backward: grad_input and grad_weight at once, where nobody differentiates them again.
    fused_forward, fused_backward: those of `involution.involution2d_fused`.

Each has a schema, a fake implementation (torch.compile, torch.export), derivatives, a rule for torch.func.vmap and a
FLOP formula, and checks its arguments; the shortcuts at the end leave that to involution.py.
"""

import functools
import importlib
import logging
import operator
import os
import types

import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import register_flop_formula

from . import involution_arguments, involution_torch
from .involution_arguments import kernel_size_of, memory_format

BACKENDS = ("reference", "torch", "cpu", "triton")

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------- choice of backend


def backend(device="cpu"):
    """Return the name of the backend in use on `device`: 'reference', 'torch', 'cpu' or 'triton'.

    INVOLUTION_BACKEND forces one. Builds the CPU backend if it was not built yet; where that or Triton is not to be
    had, says so in one warning and returns 'torch'.

    Raises:
        ValueError: INVOLUTION_BACKEND names no backend, or one that cannot run here.
    """
    return _choose(torch.device(device).type, os.environ.get("INVOLUTION_BACKEND", ""))


@functools.cache
def _choose(device_type, forced):
    if forced and forced not in BACKENDS:
        raise ValueError(f"INVOLUTION_BACKEND must be one of {', '.join(BACKENDS)}, got {forced!r}")
    name = forced or {"cpu": "cpu", "cuda": "triton"}.get(device_type, "torch")
    reason = _unavailable(name, device_type)
    if reason and forced:
        raise ValueError(f"INVOLUTION_BACKEND={forced} cannot run on {device_type}: {reason}")
    if reason:
        logger.warning("involution: no %s backend (%s); plain PyTorch is used, which is slower", name, reason)
        return "torch"
    return name


def _unavailable(name, device_type):
    """Why the backend cannot run on this kind of device here; None where it can."""
    if name == "cpu" and device_type != "cpu":
        return "it needs tensors on the CPU"
    if name == "triton" and device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a CUDA device, or TRITON_INTERPRET=1"
    try:
        if name == "cpu":
            _module(name).library()
        elif name == "triton":
            _module(name).probe(device_type)
    except Exception as error:  # Triton's are of many kinds, down to those of the C compiler that it calls
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def _module(name):
    return importlib.import_module(f".involution_{name}", __package__)


def _passes(image):
    """The module whose functions serve this image."""
    if image.numel() == 0:
        return _zeros
    name = backend(image.device)
    if name == "reference":  # is differentiated by autograd, above the operators: here only on a direct call
        return involution_torch
    module = _module(name)
    return module if image.dtype in getattr(module, "DTYPES", (image.dtype,)) else involution_torch


_zeros = types.SimpleNamespace()  # of images without a pixel: the passes under their names, filled in by `_define`


# ------------------------------------------------------------------------------------------------ definitions


_library = torch.library.Library("darts_involution", "DEF")
_ops = torch.ops.darts_involution


def _define(schema, check, implementation, empty, flops):
    """Define an operator by the check of its arguments, the real and fake implementation, and its number of FLOPs."""
    name = schema.partition("(")[0]
    qualified = f"darts_involution::{name}"
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, lambda *args: implementation(*args[:-2], *check(*args)), "CompositeExplicitAutograd")
    setattr(_zeros, name, lambda *args: tree_map(torch.zero_, empty(*args)))
    packet = getattr(_ops, name)
    torch.library.register_fake(qualified, empty, lib=_library)
    torch.library.register_vmap(qualified, functools.partial(_one_by_one, packet), lib=_library)
    register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None: flops(*args))


def _one_by_one(function, info, in_dims, *args):
    """torch.func.vmap by a loop: an operator has a batch of its own, and span gradients are sums over it."""
    if info.batch_size == 0:
        raise ValueError("vmap over an involution needs at least one item, got a batch of 0")
    results = []
    for b in range(info.batch_size):
        results.append(function(*(a if d is None else a.select(d, b) for a, d in zip(args, in_dims, strict=True))))
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])


def _empty(image, *shape):
    """An uninitialised result (N, C, H, W): of the dtype and device of `image`, channels-last where that is."""
    return torch.empty(shape, dtype=image.dtype, device=image.device, memory_format=memory_format(image))


def _laid_out(result, image):
    """The result of a backend in the layout that `_empty` promised."""
    return result.contiguous(memory_format=memory_format(image))


# ------------------------------------------------------------------------------------------------------ passes


def _forward(input, weight, stride, dilation):
    return _laid_out(_passes(input).forward(input, weight, stride, dilation), input)


def _empty_forward(input, weight, stride, dilation):
    return _empty(input, *input.shape[:2], *weight.shape[3:])


def _grad_input(grad_output, weight, H, W, stride, dilation):
    return _laid_out(_passes(grad_output).grad_input(grad_output, weight, H, W, stride, dilation), grad_output)


def _empty_grad_input(grad_output, weight, H, W, stride, dilation):
    return _empty(grad_output, *grad_output.shape[:2], H, W)


def _grad_weight(grad_output, input, K, G, stride, dilation):
    result = _passes(input).grad_weight(grad_output, input, K, G, stride, dilation)
    return _laid_out(result.flatten(1, 2), input).unflatten(1, (G, K * K))


def _empty_grad_weight(grad_output, input, K, G, stride, dilation):
    N, _, Ho, Wo = grad_output.shape
    return _empty(input, N, G * K * K, Ho, Wo).unflatten(1, (G, K * K))


def _backward(grad_output, input, weight, stride, dilation):
    passes, K, G = _passes(input), kernel_size_of(weight), weight.shape[1]
    if hasattr(passes, "backward"):  # which lays them out itself
        return passes.backward(grad_output, input, weight, stride, dilation)
    to_input = passes.grad_input(grad_output, weight, *input.shape[2:], stride, dilation)
    to_weight = passes.grad_weight(grad_output, input, K, G, stride, dilation)
    to_weight = _laid_out(to_weight.flatten(1, 2), input).unflatten(1, (G, K * K))
    return _laid_out(to_input, input), to_weight


def _empty_backward(grad_output, input, weight, stride, dilation):
    to_weight = _empty_grad_weight(grad_output, input, kernel_size_of(weight), weight.shape[1], stride, dilation)
    return _empty(input, *input.shape), to_weight


def _fused_forward(input, hidden, span_weight, span_bias, K, stride, dilation):
    passes = _passes(input)
    return _laid_out(passes.fused_forward(input, hidden, span_weight, span_bias, K, stride, dilation), input)


def _empty_fused_forward(input, hidden, span_weight, span_bias, K, stride, dilation):
    return _empty(input, *input.shape[:2], *hidden.shape[2:])


def _fused_backward(grad_output, input, hidden, span_weight, span_bias, K, stride, dilation):
    passes = _passes(input)
    to_input, to_hidden, to_weight, to_bias = passes.fused_backward(
        grad_output, input, hidden, span_weight, span_bias, K, stride, dilation
    )
    return _laid_out(to_input, input), _laid_out(to_hidden, hidden), to_weight, to_bias


def _empty_fused_backward(grad_output, input, hidden, span_weight, span_bias, K, stride, dilation):
    spans = (span.new_empty(span.shape) for span in (span_weight, span_bias))
    return _empty(input, *input.shape), _empty(hidden, *hidden.shape), *spans


# Multiply-adds, counted as two, of one pass with given weights: K*K for every channel of every output pixel.


def _flops(output, KK):
    return 2 * output.numel() * KK


def _span_flops(hidden, span_weight):
    return 2 * hidden.numel() * span_weight.shape[0]


def _fused_forward_flops(input, hidden, span_weight, span_bias, K, stride, dilation):
    output = hidden.numel() // hidden.shape[1] * input.shape[1]
    return 2 * output * K * K + _span_flops(hidden, span_weight)


def _fused_backward_flops(grad_output, input, hidden, span_weight, span_bias, K, stride, dilation):
    # two passes; the weights again, and their gradient into hidden and span_weight
    return 2 * _flops(grad_output, K * K) + 3 * _span_flops(hidden, span_weight)


_define(
    "forward(Tensor input, Tensor weight, int stride, int dilation) -> Tensor",
    involution_arguments.check,
    _forward,
    _empty_forward,
    lambda input, weight, *_: 2 * weight.numel() // weight.shape[1] * input.shape[1],
)
_define(
    "grad_input(Tensor grad_output, Tensor weight, SymInt H, SymInt W, int stride, int dilation) -> Tensor",
    involution_arguments.check_grad_input,
    _grad_input,
    _empty_grad_input,
    lambda grad_output, weight, *_: _flops(grad_output, weight.shape[2]),
)
_define(
    "grad_weight(Tensor grad_output, Tensor input, int K, int G, int stride, int dilation) -> Tensor",
    involution_arguments.check_grad_weight,
    _grad_weight,
    _empty_grad_weight,
    lambda grad_output, input, K, *_: _flops(grad_output, K * K),
)
_define(
    "backward(Tensor grad_output, Tensor input, Tensor weight, int stride, int dilation) -> (Tensor, Tensor)",
    involution_arguments.check_backward,
    _backward,
    _empty_backward,
    lambda grad_output, input, weight, *_: 2 * _flops(grad_output, weight.shape[2]),
)
_define(
    "fused_forward(Tensor input, Tensor hidden, Tensor span_weight, Tensor span_bias, int kernel_size, int stride, "
    "int dilation) -> Tensor",
    involution_arguments.check_fused,
    _fused_forward,
    _empty_fused_forward,
    _fused_forward_flops,
)
_define(
    "fused_backward(Tensor grad_output, Tensor input, Tensor hidden, Tensor span_weight, Tensor span_bias, "
    "int kernel_size, int stride, int dilation) -> (Tensor, Tensor, Tensor, Tensor)",
    involution_arguments.check_fused_backward,
    _fused_backward,
    _empty_fused_backward,
    _fused_backward_flops,
)


# ------------------------------------------------------------------------------------------------- derivatives


def _save_two(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.stride, ctx.dilation = inputs[-2:]


def _forward_backward(ctx, u):
    input, weight = ctx.saved_tensors
    s, d = ctx.stride, ctx.dilation
    if all(ctx.needs_input_grad[:2]) and not torch.is_grad_enabled():  # `backward` has no derivative
        run = _backward if nobody_watches(u, input, weight) else _ops.backward
        return *run(u, input, weight, s, d), None, None
    K, G, (H, W) = kernel_size_of(weight), weight.shape[1], input.shape[2:]
    to_input = _apply("grad_input", u, weight, H, W, s, d) if ctx.needs_input_grad[0] else None
    to_weight = _apply("grad_weight", u, input, K, G, s, d) if ctx.needs_input_grad[1] else None
    return to_input, to_weight, None, None


def _grad_input_backward(ctx, u):
    grad_output, weight = ctx.saved_tensors
    s, d = ctx.stride, ctx.dilation
    K, G = kernel_size_of(weight), weight.shape[1]
    to_grad_output = _apply("forward", u, weight, s, d) if ctx.needs_input_grad[0] else None
    to_weight = _apply("grad_weight", grad_output, u, K, G, s, d) if ctx.needs_input_grad[1] else None
    return to_grad_output, to_weight, None, None, None, None


def _grad_weight_backward(ctx, u):
    grad_output, input = ctx.saved_tensors
    s, d = ctx.stride, ctx.dilation
    to_grad_output = _apply("forward", input, u, s, d) if ctx.needs_input_grad[0] else None
    to_input = _apply("grad_input", grad_output, u, *input.shape[2:], s, d) if ctx.needs_input_grad[1] else None
    return to_grad_output, to_input, None, None, None, None


def _save_fused(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.kernel_size, ctx.stride, ctx.dilation = inputs[4:]


def _fused_forward_backward(ctx, u):
    input, hidden, span_weight, span_bias = ctx.saved_tensors
    K, s, d = ctx.kernel_size, ctx.stride, ctx.dilation
    if torch.is_grad_enabled():  # the gradients will be differentiated: make them of differentiable operators
        weight = involution_torch.span(hidden, span_weight, span_bias, K)
        to_input = _apply("grad_input", u, weight, *input.shape[2:], s, d)
        to_weight = _apply("grad_weight", u, input, K, weight.shape[1], s, d)
        gradients = to_input, *involution_torch.span_backward(to_weight, hidden, span_weight)
    else:
        watched = not nobody_watches(u, input, hidden, span_weight, span_bias)
        run = _ops.fused_backward if watched else _fused_backward
        gradients = run(u, input, hidden, span_weight, span_bias, K, s, d)
    return *gradients, None, None, None


def _apply(name, *args):
    """The differentiable operator, where torch.func is at work as the autograd.Function that it can transform."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _functions[name].apply(*args)
    return getattr(_ops, name)(*args)


_functions = {}
for _name, _derivative, _save in (
    ("forward", _forward_backward, _save_two),
    ("grad_input", _grad_input_backward, _save_two),
    ("grad_weight", _grad_weight_backward, _save_two),
    ("fused_forward", _fused_forward_backward, _save_fused),
):
    torch.library.register_autograd(f"darts_involution::{_name}", _derivative, setup_context=_save, lib=_library)
    _methods = {
        "forward": getattr(_ops, _name),
        "setup_context": _save,
        "backward": _derivative,
        "vmap": functools.partial(_one_by_one, functools.partial(_apply, _name)),
    }
    _methods = {name: staticmethod(method) for name, method in _methods.items()}
    _functions[_name] = type(f"involution_{_name}", (torch.autograd.Function,), _methods)


# ---------------------------------------------------------------------------------------------------- shortcuts
#
# PyTorch's dispatcher and its autograd around an operator registered from Python take 0.2 ms for both passes, longer
# than the work on a small image. Where nothing but autograd would see the operator, it is called without them.


def nobody_watches(*tensors):
    """Whether these are plain CPU tensors, and no mode, transform, tracer or compiler is at work."""
    if torch.compiler.is_compiling() or torch._C._len_torch_function_stack():
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() != _PLAIN_DISPATCH:
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TYPES or _keys_of(tensor).raw_repr() != _PLAIN_KEYS:
            return False
    return True


def _key_set(*names):
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, keys).raw_repr()


_keys_of = torch._C._dispatch_keys
# FlopCounterMode and its like, torch.func, torch.jit and inference mode each change what a thread dispatches to
_PLAIN_DISPATCH = _key_set("BackendSelect", "ADInplaceOrView")
# neither negated lazily (the imaginary part of a conjugate) nor zeros without memory, as some derivatives are
_PLAIN_KEYS = _key_set("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


class Involution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        _save_two(ctx, args, None)
        return _forward(*args)

    backward = staticmethod(_forward_backward)


class InvolutionFused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        _save_fused(ctx, args, None)
        return _fused_forward(*args)

    backward = staticmethod(_fused_forward_backward)


def involution(*args):
    """`torch.ops.darts_involution.forward(*args)`, by the shortest way."""
    return Involution.apply(*args) if nobody_watches(*args[:2]) else _apply("forward", *args)


def involution_fused(*args):
    """`torch.ops.darts_involution.fused_forward(*args)`, by the shortest way."""
    return InvolutionFused.apply(*args) if nobody_watches(*args[:4]) else _apply("fused_forward", *args)
