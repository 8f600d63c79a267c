"""Random resized crops and colour jitter against torchvision's, image by image."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2 import functional

from images import augment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_boxes_are_drawn_as_by_torchvision():
    """Two samples of 2,000 boxes, compared in every number that matters."""
    torch.manual_seed(0)
    image, count = torch.zeros(3, 32, 32), 2000
    theirs = [RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)]
    theirs, ours = torch.tensor(theirs).T.double(), augment.draw_boxes(count, 32, generator()).double()
    for function in (
        lambda top, left, height, width: top,
        lambda top, left, height, width: left,
        lambda top, left, height, width: height * width,
        lambda top, left, height, width: width / height,
        lambda top, left, height, width: top / (32 - height).clamp_min(0.5),
    ):
        assert ks_2samp(function(*ours), function(*theirs)).pvalue > 0.01
    narrow = augment.draw_boxes(500, 1, generator())
    assert torch.equal(narrow, torch.tensor([[0], [0], [1], [1]]).expand(4, 500))


def test_boxes_lie_within_the_image():
    top, left, height, width = augment.draw_boxes(5000, 7, generator())
    assert top.min() == left.min() == 0 and (top + height).max() == (left + width).max() == 7
    assert height.min() >= 1 and width.min() >= 1 and ((height == 7) & (width == 7)).any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_box_is_enlarged_as_by_torchvision(layout):
    torch.manual_seed(0)
    images, boxes = 255 * torch.rand(40, 3, 17, 17), augment.draw_boxes(40, 17, generator())
    resized = augment.resize(images.to(memory_format=layout), boxes)
    for image, box, result in zip(images, boxes.T.tolist(), resized, strict=True):
        expected = functional.resized_crop(image, *box, [17, 17], antialias=True)
        assert torch.allclose(result, expected, atol=0.01)


def test_the_whole_image_stays_as_it_is():
    image = 255 * torch.rand(1, 3, 9, 9)
    assert torch.allclose(augment.resize(image, torch.tensor([[0], [0], [9], [9]])), image, atol=1e-3)


def test_colours_are_changed_as_by_torchvision():
    """Every order of the four changes, with factors of its own; some pixels are gray, black or saturated."""
    torch.manual_seed(0)
    orders = list(itertools.permutations(range(4)))
    images = torch.rand(len(orders), 3, 8, 8)
    images[:, :, 0], images[:, :, 1], images[:, 1:, 2], images[:, :, 3] = 0.5, 0.0, 0.0, 1.0
    changes, _ = augment.draw_jitter(len(orders), 0.8, generator())
    results = augment.jitter(images * 255, changes, torch.tensor(orders).T) / 255
    names = "brightness", "contrast", "saturation", "hue"
    for image, amounts, order, result in zip(images, changes.T.tolist(), orders, results, strict=True):
        for k in order:
            image = getattr(functional, f"adjust_{names[k]}")(image, amounts[k])
        assert torch.allclose(result, image, atol=1e-4)


def test_images_are_reduced_as_by_pillow():
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator())
    small = Image.fromarray(image.numpy()).resize((20, 20), Image.Resampling.BILINEAR)
    images = image.permute(2, 0, 1)[None].float()
    reduced = augment.reduce(images, 20)[0].permute(1, 2, 0)
    assert (reduced - torch.from_numpy(np.array(small))).abs().max() < 1  # its values are rounded
    assert augment.reduce(images, 32) is images


def test_changes_are_drawn_as_by_torchvision():
    torch.manual_seed(0)
    ranges = (0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.2, 0.2)
    theirs = [ColorJitter.get_params(*map(list, ranges)) for _ in range(2000)]
    changes, order = augment.draw_jitter(2000, 0.4, generator())
    for k, (low, high) in enumerate(ranges):
        assert low <= changes[k].min() < changes[k].max() <= high
        assert ks_2samp(changes[k].numpy(), [draw[k + 1] for draw in theirs]).pvalue > 0.01
    _, counts = (order * torch.tensor([64, 16, 4, 1])[:, None]).sum(0).unique(return_counts=True)
    assert len(counts) == 24 and (counts - 2000 / 24).abs().max() < 4 * (2000 / 24) ** 0.5


def test_the_draws_are_those_of_their_generator():
    def draws(seed):
        return [augment.draw_boxes(9, 32, generator(seed)), augment.draw_jitter(9, 1.0, generator(seed))[0]]

    assert all(map(torch.equal, draws(1), draws(1))) and not any(map(torch.equal, draws(1), draws(2)))
