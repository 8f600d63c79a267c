"""What a run on a CPU does with memory that it has freed: it keeps it for the next step.

A training step allocates and frees hundreds of images. The C library (glibc) gives what is free at the end of its heap
back to the system, which clears every page before it hands it out again: tens of thousands of page faults a step, a
tenth of its time. Kept, they are the same bytes the next time, and the process is as large as at its peak anyway.
"""

import contextlib
import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 32 << 20  # bytes of a block in the heap: the most that glibc allows; a larger one is a mapping of its own


def keep_freed():
    """Keep what is freed in the process; returns whether the C library can (glibc; others have no such function)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: CDLL(None) on Windows
        mallopt = ctypes.CDLL(None).mallopt
        # -1: never give back. Mappings all the same for the largest blocks, which would leave the largest holes
        return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, -1))
    return False


def clear_gradients(optimizer):
    """As `optimizer.zero_grad()`; on a CPU the gradients stay where they are, as zeros that backward adds to.

    Those that backward makes lie between activations that it has just freed, which are then no room for the images of
    the cells before: the process of a deep network grows by a fifth. The first call makes those that are not there yet.
    """
    weights = [w for group in optimizer.param_groups for w in group["params"]]
    stay = all(w.device.type == "cpu" for w in weights)
    if stay:
        for w in weights:
            if w.grad is None:
                w.grad = torch.zeros_like(w)
    optimizer.zero_grad(set_to_none=not stay)
