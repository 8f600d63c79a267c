"""Checkpoints: files of tensors and plain values that are written whole, kept twice, and verified when they are read.

`checkpoint.pt` is what the last save wrote, `checkpoint.previous.pt` what the save before it wrote. Each is a ZIP
archive, whose entries have checksums; torch.load does not look at them, so that a flipped bit would be another weight.
"""

import os
import shutil
import warnings
import zipfile
from pathlib import Path

import torch

from utils import UserError, replacing

NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def save(state, path):
    """Replace a checkpoint; what it was becomes checkpoint.previous.pt, and there is one at any time."""
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(state, file)
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


def load_weights(model, weights, path):
    """Load a state dict strictly.

    Raises:
        UserError: weights of another network, naming the first key that does not fit.
    """
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = lines[min(1, len(lines) - 1)][:200]
        raise UserError(f"the weights of {path} are not those of this network: {first}") from None
