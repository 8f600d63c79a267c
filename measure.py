"""What genotypes cost: parameters, multiply-adds, activations, memory of a training step, latency; side by side.

python measure.py DARTS_V2                                              # 36 channels, 20 cells: 3.35 M parameters
python measure.py DARTS DARTS_V2 runs/search-EXP-20250101-120000 --init_channels 16 --layers 8 --csv cost.csv
"""

import functools
import logging
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import genotypes
import utils
from involution import Involution2d
from model import NETWORKS

logger = logging.getLogger("darts.measure")


class Count(NamedTuple):
    """What a network costs for one image, whatever computes it."""

    parameters: int  # without the auxiliary head, which takes no part after training
    multiply_adds: int  # of convolutions (those that make kernels too), involutions and the classifier
    activations: int  # values that these layers put out; not kernels, which are made where they are used


def build(genotype, args, classes=10):
    """The evaluation network of a genotype."""
    form = args.init_channels, classes, args.layers, args.auxiliary
    return NETWORKS[args.network](*form, genotype, args.kernel_norm)


def parameters(genotype, args):
    """The number of parameters of an evaluation network, fast for many genotypes: a sum over their edges."""
    form = args.network, args.init_channels, args.layers, args.kernel_norm
    steps = len(genotype.normal) // 2, len(genotype.reduce) // 2
    concats = tuple(genotype.normal_concat), tuple(genotype.reduce_concat)
    total = empty = _parameters_of(form, steps, concats, None)
    for cell, edges in (("normal", genotype.normal), ("reduce", genotype.reduce)):
        for primitive, node in edges:
            # operations on the inputs of a reduction cell have stride 2
            total += _parameters_of(form, steps, concats, (cell, primitive, min(node, 2))) - empty
    return total


@functools.cache
def _parameters_of(form, steps, concats, edge):
    """Parameters of a network that has no operations but for one edge, (cell, primitive, node), of each such cell."""
    network, C, layers, kernel_norm = form
    cells = {"normal": [("none", 0)] * 2 * steps[0], "reduce": [("none", 0)] * 2 * steps[1]}
    if edge is not None:
        cell, primitive, node = edge
        cells[cell][-1] = (primitive, node)
    genotype = genotypes.Genotype(cells["normal"], concats[0], cells["reduce"], concats[1])
    with torch.device("meta"):
        return utils.count_parameters(NETWORKS[network](C, 10, layers, False, genotype, kernel_norm))


@torch.no_grad()
def count(genotype, args, image_size, classes=10):
    """The `Count` of an evaluation network; computes nothing, on the device `meta`."""
    with torch.device("meta"):
        net, image = build(genotype, args, classes).eval(), torch.empty(1, 3, image_size, image_size)
    net.fast = False  # module by module, so that every layer is seen
    kernels = {layer.conv2.conv for layer in net.modules() if isinstance(layer, Involution2d)}
    sizes = []
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, Involution2d)) and layer not in kernels:
            layer.register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
    with FlopCounterMode(display=False) as counter:
        net(image)
    return Count(utils.count_parameters(net), counter.get_total_flops() // 2, sum(sizes))
