"""Networks of fast cells on a CPU: the passes of all cells, from images or a stem's to a feature map, as programs.

`derived` computes the cells of a genotype, `mixed` those of a supernet, by fast_cell.py and its backend in C++. What
they do is recorded the first time, and from then on it is done in C++ without Python between:

    - a training pass, and its derivative, by kernels/recorded.py as one list of calls, bit for bit the same.
    - an evaluation without gradients, of a genotype's cells, by kernels/inference_cpu.py: all passes for a few images
      after the other, whose feature maps stay in the cache.

What was recorded holds for as long as the network stays as it is, which is looked at in every pass. Cells with an
operation whose own forward is called, as one with hooks, are computed without programs.
"""

import functools
import weakref
from operator import attrgetter
from typing import NamedTuple

import torch

import fast_cell
from involution import all_are_watched
from kernels import build, fast_cell_torch, recorded
from kernels.unchanged import Unchanged
from operations import drop_path_factors

_KEPT = 2  # states of a network of which something is kept
_MOST_PROGRAMS = 32  # of its training: as many sizes of images, or of batches
_NEVER, _ONCE = object(), object()  # seen before, and recorded not yet


def serves(x):
    """Whether `derived` can compute the cells of a network on this tensor."""
    return fast_cell.choose_backend(x) is not fast_cell_torch and not all_are_watched()


def derived(stems, cells, x, drop_prob, wanted):
    """{k: the output of cell k, for k in wanted}, of a network's stems and cells, from images x (N, 3, H, W).

    stems: the module whose output is both inputs of the first cell, or one for each, the second reading the first.
    """
    known = _what_is_known(stems, cells, x.dtype)
    if not torch.is_grad_enabled():
        results = _evaluate(stems, known, x, wanted)
        if results:
            return results
    backend, plans = fast_cell.choose_backend(x), known.plans
    stems = [functools.partial(fast_cell.state_of_stem, stem) for stem in stems]
    inputs = fast_cell.states_of_inputs(stems, plans, x, backend)
    given = fast_cell.Given(drop_prob, functools.partial(_draw, x, drop_prob))
    results = _train(known, inputs, given, wanted)
    if results:
        return results
    cells = fast_cell.nodes_of_cells(inputs, plans, given, wanted, backend)
    return {k: fast_cell.as_one(nodes, backend) for k, nodes in cells}


def mixed(stem, cells, x, weights, drop_prob):
    """The output of a supernet's cells, `model_search.Cell`, in training, from images x (N, 3, H, W).

    None where a program could not compute it: then each cell is to be computed for itself, by `forward`.

    Args:
        weights: of the normal and of the reduction cells, (edges, primitives) each.
    """
    known = _what_is_known([stem], cells, x.dtype, fast_cell.mixed_plan_of) if torch.is_grad_enabled() else None
    if known is None or not known.trains:
        return None
    last, draw = len(cells) - 1, functools.partial(_draw, x.float(), drop_prob, dtype=x.dtype)
    given = fast_cell.Given(drop_prob, draw, tuple(w.to(x.dtype) for w in weights))
    backend = fast_cell.choose_backend(x)
    inputs = fast_cell.states_of_inputs([functools.partial(fast_cell.state_of_stem, stem)], known.plans, x, backend)
    results = _train(known, inputs, given, {last})
    if results:
        return results[last]
    ((_, nodes),) = fast_cell.nodes_of_cells(inputs, known.plans, given, {last}, backend)
    return fast_cell.as_one(nodes, backend)


def _draw(like, drop_prob, count, dtype=None):
    return drop_path_factors(like, drop_prob, count).to(dtype or like.dtype).unbind()


# ------------------------------------------------------------------------------------------ what is known of a network


class _Known(Unchanged):
    """The plans of a network's cells and its programs, by the dtype of images, while its modules stay as they are."""

    def __init__(self, roots):
        super().__init__(roots)
        self.by_dtype, self.passes, self.hesitates = {}, 0, False

    def of_dtype(self, stems, cells, dtype, plan):
        if dtype not in self.by_dtype:
            plans = [plan(cell, dtype) for cell in cells]
            evaluations = {} if _can_be_evaluated(stems, plans, dtype) else None
            trainings = {} if self.lasts() and _can_be_trained(plans) else None
            self.by_dtype[dtype] = _OfDtype(plans, self.tensors, evaluations, trainings, trainings is not None, [])
        found = self.by_dtype[dtype]
        return found._replace(trainings=None) if self.hesitates and self.passes < 2 else found


class _OfDtype(NamedTuple):
    """For images of one dtype. Programs are told apart by what they were recorded for; None: there can be none."""

    plans: list
    tensors: list
    evaluations: dict | None
    trainings: dict | None
    trains: bool  # whether there can be such, though perhaps not yet
    arenas: list  # memory of the latter


_known = weakref.WeakKeyDictionary()  # by the list of cells, so that copies of a network and pickles know nothing


def _what_is_known(stems, cells, dtype, plan=fast_cell.plan_of):
    """The _OfDtype of a network, whose cells `plan` plans.

    Two are kept, as a network goes to and fro between training and evaluation. One that takes the place of another that
    was of no use records only once it has been seen again: the network may change with every pass.
    """
    roots, kept = [*stems, *cells], _known.get(cells, [])
    known = next((each for each in kept if each.holds(roots)), None)
    if known is None:
        known = _Known(roots)
        known.hesitates = len(kept) == _KEPT and kept[-1].passes < 2
    known.passes += 1
    if known.lasts():
        _known[cells] = [known, *(each for each in kept if each is not known)][:_KEPT]
    else:
        _known.pop(cells, None)
    return known.of_dtype(stems, cells, dtype, plan)


# ------------------------------------------------------------------------------------------------------- evaluation


def _kinds(plans):
    """Of all that cells do; `any` is an own forward."""
    known = [plan for plan in plans if plan.edges is not None]
    kinds = {kind[0] for plan in known for kind in (*plan.preprocess, *(edge.kind for edge in plan.edges))}
    return kinds | ({"any"} if len(known) < len(plans) else set())


def _can_be_evaluated(stems, plans, dtype):
    """Whether nothing that a network does depends on more than one image, and all of it is known."""
    if any(module.training for module in (*stems, *(plan.cell for plan in plans))):
        return False
    return not {"any", "pool"} & _kinds(plans) and all(fast_cell.is_usual_stem(stem, dtype) for stem in stems)


def _evaluate(stems, known, x, wanted):
    """`derived`, by a program that is recorded the first time; None where other code is to do it."""
    if known.evaluations is None:
        return None
    (inputs, of_images), plans, programs = _inputs(stems, x), known.plans, known.evaluations
    key = (*sorted(wanted), *of_images, *(v.shape[1:] for v in inputs))
    if key not in programs:
        programs[key] = _record(stems, plans, inputs, of_images, wanted)
    if programs[key] is None:
        return None
    return dict(zip(sorted(wanted), programs[key].run(inputs), strict=True))


def _inputs(stems, x):
    """What a program is given of each stem: what its last convolution reads, if that is images; or its last batch norm.

    Returns tensors, and of each whether it is the former. Only the last stem's may be, whose norm no other one reads.
    """
    inputs, of_images, x = [], [], x.detach()
    for stem in stems:
        *before, conv, norm = stem
        for layer in before:
            x = layer(x)
        of_images.append(stem is stems[-1] and fast_cell.is_of_images(conv, x))
        inputs.append(x if of_images[-1] else conv(x))
        x = norm(inputs[-1]) if stem is not stems[-1] else None
    return inputs, of_images


def _record(stems, plans, inputs, of_images, wanted):
    """The inference_cpu.Program of the cells; None where there is none, or where other code is to raise an error."""
    from kernels import inference_cpu

    recording = inference_cpu.Recording(inputs)
    recorded_stems = [functools.partial(_recorded_stem, *each) for each in zip(inputs, of_images, stems, strict=True)]
    try:
        inference_cpu.library()
        states = fast_cell.states_of_inputs(recorded_stems, plans, None, recording)
        for _, nodes in fast_cell.nodes_of_cells(states, plans, fast_cell.Given(0.0, None), wanted, recording):
            recording.hand_on([node.plain for node in nodes])
    except (inference_cpu.Unsupported, ValueError, build.BuildError):
        return None
    return inference_cpu.Program(recording)


def _recorded_stem(given, is_of_images, stem, x, wanted, backend):
    """The State of a stem of which the program is given this tensor."""
    *_, conv, norm = stem
    results = (
        backend.convolved(given, conv.weight, norm, wanted) if is_of_images else backend.normalize(given, norm, wanted)
    )
    return fast_cell.state_of(iter(results), wanted)


# --------------------------------------------------------------------------------------------------------- training


def _can_be_trained(plans):
    """Whether all of a network is known and trains, and no weight would have to be copied."""
    modules = [module for plan in plans for module in plan.cell.modules()]
    contiguous = all(w.is_contiguous() for plan in plans for w in plan.cell.parameters())
    return contiguous and all(module.training for module in modules) and "any" not in _kinds(plans)


def _train(known, inputs, given, wanted):
    """{k: the output of cell k}, by a program that is recorded the first time; None where other code is to do it.

    Once there are many, a new one is recorded the second time: sizes may be others with every pass.
    """
    programs = known.trainings
    if programs is None or not torch.is_grad_enabled() or _somebody_looks():
        return None
    of_inputs, tensors = fast_cell.wanted_of_inputs(known.plans, len(inputs)), []
    for state, (plain, positive) in zip(inputs, of_inputs, strict=True):
        tensors += [state.plain] * plain + ([state.relu()] if positive else [])
    tensors += given.weights or ()
    forms = tuple((x.shape, x.dtype, x.requires_grad) for x in tensors)
    key = *sorted(wanted), bool(given.drop_prob > 0), forms, *map(attrgetter("requires_grad"), known.tensors)
    program = programs.pop(key, _NEVER)
    if program is _ONCE or (program is _NEVER and len(programs) < _MOST_PROGRAMS):
        program = _record_training(known, of_inputs, forms, given, wanted)
    programs[key] = _ONCE if program is _NEVER else program  # at the end: the first one is that of longest ago
    if len(programs) > _MOST_PROGRAMS:
        programs.pop(next(iter(programs)))
    if not isinstance(program, recorded.Program):
        return None
    factors = [torch.cat(given.draw(len(place) // len(tensors[0]))) for place in program.inputs[len(tensors) :]]
    return dict(zip(sorted(wanted), program([*tensors, *factors]), strict=True))


def _somebody_looks():
    """Whether hooks on saved tensors, a profiler or a search for NaN wait for operations, of which a program is one."""
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # from PyTorch 2.8 on
    hooked = top_hooks is None or top_hooks(True) is not None
    return hooked or torch.autograd._profiler_enabled() or torch.is_anomaly_enabled()


def _record_training(known, of_inputs, forms, given, wanted):
    """The recorded.Program of the cells; None where there is none, or where other code is to raise an error."""
    mixed = given.weights is not None
    try:
        record = functools.partial(_record_cells, known.plans, of_inputs, forms, given.drop_prob, mixed, wanted)
        return recorded.Program(record, known.arenas)
    except (recorded.Unsupported, ValueError):
        return None


def _record_cells(plans, of_inputs, forms, drop_prob, mixed, wanted, recording):
    """The places of what cells are given, tensors of these forms, then factors of drop path, and of their outputs."""
    from kernels import fast_cell_cpu

    places, ((N, *_), dtype, _) = [recording.outside(*form) for form in forms], forms[0]
    left = iter([*places])
    states = [fast_cell.state_of(left, pair) for pair in of_inputs]

    def draw(count):
        places.append(recording.outside((count * N, 1, 1, 1), dtype, False))
        return places[-1].split([N] * count)

    given = fast_cell.Given(drop_prob, draw, tuple(left) if mixed else None)
    cells = fast_cell.nodes_of_cells(states, plans, given, wanted, fast_cell_cpu)
    results = [fast_cell_cpu.side_by_side([node.plain for node in nodes]) for _, nodes in cells]
    return places, [recording.hand_on(result) for result in results]
