"""The supernet: every edge of every cell is a mixture of all primitives, weighted by a softmax of the alphas."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import fast_cell
import fast_network
from genotypes import PRIMITIVES, Genotype, derive
from involution import Involution2d, all_are_watched, is_watched, set_kernel_norm
from operations import KERNEL_NORM, OPS, FactorizedReduce, ReLUConvBN, drop_path_factors, halving

STEM_STRIDES = (1, 4, 8)


class MixedOp(nn.Module):
    """One edge: sum_o weights[o] * o(x) over the primitives (arXiv 1806.09055, eq. 2).

    `none` keeps its share of the softmax and its place in the state dict, but it is never computed.
    """

    def __init__(self, C, stride, primitives=PRIMITIVES):
        super().__init__()
        self._ops = nn.ModuleList()
        for primitive in primitives:
            op = OPS[primitive](C, stride, False)
            if "pool" in primitive:
                op = nn.Sequential(op, nn.BatchNorm2d(C, affine=False))
            self._ops.append(op)
        self._computed = [k for k, primitive in enumerate(primitives) if primitive != "none"]

    def forward(self, x, weights):
        """(N, C, H, W) and (primitives,) -> (N, C, ceil(H/stride), ceil(W/stride))."""
        return sum(weights[k] * self._ops[k](x) for k in self._computed)


class Cell(nn.Module):
    """Two input nodes, `steps` own nodes, each the sum of a mixed edge from every node before it."""

    def __init__(self, steps, multiplier, C_prev_prev, C_prev, C, reduction, reduction_prev, primitives=PRIMITIVES):
        super().__init__()
        self.reduction = reduction
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self._steps = steps
        self._multiplier = multiplier
        self._ops = nn.ModuleList(
            MixedOp(C, 2 if reduction and j < 2 else 1, primitives) for i in range(steps) for j in range(2 + i)
        )

    def forward(self, s0, s1, weights, fast=False, drop_prob=0.0):
        """Two feature maps and the softmax weights (edges, primitives) -> (N, multiplier * C, H', W').

        `fast` computes the same with the work shared that the edges have in common; where somebody watches an edge
        by a hook, every edge is computed. In training, `drop_prob` drops edges, each for each image.
        """
        factors = None
        if self.training and drop_prob > 0:
            # in float32, so that a pass in mixed precision drops the same paths as one without
            like = s0[:, :1, :1, :1].float()
            factors = drop_path_factors(like, drop_prob, len(self._ops)).to(s0.dtype).unbind()
        if fast and not any(map(is_watched, self._ops)) and not all_are_watched():
            return fast_cell.forward(self, s0, s1, weights, factors)
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edge = 0
        for _ in range(self._steps):
            terms = [self._ops[edge + j](state, weights[edge + j]) for j, state in enumerate(states)]
            if factors is not None:
                terms = [factors[edge + j] * term for j, term in enumerate(terms)]
            edge += len(states)
            states.append(sum(terms))
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(nn.Module):
    """The supernet of the original DARTS code, over any list of primitives.

    `parameters()` yields the weights alone; the alphas come from `arch_parameters()`, so that
    `SGD(net.parameters())` does what it should. `state_dict()` holds both.

    `drop_path_prob`, which a search raises over the epochs, is the probability that an edge is dropped for an image in
    training: the whole mixture, so that skip connections gain nothing by it, as in RobustDARTS (arXiv 1909.09656).

    Args:
        C: channels of the first cells; doubled at one third and at two thirds of the depth.
        layers: number of cells.
        criterion: (logits, target) -> scalar loss.
        steps: own nodes of a cell; `multiplier`: how many of the last ones are concatenated as its output.
        primitives: names in `operations.OPS`.
        fast: compute the cells by fast_cell.py, not edge by edge; the results are equal, but on a CPU they cannot be
            differentiated twice. `net.fast` may be changed at any time.
        kernel_norm: what bounds the kernels of the involutions, one of `involution.KERNEL_NORMS`.
        stem_stride: by which the stem reduces the image before the cells, one of `STEM_STRIDES`. 1 is the stem of the
            original. 4 and 8 are two and three strided convolutions: the stem that brings 224 pixels to 28 in the
            original's network for ImageNet and in the searches of PC-DARTS on it (arXiv 1907.05737, section 4.3).

    Raises:
        ValueError: an unknown primitive, kernel_norm or stem_stride, no primitive but `none`, or a count below one.
    """

    def __init__(
        self,
        C,
        num_classes,
        layers,
        criterion,
        steps=4,
        multiplier=4,
        stem_multiplier=3,
        primitives=PRIMITIVES,
        fast=True,
        kernel_norm=KERNEL_NORM,
        stem_stride=1,
    ):
        super().__init__()
        _check_counts(C=C, num_classes=num_classes, layers=layers, steps=steps, multiplier=multiplier)
        if multiplier > steps:
            raise ValueError(f"multiplier must be at most steps = {steps}, got {multiplier}")
        unknown = [primitive for primitive in primitives if primitive not in OPS]
        if unknown or not set(primitives) - {"none"}:
            raise ValueError(f"primitives must be names in operations.OPS besides none, got {unknown or primitives}")
        self._C, self._num_classes, self._layers, self._criterion = C, num_classes, layers, criterion
        self._steps, self._multiplier, self._stem_multiplier = steps, multiplier, stem_multiplier
        self._primitives, self.fast, self._stem_stride = list(primitives), fast, stem_stride
        self.drop_path_prob = 0.0

        C_curr = stem_multiplier * C
        self.stem = _make_stem(C_curr, stem_stride)
        self.cells = nn.ModuleList()
        C_prev_prev, C_prev, C_curr = C_curr, C_curr, C
        reduction_prev = False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C_curr *= 2 if reduction else 1
            cell = Cell(steps, multiplier, C_prev_prev, C_prev, C_curr, reduction, reduction_prev, self._primitives)
            self.cells.append(cell)
            reduction_prev = reduction
            C_prev_prev, C_prev = C_prev, multiplier * C_curr
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(C_prev, num_classes)

        edges = sum(2 + i for i in range(steps))
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(edges, len(primitives)))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(edges, len(primitives)))
        set_kernel_norm(self, kernel_norm)

    def forward(self, input):
        """(N, 3, H, W) -> logits (N, num_classes)."""
        normal, reduce = F.softmax(self.alphas_normal, dim=-1), F.softmax(self.alphas_reduce, dim=-1)
        s1 = None
        if self.fast and fast_network.serves(input) and all(type(cell) is Cell for cell in self.cells):
            s1 = fast_network.mixed(self.stem, self.cells, input, (normal, reduce), self.drop_path_prob)
        if s1 is None:
            s1 = self._cell_by_cell(self.stem(input), normal, reduce)
        return self.classifier(self.global_pooling(s1).flatten(1))

    def _cell_by_cell(self, x, normal, reduce):
        s0 = s1 = x
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, reduce if cell.reduction else normal, self.fast, self.drop_path_prob)
        return s1

    def _loss(self, input, target):
        return self._criterion(self(input), target)

    @property
    def primitives(self):
        """Their names, in the order of the alphas' columns."""
        return self._primitives

    def arch_parameters(self):
        """The alphas: [normal, reduce], each (edges, primitives)."""
        return [self.alphas_normal, self.alphas_reduce]

    def named_parameters(self, *args, **kwargs):
        """The weights alone, by name; `parameters()` follows."""
        alphas = {id(alpha) for alpha in self.arch_parameters()}
        return (item for item in super().named_parameters(*args, **kwargs) if id(item[1]) not in alphas)

    def new(self):
        """A fresh network of the same arguments and alphas, on the same device."""
        net = Network(
            self._C,
            self._num_classes,
            self._layers,
            self._criterion,
            self._steps,
            self._multiplier,
            self._stem_multiplier,
            self._primitives,
            self.fast,
            stem_stride=self._stem_stride,
        ).to(self.alphas_normal)
        net.drop_path_prob = self.drop_path_prob
        for new, old in zip(net.modules(), self.modules(), strict=True):
            if isinstance(old, Involution2d):
                new.kernel_norm = old.kernel_norm
        with torch.no_grad():
            for new, old in zip(net.arch_parameters(), self.arch_parameters(), strict=True):
                new.copy_(old)
        return net

    def genotype(self):
        """The discrete architecture that the alphas stand for (`genotypes.derive`)."""
        concat = range(2 + self._steps - self._multiplier, 2 + self._steps)
        normal, reduce = (F.softmax(alpha.detach(), dim=-1).tolist() for alpha in self.arch_parameters())
        return Genotype(
            normal=derive(normal, self._primitives),
            normal_concat=concat,
            reduce=derive(reduce, self._primitives),
            reduce_concat=concat,
        )


def _make_stem(C, stride):
    """(N, 3, H, W) -> (N, C, ceil(H/stride), ceil(W/stride)), normalised."""
    if stride not in STEM_STRIDES:
        raise ValueError(f"stem_stride must be one of {', '.join(map(str, STEM_STRIDES))}, got {stride}")
    if stride == 1:
        return nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
    half = max(1, C // 2)
    layers = [*halving(3, half), nn.ReLU(), *halving(half, C)]
    return nn.Sequential(*layers) if stride == 4 else nn.Sequential(*layers, nn.ReLU(), *halving(C, C))


def _check_counts(**counts):
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
