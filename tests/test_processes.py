"""Several processes as one: over gloo, and as torchrun starts, stops and restarts them."""

import copy
import functools
import importlib
import os
import pkgutil
import runpy
import shutil
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import run_folder
import utils
from architect import Architect
from conftest import in_processes, meet_and_call, print_into, printed, start_processes, vary_kernels
from genotypes import SEARCH_SPACES
from gradients import Gradients
from model_search import Network
from runtime import checkpoint
from runtime.processes import ALONE, Processes, digest
from test_train_search import assert_same_run

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
    batches = [(torch.randn(n, 3, 8, 8).double(), torch.randint(3, (n,))) for n in ((4, 5) if training else (7, 8))]
    for _ in range(2):
        net._loss(*batches[0]).backward()
        sgd.step()
    if training:  # every image as often as there are processes, and beside itself: all shares have the same statistics
        batches = [(input.repeat_interleave(6, 0), torch.randint(3, (6 * len(target),))) for input, target in batches]
    return net.train(training), sgd, *batches


def derive(team, training):
    """Gradients of both orders and of the weights, and the running statistics after them."""
    net, sgd, train, valid = make_search(training)
    gradients = Gradients(net, team=team)
    architect, results = Architect(net, ARGS, gradients), {}
    for unrolled in (False, True):
        architect.step(*share(team, train), *share(team, valid), 0.025, sgd, unrolled)
        results[f"alphas {unrolled}"] = [alpha.grad.clone() for alpha in net.arch_parameters()]
    loss, _, grads = gradients("weights", *share(team, train))
    means = [buffer.clone() for name, buffer in net.named_buffers() if name.endswith("running_mean")]
    return results | {"loss": [loss], "weights": [grad.clone() for grad in grads], "running means": means}


@pytest.mark.parametrize(
    "count, training",
    [
        pytest.param(2, False, id="two, in evaluation mode"),
        pytest.param(3, True, id="three, with equal statistics"),
        pytest.param(3, False, id="three, in evaluation mode", marks=pytest.mark.slow),
        pytest.param(2, True, id="two, with equal statistics", marks=pytest.mark.slow),
    ],
)
def test_derivatives_are_those_of_one_process(count, training, tmp_path):
    expected = derive(ALONE, training)
    results = in_processes(count, tmp_path, derive, training)
    for name, values in expected.items():
        values, first, *others = (torch.cat([v.flatten() for v in r[name]]) for r in [expected, *results])
        assert (first - values).norm() <= 1e-9 * values.norm(), name
        assert all(torch.equal(first, other) for other in others), name


# ---------------------------------------------------------------------------------------------- runs

# 35 images to train on: a last batch of three is too small to share
SMALL = "--dataset digits --subset 70 --batch_size 16 --init_channels 4 --epochs 2 --report_freq 1".split()
LINES = {
    "train_search.py": ["--unrolled", "--layers=3", *SMALL],
    "train.py": ["--layers=2", "--auxiliary_weight=0.4", "--drop_path_prob=0.5", *SMALL],
}


def call(rank, script, *line, faults=(), save_every=300):
    """A script in this process; at its n-th start it has the n-th of the faults, (rank, function, call of it)."""
    starts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if starts < len(faults) and faults[starts][0] == rank:
        die_at(*faults[starts][1:])
    run_folder._SAVE_EVERY = save_every
    SEARCH_SPACES["involution"] = ["none", "skip_connect", "max_pool_3x3", "sep_invo_3x3"]  # a quick one
    sys.argv = [script, *line]
    utils.run_script(importlib.import_module(script.removesuffix(".py")).main)


def die_at(function, calls):
    """SIGKILL in the given call of a function, "module:Class.name"."""
    place, name = function.replace(":", ".").rsplit(".", 1)
    place = pkgutil.resolve_name(place)
    original, left = getattr(place, name), iter(range(calls - 1, -1, -1))

    @functools.wraps(original)
    def fatal(*args, **kwargs):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(place, name, fatal)


def launch(_, count, restarts, script, line, **more):
    """What torchrun does: an agent, which starts processes and starts all of them again when one fails."""
    how = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test", monitor_interval=0.05)
    place = dict(min_nodes=1, max_nodes=1, nproc_per_node=count, start_method="fork", max_restarts=restarts)
    elastic_launch(LaunchConfig(**how, **place), _launched)(os.getcwd(), script, line, more)


def _launched(folder, script, line, more):
    os.chdir(folder)
    print_into(f"printed-{os.environ['RANK']}")
    torch.set_num_threads(1)
    call(int(os.environ["RANK"]), script, *line, **more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function of a script: the folder of a run of two processes that nobody stopped."""

    @functools.cache
    def run(script):
        folder = tmp_path_factory.mktemp("uninterrupted")
        with start_processes(2, folder, call, script, *LINES[script]) as started:
            for process in started:
                process.join(900)
            assert [process.exitcode for process in started] == [0, 0], printed(folder)
        assert (folder / "printed-1").read_text() == ""
        return next(folder.glob("runs/*"))

    return run


FAULTS = {
    "train_search.py": [
        (1, "architect:Architect._virtual_step", 2),
        (1, "torch.nn.utils:clip_grad_norm_", 2),
        (1, "utils:Evaluation.add", 1),
        (0, "os:replace", 2),  # that of checkpoint.pt: the first one is of checkpoint.previous.pt
    ],
    "train.py": [(0, "torch.nn.utils:clip_grad_norm_", 3)],
}


@pytest.mark.parametrize("script", [pytest.param("train_search.py", marks=pytest.mark.slow), "train.py"])
def test_killed_processes_are_started_again_and_end_in_the_same_bits(script, uninterrupted, tmp_path):
    faults = FAULTS[script]
    again = functools.partial(launch, faults=faults, save_every=-1)
    with start_processes(1, tmp_path, again, 2, len(faults), script, LINES[script]) as (agent,):
        agent.join(900)
        assert agent.exitcode == 0, printed(tmp_path)
    errors = [line for line in printed(tmp_path).splitlines() if "error:" in line]
    assert len(errors) <= len(faults) and all("has lost another process" in line for line in errors)
    (run,) = tmp_path.glob("runs/*")
    assert_same_run(run, uninterrupted(script))


def stop_in_the_first_step(folder, script):
    """Two processes of a script, whose agent gets SIGTERM in the first step: their run folder."""
    again = functools.partial(launch, save_every=300)
    with start_processes(1, folder, again, 2, 3, script, LINES[script]) as (agent,):
        while "step 1/" not in printed(folder):
            assert agent.is_alive(), printed(folder)
            time.sleep(0.02)
        os.kill(agent.pid, signal.SIGTERM)
        agent.join(900)
    return next(folder.glob("runs/*"))


def test_sigterm_to_torchrun_saves_and_says_how_to_go_on(uninterrupted, tmp_path):
    """With as many processes the run then ends in the same bits, and it goes on with another number."""
    run = stop_in_the_first_step(tmp_path, "train.py")
    assert f"--nproc_per_node=2 {os.path.relpath('train.py', tmp_path)} --resume runs/{run.name}" in printed(tmp_path)
    assert "error:" not in printed(tmp_path) and "started again" not in printed(tmp_path)
    state = checkpoint.load(run / checkpoint.NAME)
    assert state["step"] > 0 and state["processes"] == 2
    for count in (2, 3):
        folder = shutil.copytree(tmp_path, tmp_path.with_name(f"goes on with {count}"))
        with start_processes(count, folder, call, "train.py", "--resume", f"runs/{run.name}") as started:
            for process in started:
                process.join(900)
        assert [process.exitcode for process in started] == count * [0], printed(folder)
        assert ("this run had 2 processes and now has" in printed(folder)) == (count == 3)
        assert (folder / "runs" / run.name / "metrics.csv").read_text().count("\n") == 3
        if count == 2:
            assert_same_run(folder / "runs" / run.name, uninterrupted("train.py"))


def lose(team, how):
    if team.rank == 1:
        os.kill(os.getpid(), how)
    team._watch._timeout = 1
    team.meet()


def test_a_process_that_hangs_is_named_and_the_others_end(tmp_path):
    with start_processes(2, tmp_path, meet_and_call, lose, (signal.SIGSTOP,)) as started:
        started[0].join(900)
        assert started[0].exitcode == 1 and started[1].is_alive()
    (line,) = printed(tmp_path).splitlines()
    assert f"no sign of rank 1 (process {started[1].pid} on " in line and "--resume" in line


def make_run(team, **changes):
    """A run of a single linear layer."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    flags = dict(save="EXP", folder=None, resume=None, epochs=2, report_freq=1, seed=0, timeout=team.rank)
    args = Namespace(**(flags | changes))
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler)
    torch.nn.init.ones_(model.weight), torch.nn.init.ones_(model.bias)
    return run_folder.Run("train", args, torch.device("cpu"), parts, team)


def differ(team):
    said = []
    try:
        make_run(team, batch_size=8 + team.rank // 2)
    except utils.UserError as error:
        said.append(str(error))
    run = make_run(team)
    with torch.no_grad():
        run.parts["model"].weight[1, 2] += 1e-7 * (team.rank == 1)
    try:
        run.save()
    except utils.UserError as error:
        said.append(str(error))
    return said


def test_processes_that_do_not_agree_are_named(tmp_path):
    for said in in_processes(3, tmp_path, differ):
        assert said[0] == "rank 2 was started with other settings, or reads other images, than rank 0"
        assert said[1].startswith("rank 1 no longer holds the weights of rank 0 in epoch 1, step 0")


def evaluate(team, images):
    """An evaluation of images whose losses are known, one of them infinite, in batches of 4 for all."""
    torch.manual_seed(0)
    batch = torch.randn(images, 10), torch.arange(images) % 10
    batch[0][1] = torch.inf
    meter = utils.Evaluation()
    for logits, target in zip(*(part.split(4) for part in share(team, batch)), strict=True):
        if len(target):
            meter.add(logits, target)
    merged = meter.merged(team, images)
    return [merged.sums, merged.losses]


@pytest.mark.parametrize("images", [25, 2])
def test_an_evaluation_is_over_all_images(images, tmp_path):
    sums, losses = evaluate(ALONE, images)
    for of_all, each in in_processes(3, tmp_path, evaluate, images):
        assert of_all == pytest.approx(sums, nan_ok=True) and torch.equal(each.nan_to_num(), losses.nan_to_num())


RESTARTED = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "x"}
BAD = [
    (2, ["--batch_size", "3"], {}, "--batch_size 3 leaves some of 2 processes less than two images"),
    (2, ["--sync_bn"], {}, "--sync_bn needs CUDA devices, and this run is on cpu: leave it out"),
    (2, ["--timeout", "0"], {}, "--timeout: must be an integer at least 1, got 0"),
    (2, ["--device", "mps"], {}, "--device mps"),
    (2, [], {"MASTER_ADDR": ""}, "there is no MASTER_ADDR: start them with torchrun"),
    (2, [], {"WORLD_SIZE": "two"}, "WORLD_SIZE must be an integer, got 'two'; start with torchrun"),
    (1, [], RESTARTED, "its store is gone: give --resume RUN_FOLDER"),
]


@pytest.mark.parametrize("count, more, environment, says", BAD, ids=[says for *_, says in BAD])
def test_bad_input_is_one_line_for_all(count, more, environment, says, tmp_path):
    line = [*LINES["train.py"], *more]
    with start_processes(count, tmp_path, call, "train.py", *line, **environment) as started:
        for process in started:
            process.join(900)
    said = printed(tmp_path).splitlines()
    assert [process.exitcode for process in started] == count * [2] and not list(tmp_path.glob("runs"))
    assert len(set(said)) == 1 and says in said[0]
    assert len(said) == 1 or environment  # they have nothing to meet by


def benchmark(_):
    folder = Path(__file__).parent.parent / "benchmarks"
    sys.path.insert(0, str(folder))
    small = "--init_channels 4 --layers 3 --image_size 8 --batch_size 4 --steps 1 --space darts --out .".split()
    sys.argv = ["bench_processes.py", *small]
    runpy.run_path(str(folder / "bench_processes.py"), run_name="__main__")


def test_a_step_has_a_few_collectives(tmp_path):
    with start_processes(2, tmp_path, benchmark) as started:
        for process in started:
            process.join(900)
    assert [process.exitcode for process in started] == [0, 0], printed(tmp_path)
    row = (tmp_path / "bench_processes.md").read_text().splitlines()[-1].split("|")
    assert "`darts`, 4 channels, 3 cells, batch 4" in row[1] and row[2].strip() == "5"


def test_shared_batch_norm_keeps_cells_fast_and_right():
    net, _, (input, _), _ = make_search(training=True)
    shared = Processes(0, 2).share_batch_norm(copy.deepcopy(net))  # without others there, it is batch norm
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in shared.modules())
    assert shared.state_dict().keys() == net.state_dict().keys()
    assert torch.allclose(shared(input), net(input), rtol=1e-9)
    for (name, one), other in zip(net.named_buffers(), shared.buffers(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9), name
