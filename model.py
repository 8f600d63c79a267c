"""The derived networks: cells of a genotype, trained from scratch."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import fast_network
from involution import set_kernel_norm
from operations import (
    KERNEL_NORM,
    LARGEST_SMALL_IMAGE,
    OPS,
    FactorizedReduce,
    Identity,
    ReLUConvBN,
    drop_path,
    halving,
)


class Cell(nn.Module):
    """A discrete cell: every own node is the sum of two operations on earlier nodes."""

    def __init__(self, genotype, C_prev_prev, C_prev, C, reduction, reduction_prev):
        super().__init__()
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0)

        edges = genotype.reduce if reduction else genotype.normal
        if len(edges) % 2 or any(not 0 <= node < 2 + k // 2 for k, (_, node) in enumerate(edges)):
            raise ValueError(f"a cell needs two operations on earlier nodes for each of its own, got {edges}")
        self._concat = genotype.reduce_concat if reduction else genotype.normal_concat
        self.multiplier = len(self._concat)
        self._indices = [node for _, node in edges]
        self._ops = nn.ModuleList(
            OPS[primitive](C, 2 if reduction and node < 2 else 1, True) for primitive, node in edges
        )

    def forward(self, s0, s1, drop_prob):
        """Two feature maps -> (N, multiplier * C, H', W'); `drop_prob`: drop-path probability in training."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for k in range(0, len(self._ops), 2):
            states.append(self._edge(k, states, drop_prob) + self._edge(k + 1, states, drop_prob))
        return torch.cat([states[i] for i in self._concat], dim=1)

    def _edge(self, k, states, drop_prob):
        op, h = self._ops[k], states[self._indices[k]]
        h = op(h)
        drops = self.training and (isinstance(drop_prob, torch.Tensor) or drop_prob > 0)
        if drops and not isinstance(op, Identity):
            h = drop_path(h, drop_prob)
        return h


class _AuxiliaryHead(nn.Module):
    """A second classifier on the feature map after two thirds of the cells, at least `smallest` pixels wide and high.

    Args:
        stride: of the 5x5 pooling, which must leave 2x2 of `smallest` pixels.
        last_norm: normalise the 768 features too.
    """

    def __init__(self, C, num_classes, stride, last_norm):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride, padding=0, count_include_pad=False),
            nn.Conv2d(C, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            *[nn.BatchNorm2d(768)] * last_norm,
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), 1)  # the identity for the smallest input
        return self.classifier(x.flatten(1))


class AuxiliaryHeadCIFAR(_AuxiliaryHead):
    smallest = 8  # pixels: of images of 32

    def __init__(self, C, num_classes):
        super().__init__(C, num_classes, stride=3, last_norm=True)


class AuxiliaryHeadImageNet(_AuxiliaryHead):
    """Without the last batch norm, as the DARTS paper's experiments and its published checkpoint."""

    smallest = 7  # pixels: of images of 224

    def __init__(self, C, num_classes):
        super().__init__(C, num_classes, stride=2, last_norm=False)


def _stem(C):
    return nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))


def _stem_to_a_quarter(C):
    half = max(1, C // 2)
    return nn.Sequential(*halving(3, half), nn.ReLU(), *halving(half, C))


def _stem_to_an_eighth(C):
    return nn.Sequential(nn.ReLU(), *halving(C, C))


class _Network(nn.Module):
    """What the derived networks have in common: cells, the head, and how they are computed.

    `drop_path_prob` (an attribute, 0 at first) is what `train.py` raises over the epochs: a number, or a tensor of one,
    which torch.compile does not compile in.

    Args:
        C: channels of the first cells; doubled at one third and at two thirds of the depth.
        layers: number of cells.
        auxiliary: add the auxiliary head (used in training only).
        genotype: a `genotypes.Genotype`.
        kernel_norm: what bounds the kernels of the involutions, one of `involution.KERNEL_NORMS`.
        fast: on a CPU, compute the cells by fast_cell.py, not module by module; the results are equal, but they cannot
            be differentiated twice. `net.fast` may be changed at any time.
    """

    fast = True  # of modules that were pickled whole before there was the choice
    # what tells the networks apart
    stems: dict  # name -> function of C; of two, each gives an input of the first cell, and the second reads the first
    stem_channels: int  # that they put out, for each of C
    stem_stride: int  # by which they reduce the image
    auxiliary_head_class: type

    def __init__(self, C, num_classes, layers, auxiliary, genotype, kernel_norm=KERNEL_NORM, fast=True):
        super().__init__()
        self._layers = layers
        self._auxiliary = auxiliary
        self.fast = fast
        self.drop_path_prob = 0.0

        for name, make in self.stems.items():
            self.add_module(name, make(C))
        C_prev_prev = C_prev = self.stem_channels * C
        C_curr, reduction_prev = C, len(self.stems) == 2
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C_curr *= 2 if reduction else 1
            cell = Cell(genotype, C_prev_prev, C_prev, C_curr, reduction, reduction_prev)
            self.cells.append(cell)
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, cell.multiplier * C_curr
            if i == 2 * layers // 3:
                C_to_auxiliary = C_prev
        if auxiliary:
            self.auxiliary_head = self.auxiliary_head_class(C_to_auxiliary, num_classes)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)
        set_kernel_norm(self, kernel_norm)

    def _stems(self):
        return [getattr(self, name) for name in self.stems]

    def forward(self, input):
        """(N, 3, H, W) -> logits (N, num_classes) and the auxiliary logits (None outside training)."""
        middle, last = 2 * self._layers // 3, self._layers - 1
        auxiliary = self._auxiliary and self.training
        wanted = {middle, last} if auxiliary else {last}
        fast = self.fast and fast_network.serves(input) and all(type(cell) is Cell for cell in self.cells)
        compute = fast_network.derived if fast else _module_by_module
        maps = compute(self._stems(), self.cells, input, self.drop_path_prob, wanted)
        logits_aux = self.auxiliary_head(maps[middle]) if auxiliary else None
        return self.classifier(self.global_pooling(maps[last]).flatten(1)), logits_aux

    @classmethod
    def smallest_image(cls, layers, auxiliary=False):
        """Pixels that an image needs so that every reduction has something to halve, and so has the auxiliary head."""
        stride = cls.stem_stride * 2 ** len({layers // 3, 2 * layers // 3})
        return (cls.auxiliary_head_class.smallest - 1) * stride + 1 if auxiliary else stride


class NetworkCIFAR(_Network):
    """The evaluation network of DARTS for small images; state-dict keys as in the original code.

    Arguments: `_Network`.
    """

    stems = {"stem": _stem}
    stem_channels = 3
    stem_stride = 1
    auxiliary_head_class = AuxiliaryHeadCIFAR


class NetworkImageNet(_Network):
    """The evaluation network of DARTS for large images: three strided convolutions come before the cells.

    State-dict keys as in the original code. The first cell reads the image at a quarter and at an eighth of its size.
    The head pools the whole map (7x7 of 224 pixels, as the original), whatever its size. Arguments: `_Network`.
    """

    stems = {"stem0": _stem_to_a_quarter, "stem1": _stem_to_an_eighth}
    stem_channels = 1
    stem_stride = 8
    auxiliary_head_class = AuxiliaryHeadImageNet


NETWORKS = {"cifar": NetworkCIFAR, "imagenet": NetworkImageNet}


def default_network(image_size):
    """The name in NETWORKS of the network for images of this many pixels."""
    return "imagenet" if image_size > LARGEST_SMALL_IMAGE else "cifar"


def _module_by_module(stems, cells, x, drop_prob, wanted):
    """{k: the output of cell k, for k in wanted}."""
    maps = {}
    s0 = stems[0](x)
    s1 = stems[1](s0) if len(stems) == 2 else s0
    for k, cell in enumerate(cells):
        s0, s1 = s1, cell(s0, s1, drop_prob)
        if k in wanted:
            maps[k] = s1
    return maps
