"""Checkpoints: written whole, kept twice, verified when they are read."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from runtime import checkpoint
from utils import UserError


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_checkpoints_run_no_code(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    for save in (lambda: torch.save(Malicious(), path), lambda: path.write_bytes(pickle.dumps(Malicious()))):
        save()
        with pytest.raises(UserError, match="not a checkpoint"):
            checkpoint.load(path)
    assert "executed" not in capsys.readouterr().out


def test_damaged_checkpoints_are_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": torch.randn(100)}, path)
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[: len(whole) // 2], b"text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="checkpoint.pt is truncated, damaged"):
            checkpoint.load(path)
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load(tmp_path / "none.pt")


def test_weights_of_another_network_are_refused():
    with pytest.raises(UserError, match="weight"):
        checkpoint.load_weights(torch.nn.Linear(2, 3), torch.nn.Linear(2, 4).state_dict(), "weights.pt")
    with pytest.raises(UserError, match="not those of this network"):
        checkpoint.load_weights(torch.nn.Linear(2, 3), {"other": 3}, "weights.pt")


def test_a_negative_variance_is_refused():
    norm = torch.nn.BatchNorm2d(3)
    with pytest.raises(UserError, match="a variance is negative: running_var"):
        checkpoint.load_weights(norm, norm.state_dict() | {"running_var": torch.tensor([1.0, -1.0, 1.0])}, "x.pt")


@pytest.mark.parametrize("name, value", [("step", torch.tensor(-1.0)), ("exp_avg_sq", torch.full((2,), -1.0))])
def test_a_negative_moment_is_refused(name, value):
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([weight])
    weight.grad = torch.ones(2)
    adam.step()
    saved = adam.state_dict()
    checkpoint.load_optimizer(adam, saved)
    saved["state"][0][name] = value
    with pytest.raises(ValueError, match=f"{name} is negative"):
        checkpoint.load_optimizer(adam, saved)


@pytest.mark.parametrize("value", [((1e300, 0.5, 0.5), (0.5,) * 3), ((0.5,) * 3, (1e-300, 0.5, 0.5))])
def test_a_normalization_that_gives_no_numbers_is_refused(value):
    assert checkpoint._normalization(((0.5,) * 3, (0.2,) * 3)) and not checkpoint._normalization(value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt is no file"):
        checkpoint.load(tmp_path / "checkpoint.pt")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk to be had")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    """PyTorch's writer raises a RuntimeError where the first bytes do not fit."""
    monkeypatch.setattr(Path, "open", lambda path, mode: open("/dev/full", mode))
    with pytest.raises(OSError, match="No space left on device") as caught:
        checkpoint.save(state(), tmp_path / "checkpoint.pt")
    assert caught.value.filename == str(tmp_path / "checkpoint.pt")


def state(seed=0):
    torch.manual_seed(seed)
    return {"model": {"weight": torch.randn(40, 25), "bias": torch.randn(40)}, "epoch": seed, "name": "x"}


def same(a, b):
    return a["epoch"] == b["epoch"] and all(torch.equal(a["model"][k], b["model"][k]) for k in b["model"])


def test_flipped_bits_are_noticed_and_the_checkpoint_before_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for k in range(2):
        checkpoint.save(state(k), path)
    whole, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(checkpoint.load(path), state(1))
        except UserError as error:
            assert f"the checkpoint before it is {tmp_path / 'checkpoint.previous.pt'}" in str(error)
            refused += 1
    assert refused > 40  # the rest hit padding
    assert same(checkpoint.load(tmp_path / "checkpoint.previous.pt"), state(0))


def test_a_checkpoint_is_there_at_any_time(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(state(0), path)
    for fails in ("link", "fsync"):  # in the place of a kill
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"os.{fails}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            checkpoint.save(state(1), path)
        assert same(checkpoint.load(path), state(0))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_without_hard_links_the_checkpoint_before_is_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError))
    path = tmp_path / "checkpoint.pt"
    for k in range(3):
        checkpoint.save(state(k), path)
    assert same(checkpoint.load(path), state(2))
    assert same(checkpoint.load(tmp_path / "checkpoint.previous.pt"), state(1))


@pytest.mark.parametrize("saved, loading", [(True, None), (None, True)])
def test_how_an_optimizer_computes_is_not_loaded(saved, loading):
    """A run that began with PyTorch's plain step goes on with the fused one."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    one, other = (
        torch.optim.SGD([weight], 0.1, 0.9, fused=how) for weight, how in zip(weights, (saved, loading), strict=True)
    )
    weights[0].grad = weights[1].grad = torch.arange(3.0)
    one.step()
    checkpoint.load_optimizer(other, one.state_dict())
    assert other.param_groups[0]["fused"] is loading
    assert torch.equal(other.state[weights[1]]["momentum_buffer"], torch.arange(3.0))
