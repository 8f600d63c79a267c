"""A bottleneck block of RedNet, built with `Involution2d`: the operator without any search.

    python examples/rednet_block.py                                 # one thread, under a minute
    python examples/rednet_block.py --channels 512 --size 14 --batch 16
    python examples/rednet_block.py --device cuda

RedNet (arXiv 2103.06255, section 4.1) is ResNet with a 7x7 involution in the place of the 3x3 convolution of every
bottleneck. `Bottleneck` has the names of the involution authors' block, so that their weights load strictly. Printed is
what a training step of the block costs, against the same block with involution as the paper's Algorithm 1 has it:
unfolded patches times a kernel tensor, differentiated by autograd.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from involution import Involution2d


class Bottleneck(nn.Module):
    """1x1 convolution, 7x7 involution, 1x1 convolution, each normalised; the input is added.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride)).

    Args:
        expansion: out_channels over the channels of the involution.
        involution: a module of (channels, kernel_size, stride).
    """

    def __init__(self, in_channels, out_channels, stride=1, expansion=4, involution=Involution2d):
        super().__init__()
        middle = out_channels // expansion
        self.conv1 = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = involution(middle, 7, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + identity)


class UnfoldedInvolution2d(Involution2d):
    """What is compared with: all patches (N, C*K*K, H*W) times all kernels, summed over the taps."""

    def forward(self, x):
        weight = self.kernels(x)
        patches = F.unfold(x, self.kernel_size, padding=self.kernel_size // 2, stride=self.stride)
        patches = patches.unflatten(1, (self.groups, -1, weight.shape[2])).unflatten(-1, weight.shape[3:])
        return (patches * weight.unsqueeze(2)).sum(3).flatten(1, 2)


def step(block, images):
    """One training step: forward, and the gradients of input and weights."""
    block.zero_grad()
    images.grad = None
    output = block(images)
    output.square().mean().backward()
    return output.detach(), images.grad


def agree(blocks, images):
    """The largest difference between two blocks' outputs and input gradients, relative to the largest value."""
    ours, theirs = (step(block, images) for block in blocks)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def seconds(block, images):
    """Of a step: of the CPU's time, which other processes disturb the least, or of a GPU's."""
    if images.is_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if images.is_cuda else time.process_time
    began = clock()
    step(block, images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def saved_bytes(block, images):
    """What a step keeps from forward for backward, beyond the weights: each tensor's memory counted once."""
    weights = {weight.untyped_storage().data_ptr() for weight in block.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor, storage.nbytes()  # the tensor, so that nothing else gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(images)
    return sum(size for _, size in kept.values())


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=256, help="of the block's input and output")
    parser.add_argument("--size", type=int, default=28, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each block, which take turns")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(1)  # the time of a process is the sum over its threads
    ours, unfolded = (
        Bottleneck(args.channels, args.channels, involution=kind).to(args.device, memory_format=torch.channels_last)
        for kind in (Involution2d, UnfoldedInvolution2d)
    )
    unfolded.load_state_dict(ours.state_dict())
    images = torch.randn(args.batch, args.channels, args.size, args.size, device=args.device)
    images = images.to(memory_format=torch.channels_last).requires_grad_()
    print(f"the largest difference between the two: {agree((ours, unfolded), images):.1e} of the largest value")
    ratios = []
    for _ in range(args.rounds):
        theirs, own = seconds(unfolded, images), seconds(ours, images)
        ratios.append(theirs / own)
    low, median, high = statistics.quantiles(ratios, n=4)
    memory = [saved_bytes(block, images) / 1e6 for block in (ours, unfolded)]
    print(f"a training step: {median:.1f} times as fast as with unfolded patches ({low:.1f} to {high:.1f}: quartiles)")
    print(f"kept for backward: {memory[0]:.0f} MB, with unfolded patches {memory[1]:.0f} MB")


if __name__ == "__main__":
    main()
