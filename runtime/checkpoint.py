"""Checkpoints: files of tensors and plain values that are written whole, kept twice, and verified when they are read.

`checkpoint.pt` is what the last save wrote, `checkpoint.previous.pt` what the save before it wrote. Each is a ZIP
archive, whose entries have checksums; torch.load does not look at them, so that a flipped bit would be another weight.
What a file holds is checked before it is used: `check` has the rules of a run's plain values, the functions that
load a part have those of that part; its settings have theirs in settings.py.
"""

import io
import math
import os
import reprlib
import shutil
import warnings
import zipfile
from pathlib import Path

import torch

import genotypes
from utils import UserError, replacing

NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def save(state, path):
    """Replace a checkpoint; what it was becomes checkpoint.previous.pt, and there is one at any time."""
    whole = io.BytesIO()  # PyTorch's own writer tells of a full disk in many ways, none of which is an OSError
    torch.save(state, whole)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(whole.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # a crash of the machine leaves the old checkpoint or the new one
        if path.exists():
            with replacing(path.with_name(PREVIOUS)) as previous:
                _link(path, previous)


def _link(path, other):
    other.unlink(missing_ok=True)  # of a process of the same number that was killed
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, other)


def load(path, device="cpu"):
    """What torch.save wrote, tensors and plain values only: a pickle that could run code is refused.

    Raises:
        UserError: a file that is missing, truncated, damaged or no checkpoint; names the checkpoint before it.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file")  # reading from a pipe would wait for ever
    try:
        _verify(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that it then refuses
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises a dozen kinds for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(
            f"{path} is truncated, damaged or not a checkpoint of tensors ({reason}){_way_out(path)}"
        ) from None


def _verify(path):
    """Raise unless the entries of a ZIP archive have their checksums (PyTorch's format before 1.6 has none)."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":  # what torch.load goes by
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of its part {damaged} is wrong")


def _way_out(path):
    previous = path.with_name(PREVIOUS)
    if path.name != NAME or not previous.exists():
        return ""
    return f"; the checkpoint before it is {previous}: rename it to {NAME} to go on from there"


# ------------------------------------------------------------------------------------------------ what they hold


def shown(value):
    """A value as a short text, whatever it is."""
    try:
        return reprlib.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"an unusual {type(value).__name__}"


def _number(value, low=-math.inf):
    return type(value) in (int, float) and low <= value < math.inf


def _count(value):
    return type(value) is int and 0 <= value <= 10**12


def _positive_count(value):
    return _count(value) and 1 <= value <= 10**6


def _list(value, of, length=None):
    return isinstance(value, (list, tuple)) and length in (None, len(value)) and all(map(of, value))


def _name(value):
    return isinstance(value, str)


def _row(row):
    """The numbers of a finished epoch, any of which may be NaN, and the genotype of a search."""
    columns = ("epoch", "lr", "train_loss", "train_acc", "valid_loss", "valid_acc")
    return (
        isinstance(row, dict)
        and all(type(row.get(name)) in (int, float) for name in columns)
        and all(type(name) is str and type(value) in (int, float, str) for name, value in row.items())
        and all(
            type(row.get(name, 0)) in (int, float) for name in ("skip_connects", "eigenvalue", "eigenvalue_largest")
        )
        and ("genotype" not in row or genotypes.format(genotypes.parse(row["genotype"])) == row["genotype"])
    )


def _is_early_stop(row, epoch):
    """Whether a row with the epoch that an early stop kept is the last one, and that epoch not after it."""
    return row["epoch"] == epoch and type(row["kept_epoch"]) is int and 1 <= row["kept_epoch"] <= epoch


def _normalization(value):
    """Mean and standard deviation by channel, of pixels of 0 to 1."""
    return (
        _list(value, lambda of: _list(of, _number, 3), 2) and max(map(abs, value[0])) <= 1e3 and 1e-6 <= min(value[1])
    )


def are_fingerprints(value):
    """Whether a value is what a run keeps of its sets of images: `data.fingerprint` of each, by name."""
    return isinstance(value, dict) and all(
        isinstance(of, dict)
        and {"classes", "counts"} < set(of) <= {"classes", "counts", "sha256", "files"}
        and _list(of["classes"], _name)
        and len(of["classes"]) > 0
        and _list(of["counts"], _count, len(of["classes"]))
        and all(_name(of[name]) for name in {*of} - {"classes", "counts"})
        for of in value.values()
    )


def _is(kind):
    return lambda value: isinstance(value, kind)


_RULES = {  # of what a run keeps
    "args": _is(dict),
    "epoch": _count,
    "step": _count,
    "sums": lambda value: _list(value, lambda of: _number(of, low=0), 5),
    "history": lambda value: _list(value, _row),
    "random": _is(torch.Tensor),
    "cuda_random": lambda value: _list(value, _is(torch.Tensor)),
    "model": _is(dict),
    "optimizer": _is(dict),
    "scheduler": _is(dict),
}
_MORE_RULES = {  # of what not every run keeps
    "arch_optimizer": _is(dict),
    "normalization": _normalization,
    "classes": lambda value: _list(value, _name) and len(value) > 0,
    "data": are_fingerprints,
    "threads": _positive_count,
    "processes": _positive_count,
    "observed": lambda value: isinstance(value, dict) and _list(value.get("reported"), lambda of: _number(of, 0), 5),
}


def check(state, path, needs=()):
    """The state of a run, if it is what a run keeps; its settings and its parts are checked elsewhere.

    Args:
        needs: names that must be in it besides those that every run keeps.

    Raises:
        UserError: names the first value that is missing, of another type, out of range or at odds with another.
    """
    for name in (*_RULES, *needs):
        if not isinstance(state, dict) or name not in state:
            raise UserError(f"{path} is not a checkpoint of this script: it has no {name!r}")
    for name, rule in (_RULES | _MORE_RULES).items():
        if name in state and not _holds(rule, state[name]):
            raise UserError(f"{path} is damaged: its {name} is {shown(state[name])}")
    epochs, batch_size = (state["args"].get(name) for name in ("epochs", "batch_size"))
    epoch, step, history, images = (state[name] for name in ("epoch", "step", "history", "sums"))
    of_images = list(state.get("data", {}).get("train", {}).get("classes", state.get("classes", [])))
    for holds, what in (
        (len(history) == epoch, f"it has ended {epoch} epochs and has the numbers of {len(history)}"),
        (not _count(epochs) or epoch <= epochs, f"it has ended {epoch} of {shown(epochs)} epochs"),
        (
            not _count(batch_size) or (step - 1) * batch_size < images[0] <= step * batch_size,
            f"{step} steps of {shown(batch_size)} images are not {shown(images[0])} images",
        ),
        (all(row["epoch"] == k + 1 for k, row in enumerate(history)), "its epochs are not one after the other"),
        (
            list(state.get("classes", of_images)) == of_images,
            "its classes are not those of its images",
        ),
        ("arch_optimizer" not in state or all("genotype" in row for row in history), "an epoch has no genotype"),
        (all(_is_early_stop(row, epoch) for row in history if "kept_epoch" in row), "its early stop is none"),
    ):
        if not holds:
            raise UserError(f"{path} is damaged: {what}")
    return state


def _holds(rule, value):
    try:
        return rule(value)
    except (TypeError, ValueError, RecursionError):  # of a value of another kind
        return False


# ---------------------------------------------------------------------------------------------- putting it back


def load_weights(model, weights, path):
    """Load a state dict strictly.

    Raises:
        UserError: weights of another network, naming the first key that does not fit, or that are not finite.
    """
    try:
        model.load_state_dict(weights)
    except Exception as error:  # as many kinds as there are wrong values
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        first = lines[min(1, len(lines) - 1)][:200]
        raise UserError(f"the weights of {path} are not those of this network: {first}") from None
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{path} holds weights that are not finite: {name}")
        if name.endswith("running_var") and (value < 0).any():
            raise UserError(f"{path} is damaged: a variance is negative: {name}")


_HOW = "foreach", "fused"  # settings of an optimizer that do not change what it computes, but for rounding


def load_optimizer(optimizer, saved):
    """Load the state dict of an optimizer, whose learning rate alone may have changed since it was made.

    How a step is computed (`foreach`, `fused`) is what this optimizer was made with, not what is saved.

    Raises:
        ValueError: says what does not fit; PyTorch raises further kinds.
    """
    fresh = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in fresh]:
        raise ValueError("its weights are counted in another way")
    groups = [old | {name: new[name] for name in _HOW} for old, new in zip(saved["param_groups"], fresh, strict=True)]
    optimizer.load_state_dict(saved | {"param_groups": groups})
    names = {"SGD": {"momentum_buffer"}, "Adam": {"step", "exp_avg", "exp_avg_sq"}}[type(optimizer).__name__]
    for before, group in zip(fresh, optimizer.param_groups, strict=True):
        for name, value in before.items():
            scheduled = name == "lr" and "initial_lr" in before
            if not (_number(group[name], low=0) if scheduled else name == "params" or _same(group[name], value)):
                raise ValueError(f"{name} is {shown(group[name])}")
        for weight in group["params"]:
            state = optimizer.state.get(weight, {})
            if state and set(state) != names:
                raise ValueError(f"it has {shown(list(state))} of a weight")
            for name, value in state.items():
                if value is None and not group.get("momentum"):
                    continue
                if value.shape != (() if name == "step" else weight.shape) or not value.isfinite().all():
                    raise ValueError(f"{name} is not finite, or of another shape than its weight")
                if name in ("step", "exp_avg_sq") and (value < 0).any():
                    raise ValueError(f"{name} is negative")


def load_scheduler(scheduler, saved, epoch):
    """Load the state dict of a `schedule.make`, or of a cosine schedule of PyTorch's, as older runs have.

    Raises:
        ValueError: says what is not as it is after `epoch` epochs.
    """
    fresh = scheduler.state_dict()
    functions = fresh.pop("lr_lambdas")  # which a file does not keep
    expected = {"base_lrs": fresh["base_lrs"], "last_epoch": epoch}
    for name, value in fresh.items():
        value = expected.get(name, value)
        if name in saved and not (_same(saved[name], value) if name in expected else type(saved[name]) is type(value)):
            raise ValueError(f"{name} is {shown(saved[name])}")
    kept = {name: saved[name] for name in fresh if name in saved or name in expected}
    scheduler.load_state_dict(kept | {"lr_lambdas": functions})


def of_weights(state, **settings):
    """The checkpoint of a run of train.py without what only a training needs, with some of its settings changed."""
    kept = {name: state[name] for name in ("epoch", "history", "model", "normalization", "classes", "data")}
    empty = dict(step=0, sums=[0] * 5, random=torch.empty(0), cuda_random=[], optimizer={}, scheduler={})
    return kept | empty | {"args": state["args"] | settings}


def _same(a, b):
    return type(a) is type(b) and a == b
