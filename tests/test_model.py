"""The derived network: shapes, the original's state-dict keys, drop-path, the auxiliary head."""

import math

import pytest
import torch

import original_darts
from conftest import logits_of_scaled_images
from genotypes import NAMED
from involution import Involution2d
from model import NetworkCIFAR
from operations import KERNEL_NORM


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("size", [32, 33], ids=["even", "odd"])
def test_logits_of_every_named_genotype(name, size):
    torch.manual_seed(0)
    net = NetworkCIFAR(4, 10, 3, True, NAMED[name])
    input = torch.randn(2, 3, size, size)
    logits, logits_aux = net(input)
    assert logits.shape == logits_aux.shape == (2, 10)
    logits, logits_aux = net.eval()(input)
    assert logits.shape == (2, 10) and logits_aux is None


@pytest.mark.parametrize("name", NAMED)
def test_a_network_of_bounded_kernels_is_of_degree_one(name):
    torch.manual_seed(0)
    *_, at_100, at_1000 = logits = logits_of_scaled_images(NetworkCIFAR(4, 10, 20, False, NAMED[name]))
    assert all(map(math.isfinite, logits)) and at_1000 <= 15 * at_100


@pytest.mark.parametrize("name", ["DARTS", "DARTS_L20"])
def test_a_network_of_kernels_without_bounds_overflows(name):
    torch.manual_seed(0)
    logits = logits_of_scaled_images(NetworkCIFAR(4, 10, 20, False, NAMED[name], kernel_norm="none"))
    assert math.isfinite(logits[0]) and not math.isfinite(logits[-1])


@pytest.mark.parametrize("name", ["DARTS", "DARTS_L20", "DARTS_V2"])
def test_no_gradient_is_huge_at_first(name):
    torch.manual_seed(0)
    net = NetworkCIFAR(4, 10, 20, False, NAMED[name])
    torch.nn.functional.cross_entropy(net(torch.randn(8, 3, 16, 16))[0], torch.arange(8)).backward()
    norms = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None])
    assert norms.max() <= 100 * norms.median()


def test_a_bound_of_the_kernels_reaches_every_involution():
    net = NetworkCIFAR(4, 10, 3, False, NAMED["DARTS"], kernel_norm="tanh")
    assert {m.kernel_norm for m in net.modules() if isinstance(m, Involution2d)} == {"tanh"}
    default = NetworkCIFAR(4, 10, 3, False, NAMED["DARTS"])
    assert {m.kernel_norm for m in default.modules() if isinstance(m, Involution2d)} == {KERNEL_NORM}
    assert list(net.state_dict()) == list(default.state_dict())
    with pytest.raises(ValueError, match="kernel_norm must be one of"):
        NetworkCIFAR(4, 10, 3, False, NAMED["DARTS_V2"], kernel_norm="layer")


@pytest.mark.parametrize("name", ["DARTS_V1", "DARTS_V2", "NASNet", "AmoebaNet", "DARTS_L8"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_state_dict_is_the_originals_for_convolutional_genotypes(name, auxiliary):
    net = NetworkCIFAR(8, 10, 6, auxiliary, NAMED[name])
    expected = original_darts.network_cifar(8, 10, 6, auxiliary, NAMED[name])
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == expected


def test_published_weights_load_strictly_also_without_batch_counters():
    shapes = original_darts.network_cifar(36, 10, 20, True, NAMED["DARTS_V2"])
    published = {k: torch.zeros(s) for k, s in shapes.items() if not k.endswith("num_batches_tracked")}
    NetworkCIFAR(36, 10, 20, True, NAMED["DARTS_V2"]).load_state_dict(published, strict=True)


def test_the_size_of_the_published_network():
    net = NetworkCIFAR(36, 10, 20, False, NAMED["DARTS_V2"])
    assert sum(p.numel() for p in net.parameters()) == 3_349_342  # the published 3.3 M parameters


@pytest.mark.parametrize("size", [32, 40, 64])
def test_auxiliary_head_takes_larger_images(size):
    logits, logits_aux = NetworkCIFAR(4, 10, 3, True, NAMED["DARTS"])(torch.randn(2, 3, size, size))
    assert logits_aux.shape == (2, 10)


def test_drop_path_acts_in_training_only():
    torch.manual_seed(0)
    net, input = NetworkCIFAR(4, 10, 3, False, NAMED["DARTS_V2"]), torch.randn(2, 3, 16, 16)
    assert net.drop_path_prob == 0
    assert torch.equal(net(input)[0], net(input)[0])
    net.drop_path_prob = 0.5
    assert not torch.equal(net(input)[0], net(input)[0])
    net.eval()
    assert torch.equal(net(input)[0], net(input)[0])


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_any_depth(layers):
    assert NetworkCIFAR(4, 10, layers, False, NAMED["DARTS_L20"])(torch.randn(2, 3, 8, 8))[0].shape == (2, 10)
