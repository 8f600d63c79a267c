"""The learning rate of an epoch, and the size of its training images: functions of the epoch alone.

    rate = (lowest + (highest - lowest) * shape(epoch / epochs)) * min(1, (epoch + 1) / (warmup_epochs + 1))

with epochs counted from 0. The second factor is the warm-up, which raises the rate in equal steps (arXiv 1706.02677,
section 2.2, by the epoch). Nothing depends on the rates before, so that a run that is extended goes on along the
schedule of its new length.

Images that grow (arXiv 2104.00298, section 4) make a short training cheaper: an epoch of half the side takes a quarter
of the operations, and the last ones see all of the image.
"""

import math

from torch.optim.lr_scheduler import LambdaLR

SHAPES = {
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,  # arXiv 1608.03983, without restarts
    "linear": lambda part: 1 - part,
}


def make(optimizer, epochs, shape="cosine", warmup_epochs=0, lowest=0.0):
    """The scheduler, to be stepped once an epoch, of an optimizer that was made with the highest rate."""
    floor = lowest / optimizer.param_groups[0]["lr"]

    def factor(epoch):
        warmup = min(1.0, (epoch + 1) / (warmup_epochs + 1))
        return (floor + (1 - floor) * SHAPES[shape](epoch / epochs)) * warmup

    return LambdaLR(optimizer, factor)


def image_size(epoch, epochs, first, last):
    """The side in pixels of the training images of an epoch: from `first` to `last` in a line, over three quarters of
    the epochs, in steps of 4 pixels (as two reductions divide).
    """
    grown = (last - first) * min(1.0, epoch / (0.75 * epochs))
    return last if last - first - grown < 2 else first + 4 * round(grown / 4)


def learning_rates(scheduler, epoch):
    """The learning rate that a scheduler of `make` has for every parameter group at an epoch."""
    return [base * factor(epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
