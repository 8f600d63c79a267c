"""Work that processes do ahead of where it is needed: images are decoded while a step computes.

`each` computes a function of every item once, in order. `Reader` serves batches of items, in an order that is known
beforehand: it asks the processes for those that come next, and a jump (a resumed run, a validation) makes it begin anew
from there. Both stand on torch.utils.data.DataLoader. `Ahead` is for what this process does with a batch before it is
used: a thread does it for the next one while a step computes.

What goes wrong in a process or in that thread arrives where its result is due, and nowhere else, so that a run that
stops there is between two steps and can be saved: a function returns its error as a `Failure`; a killed process is a
ReadError.
"""

import contextlib
import os
import signal
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from runtime import progress
from utils import UserError

_CHUNK = 64  # items of `each` that a process gets at once
_ENOUGH = 8 * _CHUNK  # items that are worth starting processes for
_AHEAD = 2  # batches that every process works ahead


class ReadError(UserError):
    """Images cannot be read any more; the run that needs them may go on later."""


class Failure(str):
    """Why a function has no result, in the words of a user: a plain value, which passes between processes."""


def default_workers():
    """One process for each core but the one that computes, at most 8 (PyTorch's own limit is the number of cores)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, cores - 1))


def each(function, items, workers, label):
    """Yield what function(some of the items) returns for each, in order; few items are done by this process."""
    chunks = [range(len(items))[k : k + _CHUNK] for k in range(0, len(items), _CHUNK)]
    loader = _loader(function, items, chunks, workers if len(items) >= _ENOUGH else 0)
    with tqdm(total=len(items), desc=label, disable=None) as bar, _clear_errors():
        for results in _started(loader):
            progress.doing(f"{label}: {bar.n} of {len(items)}")
            yield from results
            bar.update(len(results))


class Reader:
    """The results of function([items[k] for k in indices]), computed ahead by processes.

    The processes start at once: those that start later would inherit what a run has opened by then, and keep its lock.

    Args:
        function: of a list of items; returns a tensor or a Failure.
        items: a numpy array, which processes share without copying it.
        ahead: a function that yields (place, indices) of the batches from a place on, in the order of their use.
        pinned: whether results are to be in page-locked memory, which a CUDA device reads while others compute.
    """

    def __init__(self, function, items, ahead, workers, pinned=False):
        self._order = _Order(ahead)
        self._loader = _loader(function, items, self._order, workers, pinned)
        self._results = _started(self._loader)

    def read(self, place):
        """The result of a place.

        Raises:
            ReadError: the function failed there, or a process was killed.
        """
        with _clear_errors():
            if self._order.next_place() != place:
                self._order.start(place)
                self._results = _started(self._loader)
            result = next(self._results)
        self._order.asked.popleft()
        if isinstance(result, Failure):
            self._order.asked.clear()  # whoever tries once more reads it once more
            raise ReadError(result)
        return result


class Ahead:
    """Results that a thread computes, one after the other, one of them before it is asked for.

    Attributes:
        waited: seconds that results were waited for.
    """

    def __init__(self):
        self._thread, self.waited = ThreadPoolExecutor(1), 0.0
        self._coming = None, None  # a place, and its result to be

    def get(self, function, place, following):
        """function(place), or what that raises; that of the following place, if there is one, is computed next."""
        start = time.monotonic()
        (known, result), self._coming = self._coming, (None, None)
        if known != place:
            result = self._thread.submit(function, place)
        value = result.result()
        self.waited += time.monotonic() - start
        if following is not None:
            self._coming = following, self._thread.submit(function, following)
        return value


class _Order:
    """What the loader asks the processes for: nothing, until `start`."""

    def __init__(self, ahead):
        self._ahead, self._coming = ahead, ()
        self.asked = deque()  # places whose results have not been read

    def next_place(self):
        return self.asked[0] if self.asked else None

    def start(self, place):
        self._coming = self._ahead(place)
        self.asked.clear()

    def __iter__(self):
        for place, indices in self._coming:
            self.asked.append(place)
            yield indices


class _Calls(torch.utils.data.Dataset):
    """function([items[k] for k in indices]) at a list of indices."""

    def __init__(self, function, items):
        self.function, self.items = function, items

    def __getitem__(self, indices):
        return self.function([self.items[k] for k in indices])


def _loader(function, items, order, workers, pinned=False):
    more = dict(persistent_workers=True, prefetch_factor=_AHEAD, worker_init_fn=_leave_interrupts) if workers else {}
    return torch.utils.data.DataLoader(
        _Calls(function, items),
        batch_size=None,  # `order` has lists of indices
        sampler=order,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pinned,
        generator=torch.Generator(),  # leaves the random state of the run as it is
        **more,
    )


def _as_it_is(result):
    return result


def _leave_interrupts(_):
    """Ctrl-C reaches every process of a terminal; the run finishes its step, for which it needs the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _started(loader):
    """iter(loader), without the signal handler that would raise the death of a process in the middle of a step.

    A dead process is noticed when its result is due, within five seconds.
    """
    number = getattr(signal, "SIGCHLD", None)  # not on Windows
    before = number and signal.getsignal(number)
    results = iter(loader)
    if number and signal.getsignal(number) is not before:
        signal.signal(number, before or signal.SIG_DFL)
    return results


@contextlib.contextmanager
def _clear_errors():
    """What DataLoader raises when a process is gone, as a ReadError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ReadError(
            "a process that reads images was killed (by the system if memory ran out: /dev/shm, or all of it; fewer "
            "--workers need less)"
        ) from None
