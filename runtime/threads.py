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

BRIEF = {"GOMP_SPINCOUNT": "10000"}  # of libgomp (Linux): a fraction of a millisecond
ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}  # of libgomp and of libomp (macOS)


def choose_waiting():
    """Say how threads wait, by the load of the last minute, unless the user has; OpenMP reads it as it is loaded."""
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ.update(ASLEEP if is_busy() else BRIEF)


def is_busy():
    """Whether other work has kept half of the cores busy for the last minute (False where that is not known)."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * os.cpu_count()


def are_asleep():
    """Whether threads sleep as soon as they wait."""
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
