"""The derived network: cells of a genotype, trained from scratch."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import fast_cell
from involution import set_kernel_norm
from operations import KERNEL_NORM, OPS, FactorizedReduce, Identity, ReLUConvBN, drop_path


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


class AuxiliaryHeadCIFAR(nn.Module):
    """A second classifier on the feature map after two thirds of the cells, at least 8x8."""

    smallest = 8  # pixels: a 5x5 pooling at stride 3 must leave 2x2

    def __init__(self, C, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=3, padding=0, count_include_pad=False),
            nn.Conv2d(C, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), 1)  # the identity for an 8x8 input
        return self.classifier(x.flatten(1))


class NetworkCIFAR(nn.Module):
    """The evaluation network of DARTS; state-dict keys as in the original code.

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

    def __init__(self, C, num_classes, layers, auxiliary, genotype, kernel_norm=KERNEL_NORM, fast=True):
        super().__init__()
        self._layers = layers
        self._auxiliary = auxiliary
        self.fast = fast
        self.drop_path_prob = 0.0

        C_curr = 3 * C
        self.stem = nn.Sequential(nn.Conv2d(3, C_curr, 3, padding=1, bias=False), nn.BatchNorm2d(C_curr))
        self.cells = nn.ModuleList()
        C_prev_prev, C_prev, C_curr = C_curr, C_curr, C
        reduction_prev = False
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
            self.auxiliary_head = AuxiliaryHeadCIFAR(C_to_auxiliary, num_classes)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)
        set_kernel_norm(self, kernel_norm)

    def forward(self, input):
        """(N, 3, H, W) -> logits (N, num_classes) and the auxiliary logits (None outside training)."""
        middle, last = 2 * self._layers // 3, self._layers - 1
        auxiliary = self._auxiliary and self.training
        wanted = {middle, last} if auxiliary else {last}
        fast = self.fast and fast_cell.serves(input) and all(type(cell) is Cell for cell in self.cells)
        compute = fast_cell.derived if fast else _module_by_module
        maps = compute(self.stem, self.cells, input, self.drop_path_prob, wanted)
        logits_aux = self.auxiliary_head(maps[middle]) if auxiliary else None
        return self.classifier(self.global_pooling(maps[last]).flatten(1)), logits_aux


def _module_by_module(stem, cells, x, drop_prob, wanted):
    """{k: the output of cell k, for k in wanted}."""
    maps = {}
    s0 = s1 = stem(x)
    for k, cell in enumerate(cells):
        s0, s1 = s1, cell(s0, s1, drop_prob)
        if k in wanted:
            maps[k] = s1
    return maps
