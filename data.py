"""Small-image data sets: one uint8 tensor on the device, augmented in batches.

What the augmentation does is what the original's transforms do, image by image: a random crop of the image padded
with black, a random flip, normalisation, cutout (arXiv 1708.04552). Every batch is a function of (seed, epoch,
step) alone, so that an interrupted run can go on at any step.
"""

import hashlib
import logging
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import image_folder
from processes import ALONE
from utils import UserError

logger = logging.getLogger("darts.data")

_NATIVE_SIZE = {"cifar10": 32, "cifar100": 32, "folder": 32, "digits": 8}  # pixels
_STATISTICS = {  # mean and standard deviation of the training images, as the original DARTS code has them
    "cifar10": ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
}


class Images(NamedTuple):
    """A labelled set of images of one size."""

    pixels: torch.Tensor  # (N, H, W, 3), uint8
    labels: torch.Tensor  # (N,), int64
    classes: list  # of names
    names: list = ()  # (N,), the files where there are files

    def __len__(self):
        return len(self.labels)

    def select(self, indices):
        return Images(self.pixels[indices], self.labels[indices], self.classes)


class Normalization(NamedTuple):
    """Mean and standard deviation of each colour, of pixels in [0, 1]."""

    mean: tuple
    std: tuple

    @classmethod
    def of(cls, dataset, load):
        """The published statistics of a data set, else those of the training images that `load()` returns."""
        if dataset in _STATISTICS:
            return cls(*_STATISTICS[dataset])
        images = load()
        chunks = images.pixels.cpu().split(1024)  # in float64, which not every device has
        count = images.pixels[..., 0].numel()
        mean = sum(chunk.double().sum((0, 1, 2)) for chunk in chunks) / count
        variance = sum((chunk.double() - mean).square().sum((0, 1, 2)) for chunk in chunks) / count
        std = variance.sqrt().clamp_min(1.0)  # a constant colour stays finite
        return cls(tuple((mean / 255).tolist()), tuple((std / 255).tolist()))


class Augmentation(NamedTuple):
    """What is done to a training image; lengths in pixels, 0 for none."""

    pad: int
    flip: bool
    cutout_length: int

    @classmethod
    def of(cls, dataset, image_size, cutout_length):
        """Crops of the original's proportion (4 pixels of 32); digits are not flipped.

        Raises:
            UserError: a cutout that covers a whole image.
        """
        if cutout_length >= image_size:
            raise UserError(
                f"--cutout_length {cutout_length} can cover a whole image of {image_size}x{image_size} pixels; "
                f"choose less than {image_size}, or a larger --image_size"
            )
        return cls(pad=max(1, image_size // 8), flip=dataset != "digits", cutout_length=cutout_length)


class Batches:
    """Mini-batches (input (B, 3, H, W) float32 in channels-last, target (B,)) of a set of images.

    `batch(epoch, step)` is shuffled and augmented; iteration yields the plain images in order. A last training batch
    of a single image is left out: batch norm has nothing to normalise there.

    Of several processes, each has its share of the same batch: every N-th image. A last training batch of less than two
    images for each goes to every one of them whole.

    Args:
        augmentation: None for a set that is not trained on.
        key: two integers, the seed of the run and a number that tells its data streams apart.
        team: the processes that share the batches.

    Raises:
        ValueError: a single image to train on.
    """

    def __init__(self, images, batch_size, normalization, augmentation, key=(0, 0), team=ALONE):
        self.batch_size, self.augmentation, self.key, self.team = batch_size, augmentation, key, team
        self.labels = images.labels
        if augmentation and len(images) < 2:
            raise ValueError("training needs two images or more, for batch norm's sake")
        pad = augmentation.pad if augmentation else 0
        device, self.size = images.pixels.device, images.pixels.shape[1]
        S = self.size
        padded = torch.nn.functional.pad(images.pixels, (0, 0, pad, pad, pad, pad))
        # what a row of a crop may be: 3 S bytes from any place on (a view, of no memory)
        self._rows = padded.flatten().unfold(0, 3 * S, 1)
        self._P, self._lines = S + 2 * pad, torch.arange(S, device=device) * 3 * (S + 2 * pad)
        mean, std = (torch.tensor(values, device=device) for values in normalization)
        self._scale, self._shift = (values.repeat(S) for values in (1 / (255 * std), -mean / std))
        if augmentation and augmentation.cutout_length:
            place, half = torch.arange(S, device=device), augmentation.cutout_length // 2
            offset = place - place[:, None]
            # 0 for the rows, and for the columns (with their colours), that a cutout around a centre takes
            self._kept_rows = ((offset < -half) | (offset >= half)).float()  # (S of centres, S)
            self._kept_columns = self._kept_rows.repeat_interleave(3, dim=1)
            # kept from batch to batch: what is freed in such pieces may go back to the system, to be cleared again
            self._kept = torch.empty(min(batch_size, len(images)), S, 3 * S, device=device)
        self._epoch, self._plan = None, None

    def __len__(self):
        """Training batches an epoch."""
        return -(-len(self.labels) // self.batch_size) - (len(self.labels) % self.batch_size == 1)

    def images(self, step):
        """How many images the batch of a step has, of all processes."""
        return min(self.batch_size, len(self.labels) - step % len(self) * self.batch_size)

    def batch(self, epoch, step):
        """The augmented batch of a step; after the last step of an epoch, a newly shuffled pass begins."""
        lap, step = divmod(step, len(self))
        if self._epoch != (epoch, lap):
            self._epoch, self._plan = (epoch, lap), self._draw(epoch, lap)
        batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
        alone = self.images(step) < 2 * self.team.count
        share = slice(None) if alone else slice(self.team.rank, None, self.team.count)
        *places, mirrored = (part[..., batch] for part in self._plan)
        indices, corners, centres = (part[..., share] for part in places)
        first = range(int(mirrored.sum()))[share]  # of this share, those that are mirrored
        input, target = self._crop(indices, *corners, mirrored=len(first))
        if self.augmentation.cutout_length:
            y, x = centres
            kept = self._kept[: len(target)]
            torch.maximum(self._kept_rows[y][:, :, None], self._kept_columns[x][:, None], out=kept)
            input.permute(0, 2, 3, 1).flatten(2).mul_(kept)
        return input, target

    def __iter__(self):
        rank, count = self.team.rank, self.team.count
        places, size = torch.arange(len(self.labels), device=self.labels.device), -(-self.batch_size // count)
        corner = self.augmentation.pad if self.augmentation else 0
        for batch in places.split(size * count):  # as many for each process, the last of which may be empty
            yield self._crop(batch[rank::count], corner, corner)

    def _draw(self, epoch, lap):
        """What a pass over the images needs of chance, the same on every device; all but the last are on the device.

        Returns:
            The order of the images, the corners of their crops (2, N), the centres of their cutouts (2, N), and a coin
            for each place (N,). Only how many coins of a batch say so matters: that many of its first images are
            mirrored, which is the same since their order is random.
        """
        N, aug = len(self.labels), self.augmentation
        seed = np.random.SeedSequence([*self.key, epoch, lap]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed))
        order = torch.randperm(N, generator=generator)
        corners = torch.randint(2 * aug.pad + 1, (2, N), generator=generator)
        centres = torch.randint(self.size, (2, N), generator=generator)
        mirrored = (torch.rand(N, generator=generator) < 0.5) & aug.flip
        return *(part.to(self.labels.device) for part in (order, corners, centres)), mirrored

    def _crop(self, indices, y, x, mirrored=0):
        """Normalised S x S crops at (y, x) of the padded images, the first `mirrored` of them mirrored."""
        S, P = self.size, self._P
        starts = 3 * ((indices * P + y) * P + x)
        pixels = self._rows.index_select(0, (starts[:, None] + self._lines).flatten()).view(len(indices), S, S, 3)
        pixels[:mirrored] = pixels[:mirrored].flip(2)
        # all colours of a row at once: a vector of three would be too short
        input = pixels.flatten(2).float()
        torch.addcmul(self._shift, input, self._scale, out=input)
        return input.unflatten(2, (-1, 3)).permute(0, 3, 1, 2), self.labels[indices]


def load(dataset, root, train, image_size=None, subset=None, seed=0, device="cpu", skip_broken=False):
    """The training or the test images of a data set.

    Args:
        dataset: one of `DATASETS`; `folder` reads `root/train/<class>/*` and `root/test/<class>/*` (or `val`).
        image_size: pixels; None is the data set's own (digits 8, else 32).
        subset: at most this many images, drawn with `seed`; None is all.
        skip_broken: leave out image files that cannot be read.

    Raises:
        UserError: images that are missing, broken or not downloadable.
    """
    size, part = image_size or _NATIVE_SIZE[dataset], "train" if train else "test"
    if dataset == "folder":
        folder, classes, samples = image_folder.scan(Path(root), train)
        count = len(samples)
        samples = [samples[k] for k in _choose(count, subset, seed)]
        pixels, labels, names = image_folder.read(samples, size, part, skip_broken)
    else:
        pixels, labels, classes = _load_digits(train) if dataset == "digits" else _load_cifar(dataset, root, train)
        count, folder = len(labels), dataset
        chosen = _choose(count, subset, seed)
        pixels, labels, names = pixels[chosen], labels[chosen], [f"image {k}" for k in chosen]
        if pixels.shape[1] != size:
            pixels = np.stack([np.asarray(Image.fromarray(p).resize((size, size), Image.BILINEAR)) for p in pixels])
    what = "%s: %d of %d images, %d classes (%s)"
    logger.info(what, part, len(labels), count, len(classes), folder)
    return Images(torch.from_numpy(pixels).to(device), torch.from_numpy(labels).to(device), classes, names)


def load_as(args, train, device):
    """`load` with the flags of a script."""
    return load(args.dataset, args.data, train, args.image_size, args.subset, args.seed, device, args.skip_broken)


def split(images, train_portion, seed):
    """A random split of the training images of a search: (for the weights, for the alphas).

    Raises:
        UserError: a part without images.
    """
    order = torch.from_numpy(np.random.default_rng([seed, 2]).permutation(len(images)))
    cut = int(len(images) * train_portion)
    if cut in (0, len(images)):
        raise UserError(f"--train_portion {train_portion} of {len(images)} images leaves one part empty")
    return images.select(order[:cut]), images.select(order[cut:])


def _choose(count, subset, seed):
    if subset is None or subset >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, 1]).permutation(count)[:subset])


def _load_digits(train):
    # the libraries that read a data set are imported where they are needed: they take seconds
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.target))
    parts = train_test_split(indices, test_size=360, stratify=digits.target, random_state=0)
    chosen = parts[0 if train else 1]
    pixels = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1), digits.target[chosen].astype(np.int64), list("0123456789")


def _load_cifar(dataset, root, train):
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = CIFAR10 if dataset == "cifar10" else CIFAR100
    root = Path(root)
    new_folders = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        images = cls(root, train=train, download=False)
    except RuntimeError:  # not there
        logger.info("%s is not in %s: downloading it", cls.__name__, root)
        try:
            images = cls(root, train=train, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            for folder in new_folders:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            raise UserError(
                f"{cls.__name__} is not in {root} and cannot be downloaded ({error}); put it there, or use "
                "--dataset digits (no download) or --dataset folder --data FOLDER (your own images)"
            ) from None
    return images.data, np.array(images.targets, dtype=np.int64), images.classes


def fingerprint(images):
    """What tells a set of images from another (a dict of plain values): 0.2 s for 60,000 images of 32x32 pixels."""
    digest = hashlib.sha256(images.pixels.cpu().numpy())
    digest.update(images.labels.cpu().numpy())
    counts = images.labels.bincount(minlength=len(images.classes)).tolist()
    return {"classes": list(images.classes), "counts": counts, "sha256": digest.hexdigest()}


def check_unchanged(part, before, now):
    """Raise UserError, naming what differs, unless two fingerprints are the same.

    Args:
        part: "train" or "test".
    """
    if before == now:
        return
    if before["classes"] != now["classes"]:
        differing = sorted(set(before["classes"]) ^ set(now["classes"])) or now["classes"]
        what = f"the classes differ in {differing[0]!r}"
    elif before["counts"] != now["counts"]:
        counts = zip(now["classes"], before["counts"], now["counts"], strict=True)
        name, had, has = next(count for count in counts if count[1] != count[2])
        what = f"class {name!r} had {had} images and has {has}"
    else:
        what = "as many images, but other pixels or another order of the files"
    raise UserError(f"the {part} images are not those that the run began with ({what}): put them back, or start anew")


def check_classes(images, expected):
    """Raise UserError unless the images have the expected class names (those of the training images)."""
    if list(images.classes) != list(expected):
        differing = sorted(set(images.classes) ^ set(expected))
        raise UserError(
            f"the test images must have the classes of the training images; they differ in {differing[0]!r}"
        )
