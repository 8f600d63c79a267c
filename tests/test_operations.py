"""Every primitive: sizes at both strides, zeros where zeros are due, drop-path."""

import pytest
import torch
import torch.nn.functional as F

from genotypes import known_primitives
from operations import OPS, FactorizedReduce, drop_path


def test_every_primitive_of_the_vocabulary_exists():
    assert set(OPS) == set(known_primitives())


@pytest.mark.parametrize("primitive", OPS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("H, W", [(8, 8), (7, 5), (1, 1)], ids=["even", "odd", "single pixel"])
def test_output_size_and_gradient(primitive, stride, H, W):
    torch.manual_seed(0)
    op = OPS[primitive](6, stride, True)
    x = torch.randn(3, 6, H, W, requires_grad=True)
    out = op(x)
    assert out.shape == (3, 6, -(-H // stride), -(-W // stride))
    if primitive in ("none", "noise"):  # see nothing of their input
        assert out.any() == (primitive == "noise") and not out.requires_grad
        return
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None for p in op.parameters())


def test_noise_is_standard_normal_and_always_new():
    torch.manual_seed(0)
    first, second = (OPS["noise"](8, 2, True)(torch.full((16, 8, 32, 32), 7.0)) for _ in range(2))
    assert abs(first.mean()) < 0.02 and abs(first.std() - 1) < 0.02
    assert abs((first * second).mean()) < 0.02


@pytest.mark.parametrize("C", [16, 36, 72, 144])
def test_involutions_take_the_channels_of_the_published_networks(C):
    assert OPS["sep_invo_5x5"](C, 2, True)(torch.randn(2, C, 5, 5)).shape == (2, C, 3, 3)


@pytest.mark.parametrize("C", [1, 3, 8])
def test_factorized_reduce_is_the_two_strided_convolutions_of_the_original(C):
    torch.manual_seed(0)
    op = FactorizedReduce(C, 2 * C)
    x = torch.randn(2, C, 8, 8)
    convs = [F.conv2d(v, c.weight, stride=2) for v, c in ((x.relu(), op.conv_1), (x.relu()[:, :, 1:, 1:], op.conv_2))]
    assert torch.allclose(op(x), op.bn(torch.cat(convs, dim=1)), atol=1e-6)


def test_affine_reaches_every_batch_norm():
    for primitive, make in OPS.items():
        for affine in (False, True):
            norms = [m for m in make(8, 2, affine).modules() if isinstance(m, torch.nn.BatchNorm2d)]
            assert all(m.affine == affine for m in norms), primitive


def test_factorized_reduce_sees_every_pixel():
    op = FactorizedReduce(2, 4)
    x = torch.rand(2, 2, 5, 6).add_(1).requires_grad_()  # positive: nothing is lost in the ReLU
    (op(x) * torch.randn(2, 4, 3, 3)).sum().backward()
    even, odd = x.grad[:, :, ::2, ::2], x.grad[:, :, 1::2, 1::2]
    assert even.all() and odd.all()


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3, 3)
    out = drop_path(x, 0.3)
    assert torch.allclose(out.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert (out == out[:, :1, :1, :1]).all()
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize("primitive", [p for p in OPS if "invo" in p])
def test_an_involution_starts_with_one_kernel_for_all_pixels(primitive):
    torch.manual_seed(0)
    op = OPS[primitive](8, 1, True).op[:2]  # without 1x1 convolution and batch norm
    x = torch.rand(1, 8, 16, 16)
    assert torch.allclose(op(2 * x), 2 * op(x), atol=1e-6)
    assert op[1].conv2.conv.bias.any()
