"""How the threads of a run wait for each other. Imports nothing of PyTorch: it has to be said before that is loaded.

A step shares hundreds to thousands of short loops among the threads of one OpenMP pool, that of PyTorch's wheel, which
kernels/ uses too. A thread that is done with its part of a loop waits for the others, and then for the next loop. Left
to itself it spins for milliseconds before it sleeps (libgomp: GOMP_SPINCOUNT=300000). On a machine with other work it
spins on the core that the thread it waits for would need, and pays with its share of the processor's time: threads take
many times as long as one alone. A thread that sleeps at once leaves its core to others, at the price of waking up: on
an idle machine, up to half of a step again. So threads spin for a while where the machine is idle when the run starts,
and sleep at once where it is not. What both cost is in benchmarks/RESULTS.md. The numbers that are computed do not
depend on it.
"""

import os
import time

BRIEF = {"GOMP_SPINCOUNT": "10000"}  # of libgomp (Linux): a fraction of a millisecond
ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}  # of libgomp and of libomp (macOS)
_WATCHED = 0.1  # seconds


def choose_waiting():
    """Say how threads wait, by what else the machine does now, unless the user has; OpenMP reads it as it is loaded."""
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ.update(ASLEEP if is_busy() else BRIEF)


def is_busy():
    """Whether other work keeps half of the cores busy.

    It is now that counts: the load of the last minute is still that of a run that has just ended, as a search has
    before its retraining. Where the system does not tell (Linux does), the load it is; else False.
    """
    before = _ticks()
    if before is None:
        return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * os.cpu_count()
    time.sleep(_WATCHED)
    idle, all_ = (after - earlier for after, earlier in zip(_ticks(), before, strict=True))
    return idle < 0.5 * all_


def _ticks():
    """How long the cores have been idle since the machine started, and all in all, in ticks; None if not known."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, idle, waiting, *others = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return idle + waiting, user + nice + system + idle + waiting + sum(others)


def are_asleep():
    """Whether threads sleep as soon as they wait."""
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
