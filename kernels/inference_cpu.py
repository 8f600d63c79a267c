"""The evaluation of a derived network on the CPU: what fast_network.py asks for is recorded, and done in C++.

A `Recording` has the functions of fast_cell_cpu.py, but what it is given and what it returns are `Map`s, places of
feature maps that are computed later: `Program.run` does all passes for a few images, whose maps stay in the cache, then
for the next ones, without a word of Python between. Batch norms are part of the convolutions before them; weights and
statistics are read where they lie, each time, so that a program holds as long as they lie there.
"""

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from . import build, fast_cell_cpu, fast_cell_torch, involution_cpu
from .fast_cell_cpu import check_widths, is_usual_average
from .recorded import Block, Unsupported, arrange, bits

CACHE = 1 << 19  # bytes of feature maps that are computed together: half of a second-level cache of today
_SUM, _DEPTHWISE, _OTHER, _NORMALIZE, _HAND_ON = range(5)
_NOTHING = -1  # in place of a map


def library():
    """Return the loaded library, building it first where there is none. Raises build.BuildError."""
    return build.library(Path(__file__).with_suffix(".cpp"))


class Map:
    """A feature map to be: (C, H, W) of every image, blocks of channels side by side."""

    def __init__(self, dtype, H, W, blocks):
        self.dtype, self.size, self.blocks = dtype, (H, W), blocks  # of the latter: (Block, its channels)

    @property
    def shape(self):
        return 1, sum(C for _, C in self.blocks), *self.size


class _Outside(NamedTuple):
    """One of the inputs, and the elements of an image."""

    place: int
    elements: int


class Recording:
    """The passes of a network in evaluation, in the order in which they are asked for.

    Args:
        inputs: tensors (N, C, H, W) that stand for those that `Program.run` will be given.
    """

    def __init__(self, inputs):
        self.inputs, self.outputs, self.passes, self.made_of = list(inputs), [], [], []

    # ---------------------------------------------------------------- functions, as in fast_cell_cpu.py

    def heads(self, x, weights, norms):
        _check_each(x, weights, norms)
        hidden = [self._map(x, len(weight)) for weight in weights]
        self._sum(hidden, True, None, [], [(x, weights, norms)])
        return hidden

    def involutions(self, x, pooled, layers, rms_eps):
        firsts = [layer.conv1 for layer in layers]
        hidden = self.heads(pooled, [first.conv.weight for first in firsts], [first.bn for first in firsts])
        return [self._involution(x, h, layer, rms_eps) for h, layer in zip(hidden, layers, strict=True)]

    def _involution(self, x, hidden, layer, rms_eps):
        (_, C, H, W), span = x.shape, layer.conv2.conv
        if rms_eps is not None:
            maps = hidden, self._map(hidden, 1)
            self._other(_pixels(hidden), fast_cell_cpu, "fast_cell_rms_norm", hidden.shape[1], bits(rms_eps), *maps)
        groups, taps = len(span.weight) // layer.kernel_size**2, layer.kernel_size**2
        size = -(-H // layer.stride), -(-W // layer.stride)
        fits = groups > 0 and C % groups == 0 and hidden.size == size and len(span.bias) == groups * taps
        if not fits or (groups * taps, hidden.shape[1]) != span.weight.shape[:2] or span.bias.dtype != x.dtype:
            raise Unsupported  # what fast_cell_cpu will say of it
        result = self._map(x, C, *hidden.size)
        problem = C, H, W, groups, layer.kernel_size, layer.stride, layer.dilation, hidden.shape[1]
        numbers = [*problem, *_argument(x), *_argument(hidden)]
        for tensor, strides in ((span.weight, (hidden.shape[1], 1, 1, 1, 0)), (span.bias, (1, 0, 0, 0, 0))):
            numbers += [self._contiguous(tensor), *strides]
        self._other(1, involution_cpu, "involution_fused_forward", *numbers, *_argument(result))
        return result

    def depthwise(self, x, weight, stride, dilation):
        (_, C, H, W), K = x.shape, weight.shape[-1]
        check_widths(C, weight.transpose(0, 1))
        result = self._map(x, C, -(-H // stride), -(-W // stride))
        self._pass(_DEPTHWISE, 1, C, H, W, K, stride, dilation, self._contiguous(weight), _only(x), _only(result))
        return result

    def pool(self, x, is_max, stride):
        _, C, H, W = x.shape
        result = self._map(x, C, -(-H // stride), -(-W // stride))
        self._other(1, fast_cell_cpu, "fast_cell_pool", C, H, W, stride, is_max, x, result)
        return result

    def every_second(self, x):
        _, C, H, W = x.shape
        results = [self._map(x, C, -(-H // 2), -(-W // 2)) for _ in range(2)]
        self._other(1, fast_cell_cpu, "fast_cell_every_second", H, W, C, True, x, *results)
        return results

    def average(self, x, pooling):
        if type(pooling) is nn.Identity:
            return x
        if not is_usual_average(pooling):
            raise Unsupported
        stride, (_, C, H, W) = pooling.stride, x.shape
        result = self._map(x, C, -(-H // stride), -(-W // stride))
        self._other(1, fast_cell_cpu, "fast_cell_average", C, H, W, stride, False, x, result)
        return result

    def side_by_side(self, maps):
        if any(each.size != maps[0].size for each in maps):
            raise Unsupported  # what fast_cell_cpu, or PyTorch, will say of it
        return Map(maps[0].dtype, *maps[0].size, [block for each in maps for block in each.blocks])

    def diagonal(self, like, *weights):
        return self._made(functools.partial(fast_cell_torch.diagonal, like, *weights))

    def _made(self, make):
        tensor = make()
        self.made_of.append((tensor, make))
        return tensor

    def node(self, parts, terms, factors, wanted):
        for term in terms:
            _check_each(term.input, [term.weight], [term.norm])
        like = parts[0] if parts else terms[0].input
        C = like.shape[1] if parts else len(terms[0].weight)
        return self._state(like, C, wanted, parts, [(term.input, [term.weight], [term.norm]) for term in terms])

    def project(self, images, weights, norms, wanted):
        x = self.side_by_side(images)
        _check_each(x, weights, norms)
        results = []
        for weight, norm, each in zip(weights, norms, wanted, strict=True):
            results += self._state(x, len(weight), each, [], [(x, [weight], [norm])])
        return results

    def convolved(self, x, weight, norm, wanted):
        """Here x is one of the inputs."""
        _, C, H, W = x.shape
        around = _map(x.dtype, fast_cell_cpu.width_around(C), H, W)
        image = _Outside(self._place(x), C * H * W)
        self._other(1, fast_cell_cpu, "fast_cell_patches", C, H, W, around.shape[1], image, around)
        matrix = self._made(functools.partial(fast_cell_cpu.matrix_around, weight))
        _check_each(around, [matrix], [norm])
        return self._state(around, len(matrix), wanted, [], [(around, [matrix], [norm])])

    def normalize(self, v, norm, wanted):
        """Here v is one of the inputs."""
        place = self._place(v)
        results = [_map(v.dtype, *v.shape[1:]) if each else None for each in wanted]
        self._pass(_NORMALIZE, place, v.shape[2] * v.shape[3], *self._norm(norm), *map(_only, results))
        return [result for result in results if result is not None]

    def hand_on(self, maps):
        """Return a number for the image of these maps side by side, which is a result of the program."""
        whole, place = self.side_by_side(maps), len(self.inputs) + len(self.outputs)
        self.outputs.append(whole.shape[1:])
        self._pass(_HAND_ON, place, _pixels(whole), len(whole.blocks), *(n for block in whole.blocks for n in block))
        return len(self.outputs) - 1

    # --------------------------------------------------------------------------------- their passes

    def _place(self, tensor):
        return next(k for k, each in enumerate(self.inputs) if each is tensor)

    def _state(self, like, C, wanted, parts, products):
        plain, positive = (self._map(like, C) if each else None for each in wanted)
        if plain is None:
            self._sum([positive], True, None, parts, products)
        else:
            self._sum([plain], False, positive, parts, products)
        return [each for each in (plain, positive) if each is not None]

    def _sum(self, results, relu, positive, parts, products):
        """products: (map, weights, norms) each, which make results side by side."""
        numbers = [_pixels(results[0]), relu, len(results)]
        for result in results:
            numbers += [_only(result), result.shape[1]]
        numbers += [_only(positive), len(parts), *map(_only, parts)]
        numbers.append(sum(len(x.blocks) for x, _, _ in products))
        for x, weights, norms in products:
            k0 = 0
            for block, width in x.blocks:
                numbers += [block, width, k0, x.shape[1], len(norms)]
                for weight, norm in zip(weights, norms, strict=True):
                    numbers += [self._contiguous(weight), *self._norm(norm)]
                k0 += width
        self._pass(_SUM, *numbers)

    def _norm(self, norm):
        return norm.num_features, norm.weight, norm.bias, norm.running_mean, norm.running_var

    def _map(self, like, C, H=None, W=None):
        return _map(like.dtype, C, H or like.size[0], W or like.size[1])

    def _contiguous(self, tensor):
        if tensor.dtype != self.inputs[0].dtype:
            raise Unsupported
        return tensor if tensor.is_contiguous() else self._made(tensor.contiguous)

    def _other(self, each, module, name, *numbers):
        """A pass by `name` of another library, in whose first number an image counts so much; Maps are its tensors."""
        is_double = self.inputs[0].dtype == torch.float64
        dtype = involution_cpu.DTYPES[self.inputs[0].dtype] if module is involution_cpu else is_double
        items = [item for x in numbers for item in _item(x)]
        self._pass(_OTHER, _entry(module, name), dtype, each, len(numbers), *items)

    def _pass(self, *numbers):
        for block in numbers:
            if isinstance(block, Block):
                block.use(len(self.passes))
        self.passes.append(numbers)


def _map(dtype, C, H, W):
    return Map(dtype, H, W, [(Block(C * H * W * dtype.itemsize), C)])


def _only(x):
    """The block of a map that is one."""
    if x is None:
        return _NOTHING
    ((block, _),) = x.blocks
    return block


def _item(x):
    """A number, a map or an image from outside, as a pass by another library's function reads it."""
    return (2, *x) if isinstance(x, _Outside) else (1, _only(x)) if isinstance(x, Map) else (0, x)


def _argument(x):
    """A map as involution_cpu.cpp reads it: its strides behind it."""
    _, C, H, W = x.shape
    return x, H * W * C, 1, W * C, C, 0


def _check_each(x, weights, norms):
    for weight, norm in zip(weights, norms, strict=True):
        check_widths(x.shape[1], weight, [norm])


def _pixels(x):
    return x.size[0] * x.size[1]


@functools.cache
def _entry(module, name):
    return ctypes.cast(getattr(module.library(), name), ctypes.c_void_p).value


class Program:
    """The passes of a Recording as C++ reads them, and the memory that its maps need."""

    def __init__(self, recording):
        self.made_of, self.outputs = recording.made_of, recording.outputs
        self.bytes = arrange({x: None for numbers in recording.passes for x in numbers if isinstance(x, Block)})
        self.dtype = recording.inputs[0].dtype
        self.tensors = [x for numbers in recording.passes for x in numbers if isinstance(x, torch.Tensor)]
        numbers = [len(recording.passes), *(_number(x) for numbers in recording.passes for x in numbers)]
        self.numbers = (ctypes.c_int64 * len(numbers))(*numbers)

    def run(self, inputs, images=None):
        """[(N, C, H, W)] of inputs like those that were recorded, so many images at a time."""
        for tensor, make in self.made_of:
            tensor.copy_(make())
        inputs, N = [x.contiguous(memory_format=torch.channels_last) for x in inputs], len(inputs[0])
        outputs = [
            torch.empty((N, *shape), dtype=self.dtype, memory_format=torch.channels_last) for shape in self.outputs
        ]
        images = images or max(1, min(CACHE // self.bytes, -(-N // torch.get_num_threads())))
        outside = [x.data_ptr() for x in (*inputs, *outputs)]
        outside = (ctypes.c_int64 * len(outside))(*outside)
        sizes = (ctypes.c_int64(number) for number in (self.bytes, N, images))
        if library().inference_evaluate(ctypes.c_int64(self.dtype == torch.float64), self.numbers, *sizes, outside):
            raise MemoryError("inference_evaluate could not allocate its scratch memory")
        return outputs


def _number(x):
    if isinstance(x, Block):
        return x.offset
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    return 0 if x is None else int(x)
