"""C functions, called now or recorded: a training pass becomes one list of calls, with no Python between them.

A step of a network with few channels calls C++ hundreds of times for a fraction of a millisecond. What Python and
autograd do in between, all threads but one wait for. All functions that compute a pass have one form, a dtype and an
array of numbers and addresses, and in training what calls them does nothing else with a tensor's values. So, given a
`Place` in place of a tensor, it does all but compute: a `Recording` keeps the calls, and a tape of the `Function`s,
whose derivatives are recorded too. What is spoken of first and last in which call says when a tensor is needed: all get
their places in one block of memory, where one lies as soon as another's is free. A `Program` then makes the calls, for
the addresses of that pass. The calls are those that would be made without it, in the same order, save that a function
adds up gradients itself where autograd would in a pass of its own (`already`): results are equal bit for bit.
"""

import ctypes
import functools
import struct
from bisect import insort
from collections import defaultdict
from operator import attrgetter
from pathlib import Path

import torch
from torch.autograd import Function

from . import build

_LINE = 64  # bytes, to which all places are aligned
_ARENA, _GRADIENTS = range(2)  # regions of memory; behind them those of single images


class Unsupported(Exception):
    """What cannot be recorded."""


def library():
    """Return the loaded library, building it first where there is none. Raises build.BuildError."""
    return build.library(Path(__file__).with_suffix(".cpp"))


# ------------------------------------------------------------------------------- what makes no difference to a caller


def call(function, dtype, like, packed, again=True):
    """Call a C function, now or, where `like` is a Place, when the program runs. Raises MemoryError.

    again: whether it is to be called again where forward is computed a second time for another backward.
    """
    if type(like) is Place:
        like.recording.calls.append((function, dtype, packed, again))
    elif function(ctypes.c_int64(dtype), (ctypes.c_int64 * len(packed))(*packed)):
        raise MemoryError(f"{function.__name__} could not allocate its scratch memory")


def apply(function, like, *arguments):
    """function.apply(*arguments), of an autograd.Function."""
    return like.recording.apply(function, arguments) if type(like) is Place else function.apply(*arguments)


def empty(like, *shape, dtype=None):
    """An uninitialised, contiguous tensor, of the dtype of `like` unless another is given."""
    dtype = dtype or like.dtype
    return like.recording.place(shape, dtype) if type(like) is Place else torch.empty(shape, dtype=dtype)


def empty_image(like, *shape):
    """An uninitialised channels-last one of shape (N, C, H, W)."""
    if type(like) is Place:
        return like.recording.place(shape, like.dtype, is_image=True)
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)


def add(tensors):
    """The sum of tensors of one shape and layout, without a derivative."""
    like = tensors[0]
    whole = empty_image(like, *like.shape) if like.dim() == 4 else empty(like, *like.shape)
    packed = [like.numel(), whole.data_ptr(), len(tensors), *(x.data_ptr() for x in tensors)]
    call(library().recorded_add, like.dtype == torch.float64, like, packed)
    return whole


def total(tensors):
    """The same of one or more; None of none."""
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    return add(tensors)


def already(ctx, k):
    """[the gradient of argument k that other functions have made], which a backward adds to its own, last of all.

    Empty where there is none, and where nothing is recorded, as autograd does that by itself.
    """
    return ctx.take_gradients(k) if type(ctx) is _Context else []


def bits(value):
    """A real number as packed numbers hold it."""
    return struct.unpack("q", struct.pack("d", value))[0]


def once_differentiable(backward):
    """Refuse create_graph=True: PyTorch's decorator of this name lets through what reaches no inner input."""

    @functools.wraps(backward)
    def once(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("the fast cells can be differentiated once only on the CPU; set network.fast = False")
        if all(grad is None for grad in grads):  # as behind a function of the user's that hands on no gradient
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    return once


# ---------------------------------------------------------------------------------------------------------- places


class Block:
    """Memory that is used from the step `first` to the step `last`, in one of the regions."""

    def __init__(self, size, region=_ARENA):
        self.size, self.region, self.offset = -(-size // _LINE) * _LINE, region, 0
        self.first = self.last = None

    def use(self, step):
        """In the order of steps."""
        self.first, self.last = step if self.first is None else self.first, step


def arrange(blocks):
    """Give blocks offsets, so that those in use at one time do not overlap; returns the bytes of all."""
    live, most = [], 0
    for block in sorted(blocks, key=attrgetter("first")):
        live = [other for other in live if other.last >= block.first]
        block.offset = 0
        for other in live:  # in the order of their offsets: the first gap that is large enough
            if block.offset + block.size <= other.offset:
                break
            block.offset = other.offset + other.size
        insort(live, block, key=attrgetter("offset"))
        most = max(most, block.offset + block.size)
    return most


class Address:
    """So many bytes behind the beginning of a block."""

    __slots__ = ("block", "offset")

    def __init__(self, block, offset):
        self.block, self.offset = block, offset

    def __add__(self, count):
        return Address(self.block, self.offset + count)


class Place:
    """A tensor to be, contiguous or a channels-last image: all of a tensor that is known before a pass."""

    device = torch.device("cpu")

    def __init__(self, recording, block, shape, dtype, is_image=False, offset=0):
        self.recording, self.block, self.offset = recording, block, offset
        self.shape, self.dtype, self.is_image = torch.Size(shape), dtype, is_image
        self.requires_grad = True

    def __len__(self):
        return self.shape[0]

    def dim(self):
        return len(self.shape)

    def numel(self):
        return self.shape.numel()

    def element_size(self):
        return self.dtype.itemsize

    def is_floating_point(self):
        return self.dtype.is_floating_point

    def contiguous(self, memory_format=None):
        return self

    def stride(self):
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, size * strides[0])
        if not self.is_image:
            return tuple(strides)
        _, C, _, W = self.shape
        return strides[0], 1, W * C, C

    def data_ptr(self):
        return Address(self.block, self.offset)

    def split(self, sizes):
        """Along the first dimension, of a contiguous one."""
        parts, offset, row = [], self.offset, self.stride()[0] * self.element_size()
        for size in sizes:
            shape = size, *self.shape[1:]
            parts.append(Place(self.recording, self.block, shape, self.dtype, offset=offset))
            offset += size * row
        return parts


# ------------------------------------------------------------------------------------------------------- recording


class _Context:
    """What an autograd.Function has for its `ctx`, and the gradients that are found so far."""

    def __init__(self, arguments):
        self.needs_input_grad = tuple(isinstance(x, torch.Tensor | Place) and x.requires_grad for x in arguments)
        self.materializes, self.saved_tensors, self.found, self._arguments = True, (), None, arguments

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def set_materialize_grads(self, value):
        self.materializes = value

    def take_gradients(self, k):
        gradient = total(self.found.pop(id(self._arguments[k]), []))
        return [] if gradient is None else [gradient]


class Recording:
    """The calls of a pass, in their order, what is needed to differentiate it, and the tensors that it reads."""

    def __init__(self):
        self.calls, self.regions, self.weights, self._tape = [], 2, {}, []

    def clear(self):
        self.calls = self.weights = self._tape = None

    def place(self, shape, dtype, is_image=False, region=_ARENA):
        size = torch.Size(shape).numel() * dtype.itemsize
        return Place(self, Block(size, region), shape, dtype, is_image)

    def outside(self, shape, dtype, requires_grad=True):
        """The place of an image or a matrix that the program is given."""
        place = self.place(shape, dtype, len(shape) == 4, self.regions)
        place.requires_grad, self.regions = requires_grad, self.regions + 1
        return place

    def apply(self, function, arguments):
        ctx = _Context(arguments)
        self.weights.update((id(x), x) for x in arguments if isinstance(x, torch.Tensor))
        results = function.forward(ctx, *arguments)
        for result in _as_tuple(results):
            result.requires_grad = any(ctx.needs_input_grad)
        if any(ctx.needs_input_grad):
            self._tape.append((function, ctx, arguments, _as_tuple(results)))
        return results

    def differentiate(self, results, gradients):
        """{id of a tensor or place: the place of its gradient}, given those of the results.

        Functions go in the order in which autograd takes them, and gradients are added in that order too.
        """
        found = defaultdict(list)
        for result, gradient in zip(results, gradients, strict=True):
            found[id(result)] += [gradient] * (gradient is not None)
        reached = set()
        for function, ctx, arguments, of_function in reversed(self._tape):
            grads = [total(found.pop(id(result), [])) for result in of_function]
            missing = [grad is None for grad in grads]
            if all(missing):
                continue
            if ctx.materializes and any(missing):
                raise Unsupported
            ctx.found = found
            to_arguments = _as_tuple(function.backward(ctx, *grads))
            for x, needs, grad in zip(arguments, ctx.needs_input_grad, to_arguments, strict=True):
                if needs and grad is not None:
                    found[id(x)].append(grad)
                    reached.add(id(x))
        return {key: total(grads) for key, grads in found.items() if key in reached}

    def hand_on(self, place):
        """The place of an image for the world outside: this one, or a copy where it is not by itself."""
        if place.block.region != _ARENA:
            place = add([place])
        place.block.region, self.regions = self.regions, self.regions + 1
        return place


def _as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


class _Calls:
    """Recorded calls as C++ reads them, all blocks having their offsets."""

    def __init__(self, calls):
        heads, numbers, slots, begin = [], [], [], 3 * len(calls)
        for function, dtype, packed, _ in calls:
            heads += [ctypes.cast(function, ctypes.c_void_p).value, dtype, begin + len(numbers)]
            for x in packed:
                if type(x) is Address:
                    slots += [begin + len(numbers), x.block.region]
                    x = x.block.offset + x.offset
                numbers.append(int(x))
        self.calls, numbers = len(calls), heads + numbers
        self.numbers, self.slots = (ctypes.c_int64 * len(numbers))(*numbers), (ctypes.c_int64 * len(slots))(*slots)

    def __call__(self, bases):
        count, of_slots = ctypes.c_int64(len(self.numbers)), ctypes.c_int64(len(self.slots) // 2)
        bases = (ctypes.c_int64 * len(bases))(*bases)
        if library().recorded_run(ctypes.c_int64(self.calls), self.numbers, count, self.slots, of_slots, bases):
            raise MemoryError("a recorded pass could not allocate its scratch memory")


class Program:
    """A pass and its derivative.

    Args:
        record: a function of a Recording, which returns the places of what the pass is given and of its results.
        arenas: the list of memory that is free, which programs that do not run at one time have in common.
        given: of each result, whether there is a gradient; by default of all.

    Raises:
        Unsupported: something in it cannot be recorded.
    """

    def __init__(self, record, arenas, given=None):
        self._record, self._arenas, self._others, self._usual = record, arenas, {}, self
        recording = Recording()
        with torch.no_grad():
            self.inputs, self.results = record(recording)
            self.given = given or (True,) * len(self.results)
            calls = len(recording.calls)
            self.to_results = [
                recording.outside(y.shape, y.dtype) if each else None
                for y, each in zip(self.results, self.given, strict=True)
            ]
            found = recording.differentiate(self.results, self.to_results)
            self.to_inputs = [recording.hand_on(found[id(x)]) if id(x) in found else None for x in self.inputs]
        self.weights = [*recording.weights.values()]
        self.addresses, self.flags = _addresses(self.weights), [w.requires_grad for w in self.weights]
        to_weights = [found.get(id(w)) for w in self.weights]
        self.regions, self.dtype = recording.regions, self.results[0].dtype
        self.gradient_bytes = _lay_out(to_weights)
        self.bytes = _place(recording.calls)
        self.parts = [None if place is None else _part(place) for place in to_weights]
        self.forward, self.backward = _Calls(recording.calls[:calls]), _Calls(recording.calls[calls:])
        self.again = _Calls([each for each in recording.calls[:calls] if each[-1]])
        recording.clear()  # places hold it

    def __call__(self, inputs):
        """The results, for tensors in place of the inputs."""
        return _Pass.apply(self, self._usual, len(inputs), *inputs, *self.weights)

    def for_gradients(self, given):
        """The program for these gradients of results, whose forward places what it keeps elsewhere.

        Raises:
            RuntimeError: the network is no longer the one that was recorded.
        """
        if given != self.given and given not in self._others:
            try:
                self._others[given] = Program(self._record, self._arenas, given)
            except Unsupported:
                raise _changed() from None
        self._usual = self._others.get(given, self)
        return self._usual

    def arena(self):
        """Memory for a pass, until it is given back."""
        arena = self._arenas.pop() if self._arenas else None
        if arena is None or len(arena) < self.bytes:
            arena = None  # before another one is made
            arena = torch.empty(self.bytes, dtype=torch.uint8)
        return arena

    def give_back(self, arena):
        if arena is not None and not self._arenas:
            self._arenas.append(arena)

    def run(self, calls, arena, outside, gradients=0):
        """outside: (places, tensors) each, None for what is not there; gradients: an address for those of weights."""
        bases = [arena.data_ptr(), gradients] + [0] * (self.regions - 2)
        for places, tensors in outside:
            for each, tensor in zip(places, tensors, strict=True):
                if each is not None:
                    bases[each.block.region] = tensor.data_ptr()
        calls(bases)


def _addresses(weights):
    return [*map(torch.Tensor.data_ptr, weights)]


def _changed():
    return RuntimeError("a network of fast cells was changed between forward and backward; set network.fast = False")


class _Pass(Function):
    """Arguments: a Program, that one or another for fewer gradients, the number of its inputs, those, its weights."""

    @staticmethod
    def forward(ctx, program, usual, n, *tensors):
        inputs, results = [_laid_out(x) for x in tensors[:n]], [_like(y) for y in usual.results]
        ctx.program, ctx.usual, ctx.n, ctx.arena = program, usual, n, usual.arena()
        usual.run(usual.forward, ctx.arena, [(usual.inputs, inputs), (usual.results, results)])
        if not any(ctx.needs_input_grad):
            usual.give_back(ctx.arena)
        of_results = zip(results, usual.results, strict=True)
        ctx.mark_non_differentiable(*(y for y, place in of_results if not place.requires_grad))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *tensors[n:])  # weights too, so that it is seen if they have changed
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        tensors, arena, ctx.arena = ctx.saved_tensors, ctx.arena, None
        program = ctx.program.for_gradients(tuple(grad is not None for grad in grads))
        if _addresses(tensors[ctx.n :]) != program.addresses or program.flags != ctx.program.flags:
            raise _changed()  # C++ would read what is no longer there
        outside = [(program.inputs, [_laid_out(x) for x in tensors[: ctx.n]])]
        if arena is None or program is not ctx.usual:  # what was kept is no more, or lies elsewhere
            program.give_back(arena)
            arena, results = program.arena(), [_like(y) for y in program.results]
            program.run(program.again, arena, [*outside, (program.results, results)])
        grads = [None if grad is None else _laid_out(grad) for grad in grads]
        to_inputs = [None if place is None else _like(place) for place in program.to_inputs]
        flat = torch.empty(program.gradient_bytes // program.dtype.itemsize, dtype=program.dtype)
        outside += [(program.to_results, grads), (program.to_inputs, to_inputs)]
        program.run(program.backward, arena, outside, flat.data_ptr())
        program.give_back(arena)
        storage = flat.untyped_storage()  # no views, which may not all be changed in place
        to_weights = (
            None if part is None else torch.empty(0, dtype=flat.dtype).set_(storage, *part) for part in program.parts
        )
        return None, None, None, *to_inputs, *to_weights


def _laid_out(x):
    """Channels-last images, contiguous matrices."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def _like(place):
    return torch.empty_strided(place.shape, place.stride(), dtype=place.dtype)


def _part(place):
    """Offset, sizes and strides of a weight's gradient, of all of them one after the other."""
    return (place.block.offset + place.offset) // place.element_size(), place.shape, place.stride()


def _lay_out(places):
    """Give the blocks of gradients that last offsets, one after the other; returns the bytes of all."""
    size = 0
    for block in {place.block: None for place in places if place is not None}:
        block.region, block.offset = _GRADIENTS, size
        size += block.size
    return size


def _place(calls):
    """Arrange the blocks of the arena; returns its bytes."""
    blocks = {}
    for k, (_, _, packed, _) in enumerate(calls):
        for x in packed:
            if type(x) is Address and x.block.region == _ARENA:
                x.block.use(k)
                blocks[x.block] = None
    return arrange(blocks)
