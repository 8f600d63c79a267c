"""The candidate operations: `OPS` maps a primitive to a function (C, stride, affine) -> module.

Every module takes (N, C, H, W) to (N, C, ceil(H/stride), ceil(W/stride)). The convolutional ones keep the
state-dict keys of the original DARTS code. To add a primitive, add it to `OPS` and to a list in
`genotypes.SEARCH_SPACES`.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from involution import Involution2d

KERNEL_NORM = "soft_rms"  # of the involutions of OPS (involution.KERNEL_NORMS)
LARGEST_SMALL_IMAGE = 64  # pixels; the cells see such images whole, and larger ones reduced by a stem

OPS = {
    "none": lambda C, stride, affine: Zero(stride),
    "skip_connect": lambda C, stride, affine: Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride, padding=1),
    "avg_pool_3x3": lambda C, stride, affine: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
    "sep_invo_3x3": lambda C, stride, affine: InvoBN(C, 3, stride, 1, affine),
    "sep_invo_5x5": lambda C, stride, affine: InvoBN(C, 5, stride, 1, affine),
    "sep_invo_7x7": lambda C, stride, affine: InvoBN(C, 7, stride, 1, affine),
    "dil_invo_3x3": lambda C, stride, affine: InvoBN(C, 3, stride, 2, affine),
    "dil_invo_5x5": lambda C, stride, affine: InvoBN(C, 5, stride, 2, affine),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, C, 3, stride, 1, affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, C, 5, stride, 2, affine),
    "sep_conv_7x7": lambda C, stride, affine: SepConv(C, C, 7, stride, 3, affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, C, 3, stride, 2, 2, affine),
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, C, 5, stride, 4, 2, affine),
    "conv_7x1_1x7": lambda C, stride, affine: FactorizedConv7(C, stride, affine),
    "noise": lambda C, stride, affine: Noise(stride),
}


class Zero(nn.Module):
    """The zero operation: no connection."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class Noise(nn.Module):
    """Standard normal noise in place of the input, in training and in evaluation (arXiv 1909.09656, space S4)."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return torch.randn_like(x[:, :, :: self.stride, :: self.stride])


class Identity(nn.Module):
    def forward(self, x):
        return x


class InvoBN(nn.Module):
    """ReLU, involution, 1x1 convolution, batch norm: an involution where DARTS has its depthwise convolution.

    Its kernels are bounded. At first all pixels share one, the bias of `conv2`.
    """

    def __init__(self, C, kernel_size, stride, dilation, affine):
        super().__init__()
        involution = Involution2d(C, kernel_size, stride, dilation, affine=affine, kernel_norm=KERNEL_NORM)
        nn.init.zeros_(involution.conv2.conv.weight)
        self.op = nn.Sequential(
            nn.ReLU(),
            involution,
            nn.Conv2d(C, C, 1, bias=False),
            nn.BatchNorm2d(C, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class ReLUConvBN(nn.Module):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class DilConv(nn.Module):
    """ReLU, dilated depthwise convolution, 1x1 convolution, batch norm."""

    def __init__(self, C_in, C_out, kernel_size, stride, padding, dilation, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, dilation, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class SepConv(nn.Module):
    """Depthwise-separable convolution, applied twice."""

    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_in, 1, bias=False),
            nn.BatchNorm2d(C_in, affine=affine),
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, 1, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class FactorizedConv7(nn.Sequential):
    """ReLU, a 1x7 and a 7x1 convolution, batch norm: AmoebaNet's `conv_7x1_1x7`."""

    def __init__(self, C, stride, affine):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C, C, (1, 7), (1, stride), (0, 3), bias=False),
            nn.Conv2d(C, C, (7, 1), (stride, 1), (3, 0), bias=False),
            nn.BatchNorm2d(C, affine=affine),
        )


class FactorizedReduce(nn.Module):
    """Halve the resolution without a blind spot: two strided 1x1 convolutions, the second off by one pixel."""

    def __init__(self, C_in, C_out, affine=True):
        super().__init__()
        # the stride is taken by slices: oneDNN's strided 1x1 convolution of few channels-last channels writes out of
        # bounds (PyTorch 2.14 on a CPU, backward, fewer than eight input channels)
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out - C_out // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):
        x = F.relu(x)
        H, W = x.shape[2:]
        shifted = F.pad(x, (-1, W % 2, -1, H % 2))  # zeros past the edge of an odd-sized image
        return self.bn(torch.cat([self.conv_1(x[:, :, ::2, ::2]), self.conv_2(shifted[:, :, ::2, ::2])], dim=1))


def halving(C_in, C_out):
    """What a stem for large images is made of: a 3x3 convolution of stride 2 and a batch norm."""
    return nn.Conv2d(C_in, C_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(C_out)


def drop_path(x, drop_prob):
    """Zero whole images of x (N, C, H, W) with probability `drop_prob`, scale the others by 1 / (1 - drop_prob)."""
    return x * drop_path_factors(x, drop_prob)


def drop_path_factors(x, drop_prob, *paths):
    """What `drop_path` multiplies the images of x with: (*paths, N, 1, 1, 1)."""
    keep = 1 - drop_prob
    return x.new_empty(*paths, len(x), 1, 1, 1).bernoulli_(keep).div_(keep)
