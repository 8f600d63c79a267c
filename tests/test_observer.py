"""What is seen of a run: TensorBoard's curves, the alphas, the cost; all the same with and without interruptions."""

import errno
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch

import genotypes
import run_folder
from conftest import assert_same_curves, read_curves
from runtime import checkpoint
from test_run_folder import make_batches, make_run, meter, record, working_folder  # noqa: F401  a fixture
from utils import UserError
from watch import alphas, cost, events

EPOCHS, STEPS = 2, 4


class Supernet(torch.nn.Linear):
    """As much of a supernet as a run looks at."""

    primitives = ["none", "skip_connect", "sep_conv_3x3"]

    def __init__(self):
        super().__init__(3, 2)
        self.alphas_normal, self.alphas_reduce = (torch.nn.Parameter(torch.randn(5, 3)) for _ in range(2))

    def arch_parameters(self):
        return [self.alphas_normal, self.alphas_reduce]


def go_through(run, look=lambda run, when: None):
    """Search to the end; what is computed depends on epoch and step alone."""
    with run:
        if run.history:
            run.report(genotypes.parse(run.history[-1]["genotype"]))
        while run.epoch < EPOCHS:
            for _ in run.steps(make_batches()):
                number = run.epoch * STEPS + run.step + 1
                look(run, f"step {number}")
                for alpha in run.parts["model"].arch_parameters():
                    alpha.grad = torch.full_like(alpha, number / 8)
                    alpha.data[0, number % 3] += number / 16
                run.record(torch.tensor(1 / number), torch.eye(2), torch.tensor([0, number % 2]), torch.tensor(number))
            look(run, f"validation {run.epoch + 1}")
            genotype = genotypes.format(genotypes.sample(genotypes.PRIMITIVES, seed=run.epoch))
            run.end_epoch(meter(loss=run.epoch / 3), skip_connects=run.epoch, eigenvalue=0.5, genotype=genotype)
            run.report(genotypes.parse(genotype))
        run.observer.finish()
    return run.folder


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The folder of a run that nobody killed, and one of how it was at each moment: `step 1`, …, `validation 1`, …"""
    moments = tmp_path_factory.mktemp("moments")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(moments)
        patch.setattr(run_folder, "_SAVE_EVERY", -1)  # after every step
        logging.getLogger("darts").setLevel(logging.INFO)  # which, unlike its attribute, loggers below it notice
        run = make_run("search", Supernet())
        folder = go_through(run, lambda run, when: shutil.copytree(run.folder, moments / when))
        logging.getLogger("darts").setLevel(logging.NOTSET)
        shutil.copytree(folder, moments / "the end")
    return moments / "the end", moments


def test_what_is_written(watched):
    folder, _ = watched
    curves = read_curves(folder)
    assert [step for step, _ in curves["steps", "loss/train"]] == [*range(1, 9)]
    assert curves["steps", "loss/train"][5] == (6, pytest.approx(1 / 6))
    assert curves["steps", "gradient_norm/weights"][2] == (3, 3.0)
    assert curves["steps", "gradient_norm/alphas"][7] == (8, pytest.approx(30**0.5))
    assert curves["epochs", "eigenvalue"] == [(1, 0.5), (2, 0.5)]
    assert curves["epochs", "loss/validation"] == [(1, 0.0), (2, pytest.approx(1 / 3))]
    assert [epoch for epoch, _ in curves["epochs", "alphas_reduce/0_to_1"]] == [0, 1, 2]
    for name in ("alphas.csv", "winners.csv", "figures/alphas_normal.png", "figures/alphas_heat_map.png"):
        assert (folder / name).stat().st_size > 0


def kill(watched, saved, killed, place):
    """A copy of the run as a kill leaves it: when its checkpoint was saved, when the process was killed."""
    _, moments = watched
    shutil.copytree(moments / killed, place)
    shutil.copy(moments / saved / "checkpoint.pt", place)
    return place


def go_on(folder, monkeypatch):
    monkeypatch.setattr(alphas, "draw", lambda *_: [Path("no picture")])  # which takes most of the time
    monkeypatch.setattr(run_folder, "plot_curves", lambda *_: None)
    return go_through(make_run("search", Supernet(), resume=folder))


@pytest.mark.parametrize(
    "saved, killed",
    [
        ("step 1", "step 4"),
        ("step 3", "step 7"),
        ("validation 1", "step 6"),
        ("step 5", "validation 2"),
        ("validation 2", "the end"),
    ],
)
def test_a_killed_run_goes_on_in_the_same_curves(watched, tmp_path, monkeypatch, saved, killed):
    folder = go_on(kill(watched, saved, killed, tmp_path / "killed"), monkeypatch)
    assert_same_curves(folder, watched[0])
    for name in ("alphas.csv", "winners.csv", "metrics.csv"):
        assert (folder / name).read_bytes() == (watched[0] / name).read_bytes()


def test_half_a_record_of_a_killed_process_is_not_read(watched, tmp_path, monkeypatch):
    folder = kill(watched, "step 3", "step 4", tmp_path / "killed")
    for path in folder.glob("events/*/*"):
        path.write_bytes(path.read_bytes() + path.read_bytes()[-40:-5])
    assert_same_curves(go_on(folder, monkeypatch), watched[0])


def test_a_truncated_file_of_events_costs_its_end_alone(watched, tmp_path, monkeypatch):
    folder = kill(watched, "step 6", "step 6", tmp_path / "killed")
    (path,) = folder.glob("events/steps/*")
    path.write_bytes(path.read_bytes()[:-150])
    curves = read_curves(go_on(folder, monkeypatch))
    assert [step for step, _ in curves["steps", "entropy/reduce"]] == [1, 2, 3, 4, 6, 7, 8]


def test_a_run_from_before_there_was_an_observer_goes_on(watched, tmp_path, monkeypatch):
    folder = kill(watched, "step 5", "step 5", tmp_path / "old")
    shutil.rmtree(folder / "events")
    state = checkpoint.load(folder / "checkpoint.pt")
    del state["observed"]
    checkpoint.save(state, folder / "checkpoint.pt")
    go_on(folder, monkeypatch)
    assert alphas.read(folder / "alphas.csv").epochs == [1, 2]
    assert json.loads((folder / "summary.json").read_text())["counted_since_epoch"] == 1
    assert read_curves(folder)["steps", "loss/train"][0][0] == 5


@pytest.mark.parametrize(
    "keys, value",
    [
        (["reported"], [1, 2]),
        (["cost", "seconds"], -1.0),
        (["cost", "command"], 3),
        (["cost"], {}),
        (["alphas", "epochs"], [0, 2]),
        (["alphas", "normal"], [torch.zeros(2, 2)] * 2),
        (["alphas", "reduce"], [torch.full((5, 3), float("nan"))] * 2),
        (["alphas"], None),
    ],
)
def test_wrong_values_in_a_checkpoint_are_named(watched, tmp_path, keys, value):
    folder = kill(watched, "step 5", "step 5", tmp_path / "damaged")
    state = checkpoint.load(folder / "checkpoint.pt")
    place = state["observed"]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    checkpoint.save(state, folder / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt is damaged.*observed"):
        make_run("search", Supernet(), resume=folder)


def test_costs_add_up_over_sessions(watched, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "darts")
    folder = go_on(kill(watched, "step 7", "step 8", tmp_path / "killed"), monkeypatch)
    one, two = (json.loads((path / "summary.json").read_text()) for path in (watched[0], folder))
    assert one["sessions"] == 1 and two["sessions"] == 2
    assert one["images"] == two["images"] == 8 * 2 and two["ended"] >= two["started"]
    assert one["started"] == two["started"] and one["command"] == two["command"]
    assert two["parameters"] == 8 + 30 and two["peak_memory_GB"] > 0.05 and two["validation_accuracy"] == 40.0
    assert two["genotype"] == genotypes.format(genotypes.sample(genotypes.PRIMITIVES, seed=1))
    assert "it took" in caplog.text and "in 2 sessions for 16 training images" in caplog.text


def test_a_summary_has_the_epoch_that_an_early_stop_kept(watched, tmp_path):
    with make_run("search", Supernet(), resume=kill(watched, "the end", "the end", tmp_path / "stopped")) as run:
        run.history[-1]["kept_epoch"] = 1
        run.observer.write()
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["epochs"], summary["result_of_epoch"], summary["genotype"]) == (2, 1, run.history[0]["genotype"])


def test_an_ended_run_that_is_resumed_costs_nothing_more(watched, tmp_path, monkeypatch):
    before = json.loads((watched[0] / "summary.json").read_text())
    folder = go_on(kill(watched, "the end", "the end", tmp_path / "again"), monkeypatch)
    assert json.loads((folder / "summary.json").read_text()) == before
    assert_same_curves(folder, watched[0])


def test_the_estimate_is_said_once(watched):
    text = (watched[0] / "log.txt").read_text()
    assert text.count("an epoch takes about") == 1 and "what is left of 2 epochs" in text
    assert text.index("an epoch takes about") < text.index("epoch 1/2 lr")


def test_the_bar_has_the_time_that_is_left_of_the_run(monkeypatch):
    seen = []
    monkeypatch.setattr(run_folder.tqdm, "set_postfix_str", lambda bar, text, **_: seen.append(text))
    monkeypatch.setattr(cost.Pace, "remaining", lambda pace, step, epochs: 25 * epochs + step)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with make_run(epochs=4) as run:
        for _ in run.steps(make_batches()):
            record(run)
    assert [text.split(", ")[1] for text in seen] == [f"whole run {100 + step} s left" for step in range(1, 5)]


def test_a_disk_that_events_have_filled_is_named(tmp_path, monkeypatch):
    writer = events.Events(tmp_path, False)
    writer.begin_steps(0)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer._writers["steps"], "flush", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        writer.flush()
    assert caught.value.filename == str(tmp_path / "events")


def test_without_tensorboard_a_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = make_run()
    for _ in run.steps(make_batches()):
        record(run)
    run.end_epoch(meter())
    assert caplog.text.count("no TensorBoard events are written") == caplog.text.count("pip install tensorboard") == 1
    assert not (run.folder / "events").exists()
