"""Several processes as one: over gloo, and as torchrun starts, stops and restarts them."""

import copy
from argparse import Namespace

import pytest
import torch

from architect import Architect
from conftest import in_processes, vary_kernels
from genotypes import SEARCH_SPACES
from gradients import Gradients
from model_search import Network
from processes import ALONE, Processes, digest

ARGS = Namespace(momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-3, arch_weight_decay=1e-3)


def share(team, batch):
    return [part[team.rank :: team.count] for part in batch]


# ---------------------------------------------------------------------------------------------- collectives


def collect(team):
    mean = [torch.full((2, 2), float(team.rank)), torch.tensor(10.0 * team.rank)]
    team.mean_(mean, images=team.rank + 1)
    team.seed(1, 2)
    return {
        "mean": mean,
        "total": team.total([1, team.rank]),
        "same": team.differing(b"the same"),
        "other": team.differing(b"another" if team.rank == 1 else b"the same"),
        "agreed": team.agreed("name", lambda: f"of rank {team.rank}"),
        "chance": torch.rand(4),
        "collectives": team.reached,
    }


def test_what_processes_share(tmp_path):
    results = in_processes(3, tmp_path, collect)
    for result in results:
        mean = (0 * 1 + 1 * 2 + 2 * 3) / 6  # weighted by the images
        assert torch.allclose(result["mean"][0], torch.full((2, 2), mean)) and result["mean"][1].allclose(
            10 * torch.tensor(mean)
        )
        assert all(torch.equal(a, b) for a, b in zip(result["mean"], results[0]["mean"], strict=True))
        assert result["total"] == [3, 3]
        assert result["same"] == [] and result["other"] == [1]
        assert result["agreed"] == "of rank 0"
        assert result["collectives"] == 5  # of which one is the meeting
    assert len({tuple(result["chance"].tolist()) for result in results}) == 3


def test_a_process_alone_pays_nothing():
    values = [torch.tensor(1.0)]
    ALONE.mean_(values, 5)
    state = torch.get_rng_state()
    ALONE.seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (ALONE.total([1, 2]), ALONE.differing(b""), ALONE.agreed("x", lambda: "y"), ALONE.reached) == (
        [1, 2],
        [],
        "y",
        0,
    )
    assert values == [torch.tensor(1.0)]


def test_a_digest_tells_one_bit_apart():
    tensors = [torch.randn(3, 4), torch.tensor(2), torch.randn(5).double()]
    before = digest(tensors)
    assert digest([t.clone() for t in tensors]) == before
    tensors[0].view(torch.int32)[1, 1] ^= 1
    assert digest(tensors) != before


# ---------------------------------------------------------------------------------------------- derivatives


def make_search(training):
    """A tiny supernet in float64 with the statistics and momenta of some steps, and two batches."""
    torch.manual_seed(0)
    net = Network(4, 3, 3, torch.nn.CrossEntropyLoss(), steps=2, multiplier=2, primitives=SEARCH_SPACES["mixed"])
    net = vary_kernels(net).double()
    sgd = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9)
    batches = [(torch.randn(n, 3, 8, 8).double(), torch.randint(3, (n,))) for n in (7, 8)]
    for _ in range(2):
        net._loss(*batches[0]).backward()
        sgd.step()
    if training:  # every image as often as there are processes, and beside itself: all shares have the same statistics
        batches = [(input.repeat_interleave(6, 0), torch.randint(3, (6 * len(target),))) for input, target in batches]
    return net.train(training), sgd, *batches


def derive(team, training):
    """Gradients of both orders and of the weights, and the running statistics after them."""
    net, sgd, train, valid = make_search(training)
    gradients = Gradients(net, processes=team)
    architect, results = Architect(net, ARGS, gradients), {}
    for unrolled in (False, True):
        architect.step(*share(team, train), *share(team, valid), 0.025, sgd, unrolled)
        results[f"alphas {unrolled}"] = [alpha.grad.clone() for alpha in net.arch_parameters()]
    loss, _, grads = gradients("weights", *share(team, train))
    means = [buffer.clone() for name, buffer in net.named_buffers() if name.endswith("running_mean")]
    return results | {"loss": [loss], "weights": [grad.clone() for grad in grads], "running means": means}


@pytest.mark.parametrize("training", [False, True], ids=["in evaluation mode", "with equal statistics"])
@pytest.mark.parametrize("count", [2, 3])
def test_derivatives_are_those_of_one_process(count, training, tmp_path):
    expected = derive(ALONE, training)
    results = in_processes(count, tmp_path, derive, training)
    for name, values in expected.items():
        values, first, *others = (torch.cat([v.flatten() for v in r[name]]) for r in [expected, *results])
        assert (first - values).norm() <= 1e-9 * values.norm(), name
        assert all(torch.equal(first, other) for other in others), name
