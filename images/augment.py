"""Random resized crops, colour jitter and smaller images, of a batch at once, on its device.

What torchvision's RandomResizedCrop and ColorJitter draw for an image is here drawn for many, and then applied to a
batch: `draw_…` gives the numbers of an epoch, on the CPU, `resize` and `jitter` do what they say to the images.
"""

import math

import torch
import torch.nn.functional as F

_AREA = 0.08, 1.0  # of a crop, as a share of the image's
_RATIO = 3 / 4, 4 / 3  # of a crop's width to its height
_ATTEMPTS = 10  # at a crop that lies within the image
_GRAY = 0.2989, 0.587, 0.114  # of red, green and blue in the brightness of a pixel (ITU-R BT.601)


def draw_boxes(count, size, generator):
    """Boxes (4, count) of random crops of square images: top, left, height, width, in pixels.

    Area and logarithm of the ratio are uniform; where no attempt fits, the box is the whole image.
    """
    shape = _ATTEMPTS, count
    area = size**2 * _uniform(*_AREA, shape, generator)
    ratio = _uniform(*map(math.log, _RATIO), shape, generator).exp()
    sides = torch.stack([area / ratio, area * ratio]).sqrt().round().long()  # (2, attempts, count)
    fits = ((sides > 0) & (sides <= size)).all(0)
    first = fits.int().argmax(0)  # the first of equal ones
    sides = torch.where(fits.any(0), sides[:, first, torch.arange(count)], size)
    corners = (_uniform(0, 1, (2, count), generator) * (size - sides + 1)).long()
    return torch.cat([corners, sides])


def resize(input, boxes):
    """The boxes (4, B) of images (B, C, S, S), enlarged to S x S by linear interpolation within the box."""
    B, S, device = len(input), input.shape[-1], input.device
    corners, sides = (part[:, :, None].float() for part in (boxes[:2], boxes[2:]))
    centres = (torch.arange(S, device=device) + 0.5) / S * sides - 0.5  # of the new pixels, counted in old ones
    pixels = corners + torch.minimum(centres.clamp_min(0), sides - 1)  # (2, B, S)
    y, x = (2 * pixels + 1) / S - 1  # as grid_sample counts
    grid = torch.stack([x[:, None].expand(B, S, S), y[:, :, None].expand(B, S, S)], dim=-1)
    return F.grid_sample(input, grid, mode="bilinear", padding_mode="border", align_corners=False)


def reduce(input, size):
    """Images (B, C, S, S) at size x size pixels, each the mean of those it covers, weighted by a triangle."""
    if input.shape[-1] == size:
        return input
    return F.interpolate(input, (size, size), mode="bilinear", align_corners=False, antialias=True)


def draw_jitter(count, strength, generator):
    """Brightness, contrast, saturation (factors from 1 - strength to 1 + strength) and hue (a shift of at most half of
    the strength, in turns) of as many images, (4, count), and the order (4, count) in which an image gets them.
    """
    middle, spread = torch.tensor([[1.0, 1.0, 1.0, 0.0], [strength, strength, strength, strength / 2]])[:, :, None]
    changes = middle + spread * _uniform(-1, 1, (4, count), generator).float()
    return changes, _uniform(0, 1, (4, count), generator).argsort(0)


def jitter(input, changes, order):
    """Change the colours of images (B, 3, S, S) of values from 0 to 255 in place, as `draw_jitter` says.

    order: on the CPU, where it is looked into.
    """
    for turn in order:
        for k, change in enumerate((_brighten, _contrast, _saturate, _turn_hue)):
            chosen = (turn == k).nonzero().flatten().to(input.device)
            if len(chosen):
                amount = changes[k, chosen].to(input)[:, None, None, None]
                input[chosen] = change(input[chosen], amount).clamp_(0, 255)
    return input


def _uniform(low, high, shape, generator):
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _gray(x):
    red, green, blue = x.split(1, dim=1)
    return _GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue


def _brighten(x, factor):
    return x * factor


def _contrast(x, factor):
    return torch.lerp(_gray(x).mean((1, 2, 3), keepdim=True).expand_as(x), x, factor.expand_as(x))


def _saturate(x, factor):
    return torch.lerp(_gray(x).expand_as(x), x, factor.expand_as(x))


def _turn_hue(x, turns):
    """Hue, from 0 to 6, is where a colour lies between red (0), green (2) and blue (4); value and chroma stay."""
    red, green, blue = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    unit = chroma.clamp_min(torch.finfo(x.dtype).tiny)  # gray has no hue, and any will do
    of_blue = torch.where(value == green, 2 + (blue - red) / unit, 4 + (red - green) / unit)
    hue = torch.where(value == red, (green - blue) / unit, of_blue) + 6 * turns
    distance = (torch.tensor([5.0, 3.0, 1.0], device=x.device).to(x)[:, None, None] + hue) % 6
    return value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)
