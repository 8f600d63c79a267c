"""Gradients against autograd's; in mixed precision; from recordings, with a stand-in for CUDA graphs and on a GPU."""

import copy
from argparse import Namespace

import pytest
import torch

import gradients
from architect import Architect
from conftest import vary_kernels
from genotypes import SEARCH_SPACES
from gradients import Gradients
from model_search import Network

ARGS = Namespace(momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-3, arch_weight_decay=1e-3)


def make(dtype=torch.float32, device="cpu", C=4):
    torch.manual_seed(0)
    net = Network(C, 3, 3, torch.nn.CrossEntropyLoss(), steps=2, multiplier=2, primitives=SEARCH_SPACES["mixed"])
    return vary_kernels(net).to(device, dtype, memory_format=torch.channels_last)


def batches(dtype=torch.float32, device="cpu", sizes=(6, 6)):
    torch.manual_seed(1)
    return [
        (torch.randn(n, 3, 8, 8, dtype=dtype).to(device, memory_format=torch.channels_last), target.to(device))
        for n in sizes
        for target in [torch.randint(3, (n,))]
    ]


def search(net, steps=3, **options):
    """Second-order and weight updates on batches of two sizes; the weights, alphas and buffers that come out."""
    sgd = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    architect = Architect(net, ARGS, Gradients(net, **options))
    for sizes in [(6, 6)] * steps + [(4, 6), (6, 4), (6, 6)]:
        train, valid = batches(net.alphas_normal.dtype, net.alphas_normal.device, sizes)
        architect.step(*train, *valid, 0.025, sgd, True)
        for w, grad in zip(net.parameters(), architect.gradients("weights", *train)[2], strict=True):
            w.grad = grad
        sgd.step()
    return net.state_dict()


@pytest.mark.parametrize("of", ["weights", "alphas", "both"])
def test_they_are_those_of_autograd(of):
    net, (batch, _) = make(torch.float64), batches(torch.float64)
    loss, logits, grads = Gradients(net)(of, *batch)
    of_alphas, of_weights = net.arch_parameters(), list(net.parameters())
    wanted = {"weights": of_weights, "alphas": of_alphas, "both": of_alphas + of_weights}[of]
    expected = torch.autograd.grad(net._loss(*batch), wanted)
    assert torch.allclose(loss, net._loss(*batch), rtol=1e-12) and torch.allclose(logits, net(batch[0]), rtol=1e-9)
    for grad, other in zip(grads, expected, strict=True):
        assert torch.allclose(grad, other, rtol=1e-9, atol=1e-14)
    assert not loss.requires_grad and all(w.requires_grad for w in of_weights)


def test_mixed_precision_is_bfloat16_and_can_be_left_out():
    net, (batch, _) = make(), batches()
    seen = []
    net.classifier.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    exact, rough, precise = (
        torch.cat([g.flatten() for g in Gradients(net, amp)("alphas", *batch, precise=precise)[2]])
        for amp, precise in ((False, False), (True, False), (True, True))
    )
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
    assert torch.equal(exact, precise)
    assert 0 < (rough - exact).norm() < 0.3 * exact.norm()


def test_the_finite_difference_is_not_in_mixed_precision():
    net, (train, valid) = make(), batches()
    seen = []
    net.classifier.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    sgd = torch.optim.SGD(net.parameters(), 0.025)
    Architect(net, ARGS, Gradients(net, amp=True)).step(*train, *valid, 0.025, sgd, True)
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2


class Imitation:
    """What a recording does to memory: inputs are copied, outputs overwritten."""

    def __init__(self, function, inputs, wanted, pool):
        self.function, self.inputs = function, inputs
        for _ in range(4):
            self.outputs = function(*inputs)

    def __call__(self, *inputs):
        for kept, input in zip(self.inputs, inputs, strict=True):
            kept.copy_(input)
        torch._foreach_copy_(self.outputs, self.function(*self.inputs))
        return self.outputs


def test_a_search_from_recordings_is_the_eager_one(monkeypatch):
    monkeypatch.setattr(gradients, "_Recording", Imitation)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    net = make()
    expected = search(copy.deepcopy(net), steps=1)
    for name, value in search(net, steps=1, cuda_graph=True).items():
        assert torch.equal(value, expected[name]), name


def test_frozen_weights_are_left_out():
    net, (train, valid) = make(), batches()
    net.stem[0].weight.requires_grad_(False)
    before = net.stem[0].weight.clone()
    gradients = Gradients(net)
    assert len(gradients("weights", *train)[2]) == len(list(net.parameters())) - 1
    Architect(net, ARGS, gradients).step(*train, *valid, 0.025, torch.optim.SGD(net.parameters(), 0.025), True)
    assert torch.equal(net.stem[0].weight, before) and not net.stem[0].weight.requires_grad


def test_tensors_that_are_kept_come_back_bit_for_bit_after_an_error():
    tensors = [torch.randn(3), torch.tensor(float("nan")), torch.arange(4)]
    before = [t.clone() for t in tensors]
    with pytest.raises(KeyError), gradients.Kept(tensors).kept():
        for t in tensors:
            t.zero_()
        raise KeyError
    for t, expected in zip(tensors, before, strict=True):
        assert torch.equal(t, expected) or t.isnan() == expected.isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, True])
def test_recorded_gradients_are_the_eager_ones(amp):
    net = make(device="cuda", C=16)
    eager, recorded = Gradients(net, amp), Gradients(net, amp, cuda_graph=True)
    for sizes in [(6, 6), (6, 4), (6, 6)]:  # of an epoch, with a smaller last batch
        for batch in batches(device="cuda", sizes=sizes):
            for of, precise in (("weights", False), ("both", False), ("alphas", True)):
                before = [b.clone() for b in net.buffers()]
                expected = [x.clone() for x in flat(eager(of, *batch, precise=precise))]
                for buffer, value in zip(net.buffers(), before, strict=True):
                    buffer.copy_(value)
                for x, y in zip(flat(recorded(of, *batch, precise=precise)), expected, strict=True):
                    assert (x - y).norm() <= 1e-3 * y.norm() + 1e-6


def flat(values):
    loss, logits, grads = values
    return [loss, logits, *grads]


@pytest.mark.gpu
def test_a_search_from_cuda_graphs_learns_as_the_eager_one():
    """Statistics and momenta too; Adam turns a rounding of a small gradient into a step, hence the tolerance."""
    net = make(device="cuda", C=16)
    start = copy.deepcopy(net.state_dict())
    expected, recorded = search(copy.deepcopy(net)), search(net, cuda_graph=True)
    for name, value in expected.items():
        moved = (value - start[name]).double().norm()
        assert (recorded[name] - value).double().norm() <= (0.5 if "alphas" in name else 0.05) * moved + 1e-6, name


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_that_of_the_cpu():
    nets = make(C=16), make(device="cuda", C=16)
    of_cpu, of_gpu = (
        torch.cat([g.flatten().cpu() for g in Gradients(net)("both", *batches(device=device)[0], precise=True)[2]])
        for net, device in zip(nets, ("cpu", "cuda"), strict=True)
    )
    assert (of_cpu - of_gpu).norm() < 1e-3 * of_cpu.norm()
