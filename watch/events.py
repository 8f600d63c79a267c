"""TensorBoard's events of a run: what `tensorboard --logdir runs` shows.

    events/steps     scalars of the training steps that are reported, by the number of steps
    events/epochs    what is known after an epoch (the columns of metrics.csv, the alphas, the cells), by epoch

A run that is resumed goes on in the same curves. Its checkpoint may be older than what the killed process wrote: events
from the purge step on, the first that will be written again, are dropped by their readers. None before it may be
missing: a checkpoint is saved after a `flush`.
"""

import functools
import logging
import re

import numpy as np
from PIL import Image

from watch.alphas import CELLS, edge_names

logger = logging.getLogger("darts.events")

FOLDER = "events"
_TAGS = {  # of columns of metrics.csv; others have their own name
    "lr": "learning_rate/weights",
    "train_loss": "loss/train",
    "train_acc": "accuracy/train",
    "entropy_normal": "entropy/normal",
    "entropy_reduce": "entropy/reduce",
}
_NOT_IN_TAGS = re.compile(r"[^\w-]")


def _named(method):
    """The method, whose OSErrors name the folder: TensorBoard's name nothing."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except OSError as error:
            raise error if error.filename else OSError(error.errno, error.strerror, str(self.folder)) from None

    return call


class Events:
    """The two writers of a run; each opens a file when it has something to write.

    Args:
        folder: the run folder.
        resumed: whether there may be events of another process.
    """

    def __init__(self, folder, resumed):
        self.folder, self._resumed, self._writers = folder.resolve() / FOLDER, resumed, {}
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:  # versions that do not fit each other raise further kinds
            what = "no TensorBoard events are written (%s): pip install tensorboard"
            logger.warning(what, " ".join(str(error).split())[:200])
            SummaryWriter = None
        self._make = SummaryWriter

    def _writer(self, name, first):
        """The writer of events from `first` on, which is a step or an epoch; None without TensorBoard."""
        if self._make is not None and name not in self._writers:
            purge = dict(purge_step=first) if self._resumed else {}
            self._writers[name] = self._make(self.folder / name, **purge)
        return self._writers.get(name)

    @_named
    def begin_steps(self, done):
        """Training goes on after so many steps."""
        self._writer("steps", done + 1)

    @_named
    def step(self, number, scalars):
        """Write scalars by tag, after a number of steps."""
        writer = self._writer("steps", number)
        if writer is not None:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, number)

    @_named
    def epoch(self, epoch, judged_by, row, trajectory):
        """Write what is known after an epoch.

        Args:
            judged_by: the images behind the columns valid_*.
            row: its columns of metrics.csv; none before the first epoch.
            trajectory: the alphas, an `alphas.Trajectory`, or None.
        """
        if not row and trajectory is None:
            return
        writer = self._writer("epochs", epoch)
        if writer is None:
            return
        tags = _TAGS | {
            "valid_loss": f"loss/{judged_by}",
            "valid_acc": f"accuracy/{judged_by}",
            "valid_top5": f"accuracy_top5/{judged_by}",
        }
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "epoch":
                writer.add_scalar(tags.get(name, name), value, epoch)
        if trajectory is not None and trajectory.epochs[-1:] == [epoch]:
            for cell in CELLS:
                weights = trajectory.weights[cell][-1]
                for edge, values in zip(edge_names(len(weights)), weights, strict=True):
                    name = _NOT_IN_TAGS.sub("", edge.replace(" -> ", "_to_"))
                    writer.add_histogram(f"alphas_{cell}/{name}", values, epoch)

    @_named
    def image(self, tag, path, epoch):
        """Write a picture file, if there is one."""
        writer = self._writer("epochs", epoch)
        if writer is not None and path.exists():
            with Image.open(path) as picture:
                writer.add_image(tag, np.asarray(picture.convert("RGB")), epoch, dataformats="HWC")

    @_named
    def flush(self):
        """Hand everything to the operating system: it survives the end of the process, however that ends."""
        for writer in self._writers.values():
            writer.flush()

    @_named
    def close(self):
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
