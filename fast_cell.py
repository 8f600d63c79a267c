"""A cell of the supernet computed state by state instead of edge by edge: the same function, several times faster.

`model_search.Cell` and its `MixedOp` edges say what a cell is and hold its parameters and buffers; `forward` here
computes it from them with the work shared that the edges have in common:

    - every state goes through ReLU and pooling once, and a pooled state is normalised once, for all edges that leave
      it: its batch norm has no parameters. The running statistics of every edge are updated all the same.
    - the first 1x1 convolutions of all involutions that read a state are one convolution, batch norm and ReLU; the
      RMS of the hidden features is taken where they are.
    - a node is made in one go from everything that enters it, as a weighted sum of plain and of normalised terms

          node = sum_t alpha_t x_t + sum_k alpha_k norm_k(W_k z_k)

      where W_k z_k is the last 1x1 convolution of a candidate, which is never written to memory on the CPU.
    - the plain terms of a state (itself, its pooled images) are weighted and summed for all nodes in one sweep.

An operation of another class than those of operations.py, one with hooks, or one whose batch norm is not as `OPS`
makes it is a plain term: its own forward is called. Two backends do the work, with the same functions (`heads`,
`involutions`, `depthwise`, `spread`, `mix`): fast_cell_cpu.py, which cannot be differentiated twice, and
fast_cell_torch.py.
"""

import functools
import logging
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import fast_cell_torch
import involution
from involution import RMS_EPS, is_watched
from involution_ops import nobody_watches
from operations import DilConv, FactorizedReduce, Identity, InvoBN, SepConv

logger = logging.getLogger(__name__)


class Term(NamedTuple):
    """What one candidate adds to a node: its input, or norm(weight * input) where it ends in a convolution."""

    input: torch.Tensor  # (N, K, H, W)
    weight: torch.Tensor | None = None  # (C, K, 1, 1)
    norm: nn.BatchNorm2d | None = None


def forward(cell, s0, s1, weights):
    """The forward of a `model_search.Cell`: two feature maps and (edges, primitives) -> (N, multiplier * C, H', W')."""
    states = [cell.preprocess0(s0), cell.preprocess1(s1)]
    backend = choose_backend(states[0])
    edges, alphas = iter(cell._ops), iter(weights.unbind())
    into = [[(next(edges), next(alphas).unbind()) for _ in range(2 + node)] for node in range(cell._steps)]
    parts, linear = [[] for _ in into], [[] for _ in into]  # of each node: images, and (alpha, Term)
    expected = {}  # shape and dtype of each node, and the operation that they come from
    for node in range(cell._steps):
        for j in range(len(states) - (1 if node else 2), len(states)):
            plain = []
            leaving = {n: into[n][j][0] for n in range(node, cell._steps)}
            for n, k, term in _expand(states[j], leaving, cell.training, backend):
                _check(term, leaving[n]._ops[k], expected.setdefault(n, (*_form(term), leaving[n]._ops[k])))
                alpha = into[n][j][1][k]
                if term.weight is None:
                    plain.append((n, alpha, term.input))
                else:
                    linear[n].append((alpha, term))
            for n, part in _spread(plain, backend):
                parts[n].append(part)
        states.append(_sum(parts[node], linear[node], backend))
        parts[node] = linear[node] = None  # what is not needed for backward is freed
    return torch.cat(states[-cell._multiplier :], dim=1)


def choose_backend(x):
    """The module that serves this tensor: fast_cell_cpu for float32 and float64 where involutions run in C++ too.

    Under PyTorch's modes and transforms, as for involutions, plain PyTorch does: they see into it.
    """
    if x.dtype not in (torch.float32, torch.float64) or x.numel() == 0 or not nobody_watches(x):
        return fast_cell_torch
    usual = involution.backend() == "cpu" and not torch.is_autocast_enabled("cpu")
    return _cpu_backend() if usual else fast_cell_torch


@functools.cache
def _cpu_backend():
    import fast_cell_cpu

    try:
        fast_cell_cpu.library()
    except fast_cell_cpu.BuildError as error:
        logger.warning("supernet: no C++ backend (%s); plain PyTorch is used, which is slower", error)
        return fast_cell_torch
    return fast_cell_cpu


def _form(term):
    """(N, C, H, W) and dtype of what a term adds to its node."""
    N, C, H, W = term.input.shape
    return (N, C if term.weight is None else len(term.weight), H, W), term.input.dtype


def _check(term, op, expected):
    """Raise ValueError unless an operation's result is like that of the first one that entered the node."""
    shape, dtype = _form(term)
    if (shape, dtype) != expected[:2]:
        names = type(expected[2]).__name__, type(op).__name__
        raise ValueError(
            f"operations that enter a node must agree in shape and dtype: {names[0]} gives {expected[0]}, "
            f"{expected[1]}, but {names[1]} gives {shape}, {dtype}"
        )


def _spread(plain, backend):
    """(node, image) of what the plain terms (node, alpha, image) of a state add up to, for every node they enter."""
    images, alphas = {}, defaultdict(dict)  # by the address of the image: itself; its alphas by node
    for n, alpha, x in plain:
        images[id(x)] = x
        alphas[id(x)][n] = alphas[id(x)][n] + alpha if n in alphas[id(x)] else alpha
    groups = defaultdict(list)  # images that enter the same nodes
    for key, of_node in alphas.items():
        groups[tuple(of_node)].append(key)
    for nodes, keys in groups.items():
        matrix = torch.stack([alphas[key][n] for n in nodes for key in keys]).view(len(nodes), len(keys))
        yield from zip(nodes, backend.spread([images[key] for key in keys], matrix), strict=True)


def _sum(parts, linear, backend):
    """A node from its parts and from its linear terms (alpha, Term), which go by the width of their input."""
    groups = defaultdict(list)
    for alpha, term in linear:
        groups[term.input.shape[1]].append((alpha, term))
    alphas = [torch.stack([alpha for alpha, _ in group]) for group in groups.values()]
    return backend.mix(parts, [[term for _, term in group] for group in groups.values()], alphas)


# ------------------------------------------------------------------------------------- the terms of each primitive


def _expand(x, edges, training, backend):
    """(node, primitive, Term) of every candidate on the edges {node: MixedOp} that leave state x (N, C, H, W)."""
    places = defaultdict(list)
    for node, edge in edges.items():
        for k in edge._computed:
            op = edge._ops[k]
            places[_kind(op, training)].append((node, k, op))
    relu = functools.cache(lambda: F.relu(x))
    for (kind, *_), found in places.items():
        terms = _TERMS[kind](x, relu, [op for _, _, op in found], backend)
        for (node, k, _), term in zip(found, terms, strict=True):
            yield node, k, term


def _kind(op, training):
    """A key that is equal for operations whose work can be shared, or ('any',) where only their own forward will do."""
    modules = _with_descendants(op, [])
    if tuple(map(type, modules)) not in _structures() or any(map(is_watched, modules)):
        return ("any",)
    for parent, m in zip([None, *modules], modules, strict=False):
        if type(m) is nn.BatchNorm2d and not _is_bare(m, training):
            return ("any",)
        if type(m) is nn.Conv2d and not _is_usual(m, biased=type(parent) is involution._Conv):
            return ("any",)
    if type(op) is nn.Sequential:
        pool = modules[1]
        return "pool", type(pool), *(str(getattr(pool, name)) for name in pool.__constants__)
    if type(op) is InvoBN:
        kernel_norm = op.op[1].kernel_norm
        return ("involution", op.op[1].stride, kernel_norm) if kernel_norm in _RMS_EPS else ("any",)
    return _KINDS[type(op)], op.op[1].stride if type(op) in _STRIDED else None


_KINDS = {
    Identity: "skip",
    FactorizedReduce: "reduce",
    DilConv: "separable",
    SepConv: "separable_twice",
}
_STRIDED = DilConv, SepConv
_RMS_EPS = {"none": None} | RMS_EPS


@functools.cache
def _structures():
    """The classes of the modules in each operation whose work is shared, as OPS makes them in a supernet."""
    with torch.device("meta"):
        operations = [Identity(), FactorizedReduce(4, 4, False), DilConv(4, 4, 3, 1, 2, 2, False)]
        operations += [SepConv(4, 4, 3, 1, 1, False), *(InvoBN(4, 3, stride, 1, False) for stride in (1, 2))]
        operations += [nn.Sequential(pool(3), nn.BatchNorm2d(4)) for pool in (nn.MaxPool2d, nn.AvgPool2d)]
    return {tuple(map(type, operation.modules())) for operation in operations}


def _is_usual(conv, biased):
    """Whether a convolution is a 1x1, or a depthwise one that keeps the image's size up to its stride."""
    if conv.padding_mode != "zeros" or (conv.bias is not None) != biased:
        return False
    (K, width), (s, _), (d, _) = conv.kernel_size, conv.stride, conv.dilation
    if K == width == 1 and conv.groups == 1:
        return conv.stride == (1, 1) and conv.padding == (0, 0)
    depthwise = conv.groups == conv.in_channels == conv.out_channels and K == width and K % 2 == 1
    return depthwise and (conv.stride, conv.dilation, conv.padding) == ((s, s), (d, d), (d * (K // 2),) * 2)


def _with_descendants(module, found):
    found.append(module)
    for child in module._modules.values():
        _with_descendants(child, found)
    return found


def _is_bare(norm, training):
    """Whether a batch norm is as OPS makes it in a supernet: statistics, no parameters, default constants."""
    standard = fast_cell_torch.EPS, fast_cell_torch.MOMENTUM, False, True, training
    return (norm.eps, norm.momentum, norm.affine, norm.track_running_stats, norm.training) == standard


def _any(x, relu, ops, backend):
    return [Term(op(x)) for op in ops]


def _skip(x, relu, ops, backend):
    return [Term(x)] * len(ops)


def _pool(x, relu, ops, backend):
    pooled = ops[0][0](x)
    norms = [norm for _, norm in ops]
    if not norms[0].training:  # the running statistics of the edges may differ
        return [Term(norm(pooled)) for norm in norms]
    normalized, mean, var = fast_cell_torch.batch_norm(pooled)
    fast_cell_torch.track(norms, [mean] * len(norms), [var] * len(norms))
    return [Term(normalized)] * len(norms)


def _reduce(x, relu, ops, backend):
    """FactorizedReduce is one 1x1 convolution of every second pixel and, beside it, of its diagonal neighbour."""
    H, W = x.shape[2:]
    shifted = F.pad(relu(), (-1, W % 2, -1, H % 2))
    pixels = torch.cat([relu()[:, :, ::2, ::2], shifted[:, :, ::2, ::2]], dim=1)
    C = x.shape[1]
    return [
        Term(pixels, torch.cat([_widened(op.conv_1.weight, 0, C), _widened(op.conv_2.weight, C, 0)]), op.bn)
        for op in ops
    ]


def _widened(weight, before, after):
    """The weight (C_out, C_in, 1, 1) of a convolution that also reads, and ignores, other channels."""
    return F.pad(weight, (0, 0, 0, 0, before, after))


def _involution(x, relu, ops, backend):
    layers = [op.op[1] for op in ops]
    outputs = backend.involutions(relu(), layers[0].avgpool(relu()), layers, _RMS_EPS[layers[0].kernel_norm])
    return [Term(output, op.op[2].weight, op.op[3]) for op, output in zip(ops, outputs, strict=True)]


def _separable(x, relu, ops, backend):
    return [Term(_depthwise(relu(), op.op[1], backend), op.op[2].weight, op.op[3]) for op in ops]


def _separable_twice(x, relu, ops, backend):
    terms = []
    for op in ops:
        (hidden,) = backend.heads(_depthwise(relu(), op.op[1], backend), [op.op[2].weight], [op.op[3]])
        terms.append(Term(_depthwise(hidden, op.op[5], backend), op.op[6].weight, op.op[7]))
    return terms


def _depthwise(x, conv, backend):
    return backend.depthwise(x, conv.weight, conv.stride[0], conv.dilation[0])


_TERMS = {
    "any": _any,
    "skip": _skip,
    "pool": _pool,
    "reduce": _reduce,
    "involution": _involution,
    "separable": _separable,
    "separable_twice": _separable_twice,
}
