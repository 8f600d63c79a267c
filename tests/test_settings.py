"""The settings of a run: what --resume brings, and what config.json and a checkpoint may hold."""

import argparse
import json

import pytest
import torch

import utils
from operations import KERNEL_NORM
from runtime import settings
from test_run_folder import make_run


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parse(*argv):
    parser = utils.ArgumentParser(prog="train.py")
    parser.add_argument("--epochs", type=utils.number(int, low=1), default=9)
    parser.add_argument("--data", default="data")
    parser.add_argument("--train_portion", type=utils.number(float, above=0, high=1), default=1.0)
    parser.add_argument("--learning_rate", type=utils.number(float, above=0), default=0.1)
    parser.add_argument("--amp", action="store_true")
    utils.add_kernel_norm_argument(parser)
    settings.add_arguments(parser, seed=0)
    return settings.parse_args(parser, [str(argument) for argument in argv])


@pytest.fixture
def saved(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    with make_run(epochs=2, data="there", seed=5) as run:
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


def test_a_run_from_before_there_was_mixed_precision_goes_on_without(saved):
    assert parse("--resume", saved).amp is False
    with pytest.raises(utils.UserError, match="--amp is False in that run, not True"):
        parse("--resume", saved, "--amp")


def test_resume_with_other_settings_names_the_setting(saved):
    for flag, value, was in (("learning_rate", 0.2, 0.1), ("seed", 6, 5), ("epochs", 1, 2)):
        with pytest.raises(utils.UserError, match=f"--{flag} is {was} in that run, not {value}"):
            parse("--resume", saved, f"--{flag}", value)


def test_more_epochs_extend_a_run(saved):
    assert parse("--resume", saved, "--epochs", 3).epochs == 3
    edit(saved, lambda args: args.update(epochs=4))  # as after a kill between config.json and the checkpoint
    assert parse("--resume", saved).epochs == 4


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["args"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda args: args.update(learning_rate=0.2), "learning_rate is 0.2 in config.json, but 0.1 in checkpoint.pt"),
        (lambda args: args.update(epochs=1), "epochs is 1 in config.json, but 2 in checkpoint.pt"),
        (lambda args: args.pop("learning_rate"), "config.json is damaged: it has no setting 'learning_rate'"),
        (lambda args: args.update(learning_rate=float("nan")), "config.json is damaged: learning_rate is nan"),
        (lambda args: args.update(learning_rate=1e300), "config.json is damaged: learning_rate is 1e+300"),
        (lambda args: args.update(epochs=True), "config.json is damaged: epochs is True"),
        (lambda args: args.update(epochs=[2]), "config.json is damaged: epochs is [2]"),
        (lambda args: args.update(seed=2**64), "config.json is damaged: seed is 184"),
        (lambda args: args.update(kernel_norm="nrom"), "config.json is damaged: kernel_norm is 'nrom'"),
    ],
)
def test_settings_that_were_edited_are_named(saved, change, says):
    edit(saved, change)
    with pytest.raises(utils.UserError) as caught:
        parse("--resume", saved)
    assert says in str(caught.value)


def test_settings_of_a_checkpoint_have_the_same_rules(saved):
    path = saved / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for value in (0, 10**10, 10**100, "2", None, [[]]):
        state["args"]["epochs"] = value
        torch.save(state, path)
        with pytest.raises(utils.UserError, match="checkpoint.pt is damaged: epochs is"):
            parse("--resume", saved)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda folder: (folder / "checkpoint.pt").unlink(), "no checkpoint.pt in it"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing or damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is missing or damaged"),
        (
            lambda folder: (folder / "config.json").write_text('{"script": ' + 10**5 * "[" + 10**5 * "]" + "}"),
            "config.json is missing or damaged",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"script": "train.py", "args": []}'),
            "its settings are []",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is missing or damaged"),
        (lambda folder: (folder / "config.json").write_text('{"script": "x.py"}'), "one of 'x.py', not of train.py"),
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


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 101])
def test_a_run_name_is_a_name(name, capsys):
    with pytest.raises(SystemExit):
        parse("--save", name)
    assert "must be a name, not a path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["", "--epochs 5 --fast --sizes 3 4", "--no-careful --rate -0.5", "--rate 0 --name=--fast", "--limit 3"]
)
def test_flags_give_the_settings_again(line):
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--careful", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--name", default="")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1])
    args = parser.parse_args(line.split())
    words = settings.flags(vars(args), parser)
    assert parser.parse_args(words) == args and len(words) <= len(line.split()) + 1


def test_a_run_from_before_a_setting_differs_in_what_it_did():
    parser = argparse.ArgumentParser()
    utils.add_kernel_norm_argument(parser)
    assert settings.differing({}, parser) == [("kernel_norm", "none", KERNEL_NORM)]
    assert settings.differing({"kernel_norm": KERNEL_NORM, "forgotten": 3}, parser) == []
