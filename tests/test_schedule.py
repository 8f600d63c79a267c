"""The learning rate and the image size of an epoch."""

import pytest
import torch

from runtime import schedule


def make(epochs=10, **kwargs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    return optimizer, schedule.make(optimizer, epochs, **kwargs)


def rates(optimizer, scheduler, epochs):
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("lowest", [0.0, 0.001])
def test_the_cosine_is_pytorchs(lowest):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    expected = rates(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=lowest), 11)
    assert rates(*make(lowest=lowest), 11) == pytest.approx(expected)


def test_the_line_falls_to_zero_after_the_last_epoch():
    assert rates(*make(5, shape="linear"), 6) == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0])


@pytest.mark.parametrize("shape", schedule.SHAPES)
def test_a_warm_up_rises_in_equal_steps_and_leaves_the_rest(shape):
    plain, warm = rates(*make(shape=shape), 10), rates(*make(shape=shape, warmup_epochs=3), 10)
    assert [a / b for a, b in zip(warm, plain, strict=True)] == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


def test_the_rate_of_any_epoch_is_known():
    optimizer, scheduler = make(shape="linear", warmup_epochs=2)
    expected = [schedule.learning_rates(scheduler, epoch)[0] for epoch in range(10)]
    assert rates(optimizer, scheduler, 10) == expected


@pytest.mark.parametrize("first, last, sizes", [
    (16, 32, [16, 20, 20, 24, 28, 28, 32, 32]),
    (32, 32, [32] * 8),
    (5, 8, [5, 5, 5, 8, 8, 8, 8, 8]),
    (30, 33, [30, 30, 30, 33, 33, 33, 33, 33]),
])  # fmt: skip
def test_images_grow_for_three_quarters_of_the_epochs(first, last, sizes):
    assert [schedule.image_size(epoch, 8, first, last) for epoch in range(8)] == sizes
