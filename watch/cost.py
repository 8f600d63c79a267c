"""What a run will cost, after its first steps, and what it has cost: hours, images, memory.

These are the only numbers of a run that depend on the clock or on the machine. They are in the log, in summary.json and
under `cost` of what a checkpoint keeps for `observer.Observer`: there, a run that was resumed may differ from one that
was not.
"""

import math
import sys
import time
from collections import deque

import torch

import utils

try:
    import resource
except ImportError:  # Windows: the memory of the process is not known
    resource = None

_MEASURED = 5  # steps after which the estimate is made


class Pace:
    """How long what is left of a run will take, from the last steps of this process and from what came after an epoch.

    Attributes:
        after: how many steps take as long as what comes after those of an epoch, as a function of the epoch: by this
            alone until one was measured, by that one's time from then on.
        work: what a step of an epoch takes, of one of the last epoch, as a function of the epoch.
    """

    def __init__(self):
        self.after, self.work = lambda epoch: 0.0, lambda epoch: 1.0
        self.epoch = self.steps = self._first = self._done = (
            0  # of an epoch; left of this process's first one; of the process
        )
        self._seconds = deque(maxlen=100)  # of the last steps
        self._after = self._last = None  # seconds from the last step of an epoch to the next epoch; when it was

    def begin_epoch(self, epoch, steps, done):
        """An epoch of so many steps begins, or goes on after some of them."""
        now = time.monotonic()
        if self._last is not None:
            self._after = now - self._last
        self._last, self.epoch, self.steps = now, epoch, steps
        self._first = self._first or steps - done

    def step(self):
        now = time.monotonic()
        if self._done == 1:
            self._seconds.clear()  # the first one warms up
        self._seconds.append((now - self._last) / self.work(self.epoch))
        self._last = now
        self._done += 1

    def remaining(self, step, epochs):
        """Seconds that are left after `step` steps of this epoch, of so many epochs."""
        left = sum(self.seconds(epoch) for epoch in range(self.epoch, epochs))
        return left - step * self._per_step() * self.work(self.epoch)

    def seconds(self, epoch):
        """Those of an epoch with its validation and what else comes after its steps."""
        after = self._per_step() * self.after(epoch)
        if self._after is not None:
            expected = self.after(self.epoch - 1)
            after = self._after * (self.after(epoch) / expected if expected else 1)
        return self.steps * self._per_step() * self.work(epoch) + after

    def _per_step(self):
        """Seconds of a step of the last epoch."""
        return sum(self._seconds) / len(self._seconds)

    @property
    def validation_is_known(self):
        return self._after is not None

    @property
    def is_news(self):
        """Whether there is an estimate since this step: after some, or at the end of a first epoch of fewer."""
        return self._done == min(_MEASURED, self._first)


class Cost:
    """What a run has cost so far, over all processes that worked on it (a session each).

    Hours are those of the clock; processor_hours are those of all its threads, which other work does not lengthen.

    Args:
        command, started: the command line that started the run, and when.
        since_epoch: epochs that were over when counting began: not zero in a run from before there was a count.
    """

    def __init__(self, command, started=None, since_epoch=0):
        texts = dict(command=command, started=started or _now(), updated=_now())
        counts = dict(since_epoch=since_epoch, sessions=0, images=0)
        self._state = texts | counts | dict(seconds=0.0, processor=0.0, memory=0.0, cuda_memory=0.0)
        self._clock = self._processor = None

    def begin(self):
        """This process begins its first step; what it read and built before is not counted."""
        if self._clock is None:
            self._clock, self._processor = time.monotonic(), time.process_time()
            self._state["sessions"] += 1

    def count(self, images):
        """Count images of a training step."""
        self._state["images"] += images

    def state_dict(self):
        """Everything up to now, as plain values."""
        if self._clock is not None:
            now, processor = time.monotonic(), time.process_time()
            self._state["seconds"] += now - self._clock
            self._state["processor"] += processor - self._processor
            self._state["updated"], self._clock, self._processor = _now(), now, processor
        for name, value in zip(("memory", "cuda_memory"), peak_memory(), strict=True):
            self._state[name] = max(self._state[name], value)
        return dict(self._state)

    def load_state_dict(self, state):
        """Go on from what another process kept.

        Raises:
            ValueError: not what `state_dict` returns.
        """
        state = dict(processor=math.inf) | state  # unknown of a run from before it was counted
        for name, value in self._state.items():
            if name == "processor" and state[name] == math.inf:
                continue
            if type(state[name]) is not type(value) or (not isinstance(value, str) and not 0 <= state[name] < 1e18):
                raise ValueError(f"{name} is {state[name]!r}"[:100])
        self._state = {name: state[name] for name in self._state}

    def summary(self, ended):
        """The columns of summary.json; counts stop at the last checkpoint."""
        state = self._state
        return {
            "command": state["command"],
            "started": state["started"],
            "ended": state["updated"] if ended else None,
            "hours": round(state["seconds"] / 3600, 4),
            "processor_hours": round(state["processor"] / 3600, 4) if state["processor"] < math.inf else None,
            "sessions": state["sessions"],
            "counted_since_epoch": state["since_epoch"],
            "images": state["images"],
            "images_per_second": round(state["images"] / state["seconds"], 2) if state["seconds"] else None,
            "peak_memory_GB": round(state["memory"], 3) or None,
            "peak_cuda_memory_GB": round(state["cuda_memory"], 3) or None,
        }

    def __str__(self):
        state = self._state
        sessions = f" in {state['sessions']} sessions" if state["sessions"] > 1 else ""
        since = f" since epoch {state['since_epoch']}" if state["since_epoch"] else ""
        spent, rate = utils.duration(state["seconds"]), state["images"] / max(state["seconds"], 1e-9)
        images = f"{state['images']:,} training images ({rate:.3g} a second, validation included)"
        return f"{spent}{sessions}{since} for {images}; {in_words(state['memory'], state['cuda_memory'])}"


def peak_memory():
    """The most that this process has had so far, in GB (10^9 bytes): in memory, and on the GPU; 0 where unknown."""
    memory = 0.0
    if resource:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, else KiB
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    # asked of a process without a CUDA context, this would make one
    cuda = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_initialized() else 0.0
    return memory, cuda


def in_words(memory, cuda_memory):
    """What `peak_memory` returns, for a log."""
    parts = [f"{memory:.2f} GB of memory"] * (memory > 0) + [f"{cuda_memory:.2f} GB on the GPU"] * (cuda_memory > 0)
    return f"at most {' and '.join(parts)}" if parts else "memory unknown"


def _now():
    return time.strftime("%Y-%m-%d %H:%M:%S")
