"""Several processes that work as one: who they are, what they share, and what becomes of the rest when one is lost.

    torchrun --nproc_per_node 8 train_search.py --unrolled

Each process computes on its share of every batch (data.Batches), and takes the mean over all of them for its own
gradients (`mean_`), so that all hold the same weights, alphas and running statistics, bit for bit, after every step.
The first one, of rank 0, logs, draws and saves. `ALONE` is a process without others: none of this costs it anything.

Beside torch.distributed's collectives there is the store of torchrun, a table of short texts that all reach: it
carries the name of the run folder, which error has been said, and how far each process is, by which a thread of each
finds the one that keeps the others waiting. torchrun keeps it while it starts the processes again.
"""

import contextlib
import hashlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

logger = logging.getLogger("darts.processes")


class StartError(ValueError):
    """The processes cannot work together as they were started; says what to start instead."""

    exit_code = 2  # as utils.UserError


class Lost(RuntimeError):
    """Another process has ended, or cannot be reached."""


def are_several():
    """Whether this process is one of several, by its environment."""
    return _number("WORLD_SIZE", 1) > 1


def is_first():
    """Whether this process speaks for all."""
    return not are_several() or _number("RANK", 0) == 0


def first_to_say(message):
    """Whether no other process has said what ended it: one line, of what went wrong first, is for all of them."""
    try:
        return not are_several() or _connect(seconds=10).add(_attempt() + "said", 1) == 1
    except (RuntimeError, StartError):  # nobody to ask
        return True


class Processes:
    """This process among `count`; alone by default.

    Args:
        rank: its number, from 0.
        local_rank: its number among those of its machine.
        store: that of torchrun.
    """

    def __init__(self, rank=0, count=1, local_rank=0, store=None):
        self.rank, self.count, self.local_rank, self.store = rank, count, local_rank, store
        self.reached = 0  # collectives that this process has come to
        self.bytes = 0  # that it has handed to them
        self._device = self._watch = None

    @classmethod
    def start(cls):
        """The process that torchrun has started, by the environment that it sets; else one that is alone.

        Raises:
            StartError: an environment that says several processes, and not where they meet.
        """
        if not (are_several() or dist.is_torchelastic_launched()):
            return cls()
        rank, count, local_rank = (_number(name, k) for name, k in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return cls(rank, count, local_rank, _connect(hosts=hosts))

    def join(self, device, timeout):
        """Meet the others, to compute on `device`; one that then keeps them waiting for `timeout` seconds ends them."""
        if self.count == 1:
            return
        self._device, self._watch = device, _Watch(self, timeout)
        with self._together():
            dist.init_process_group(
                "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo",
                store=dist.PrefixStore(_attempt() + "group", self.store),
                rank=self.rank,
                world_size=self.count,
                timeout=timedelta(seconds=2 * timeout + 60),  # our own line comes first
                device_id=device if device.type == "cuda" else None,
            )

    def share_batch_norm(self, model):
        """The model, whose batch norms see the images of all processes."""
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if self.count > 1 else model

    def leave(self):
        """Part from the others, once all have come so far."""
        if self._watch:
            self._watch.end()
            self.meet()
            dist.destroy_process_group()

    # -------------------------------------------------------------------------------------------- in one collective

    def mean_(self, tensors, images):
        """Put the mean over the images of all processes into tensors of one dtype that hold those over `images`.

        They travel as one, with the number of images behind them: one collective, and nothing to know of the others.
        """
        if self.count == 1:
            return
        one = tensors[0].new_ones(1)
        flat = torch.cat([tensor.reshape(-1) for tensor in [*tensors, one]]).mul_(images)
        self._sum_(flat)
        parts = flat.div_(flat[-1].clone()).split([tensor.numel() for tensor in [*tensors, one]])
        views = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=False)]
        torch._foreach_copy_(tensors, views)

    def total(self, numbers):
        """The sums over the processes of a list of numbers, as floats."""
        if self.count == 1:
            return list(numbers)
        values = torch.as_tensor(numbers, dtype=torch.float64).to(self._device)
        self._sum_(values)
        return values.tolist()

    def seed(self, *key):
        """Of several processes, give each its own chance, that of a step alone: nothing of it has to be kept."""
        if self.count > 1:
            seed = np.random.SeedSequence([*key, self.rank]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(seed))

    def meet(self):
        """Wait until all processes have come here."""
        self.total([0])

    def differing(self, value):
        """The ranks whose value (bytes) is not that of the first process."""
        if self.count == 1:
            return []
        number = int.from_bytes(hashlib.sha256(value).digest()[:6], "big")  # a float64 holds it
        numbers = self.total([number * (rank == self.rank) for rank in range(self.count)])
        return [rank for rank, other in enumerate(numbers) if other != numbers[0]]

    def _sum_(self, tensor):
        self.bytes += tensor.numel() * tensor.element_size()
        with self._together():
            dist.all_reduce(tensor)

    @contextlib.contextmanager
    def _together(self):
        self.reached += 1
        with self._reaching():
            yield

    @contextlib.contextmanager
    def _reaching(self):
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0].split("] ", 1)[-1].split(". ")[0][:120]
            what = "has lost another process, which has ended or is out of reach"
            raise Lost(f"rank {self.rank} {what} ({reason})") from None

    # ------------------------------------------------------------------------------------------- through the store

    @contextlib.contextmanager
    def in_turn(self):
        """On every machine, one process first and the others after it: what it downloads is there for them."""
        turn = f"{_attempt()}first of machine {os.environ.get('GROUP_RANK')}"
        if self.local_rank:
            self._wait_for(turn)
        yield
        if self.count > 1 and not self.local_rank:
            with self._reaching():
                self.store.set(turn, "done")

    def agreed(self, name, decide):
        """The text that `decide()` returns in the first process, in all of them."""
        if self.count == 1:
            return decide()
        if self.rank:
            self._wait_for(_attempt() + name)
            with self._reaching():
                return self.store.get(_attempt() + name).decode()
        text = decide()
        with self._reaching():
            self.store.set(_attempt() + name, text)
        return text

    def arguments(self):
        """The arguments of the command line; after a restart, those that resume the run that was begun.

        Raises:
            StartError: restarted, without what was kept of the run that was begun.
        """
        if self.store is None:
            return sys.argv[1:]
        folder = self.agreed("resume", self._begun)
        return sys.argv[1:] + (["--resume", folder] if folder else [])

    def _begun(self):
        """The run folder that is to be resumed after a restart, or an empty text."""
        restarts = _number("TORCHELASTIC_RESTART_COUNT", 0)
        first = self.store.add(_job() + "starts", 1) == 1
        if restarts and first:
            raise StartError("torchrun has started this again, and its store is gone: give --resume RUN_FOLDER")
        folder = self.recorded()
        if not folder or not (Path(folder) / "checkpoint.pt").is_file():  # killed before there was anything to lose
            return ""
        logger.info("started again by torchrun (%d of %s times)", restarts, os.environ["TORCHELASTIC_MAX_RESTARTS"])
        return "" if any(word.startswith("--resume") for word in sys.argv) else folder

    def recorded(self):
        """The folder that `record` was given, before a restart, or None."""
        if self.store is None or not self.store.check([_job() + "folder"]):
            return None
        return self.store.get(_job() + "folder").decode()

    def record(self, folder):
        """Keep the name of the run folder for a restart."""
        if self.store is not None and self.rank == 0:
            self.store.set(_job() + "folder", str(folder))

    def _wait_for(self, key):
        with self._reaching():
            while not self.store.check([key]):
                time.sleep(0.05)


ALONE = Processes()


class _Watch(threading.Thread):
    """Ends this process, with one line, when it waits for another that does not come.

    Each says in the store how many collectives it has come to. One that has come no further for the time-out, and
    further than another, waits for that one; and whether that one computes, sleeps or has been stopped is the same.
    """

    def __init__(self, processes, timeout):
        super().__init__(daemon=True)
        self._processes, self._timeout, self._ended = processes, timeout, threading.Event()
        self._store = _connect()  # its own: another thread is at work with that of the process
        place = f"process {os.getpid()} on {socket.gethostname()}"
        self._store.set(self._key(processes.rank, "place"), place)
        self.start()

    def end(self):
        self._ended.set()

    def run(self):
        said, since = None, 0.0
        while not self._ended.wait(min(5, self._timeout / 10)):
            reached = self._processes.reached
            try:
                if reached != said:
                    self._store.set(self._key(self._processes.rank, "reached"), str(reached))
                    said, since = reached, time.monotonic()
                elif time.monotonic() - since > self._timeout:
                    self._look_for_others(reached)
            except RuntimeError:  # torchrun is gone
                if not self._ended.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def _look_for_others(self, reached):
        ranks = range(self._processes.count)
        behind = [rank for rank in ranks if int(self._get(rank, "reached", "0")) < reached]
        if not behind:
            return
        names = " and ".join(f"rank {rank} ({self._get(rank, 'place', 'not seen yet')})" for rank in behind)
        message = (
            f"{Path(sys.argv[0]).name}: error: no sign of {names} for {self._timeout} seconds, while the others wait; "
            "--resume, or a restart by torchrun, goes on from the last checkpoint (a longer wait: --timeout)"
        )
        if first_to_say(message):
            print(message, file=sys.stderr, flush=True)
        os._exit(1)  # the main thread waits in a collective, where no exception reaches it

    def _get(self, rank, what, unknown):
        key = self._key(rank, what)
        return self._store.get(key).decode() if self._store.check([key]) else unknown

    def _key(self, rank, what):
        return f"{_attempt()}{what} of {rank}"


def digest(tensors):
    """A hash (bytes) of the bits of tensors."""
    result, groups = hashlib.sha256(), {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor.detach().reshape(-1))
    for group in groups.values():
        devices = {tensor.device for tensor in group}
        group = [tensor.cpu() for tensor in group] if len(devices) > 1 else group
        result.update(torch.cat(group).cpu().view(torch.uint8).numpy())
    return result.digest()


def _number(name, default):
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise StartError(f"{name} must be an integer, got {os.environ[name]!r}; start with torchrun") from None


def _connect(hosts=False, seconds=300):
    """A connection to the store that torchrun keeps, or the store itself where nobody else does."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise StartError(f"WORLD_SIZE says several processes, but there is no {name}: start them with torchrun")
    place, time_out = (os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)), timedelta(seconds=seconds)
    return dist.TCPStore(*place, is_master=hosts, timeout=time_out, wait_for_workers=False)


def _job():
    """Before the names of what the store keeps as long as torchrun runs."""
    return f"darts/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/"


def _attempt():
    """Before the names of what is of these processes alone, and not of those that torchrun starts again."""
    return f"{_job()}{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/"
