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

`derived` does the same for the cells of a genotype, `model.Cell`, on a CPU: what a state's edges share is computed
once, and a node is made in one go, with the factors of drop path. Besides,

    - a feature map is handed on as the nodes that it consists of. The preprocessing blocks that read it, those of the
      next two cells, are one 1x1 convolution of all of them.
    - ReLU is no pass of its own: whatever makes a state writes its positive part too, where an edge reads that.
    - in evaluation without gradients the same functions are recorded once, by kernels/inference_cpu.py, and done in C++
      for a few images after the other, whose feature maps stay in the cache.

An operation of another class than those of operations.py, one with hooks, or one whose layers are not as `OPS` makes
them is a plain term: its own forward is called. Two backends do the work: kernels/fast_cell_torch.py, and
kernels/fast_cell_cpu.py, which cannot be differentiated twice and alone has what `derived` needs besides (`node`,
`project`, `normalize`); elsewhere derived cells are plain ones.
"""

import functools
import logging
import weakref
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from operator import eq, is_, methodcaller
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import involution
from involution import RMS_EPS, all_are_watched, is_reference_forced, is_watched
from kernels import build, fast_cell_torch
from kernels.involution_ops import nobody_watches
from operations import DilConv, FactorizedReduce, Identity, InvoBN, ReLUConvBN, SepConv, drop_path_factors

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
            for n, part in _spread(plain, backend):
                parts[n].append(part if factors[n][j] is None else part * factors[n][j])
        states.append(_sum(parts[node], linear[node], backend))
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
        fast_cell_cpu.library()
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
        matrix = matrix.to(images[keys[0]].dtype)
        yield from zip(nodes, backend.spread([images[key] for key in keys], matrix), strict=True)


def _sum(parts, linear, backend):
    """A node from its parts and its linear terms (alpha, Term, factor), which go by the width of their input."""
    groups = defaultdict(list)
    for alpha, term, factor in linear:
        groups[term.input.shape[1]].append((alpha, term, factor))
    alphas, terms, factors = ([[each[k] for each in group] for group in groups.values()] for k in range(3))
    alphas = [torch.stack(of_group).to(terms[0][0].input.dtype) for of_group in alphas]
    return backend.mix(parts, terms, alphas, factors)


# ------------------------------------------------------------------------------------------- cells of a genotype


class State(NamedTuple):
    """A node's image (N, C, H, W), or None where nothing reads it but ReLU; and its positive part, made when needed."""

    plain: torch.Tensor | None
    relu: Callable


class _Plan(NamedTuple):
    """A cell, and the `_kind` of its operations and of its preprocessing; None where only its own forward will do."""

    cell: nn.Module
    ops: list | None
    preprocess: list | None


def serves(x):
    """Whether `derived` can compute the cells of a network on this tensor."""
    return choose_backend(x) is not fast_cell_torch and not all_are_watched()


def derived(stems, cells, x, drop_prob, wanted):
    """{k: the output of cell k, for k in wanted}, of a network's stems and cells, from images x (N, 3, H, W).

    stems: the module whose output is both inputs of the first cell, or one for each, the second reading the first.
    """
    plans, programs = _plans(stems, cells, x.dtype)
    if programs is not None and not torch.is_grad_enabled():
        results = _evaluate(stems, plans, programs, x, wanted)
        if results:
            return results
    backend, stems = choose_backend(x), [functools.partial(_stem, stem) for stem in stems]
    return {k: _as_one(nodes, backend) for k, nodes in _cells(stems, plans, x, drop_prob, wanted, backend)}


def _cells(stems, plans, x, drop_prob, wanted, backend):
    """(k, the nodes of cell k) for k in wanted; stems: functions (image, what is wanted of it, backend) -> State."""
    # a feature map is the second input of the cell after it, and the first one of the cell after that
    readers = [[(k, j) for k, j in ((i, 1), (i + 1, 0)) if k < len(plans)] for i in range(len(plans) + 1)]
    states = {}
    if len(stems) == 2:
        nodes0 = [stems[0](x, _map_wanted([(0, 0)], plans, True), backend)]
        states.update(_preprocess(nodes0, [(0, 0)], plans, backend))
        x = nodes0[0].plain
    else:
        readers[0] = [(0, 0), *readers[0]]
    nodes1 = [stems[-1](x, _map_wanted(readers[0], plans, False), backend)]
    nodes0 = nodes0 if len(stems) == 2 else nodes1
    for k, plan in enumerate(plans):
        states.update(_preprocess(nodes1, readers[k], plans, backend))
        if plan.ops is None:
            nodes = [_own_state(plan.cell(_as_one(nodes0, backend), _as_one(nodes1, backend), drop_prob))]
        else:
            inputs = [states.pop((k, 0)), states.pop((k, 1))]
            nodes = _nodes(plan, inputs, drop_prob, _map_wanted(readers[k + 1], plans, k in wanted), backend)
        nodes0, nodes1 = nodes1, nodes
        if k in wanted:
            yield k, nodes


def _plan(cell, dtype):
    if is_watched(cell):
        return _Plan(cell, None, None)
    of_cell = cell._ops, (cell.preprocess0, cell.preprocess1)
    return _Plan(cell, *([_kind(op, cell.training, True, dtype) for op in ops] for ops in of_cell))


def _map_wanted(readers, plans, is_output):
    """Whether anybody reads a feature map itself, and whether its positive part; readers: (cell, input) each."""
    shared = [plans[i].ops is not None and plans[i].preprocess[j][0] in _PREPROCESS for i, j in readers]
    return is_output or False in shared, True in shared


def _stem(module, x, wanted, backend):
    """The State of a stem, whose last layers are a convolution and a batch norm."""
    if not _is_usual_stem(module, x.dtype):
        return _own_state(module(x))
    *before, conv, norm = module
    for layer in before:
        x = layer(x)
    return _state(iter(backend.normalize(conv(x), norm, wanted)), wanted)


def _is_usual_stem(module, dtype):
    if type(module) is not nn.Sequential or tuple(map(type, module[-2:])) != (nn.Conv2d, nn.BatchNorm2d):
        return False
    *_, conv, norm = module
    if any(map(is_watched, (module, conv, norm))) or not _is_usual_norm(norm, module.training, True, dtype):
        return False
    return conv.out_channels == norm.num_features  # else PyTorch raises its own error


def _own_state(plain):
    return State(plain, functools.cache(functools.partial(F.relu, plain)))


def _as_one(nodes, backend):
    """The feature map of nodes: their channels one after the other."""
    return nodes[0].plain if len(nodes) == 1 else backend.side_by_side([node.plain for node in nodes])


def _preprocess(nodes, readers, plans, backend):
    """{(k, j): State} of the inputs (cell k, input j) in readers, which read a feature map, given as its nodes."""
    states, groups = {}, defaultdict(list)
    for k, j in readers:
        cell, kinds, preprocess = plans[k]
        if kinds is None:
            continue
        op, wanted = (cell.preprocess0, cell.preprocess1)[j], _wanted(plans[k], j)
        if preprocess[j][0] not in _PREPROCESS:
            states[k, j] = _own_state(op(_as_one(nodes, backend)))
        else:  # what nobody reads is by itself, so that its weights get no gradient
            groups[preprocess[j], cell.training, any(wanted) or (k, j)].append(((k, j), op, wanted))
    for (kind, *_), group in groups.items():
        keys, ops, wanted = zip(*group, strict=True)
        images = [node.relu() for node in nodes]
        states.update(zip(keys, _PREPROCESS[kind[0]](images, ops, wanted, backend), strict=True))
    return states


def _wanted(plan, j, of_map=(True, True)):
    """Whether anybody reads state j of a cell itself, and whether its positive part; of_map: of the cell's output."""
    reading = {kind in _LINEAR for (kind, *_), i in zip(plan.ops, plan.cell._indices, strict=True) if i == j}
    is_output = j in plan.cell._concat
    return False in reading or (is_output and of_map[0]), True in reading or (is_output and of_map[1])


def _nodes(plan, states, drop_prob, of_map, backend):
    """The nodes that a cell hands on, from the states of its inputs, to which it adds its own."""
    cell = plan.cell
    edges = list(zip(cell._indices, cell._ops, plan.ops, strict=True))
    factors = [None] * len(edges)
    if cell.training and drop_prob > 0:
        like = next(x for state in states for x in (state.plain, state.relu()) if x is not None)
        factors = [None if isinstance(op, Identity) else drop_path_factors(like, drop_prob) for op in cell._ops]
    parts, linear, expected = defaultdict(list), defaultdict(list), {}  # by node
    for j in range(2 + len(edges) // 2):
        if j >= 2:
            states.append(_node(parts.pop(j, []), linear.pop(j, []), _wanted(plan, j, of_map), backend))
        leaving = [(e, op, kind) for e, (i, op, kind) in enumerate(edges) if i == j]
        for e, term in _expand(states[j].plain, states[j].relu, leaving, backend):
            n, factor = 2 + e // 2, factors[e]
            _check(term, edges[e][1], expected.setdefault(n, (*_form(term), edges[e][1])))
            if term.weight is None:
                parts[n].append(term.input if factor is None else term.input * factor)
            else:
                linear[n].append((term, factor))
    return [states[i] for i in cell._concat]


def _node(parts, linear, wanted, backend):
    wanted = wanted if any(wanted) else (True, False)
    terms, factors = zip(*linear, strict=True) if linear else ((), ())
    return _state(iter(backend.node(parts, terms, factors, wanted)), wanted)


def _state(results, wanted):
    """The next State among results, of which those are there that are wanted."""
    plain, positive = (next(results) if each else None for each in wanted)
    return State(plain, lambda: positive)


def _project(images, ops, wanted, backend):
    _, convs, norms = zip(*(op.op for op in ops), strict=True)
    return _projected(images, [conv.weight for conv in convs], norms, wanted, backend)


def _project_every_second(images, ops, wanted, backend):
    first, second = zip(*map(backend.every_second, images), strict=True)
    weights = [_reducing_weight(op, backend) for op in ops]
    return _projected([*first, *second], weights, [op.bn for op in ops], wanted, backend)


def _projected(images, weights, norms, wanted, backend):
    wanted = [pair if any(pair) else (True, False) for pair in wanted]
    results = iter(backend.project(images, weights, norms, wanted))
    return [_state(results, pair) for pair in wanted]


_PREPROCESS = {"project": _project, "reduce": _project_every_second}


# ------------------------------------------------------------------------------------------ what is known of a network


class _Known:
    """The plans of a network's cells, and its programs of evaluation, for as long as its modules stay as they are.

    To see whether they do takes less than planning, by lists of what may change: the classes and attributes of all
    modules, what is in the dictionaries and lists among them, hooks, and where tensors lie (`data` may be replaced).
    It does not last where there are hooks, which may hold the network, or tensors without an address (sparse ones).
    """

    def __init__(self, roots):
        self.roots, self.by_dtype = roots, {}
        self.modules = [m for root in roots for m in root.modules()]
        self.classes, self.attributes = [*map(type, self.modules)], [dict(vars(m)) for m in self.modules]
        self.hooks = [hooks for m in self.modules for hooks in _hooks(m)]
        self.dictionaries = [d for m in self.modules for d in (m._modules, m._parameters, m._buffers)]
        self.contents = _contents(self.dictionaries)
        self.tensors = [x for x in self.contents if isinstance(x, torch.Tensor)]
        self.lists = [x for attributes in self.attributes for x in attributes.values() if type(x) is list]
        self.copies = list(map(list, self.lists))
        try:
            self.places = _places(self.tensors)
        except (RuntimeError, ValueError):  # a tensor has no address, or is not made yet
            self.places = None

    def lasts(self):
        """Whether it may be kept for another pass."""
        return self.places is not None and not any(self.hooks)

    def holds(self, roots):
        """Whether these are the modules that it was made of, unchanged."""
        try:
            if self.roots != roots or any(self.hooks) or [*map(type, self.modules)] != self.classes:
                return False
            if not all(map(eq, map(vars, self.modules), self.attributes)):
                return False
        except (RuntimeError, ValueError):  # an attribute is another tensor or array, which are not simply equal or not
            return False
        contents = _contents(self.dictionaries)
        same = len(contents) == len(self.contents) and all(map(is_, contents, self.contents))
        return same and _places(self.tensors) == self.places and self.lists == self.copies


_known = weakref.WeakKeyDictionary()  # by the list of cells, so that copies of a network and pickles know nothing


def _plans(stems, cells, dtype):
    """Plans of images of this dtype; and the programs by what they were recorded for, None where they cannot be."""
    roots, known = [*stems, *cells], _known.get(cells)
    if known is None or not known.holds(roots):
        _known.pop(cells, None)
        known = _Known(roots)
        if known.lasts():
            _known[cells] = known
    found = known.by_dtype.get(dtype)
    if found is None:
        plans = [_plan(cell, dtype) for cell in cells]
        found = known.by_dtype[dtype] = plans, {} if _can_be_recorded(stems, plans, dtype) else None
    return found


def _hooks(m):
    return m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks


def _contents(dictionaries):
    return [*chain.from_iterable(map(methodcaller("values"), dictionaries))]


def _places(tensors):
    return [(x.data_ptr(), x.dtype) for x in tensors]


# ------------------------------------------------------------------------------------------------------- evaluation


def _can_be_recorded(stems, plans, dtype):
    """Whether nothing that a network does depends on more than one image, and all of it is known."""
    if any(module.training for module in (*stems, *(plan.cell for plan in plans))):
        return False
    kinds = [kind for plan in plans for kinds in (plan.ops, plan.preprocess) for (kind, *_) in kinds or [("any",)]]
    return not {"any", "pool"} & {*kinds} and all(_is_usual_stem(stem, dtype) for stem in stems)


def _evaluate(stems, plans, programs, x, wanted):
    """`derived`, by a program that is recorded the first time; None where other code is to do it."""
    inputs = _before_norms(stems, x)
    key = (*sorted(wanted), *(v.shape[1:] for v in inputs))
    if key not in programs:
        programs[key] = _record(stems, plans, inputs, wanted)
    if programs[key] is None:
        return None
    return dict(zip(sorted(wanted), programs[key].run(inputs), strict=True))


def _before_norms(stems, x):
    """The images that the last batch norms of the stems read."""
    images = []
    for stem in stems:
        *before, norm = stem
        for layer in before:
            x = layer(x)
        images.append(x)
        x = norm(x) if stem is not stems[-1] else None
    return images


def _record(stems, plans, inputs, wanted):
    """The inference_cpu.Program of the cells; None where there is none, or where other code is to raise an error."""
    from kernels import inference_cpu

    recording = inference_cpu.Recording(inputs)
    recorded = [functools.partial(_recorded_stem, v, stem[-1]) for v, stem in zip(inputs, stems, strict=True)]
    try:
        inference_cpu.library()
        for _, nodes in _cells(recorded, plans, None, 0.0, wanted, recording):
            recording.hand_on([node.plain for node in nodes])
    except (inference_cpu.Unsupported, ValueError, build.BuildError):
        return None
    return inference_cpu.Program(recording)


def _recorded_stem(v, norm, x, wanted, backend):
    """The State of a stem, of which the program is given v, what its last layer reads."""
    return _state(iter(backend.normalize(v, norm, wanted)), wanted)


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
    usual = all(x is not None and x.dtype == dtype and x.is_contiguous() for x in tensors)
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
    normalized, mean, var = fast_cell_torch.batch_norm(pooled)
    fast_cell_torch.track(norms, [mean] * len(norms), [var] * len(norms))
    return [Term(normalized)] * len(norms)


def _bare_pool(x, relu, ops, backend):
    return [Term(_pooled(x, ops[0], backend))] * len(ops)


def _pooled(x, pool, backend):
    return backend.pool(x, type(pool) is nn.MaxPool2d, pool.stride)


def _reduce(x, relu, ops, backend):
    """FactorizedReduce is one 1x1 convolution of every second pixel and, beside it, of its diagonal neighbour."""
    pixels = backend.side_by_side(backend.every_second(relu()))
    return [Term(pixels, _reducing_weight(op, backend), op.bn) for op in ops]


def _reducing_weight(op, backend):
    C = op.conv_1.in_channels
    return backend.made(lambda: torch.cat([_widened(op.conv_1.weight, 0, C), _widened(op.conv_2.weight, C, 0)]))


def _widened(weight, before, after):
    """The weight (C_out, C_in, 1, 1) of a convolution that also reads, and ignores, other channels."""
    return F.pad(weight, (0, 0, 0, 0, before, after))


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
