"""Run folders: what they hold, how they are resumed, how they stop."""

import argparse
import json
import logging
import os
import signal

import pytest
import torch

import data
import run_folder
import utils
from involution import Involution2d
from operations import KERNEL_NORM


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    yield tmp_path
    logging.getLogger().handlers[:] = handlers


def settings(**kwargs):
    return argparse.Namespace(**(dict(save="EXP", resume=None, epochs=2, report_freq=1, learning_rate=0.1) | kwargs))


def make_run(kind="train", model=None, **kwargs):
    torch.manual_seed(0)
    model = model or torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    parts = dict(model=model, optimizer=optimizer, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2))
    return run_folder.Run(kind, settings(**kwargs), torch.device("cpu"), parts)


def make_batches():
    images = data.Images(torch.zeros(8, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1] * 4), ["a", "b"])
    plain = data.Normalization((0.0,) * 3, (1.0,) * 3)
    return data.Batches(images, 2, plain, data.Augmentation(0, False, 0))


def meter(images=10, loss=1.0, top1=40.0, finite=10):
    return utils.AverageMeter((images, loss * images, top1 * images, 100.0 * images, finite))


def record(run, loss=1.0):
    run.record(torch.tensor(loss), torch.tensor([[1.0, 0.0]] * 2), torch.tensor([0, 1]))


def test_a_folder_and_its_files():
    run = make_run(kind="search")
    assert run.folder.parent.name == "runs" and run.folder.name.startswith("search-EXP-2")
    run.meter = meter(3, 1 / 3, 50.0)
    run.end_epoch(meter(), note="x")
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"config.json", "log.txt", "metrics.csv", "checkpoint.pt", "figures"}
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

    again = make_run(resume=run.folder)
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
    again = make_run(resume=run.folder)
    rest = [target for _, target in again.steps(batches)]
    assert len(rest) == 2
    assert all(torch.equal(target, batches.batch(0, step)[1]) for step, target in enumerate(rest, start=2))


def test_a_resume_with_another_number_of_threads_says_so(caplog):
    caplog.set_level(logging.INFO, "darts")
    run = make_run()
    assert "CPU threads: 1" in (run.folder / "log.txt").read_text()
    make_run(resume=run.folder)
    assert "last digits" not in caplog.text
    torch.set_num_threads(2)
    try:
        make_run(resume=run.folder)
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
    assert utils.load_checkpoint(run.checkpoint)["step"] == 2
    assert f"--resume {run.folder}" in caplog.text
    assert caplog.text.index("stopped in epoch 1 after step 2") < caplog.text.index("--resume")
    assert signal.getsignal(number) != run._on_signal


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(loss):
    run = make_run()
    with pytest.raises(utils.UserError) as caught:
        for _ in run.steps(make_batches()):
            record(run, loss if run.step == 2 else 1.0)
    for text in (f"became {loss}", "epoch 1, step 3", "learning rate 0.1", str(run.checkpoint)):
        assert text in str(caught.value)
    assert utils.load_checkpoint(run.checkpoint)["step"] == 0


def parse(*argv):
    parser = utils.ArgumentParser(prog="train.py")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--data", default="data")
    parser.add_argument("--learning_rate", type=float, default=0.1)
    utils.add_kernel_norm_argument(parser)
    run_folder.add_arguments(parser, seed=0)
    return run_folder.parse_args(parser, [str(argument) for argument in argv])


@pytest.fixture
def saved(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    run = make_run(epochs=2, data="there", seed=5)
    return run.folder


def test_resume_brings_the_settings_of_the_run(saved):
    args = parse("--resume", saved)
    assert (args.epochs, args.data, args.seed, args.resume) == (2, "there", 5, str(saved))
    assert parse("--resume", saved, "--data", "here").data == "here"
    assert parse("--resume", saved, "--epochs", 2).epochs == 2


def test_a_run_from_before_kernels_were_bounded_goes_on_without_bounds(saved):
    assert "kernel_norm" not in json.loads((saved / "config.json").read_text())["args"]
    assert (
        parse("--resume", saved).kernel_norm == parse("--resume", saved, "--kernel_norm", "none").kernel_norm == "none"
    )
    with pytest.raises(utils.UserError, match="--kernel_norm is none in that run, not soft_rms"):
        parse("--resume", saved, "--kernel_norm", "soft_rms")
    assert parse().kernel_norm == KERNEL_NORM


def test_resume_with_other_settings_names_the_setting(saved):
    with pytest.raises(utils.UserError, match="--epochs is 2 in that run, not 3"):
        parse("--resume", saved, "--epochs", 3)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda folder: (folder / "checkpoint.pt").unlink(), "no checkpoint.pt in it"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing or damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is missing or damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is missing or damaged"),
        (lambda folder: (folder / "config.json").write_text('{"script": "x.py"}'), "one of x.py, not of train.py"),
        (
            lambda folder: (folder / "config.json").write_text('{"script": "train.py", "args": {"new": 1}}'),
            "a setting 'new' that this version does not know",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"script": "train.py", "args": {"epochs": "2"}}'),
            "config.json is damaged: epochs is '2'",
        ),
    ],
)
def test_resume_of_a_damaged_run(saved, damage, says):
    damage(saved)
    with pytest.raises(utils.UserError) as caught:
        parse("--resume", saved)
    assert says in str(caught.value)


def test_resume_of_a_truncated_checkpoint(saved):
    path = saved / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(utils.UserError, match="truncated"):
        make_run(resume=saved)


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 101])
def test_a_run_name_is_a_name(name, capsys):
    with pytest.raises(SystemExit):
        parse("--save", name)
    assert "must be a name, not a path" in capsys.readouterr().err


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


@pytest.mark.parametrize("kernel_norm, cure", [("none", "--kernel_norm soft_rms"), ("rms", "a lower --learning_rate")])
def test_what_cures_numbers_that_are_not_finite_is_said_once(caplog, kernel_norm, cure):
    run = make_run(model=Involution2d(4, 3, kernel_norm=kernel_norm))
    for _ in range(2):
        run.end_epoch(meter(loss=float("nan"), finite=7))
    assert caplog.text.count("logits that are not finite") == caplog.text.count(cure) == 1
    assert cure in str(run.diverged("the loss became nan", 3))


def test_a_huge_loss_does_not_hide_the_others():
    assert run_folder.off_scale([2.3, 2.1, 1.9, 4e4, float("nan")]) == pytest.approx(2.5 * 2.2)
    assert run_folder.off_scale([2.3, 1.9, 7.2]) is None
    assert run_folder.off_scale([float("nan")]) is None
