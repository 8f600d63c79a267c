"""How the threads of a run wait for each other. Imports nothing, for it has to be said before PyTorch is loaded.

A step shares hundreds to thousands of short loops among the threads of one OpenMP pool, that of PyTorch's wheel, which
kernels/ uses too. A thread that is done with its part of a loop waits for the others, and then for the next loop. Left
to itself it spins for milliseconds before it sleeps (libgomp: GOMP_SPINCOUNT=300000). On a machine with other work it
spins on the core that the thread it waits for would need, and pays with its share of the processor's time: threads take
many times as long as one alone. A thread that sleeps at once leaves its core to others, at the price of waking up.
What it costs is in benchmarks/RESULTS.md. The numbers that are computed do not depend on it.
"""

import os

ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}  # of libgomp (Linux) and of libomp (macOS)


def wait_asleep():
    """Let threads sleep as soon as they wait, unless the user has set the policy; OpenMP reads it as it is loaded."""
    for name, value in ASLEEP.items():
        os.environ.setdefault(name, value)
