"""The examples: the block of RedNet has the authors' keys, and computes what the paper's formulation does."""

import sys

import pytest
import torch

from scripts import ROOT

sys.path.insert(0, str(ROOT / "examples"))

import rednet_block
from rednet_block import Bottleneck, UnfoldedInvolution2d


def _bn(prefix, C):
    return {f"{prefix}.{name}": (C,) for name in ("weight", "bias", "running_mean", "running_var")} | {
        f"{prefix}.num_batches_tracked": ()
    }


def authors_block(C_in, C_out, downsamples):
    """Keys and shapes of the Bottleneck of github.com/d-li14/involution (cls/mmcls/models/backbones/rednet.py)."""
    C, hidden, groups = C_out // 4, C_out // 16, C_out // 64
    shapes = {"conv1.weight": (C, C_in, 1, 1), "conv3.weight": (C_out, C, 1, 1)}
    shapes |= {"conv2.conv1.conv.weight": (hidden, C, 1, 1)} | _bn("conv2.conv1.bn", hidden)
    shapes |= {"conv2.conv2.conv.weight": (49 * groups, hidden, 1, 1), "conv2.conv2.conv.bias": (49 * groups,)}
    shapes |= _bn("bn1", C) | _bn("bn2", C) | _bn("bn3", C_out)
    if downsamples:
        shapes |= {"downsample.0.weight": (C_out, C_in, 1, 1)} | _bn("downsample.1", C_out)
    return shapes


@pytest.mark.parametrize("C_in, C_out, stride", [(64, 256, 1), (256, 256, 1), (256, 512, 2)])
def test_the_authors_weights_load_strictly(C_in, C_out, stride):
    shapes = authors_block(C_in, C_out, downsamples=C_in != C_out)
    weights = {name: torch.randn(shape) if shape else torch.tensor(3) for name, shape in shapes.items()}
    block = Bottleneck(C_in, C_out, stride)
    block.load_state_dict(weights, strict=True)
    assert torch.equal(block.conv2.conv2.conv.bias, weights["conv2.conv2.conv.bias"])


@pytest.mark.parametrize("stride, size", [(1, 9), (2, 8)])
def test_the_block_is_that_of_unfolded_patches(stride, size):
    torch.manual_seed(0)
    kinds = rednet_block.Involution2d, UnfoldedInvolution2d
    blocks = [Bottleneck(64, 128, stride, involution=kind).double() for kind in kinds]
    blocks[1].load_state_dict(blocks[0].state_dict())
    images = torch.randn(3, 64, size, size).double().requires_grad_()
    assert rednet_block.agree(blocks, images) < 1e-9
    assert blocks[0](images).shape == (3, 128, -(-size // stride), -(-size // stride))


def test_the_block_keeps_less_for_backward():
    ours, unfolded = (Bottleneck(64, 64, involution=kind) for kind in (rednet_block.Involution2d, UnfoldedInvolution2d))
    images = torch.randn(2, 64, 8, 8, requires_grad=True)
    kept, by_unfolding = (rednet_block.saved_bytes(block, images) for block in (ours, unfolded))
    patches = 2 * 16 * 49 * 8 * 8 * 4  # bytes: those of the 16 channels of the involution
    assert by_unfolding - kept >= patches


def test_the_example_prints_what_it_measured(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", "rednet_block.py --channels 64 --size 8 --batch 2 --rounds 3".split())
    rednet_block.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "times as fast" in lines[1] and lines[2].startswith("kept for backward: ")
