"""Cells computed state by state instead of edge by edge: the same function, in less time and memory.

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

`nodes_of_cells` does the same on a CPU for all cells of a network, those of a genotype (`model.Cell`) or of a supernet:
what a state's edges share is computed once, and a node is made in one go, with the factors of drop path. Besides,

    - a feature map is handed on as the nodes that it consists of. The preprocessing blocks that read it, those of the
      next two cells, are one 1x1 convolution of all of them.
    - ReLU is no pass of its own: whatever makes a state writes its positive part too, where an edge reads that.

fast_network.py calls it, and makes programs of it.

An operation of another class than those of operations.py, one with hooks, or one whose layers are not as `OPS` makes
them is a plain term: its own forward is called, and nothing is recorded. Two backends do the work:
kernels/fast_cell_torch.py, and kernels/fast_cell_cpu.py, which cannot be differentiated twice and alone has what
`nodes_of_cells` needs besides (`node`, `project`, `normalize`, `convolved`); elsewhere derived cells are plain ones.
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import involution
from involution import RMS_EPS, is_reference_forced, is_watched
from kernels import build, fast_cell_torch, recorded
from kernels.involution_ops import nobody_watches
from operations import DilConv, FactorizedReduce, Identity, InvoBN, ReLUConvBN, SepConv

logger = logging.getLogger(__name__)


class Term(NamedTuple):
    """What one candidate adds to a node: its input, or norm(weight * input) where it ends in a convolution."""

    input: torch.Tensor  # (N, K, H, W)
    weight: torch.Tensor | None = None  # (C, K, 1, 1)
    norm: nn.BatchNorm2d | None = None


def forward(cell, s0, s1, weights, factors=None):
    """The forward of a `model_search.Cell`: two feature maps and (edges, primitives) -> (N, multiplier * C, H', W').

    factors: of drop path, what each edge's sum is multiplied with, (N, 1, 1, 1) for each.
    """
    states = [cell.preprocess0(s0), cell.preprocess1(s1)]
    backend = choose_backend(states[0])
    into = _by_node(map(torch.unbind, weights.unbind()), cell._steps)
    factors = _by_node(factors or [None] * len(cell._ops), cell._steps)
    edges = _by_node(cell._ops, cell._steps)
    parts, linear = [[] for _ in into], [[] for _ in into]  # of each node: images, and (alpha, Term, factor)
    expected = {}  # shape and dtype of each node, and the operation that they come from
    for node in range(cell._steps):
        for j in range(len(states) - (1 if node else 2), len(states)):
            plain = []
            ops = [(n, k, edges[n][j]._ops[k]) for n in range(node, cell._steps) for k in edges[n][j]._computed]
            ops = [((n, k, op), op, _kind(op, cell.training, False, states[j].dtype)) for n, k, op in ops]
            relu = functools.cache(functools.partial(F.relu, states[j]))
            for (n, k, op), term in _expand(states[j], relu, ops, backend):
                _check(term, op, expected.setdefault(n, (*_form(term), op)))
                alpha = into[n][j][k]
                if term.weight is None:
                    plain.append((n, alpha, term.input))
                else:
                    linear[n].append((alpha, term, factors[n][j]))
            for n, part in _spread(plain, _stack, backend):
                parts[n].append(part if factors[n][j] is None else part * factors[n][j])
        states += backend.mix(*_arguments_of_mix(parts[node], linear[node], _stack))
        parts[node] = linear[node] = None  # what is not needed for backward is freed
    return torch.cat(states[-cell._multiplier :], dim=1)


def _by_node(of_edges, steps):
    """What there is of each edge, by the node that it enters and the state that it reads."""
    of_edges = iter(of_edges)
    return [[next(of_edges) for _ in range(2 + node)] for node in range(steps)]


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
    from kernels import fast_cell_cpu

    try:
        fast_cell_cpu.library(), recorded.library()
    except build.BuildError as error:
        logger.warning("cells: no C++ backend (%s); plain PyTorch is used, which is slower", error)
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


def _spread(plain, stack, backend):
    """(node, image) of what the plain terms (node, alpha, image) of a state add up to, for every node they enter.

    stack: a function (alphas, image, shape) -> the alphas in this shape and the image's dtype.
    """
    images, alphas = {}, defaultdict(dict)  # of an image's address and how often it enters a node: itself; its alphas
    for n, alpha, x in plain:
        key = next((id(x), times) for times in count() if n not in alphas[id(x), times])
        images[key], alphas[key][n] = x, alpha
    groups = defaultdict(list)  # images that enter the same nodes
    for key, of_node in alphas.items():
        groups[tuple(of_node)].append(key)
    for nodes, keys in groups.items():
        matrix = stack([alphas[key][n] for n in nodes for key in keys], images[keys[0]], (len(nodes), len(keys)))
        yield from zip(nodes, backend.spread([images[key] for key in keys], matrix), strict=True)


def _stack(alphas, image, shape):
    return torch.stack(alphas).view(shape).to(image.dtype)


def _arguments_of_mix(parts, linear, stack):
    """For a node of parts and of linear terms (alpha, Term, factor), which go by the width of their input."""
    groups = defaultdict(list)
    for alpha, term, factor in linear:
        groups[term.input.shape[1]].append((alpha, term, factor))
    alphas, terms, factors = ([[each[k] for each in group] for group in groups.values()] for k in range(3))
    alphas = [stack(each, of_group[0].input, (len(each),)) for each, of_group in zip(alphas, terms, strict=True)]
    return parts, terms, alphas, factors


# -------------------------------------------------------------------------------------------- cells of a network


class State(NamedTuple):
    """A node's image (N, C, H, W), or None where nothing reads it but ReLU; and its positive part, made when needed."""

    plain: torch.Tensor | None
    relu: Callable


class _Edge(NamedTuple):
    """An operation of a cell, between two of its states; in a supernet one of several."""

    source: int
    node: int
    op: nn.Module
    kind: tuple  # `_kind` of the operation
    place: tuple  # (edge, primitive) in a supernet's alphas


class _Plan(NamedTuple):
    """A cell, and what is known of it; no edges where only its own forward will do."""

    cell: nn.Module
    edges: list | None
    preprocess: list | None  # the `_kind` of either
    concat: range | None  # the states that it hands on


class Given(NamedTuple):
    """What cells need besides images."""

    drop_prob: float
    draw: Callable  # makes the factors of drop path of a number of edges, (N, 1, 1, 1) each
    weights: tuple | None = None  # a supernet's, of its normal and its reduction cells: (edges, primitives)


def _readers(plans, inputs):
    """(cell, input) of those that read each of one or two inputs of the first cell; and each cell's output."""
    # a feature map is the second input of the cell after it, and the first one of the cell after that
    readers = [[(k, j) for k, j in ((i, 1), (i + 1, 0)) if k < len(plans)] for i in range(len(plans) + 1)]
    return [[(0, 0)], readers[0]] if inputs == 2 else [[(0, 0), *readers[0]]], readers[1:]


def states_of_inputs(stems, plans, x, backend):
    """States of the first cell's inputs; stems: functions (image, what is wanted of it, backend) -> State."""
    states = []
    for stem, wanted in zip(stems, wanted_of_inputs(plans, len(stems)), strict=True):
        states.append(stem(x, wanted, backend))
        x = states[-1].plain
    return states


def wanted_of_inputs(plans, inputs):
    """Of each input of the first cell, as `_map_wanted`; the first of two stems is what the second one reads."""
    readers, _ = _readers(plans, inputs)
    return [_map_wanted(each, plans, each is not readers[-1]) for each in readers]


def nodes_of_cells(inputs, plans, given, wanted, backend):
    """(k, the nodes of cell k) for k in wanted; inputs: one State or two."""
    of_inputs, of_outputs = _readers(plans, len(inputs))
    states, (nodes0, nodes1) = {}, ([inputs[0]], [inputs[-1]])
    for state, readers in zip(inputs, of_inputs, strict=True):
        states.update(_preprocess([state], readers, plans, backend))
    for k, (plan, readers) in enumerate(zip(plans, of_outputs, strict=True)):
        if plan.edges is None:
            nodes = [_own_state(plan.cell(as_one(nodes0, backend), as_one(nodes1, backend), given.drop_prob))]
        else:
            compute = _mixed_nodes if given.weights else _nodes
            of_map = _map_wanted(readers, plans, k in wanted)
            nodes = compute(plan, [states.pop((k, 0)), states.pop((k, 1))], given, of_map, backend)
        nodes0, nodes1 = nodes1, nodes
        if k in wanted:
            yield k, nodes
        states.update(_preprocess(nodes, readers, plans, backend))


def plan_of(cell, dtype):
    """The _Plan of a `model.Cell`."""
    if is_watched(cell):
        return _Plan(cell, None, None, None)
    ops = enumerate(zip(cell._indices, cell._ops, strict=True))
    edges = [_Edge(j, 2 + e // 2, op, _kind(op, cell.training, True, dtype), (e, None)) for e, (j, op) in ops]
    return _Plan(cell, edges, _preprocess_kinds(cell, dtype), cell._concat)


def mixed_plan_of(cell, dtype):
    """The _Plan of a `model_search.Cell`."""
    if any(map(is_watched, (cell, *cell._ops))):
        return _Plan(cell, None, None, None)
    places = [(j, 2 + n) for n in range(cell._steps) for j in range(2 + n)]
    edges = [
        _Edge(j, n, edge._ops[k], _kind(edge._ops[k], cell.training, False, dtype), (e, k))
        for e, (edge, (j, n)) in enumerate(zip(cell._ops, places, strict=True))
        for k in edge._computed
    ]
    return _Plan(cell, edges, _preprocess_kinds(cell, dtype), range(2 + cell._steps)[-cell._multiplier :])


def _preprocess_kinds(cell, dtype):
    return [_kind(op, cell.training, True, dtype) for op in (cell.preprocess0, cell.preprocess1)]


def _map_wanted(readers, plans, is_output):
    """Whether anybody reads a feature map itself, and whether its positive part; readers: (cell, input) each."""
    shared = [plans[i].edges is not None and plans[i].preprocess[j][0] in _PREPROCESS for i, j in readers]
    return is_output or False in shared, True in shared


def state_of_stem(module, x, wanted, backend):
    """The State of a stem, whose last layers are a convolution and a batch norm."""
    if not is_usual_stem(module, x.dtype):
        return _own_state(module(x))
    *before, conv, norm = module
    for layer in before:
        x = layer(x)
    if is_of_images(conv, x):
        return state_of(iter(backend.convolved(x, conv.weight, norm, wanted)), wanted)
    return state_of(iter(backend.normalize(conv(x), norm, wanted)), wanted)


def is_of_images(conv, x):
    """Whether a convolution is a usual 3x3 one, of images that need no gradient and, as nine are kept, few channels."""
    form = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    usual = form == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and conv.bias is None
    return usual and x.shape[1] == conv.in_channels <= 4 and x.dtype == conv.weight.dtype and not x.requires_grad


def is_usual_stem(module, dtype):
    if type(module) is not nn.Sequential or tuple(map(type, module[-2:])) != (nn.Conv2d, nn.BatchNorm2d):
        return False
    *_, conv, norm = module
    if any(map(is_watched, (module, conv, norm))) or not _is_usual_norm(norm, module.training, True, dtype):
        return False
    return conv.out_channels == norm.num_features  # else PyTorch raises its own error


def _own_state(plain):
    return State(plain, functools.cache(functools.partial(F.relu, plain)))


def as_one(nodes, backend):
    """The feature map of nodes: their channels one after the other."""
    return nodes[0].plain if len(nodes) == 1 else backend.side_by_side([node.plain for node in nodes])


def _preprocess(nodes, readers, plans, backend):
    """{(k, j): State} of the inputs (cell k, input j) in readers, which read a feature map, given as its nodes."""
    states, groups = {}, defaultdict(list)
    for k, j in readers:
        cell, edges, preprocess, _ = plans[k]
        if edges is None:
            continue
        op, wanted = (cell.preprocess0, cell.preprocess1)[j], _wanted(plans[k], j)
        if preprocess[j][0] not in _PREPROCESS:
            states[k, j] = _own_state(op(as_one(nodes, backend)))
        else:  # what nobody reads is by itself, so that its weights get no gradient
            groups[preprocess[j], cell.training, any(wanted) or (k, j)].append(((k, j), op, wanted))
    for (kind, *_), group in groups.items():
        keys, ops, wanted = zip(*group, strict=True)
        images = [node.relu() for node in nodes]
        states.update(zip(keys, _PREPROCESS[kind[0]](images, ops, wanted, backend), strict=True))
    return states


def _wanted(plan, j, of_map=(True, True)):
    """Whether anybody reads state j of a cell itself, and whether its positive part; of_map: of the cell's output."""
    reading, is_output = {edge.kind[0] in _LINEAR for edge in plan.edges if edge.source == j}, j in plan.concat
    return False in reading or (is_output and of_map[0]), True in reading or (is_output and of_map[1])


def _nodes(plan, states, given, of_map, backend):
    """The nodes that a cell hands on, from the states of its inputs, to which it adds its own."""
    draws = plan.cell.training and given.drop_prob > 0
    factors = [given.draw(1)[0] if draws and not isinstance(edge.op, Identity) else None for edge in plan.edges]
    parts, linear, expected = defaultdict(list), defaultdict(list), {}  # by node
    for j in range(2 + len(plan.edges) // 2):
        if j >= 2:
            states.append(_node(parts.pop(j, []), linear.pop(j, []), _wanted(plan, j, of_map), backend))
        for edge, term in _leaving(plan, j, states[j], expected, backend):
            n, factor = edge.node, factors[edge.place[0]]
            if term.weight is None:
                parts[n].append(term.input if factor is None else backend.scale(term.input, factor))
            else:
                linear[n].append((term, factor))
    return [states[i] for i in plan.concat]


def _mixed_nodes(plan, states, given, of_map, backend):
    """The same of a supernet's cell."""
    draws, edges = plan.cell.training and given.drop_prob > 0, len(plan.cell._ops)
    factors = given.draw(edges) if draws else [None] * edges
    weights = given.weights[plan.cell.reduction]
    parts, linear, expected = defaultdict(list), defaultdict(list), {}  # by node

    def stack(places, image, shape):
        return backend.gather(image, weights, places, shape)

    for j in range(2 + plan.cell._steps):
        if j >= 2:
            arguments, wanted = _arguments_of_mix(parts.pop(j, []), linear.pop(j, []), stack), _wanted(plan, j, of_map)
            wanted = wanted if any(wanted) else (True, False)
            states.append(state_of(iter(backend.mix(*arguments, wanted)), wanted))
        plain, of_node = [], {}
        for edge, term in _leaving(plan, j, states[j], expected, backend):
            factor = of_node[edge.node] = factors[edge.place[0]]
            if term.weight is None:
                plain.append((edge.node, edge.place, term.input))
            else:
                linear[edge.node].append((edge.place, term, factor))
        for n, part in _spread(plain, stack, backend):
            parts[n].append(part if of_node[n] is None else backend.scale(part, of_node[n]))
    return [states[i] for i in plan.concat]


def _leaving(plan, j, state, expected, backend):
    """(edge, Term) of all that reads state j; expected: of each node shape, dtype, and which operation they are of."""
    leaving = [(edge, edge.op, edge.kind) for edge in plan.edges if edge.source == j]
    for edge, term in _expand(state.plain, state.relu, leaving, backend):
        _check(term, edge.op, expected.setdefault(edge.node, (*_form(term), edge.op)))
        yield edge, term


def _node(parts, linear, wanted, backend):
    wanted = wanted if any(wanted) else (True, False)
    terms, factors = zip(*linear, strict=True) if linear else ((), ())
    return state_of(iter(backend.node(parts, terms, factors, wanted)), wanted)


def state_of(results, wanted):
    """The next State among results, of which those are there that are wanted."""
    plain, positive = (next(results) if each else None for each in wanted)
    return State(plain, lambda: positive)


def _project(images, ops, wanted, backend):
    _, convs, norms = zip(*(op.op for op in ops), strict=True)
    return _projected(images, [conv.weight for conv in convs], norms, wanted, backend)


def _project_every_second(images, ops, wanted, backend):
    first, second = zip(*map(backend.every_second, images), strict=True)
    weights = [_reducing_weight(op, first[0], backend) for op in ops]
    return _projected([*first, *second], weights, [op.bn for op in ops], wanted, backend)


def _projected(images, weights, norms, wanted, backend):
    wanted = [pair if any(pair) else (True, False) for pair in wanted]
    results = iter(backend.project(images, weights, norms, wanted))
    return [state_of(results, pair) for pair in wanted]


_PREPROCESS = {"project": _project, "reduce": _project_every_second}


# ------------------------------------------------------------------------------------- the terms of each primitive


def _expand(x, relu, ops, backend):
    """(key, Term) of each (key, operation, kind) that reads state x (N, C, H, W), relu() being its positive part."""
    places = defaultdict(list)
    for key, op, kind in ops:
        places[kind].append((key, op))
    for (kind, *_), found in places.items():
        terms = _TERMS[kind](x, relu, [op for _, op in found], backend)
        yield from zip((key for key, _ in found), terms, strict=True)


def _kind(op, training, affine, dtype):
    """A key that is equal for operations whose work can be shared, or ('any',) where only their own forward will do.

    affine: whether batch norms may have parameters; those of operations with one key have, or none has. dtype: of the
    images, which all parameters must share, since C++ takes their addresses.
    """
    modules = _with_descendants(op, [])
    if tuple(map(type, modules)) not in _structures() or any(map(is_watched, modules)):
        return ("any",)
    depthwise = [op.op[k] for k in _DEPTHWISE.get(type(op), ())]
    for parent, m in zip([None, *modules], modules, strict=False):
        if type(m) is nn.BatchNorm2d and not _is_usual_norm(m, training, affine, dtype):
            return ("any",)
        if type(m) is nn.Conv2d and not _is_usual(m, type(parent) is involution._Conv, m in depthwise, dtype):
            return ("any",)
    affines = tuple(m.affine for m in modules if type(m) is nn.BatchNorm2d)
    if type(op) is nn.Sequential:
        pool = modules[1]
        return ("pool", type(pool), pool.stride) if _is_usual_pool(pool) and not affines[0] else ("any",)
    if type(op) is InvoBN:
        kernel_norm = op.op[1].kernel_norm
        if kernel_norm not in _SHARED_NORMS or is_reference_forced():
            return ("any",)
        return "involution", op.op[1].stride, kernel_norm, affines
    if isinstance(op, _POOLS):
        return ("bare_pool", type(op), op.stride) if _is_usual_pool(op) else ("any",)
    return _KINDS[type(op)], op.op[1].stride if depthwise else None, affines


_KINDS = {
    Identity: "skip",
    FactorizedReduce: "reduce",
    ReLUConvBN: "project",
    DilConv: "separable",
    SepConv: "separable_twice",
}
_DEPTHWISE = {DilConv: (1,), SepConv: (1, 5)}  # the places of their depthwise convolutions
_POOLS = nn.MaxPool2d, nn.AvgPool2d
_SHARED_NORMS = {"none": None} | RMS_EPS  # the forms of involutions whose work is shared


@functools.cache
def _structures():
    """The classes of the modules in each operation whose work is shared, as OPS and the cells make them."""
    with torch.device("meta"):
        operations = [Identity(), FactorizedReduce(4, 4, False), DilConv(4, 4, 3, 1, 2, 2, False)]
        operations += [SepConv(4, 4, 3, 1, 1, False), *(InvoBN(4, 3, stride, 1, False) for stride in (1, 2))]
        operations += [nn.Sequential(pool(3), nn.BatchNorm2d(4)) for pool in _POOLS] + [pool(3) for pool in _POOLS]
        operations += [ReLUConvBN(4, 4, 1, 1, 0)]
    return {tuple(map(type, operation.modules())) for operation in operations}


def _is_usual(conv, biased, is_depthwise, dtype):
    """Whether a convolution is a 1x1, or else a depthwise one that keeps the image's size up to its stride."""
    if conv.padding_mode != "zeros" or (conv.bias is not None) != biased or conv.weight.dtype != dtype:
        return False
    (K, width), (s, _), (d, _) = conv.kernel_size, conv.stride, conv.dilation
    if not is_depthwise:
        return K == width == conv.groups == 1 and conv.stride == (1, 1) and conv.padding == (0, 0)
    by_channel = conv.groups == conv.in_channels == conv.out_channels and K == width and K % 2 == 1
    return by_channel and (conv.stride, conv.dilation, conv.padding) == ((s, s), (d, d), (d * (K // 2),) * 2)


def _is_usual_pool(pool):
    """Whether a pooling is one of OPS, whose border does not count."""
    if type(pool) is nn.MaxPool2d:
        rest = pool.dilation, pool.return_indices, pool.ceil_mode
    else:
        rest = 1, pool.count_include_pad, pool.ceil_mode if pool.divisor_override is None else True
    return (pool.kernel_size, pool.padding, *rest) == (3, 1, 1, False, False) and pool.stride in (1, 2)


def _with_descendants(module, found):
    found.append(module)
    for child in module._modules.values():
        _with_descendants(child, found)
    return found


def _is_usual_norm(norm, training, affine, dtype):
    """Whether a batch norm is as OPS makes it: statistics, default constants, parameters only where those may be."""
    standard = fast_cell_torch.EPS, fast_cell_torch.MOMENTUM, True, training
    if (norm.eps, norm.momentum, norm.track_running_stats, norm.training) != standard or (norm.affine and not affine):
        return False
    *statistics, count = norm._buffers.values()
    tensors = [*norm._parameters.values(), *statistics] if norm.affine else statistics
    # C++ reads and writes them where they lie
    size = (norm.num_features,)
    usual = all(x is not None and x.shape == size and x.dtype == dtype and x.is_contiguous() for x in tensors)
    return usual and count is not None and count.dtype == torch.int64


def _any(x, relu, ops, backend):
    return [Term(op(x)) for op in ops]


def _skip(x, relu, ops, backend):
    return [Term(x)] * len(ops)


def _pool(x, relu, ops, backend):
    pooled = _pooled(x, ops[0][0], backend)
    norms = [norm for _, norm in ops]
    if not norms[0].training:  # the running statistics of the edges may differ
        return [Term(norm(pooled)) for norm in norms]
    return [Term(backend.normalized(pooled, norms))] * len(norms)


def _bare_pool(x, relu, ops, backend):
    return [Term(_pooled(x, ops[0], backend))] * len(ops)


def _pooled(x, pool, backend):
    return backend.pool(x, type(pool) is nn.MaxPool2d, pool.stride)


def _reduce(x, relu, ops, backend):
    """FactorizedReduce is one 1x1 convolution of every second pixel and, beside it, of its diagonal neighbour."""
    pixels = backend.side_by_side(backend.every_second(relu()))
    return [Term(pixels, _reducing_weight(op, pixels, backend), op.bn) for op in ops]


def _reducing_weight(op, like, backend):
    return backend.diagonal(like, op.conv_1.weight, op.conv_2.weight)


def _involution(x, relu, ops, backend):
    _, layers, convs, norms = zip(*(op.op for op in ops), strict=True)
    pooled = backend.average(relu(), layers[0].avgpool)
    outputs = backend.involutions(relu(), pooled, layers, _SHARED_NORMS[layers[0].kernel_norm])
    return [Term(output, conv.weight, norm) for output, conv, norm in zip(outputs, convs, norms, strict=True)]


def _convolution(x, relu, ops, backend):
    return [Term(relu(), conv.weight, norm) for _, conv, norm in (op.op for op in ops)]


def _separable(x, relu, ops, backend):
    return [Term(_depthwise(relu(), dw, backend), conv.weight, norm) for _, dw, conv, norm in (op.op for op in ops)]


def _separable_twice(x, relu, ops, backend):
    terms = []
    for _, dw1, conv1, norm1, _, dw2, conv2, norm2 in (op.op for op in ops):
        (hidden,) = backend.heads(_depthwise(relu(), dw1, backend), [conv1.weight], [norm1])
        terms.append(Term(_depthwise(hidden, dw2, backend), conv2.weight, norm2))
    return terms


def _depthwise(x, conv, backend):
    return backend.depthwise(x, conv.weight, conv.stride[0], conv.dilation[0])


_LINEAR = "reduce", "project", "involution", "separable", "separable_twice"  # which read a state's positive part only
_TERMS = {
    "any": _any,
    "skip": _skip,
    "pool": _pool,
    "bare_pool": _bare_pool,
    "reduce": _reduce,
    "project": _convolution,
    "involution": _involution,
    "separable": _separable,
    "separable_twice": _separable_twice,
}
