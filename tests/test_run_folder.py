"""Run folders: what they hold, how they are resumed, how they stop."""

import argparse
import errno
import json
import logging
import math
import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import data
import run_folder
import utils
from images import stream
from involution import Involution2d
from runtime import checkpoint, progress, schedule


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    yield tmp_path
    logging.getLogger().handlers[:] = handlers


def settings(**kwargs):
    own = dict(save="EXP", folder=None, resume=None, epochs=2, report_freq=1, learning_rate=0.1, train_portion=1.0)
    return argparse.Namespace(**own | dict(seed=0) | kwargs)


def make_run(kind="train", model=None, **kwargs):
    torch.manual_seed(0)
    model = model or torch.nn.Linear(3, 2)
    epochs = kwargs.get("epochs", 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = schedule.make(optimizer, epochs, kwargs.get("lr_scheduler", "cosine"))
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler)
    run = run_folder.Run(kind, settings(**kwargs), torch.device("cpu"), parts)
    if run.args.resume is None:
        optimizer.step()  # as a training does before an epoch ends; without gradients, it moves nothing
    return run


def go_on(run, **kwargs):
    """The run, resumed by what would be another process."""
    run.__exit__()
    return make_run(resume=run.folder, **kwargs)


def make_batches(kind=data.Batches):
    images = data.Images(torch.zeros(8, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1] * 4), ["a", "b"])
    plain = data.Normalization((0.0,) * 3, (1.0,) * 3)
    return kind(images, 2, plain, data.Augmentation(0, False, 0))


def meter(images=10, loss=1.0, top1=40.0, finite=10):
    result = utils.Evaluation()
    result.sums = [images, loss * images, top1 * images, 100.0 * images, finite]
    return result


def record(run, loss=1.0):
    run.record(torch.tensor(loss), torch.tensor([[1.0, 0.0]] * 2), torch.tensor([0, 1]))


def test_a_folder_and_its_files():
    run = make_run(kind="search")
    assert run.folder.parent.name == "runs" and run.folder.name.startswith("search-EXP-2")
    run.meter = meter(3, 1 / 3, 50.0)
    run.end_epoch(meter(), note="x")
    names = {path.name for path in run.folder.iterdir()}
    expected = "config.json log.txt metrics.csv summary.json checkpoint.pt checkpoint.previous.pt figures events"
    assert names == set(expected.split())
    config = json.loads((run.folder / "config.json").read_text())
    assert config["args"]["epochs"] == 2 and config["versions"]["torch"] == torch.__version__
    assert config["device"] == "cpu" and config["involution_backend"]
    assert (run.folder / "metrics.csv").read_text().splitlines() == [
        "epoch,lr,train_loss,train_acc,valid_loss,valid_acc,note",
        "1,0.1,0.3333333333333333,50.0,1.0,40.0,x",
    ]
    assert (run.folder / "figures" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_of_the_same_second_get_folders_of_their_own(monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "NOW")
    assert [make_run().folder.name for _ in range(3)] == ["train-EXP-NOW", "train-EXP-NOW-2", "train-EXP-NOW-3"]


def test_a_folder_of_ones_own(tmp_path):
    own = str(tmp_path / "deep" / "mine")
    run = make_run(folder=own)
    assert run.folder == Path(own) and (run.folder / "checkpoint.pt").exists()
    assert go_on(run, folder=own).folder == run.folder
    with pytest.raises(utils.UserError, match="mine holds a run already: go on with it \\(--resume"):
        make_run(folder=own)
    assert (run.folder / "checkpoint.pt").exists()


def test_a_folder_of_a_run_that_never_saved_is_taken_over():
    def never_save():
        make_run(folder="mine").__exit__()
        for name in ("checkpoint.pt", "summary.json"):  # written in this order
            Path("mine", name).unlink()

    never_save()
    Path("mine", ".metrics.csv.17").touch()
    never_save()
    Path("mine", "thesis.tex").touch()
    with pytest.raises(utils.UserError, match="holds thesis.tex, which is not of a run: name a new or an empty folder"):
        make_run(folder="mine")
    with pytest.raises(utils.UserError, match="cannot make the run folder mine/thesis.tex"):
        make_run(folder="mine/thesis.tex")
    assert Path("mine", "thesis.tex").exists()


def test_a_folder_with_hidden_files_of_ones_own_is_not_taken():
    """A run that fails before its first step removes its folder."""
    Path("mine", ".git").mkdir(parents=True)
    with pytest.raises(utils.UserError, match="holds .git, which is not of a run"):
        make_run(folder="mine")
    assert Path("mine", ".git").exists()


@pytest.mark.skipif(run_folder.fcntl is None, reason="no locks on this system")
def test_a_folder_that_another_run_is_at_work_in_is_left_alone():
    run = make_run(folder="mine")
    for path in (run.checkpoint, run.folder / "summary.json"):  # as before the first of them
        path.unlink()
    with pytest.raises(utils.UserError, match="mine: another process is at work on this run"):
        make_run(folder="mine")
    assert (run.folder / "config.json").exists()


def test_what_a_run_is_judged_by():
    assert make_run().judged_by == "test"
    assert make_run(train_portion=0.9).judged_by == make_run(kind="search").judged_by == "validation"


def test_everything_is_restored():
    run = make_run()
    run.end_epoch(meter())
    for _ in zip(range(2), run.steps(make_batches()), strict=False):
        loss = run.parts["model"](torch.randn(4, 3)).sum()
        loss.backward()
        run.parts["optimizer"].step()
        record(run)
    run.save()
    expected = torch.rand(3)

    again = go_on(run)
    assert (again.epoch, again.step, again.history) == (1, run.step, run.history)
    assert again.meter.sums == run.meter.sums
    assert torch.equal(again.parts["model"].weight, run.parts["model"].weight)
    momentum = [part["optimizer"].state_dict()["state"] for part in (again.parts, run.parts)]
    assert torch.equal(momentum[0][0]["momentum_buffer"], momentum[1][0]["momentum_buffer"])
    assert torch.equal(torch.rand(3), expected)


def test_steps_go_on_where_they_stopped():
    batches = make_batches()
    run = make_run()
    targets = []
    for _, target in run.steps(batches):
        targets.append(target)
        if run.step == 1:
            run.step = 2  # the second step is counted as done
            run.save()
            break
    again = go_on(run)
    rest = [target for _, target in again.steps(batches)]
    assert len(rest) == 2
    assert progress._state["doing"] == "epoch 1/2 step 4/4"
    assert all(torch.equal(target, batches.batch(0, step)[1]) for step, target in enumerate(rest, start=2))


def test_an_epoch_whose_last_step_was_saved_is_ended_by_the_next_run():
    run = make_run()
    for _ in run.steps(make_batches()):
        record(run)
    run.save()
    again = go_on(run)
    assert not list(again.steps(make_batches()))
    again.end_epoch(meter())  # a warning of the scheduler would be an error
    assert torch.equal(again.parts["model"].weight, run.parts["model"].weight)
    assert (again.epoch, again.step) == (1, 0)


def test_a_resume_with_another_number_of_threads_says_so(caplog):
    caplog.set_level(logging.INFO, "darts")
    run = make_run()
    assert "CPU threads: 1" in (run.folder / "log.txt").read_text()
    run = go_on(run)
    assert "last digits" not in caplog.text
    torch.set_num_threads(2)
    try:
        go_on(run)
    finally:
        torch.set_num_threads(1)
    assert "had 1 CPU threads and now has 2" in caplog.text and "OMP_NUM_THREADS=1" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(number, caplog):
    caplog.set_level(logging.INFO, "darts")
    with pytest.raises(SystemExit) as caught, make_run() as run:
        for _ in run.steps(make_batches()):
            if run.step == 1:
                os.kill(os.getpid(), number)
            record(run)
    assert caught.value.code == 128 + number
    assert checkpoint.load(run.checkpoint)["step"] == 2
    assert f"--resume {run.folder}" in caplog.text
    assert caplog.text.index("stopped in epoch 1 after step 2") < caplog.text.index("--resume")
    assert signal.getsignal(number) != run._on_signal


def test_images_that_cannot_be_read_any_more_stop_the_run_after_a_whole_step(caplog):
    caplog.set_level(logging.INFO, "darts")

    class Lost(data.Batches):
        def batch(self, epoch, step):
            if step == 2:
                raise stream.ReadError("cannot read a.jpg any more")
            return super().batch(epoch, step)

    with pytest.raises(stream.ReadError), make_run() as run:
        for _ in run.steps(make_batches(Lost)):
            record(run)
    assert checkpoint.load(run.checkpoint)["step"] == 2
    assert "stopped in epoch 1 after step 2" in caplog.text and f"--resume {run.folder}" in caplog.text
    assert f"--resume {run.folder}" in (run.folder / "log.txt").read_text()
    with pytest.raises(SystemExit) as caught, go_on(run) as again:
        os.kill(os.getpid(), signal.SIGTERM)  # which may have reached the processes that read
        raise stream.ReadError("a process was killed")
    assert caught.value.code == 143 and again._log.stream is None


@pytest.mark.parametrize("seconds, level", [(0, None), (0.001, logging.DEBUG), (1000, logging.WARNING)])
def test_time_spent_waiting_for_images_is_logged(seconds, level, caplog):
    caplog.set_level(logging.DEBUG, "darts")

    class Slow(data.Batches):
        waited = 0.0

        def batch(self, epoch, step):
            self.waited += seconds
            return super().batch(epoch, step)

    for _ in make_run().steps(make_batches(Slow), make_batches()):
        time.sleep(0.03)
    lines = [record for record in caplog.records if "waiting for images" in record.getMessage()]
    assert [line.levelno for line in lines] == ([level] if level else [])
    assert all(("more --workers" in line.getMessage()) == (level == logging.WARNING) for line in lines)


def test_a_run_that_cannot_read_its_first_images_leaves_nothing():
    with pytest.raises(stream.ReadError), make_run():
        raise stream.ReadError("a process was killed")
    assert not os.path.exists("runs")


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(loss):
    run = make_run()
    with pytest.raises(utils.UserError) as caught:
        for _ in run.steps(make_batches()):
            record(run, loss if run.step == 2 else 1.0)
    for text in (f"became {loss}", "epoch 1, step 3", "learning rate 0.1", str(run.checkpoint)):
        assert text in str(caught.value)
    assert checkpoint.load(run.checkpoint)["step"] == 0


def test_resume_of_a_truncated_checkpoint():
    with make_run() as run:
        path = run.checkpoint
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(utils.UserError, match="truncated"):
        make_run(resume=run.folder)


def test_weights_that_are_not_finite_are_not_saved():
    run = make_run()
    before = run.checkpoint.read_bytes()
    with torch.no_grad():
        run.parts["model"].weight[0, 0] = float("inf")
    with pytest.raises(utils.UserError, match="the weights became infinite or NaN in epoch 1"):
        run.save()
    assert run.checkpoint.read_bytes() == before


def test_validation_images_without_finite_logits_are_told(caplog):
    run = make_run()
    run.end_epoch(meter(loss=float("nan"), finite=7))
    assert "3 of 10 validation images have logits that are not finite" in caplog.text
    before = run.checkpoint.read_bytes()
    with pytest.raises(utils.UserError, match="no validation image has finite logits any more in epoch 2"):
        run.end_epoch(meter(loss=float("nan"), finite=0))
    assert run.checkpoint.read_bytes() == before and len(run.history) == 1


def test_images_that_make_the_loss_are_counted(caplog):
    run, valid = make_run(), utils.Evaluation()
    valid.add(torch.tensor([[0.0, 1.0]] * 9 + [[7e5, 0.0]]), torch.ones(10, dtype=torch.long))
    run.end_epoch(valid)
    assert "1 of 10 validation images make 100.0% of the loss, up to 7e+05 each; the median" in caplog.text


@pytest.mark.parametrize("kernel_norm, cure", [("none", "--kernel_norm soft_rms"), ("rms", "a lower --learning_rate")])
def test_what_cures_numbers_that_are_not_finite_is_said_once(caplog, kernel_norm, cure):
    run = make_run(model=Involution2d(4, 3, kernel_norm=kernel_norm))
    for _ in range(2):
        run.end_epoch(meter(loss=float("nan"), finite=7))
    assert caplog.text.count("logits that are not finite") == caplog.text.count(cure) == 1
    assert cure in str(run.diverged("the loss became nan", 3))


def test_a_run_is_not_gone_on_with_twice_at_once():
    run = make_run()
    before = run.checkpoint.read_bytes()
    (run.folder / f".checkpoint.pt.{os.getpid()}").write_text("half of it")
    with pytest.raises(utils.UserError, match="another process is at work on this run"):
        make_run(resume=run.folder)
    assert run.checkpoint.read_bytes() == before and list(run.folder.glob(".checkpoint*"))
    go_on(run)


def test_without_locks_runs_go_on(monkeypatch):
    monkeypatch.setattr(run_folder, "fcntl", None)
    run = make_run()
    make_run(resume=run.folder)


def test_a_resumed_run_removes_what_a_kill_left_and_makes_its_figures_again():
    run = make_run()
    run.end_epoch(meter())
    (run.folder / ".checkpoint.pt.123").write_text("half of it")
    (run.folder / "figures" / ".curves.png.123").write_text("half of it")
    (run.folder / ".mine.7").write_text("of the user")
    again = go_on(run)
    assert not list(run.folder.rglob(".c*")) and (run.folder / ".mine.7").exists()
    shutil.rmtree(run.folder / "figures")
    go_on(again)
    assert (run.folder / "figures" / "curves.png").exists()


def test_a_run_that_fails_before_its_first_step_leaves_nothing(working_folder):
    for _ in range(2):
        with pytest.raises(RuntimeError), make_run():
            raise RuntimeError
        assert not list(working_folder.iterdir())
    with pytest.raises(RuntimeError), make_run() as run:
        for _ in run.steps(make_batches()):
            if run.step:
                raise RuntimeError
    assert run.checkpoint.exists()


@pytest.mark.parametrize("fails", ["os.fsync", "run_folder.environment", "logging.FileHandler._open"])
def test_a_full_disk_is_named_and_leaves_nothing(working_folder, monkeypatch, fails):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fails, no_space)
    with pytest.raises(OSError) as caught:
        make_run()
    assert not list(working_folder.iterdir())
    if fails == "os.fsync":
        assert str(caught.value.filename).endswith("checkpoint.pt")


def test_a_log_that_cannot_be_written_is_named():
    with make_run() as run:
        run._log.stream.close()
        run._log.stream = open("/dev/full", "w")
        with pytest.raises(OSError) as caught:
            logging.getLogger("darts").warning("x")
        assert caught.value.filename == str((run.folder / "log.txt").absolute())


@pytest.mark.parametrize("name", ["-dash", "DARTS"])
def test_a_printed_command_takes_a_folder_of_any_name(name):
    line = shlex.split(run_folder.command("train.py", "--arch", Path(name)))
    assert line[-1] == f"./{name}"


def trained_run():
    run = make_run()
    for _ in run.steps(make_batches()):
        run.parts["model"](torch.randn(4, 3)).sum().backward()
        run.parts["optimizer"].step()
        record(run)
    run.end_epoch(meter())
    run.__exit__()
    return run.folder


NAN = float("nan")
DAMAGES = {  # what is put where in a checkpoint: the last key of a path gets the value
    "epoch": ["0", -1, 5, True, None, [0]],
    "step": [-1, 1.0, "x"],
    "sums": [[], [1, 2], ["a"] * 5, [NAN] * 5],
    "history": [[], [{}], [3], {"zz": 1}, None],
    "history 0 valid_acc": ["high", [1]],
    "history 0 genotype": ["nothing", 3],
    "history 0 epoch": [7],
    "threads": [0],
    "random": [torch.zeros(3, dtype=torch.uint8), torch.zeros(5056), None],
    "cuda_random": [3],
    "model weight": [torch.zeros(7), torch.full((2, 3), NAN), None],
    "model": [{}, []],
    "optimizer": [{}, {"state": {}, "param_groups": []}],
    "optimizer param_groups 0 lr": [NAN, -1.0, "x"],
    "optimizer param_groups 0 momentum": ["0.9", 5.0],
    "optimizer param_groups 0 params": [[0], [7, 8]],
    "optimizer state 0 momentum_buffer": [torch.zeros(7), torch.full((2, 3), NAN), 3],
    "optimizer state 0": [{}, {"zz": torch.zeros(2, 3)}][1:],
    "scheduler": [{}],
    "scheduler last_epoch": [-5, None],
    "scheduler base_lrs": [[9.0], []],
    "args": [None, []],
}


@pytest.mark.parametrize("where", DAMAGES)
def test_wrong_values_in_a_checkpoint_are_named(where):
    folder = trained_run()
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    for value in DAMAGES[where]:
        path.write_bytes(whole)
        state = torch.load(path, weights_only=True)
        *keys, last = [int(key) if key.isdigit() else key for key in where.split()]
        place = state
        for key in keys:
            place = place[key]
        place[last] = value
        torch.save(state, path)
        with pytest.raises(utils.UserError, match="checkpoint.pt"):
            make_run(resume=folder)
        del place[last]
        torch.save(state, path)
        if where.split()[-1] not in ("genotype", "momentum_buffer", "0", "threads"):
            with pytest.raises(utils.UserError, match="checkpoint.pt"):
                make_run(resume=folder)
    path.write_bytes(whole)
    make_run(resume=folder)


def test_a_step_beyond_the_epoch_is_named():
    run = make_run()
    run.step = 9
    with pytest.raises(utils.UserError, match="step 9 of an epoch of 4 steps"):
        next(run.steps(make_batches()))


def test_a_run_that_stopped_early_is_not_extended():
    with make_run(epochs=2) as run:
        run.end_epoch(meter(), skip_connects=2, kept_epoch=1)
        assert run.stopped
    with go_on(run, epochs=2) as again:
        assert again.stopped
    with pytest.raises(utils.UserError, match="stopped early after epoch 1, and more --epochs do not change"):
        make_run(resume=run.folder, epochs=5)


def test_an_extended_run_goes_on_along_the_schedule_of_its_new_length(caplog):
    caplog.set_level(logging.INFO, "darts")
    folder = trained_run()
    with make_run(resume=folder, epochs=5) as run:
        rates = []
        while run.epoch < 5:
            rates.append(run.parts["optimizer"].param_groups[0]["lr"])
            run.parts["optimizer"].step()
            run.end_epoch(meter())
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(1, 5)]
    assert rates == pytest.approx(expected)
    assert "extended from 2 to 5 epochs" in caplog.text and f"{expected[0]:.3g} from here on" in caplog.text
    assert json.loads((folder / "config.json").read_text())["args"]["epochs"] == 5
    assert len((folder / "metrics.csv").read_text().splitlines()) == 6
    make_run(resume=folder, epochs=5)


def test_a_run_with_the_cosine_schedule_of_before_goes_on():
    """PyTorch's, whose state is another."""
    folder = trained_run()
    path = folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    optimizer.step()
    cosine.step()
    state["scheduler"] = cosine.state_dict()
    torch.save(state, path)
    with make_run(resume=folder) as run:
        assert run.parts["optimizer"].param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        run.end_epoch(meter())
        assert run.parts["optimizer"].param_groups[0]["lr"] == pytest.approx(0)
