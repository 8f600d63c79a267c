"""Sets of images, in one uint8 tensor on the device or in files that are read as they are needed, augmented in batches.

What the augmentation does is what the original's transforms do, image by image: a random crop of the image padded
with black, or an enlarged part of it, a random flip, colour jitter, normalisation, cutout (arXiv 1708.04552). Every
batch is a function of (seed, epoch, step) alone, so that an interrupted run can go on at any step.
"""

import dataclasses
import functools
import hashlib
import logging
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from images import augment, image_folder, stream
from runtime.processes import ALONE
from utils import UserError

logger = logging.getLogger("darts.data")

IN_MEMORY = 2**31  # bytes of pixels that a set in a folder may have to be kept in memory, unless that is asked for
_SAMPLE = 2**16  # images that statistics are taken of at most
NATIVE_SIZE = {"cifar10": 32, "cifar100": 32, "folder": 32, "digits": 8}  # pixels
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
    marks: list = ()  # (N,), what tells these files from others: names, lengths, checksums

    def __len__(self):
        return len(self.labels)

    @property
    def device(self):
        return self.pixels.device

    @property
    def size(self):
        return self.pixels.shape[1]

    def select(self, indices):
        return Images(self.pixels[indices], self.labels[indices], self.classes)

    def parts(self, indices):
        """The pixels of some of the images, a few at a time (n, H, W, 3), on the CPU."""
        yield from (self.pixels[part].cpu() for part in indices.to(self.device).split(64))


@dataclasses.dataclass(frozen=True)
class StreamedImages:
    """A labelled set of images in files: decoded, to one size, as they are needed."""

    names: list  # (N,), the files
    labels: torch.Tensor  # (N,), int64, on the CPU
    classes: list  # of names
    marks: list  # (N,), as of Images
    device: torch.device  # of the batches
    size: int  # pixels
    fit: str  # as of image_folder.read
    workers: int  # processes that decode

    def __len__(self):
        return len(self.labels)

    def select(self, indices):
        names, marks = ([values[k] for k in indices.tolist()] for values in (self.names, self.marks))
        return dataclasses.replace(self, names=names, labels=self.labels[indices], marks=marks)

    def parts(self, indices):
        """As of Images."""
        files = [self.names[k] for k in indices.tolist()]
        for pixels in image_folder.decode_each(files, self.size, self.fit, self.workers):
            yield torch.tensor(pixels)[None]

    def reader(self, ahead):
        """A stream.Reader of pixels (B, size, size, 3), in page-locked memory if a CUDA device wants them."""
        decode = functools.partial(image_folder.decode, self.size, self.fit)
        files = image_folder.as_array(self.names)
        return stream.Reader(decode, files, ahead, self.workers, pinned=self.device.type == "cuda")


class Normalization(NamedTuple):
    """Mean and standard deviation of each colour, of pixels in [0, 1]."""

    mean: tuple
    std: tuple

    @classmethod
    def of(cls, dataset, load):
        """The published statistics of a data set, else those of the training images that `load()` returns.

        Of more than 65,536 images, as many are looked at, evenly spaced. The sums are of integers, and exact: they do
        not depend on where the pixels come from.
        """
        if dataset in _STATISTICS:
            return cls(*_STATISTICS[dataset])
        images = load()
        count = min(len(images), _SAMPLE)
        indices = torch.arange(count) * len(images) // count
        sums, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for pixels in images.parts(indices):
            values = pixels.flatten(0, 2).double()
            sums += values.sum(0)
            squares += values.square().sum(0)
        n = count * images.size**2
        pairs = [(int(s), int(q)) for s, q in zip(sums.tolist(), squares.tolist(), strict=True)]
        # a constant colour stays finite
        return cls(
            tuple(s / n / 255 for s, _ in pairs), tuple(max(1.0, (n * q - s * s) / n**2) ** 0.5 / 255 for s, q in pairs)
        )


class Augmentation(NamedTuple):
    """What is done to a training image; lengths in pixels, 0 for none."""

    pad: int
    flip: bool
    cutout_length: int
    resized_crop: bool = False
    color_jitter: float = 0.0

    @classmethod
    def of(cls, dataset, image_size, cutout_length, resized_crop=False, color_jitter=0.0):
        """Crops of the original's proportion (4 pixels of 32), or resized ones; digits are not flipped.

        Raises:
            UserError: a cutout that covers a whole image.
        """
        if cutout_length >= image_size:
            raise UserError(
                f"--cutout_length {cutout_length} can cover a whole image of {image_size}x{image_size} pixels; "
                f"choose less than {image_size}, or a larger --image_size"
            )
        pad = 0 if resized_crop else max(1, image_size // 8)
        return cls(pad, dataset != "digits", cutout_length, resized_crop, color_jitter)

    @classmethod
    def of_flags(cls, args):
        """`of` with the flags of a script."""
        cutout_length = args.cutout_length if args.cutout else 0
        return cls.of(args.dataset, image_size(args), cutout_length, args.augment == "resized_crop", args.color_jitter)


class Plan:
    """Which images are in a batch, and what chance does to them: a function of (key, epoch, step).

    Args:
        count: of the images.
        device: of what chance does; which images these are is on the device of `order_on`.
        steps: how many batches of an epoch are asked for, where that is not all of them (it does not change them).
        team: the processes that share the batches, each of which is told of its own images.
    """

    def __init__(self, count, batch_size, augmentation, size, key, device, order_on, steps, team=ALONE):
        self.count, self.batch_size, self.augmentation, self.size, self.key = count, batch_size, augmentation, size, key
        self._device, self._order_on, self._team = device, order_on, team
        self._steps = steps or len(self)
        self._passes = {}  # (epoch, lap): what `_draw` returns

    def __len__(self):
        """Training batches an epoch; without one of a single image."""
        return -(-self.count // self.batch_size) - (self.count % self.batch_size == 1)

    def batch(self, epoch, step):
        """What `_draw` returns, of one step; after the last step of an epoch, a newly shuffled pass begins."""
        lap, step = divmod(step, len(self))
        if (epoch, lap) not in self._passes:  # the one before is kept: who reads ahead is at its end still
            self._passes = dict([*self._passes.items()][-1:]) | {(epoch, lap): self._draw(epoch, lap)}
        batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
        order, corners, centres, mirrored, *others = (part[..., batch] for part in self._passes[epoch, lap])
        first = torch.arange(len(order)) < mirrored.sum()  # those that are mirrored
        share = self._share(len(order))
        return [part[..., share] for part in (order, corners, centres, first, *others)]

    def _share(self, images):
        """Which images of a batch this process has: all, where there are less than two for each."""
        return slice(None) if images < 2 * self._team.count else slice(self._team.rank, None, self._team.count)

    def images(self, step):
        """How many images the batch of a step has, of all processes."""
        return min(self.batch_size, self.count - step % len(self) * self.batch_size)

    @functools.cached_property
    def plain(self):
        """The images of the plain batches: as many batches for each process, the last of which may be empty."""
        rank, count = self._team.rank, self._team.count
        batches = torch.arange(self.count, device=self._order_on).split(-(-self.batch_size // count) * count)
        return [batch[rank::count] for batch in batches]

    def after(self, place):
        """The place, (epoch, step) or (None, step) of the plain images, that comes after a place; None if none does.

        After the training images of an epoch come those of the next; plain ones come again if there are no others.
        """
        epoch, step = place
        if step + 1 < (len(self.plain) if epoch is None else self._steps):
            return epoch, step + 1
        if epoch is None:
            return None if self.augmentation else (None, 0)
        return epoch + 1, 0

    def ahead(self, place):
        """Yield (place, indices) of the batches from a place on."""
        while place is not None:
            epoch, step = place
            indices = self.plain[step] if epoch is None else self.batch(epoch, step)[0]
            if len(indices):
                yield place, indices.tolist()
            place = self.after(place)

    def _draw(self, epoch, lap):
        """What a pass over the images needs of chance, the same on every device; on the device, but for two.

        Returns:
            The order of the images, the corners of their crops (2, N), the centres of their cutouts (2, N), a coin for
            each place (N,), the boxes of resized crops (4, N), changes of colour (4, N) and the turns in which an image
            gets them (4, N); what is not asked for is empty. Only how many coins of a batch say so matters: that many
            of its first images are mirrored, which is the same since their order is random. Coins and turns stay on
            the CPU.
        """
        N, aug = self.count, self.augmentation
        seed = np.random.SeedSequence([*self.key, epoch, lap]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed))
        order = torch.randperm(N, generator=generator)
        corners = torch.randint(2 * aug.pad + 1, (2, N), generator=generator)
        centres = torch.randint(self.size, (2, N), generator=generator)
        mirrored = (torch.rand(N, generator=generator) < 0.5) & aug.flip
        # what came later is drawn last: without it, a run goes on as it would have before
        none = torch.empty(4, 0)
        boxes = augment.draw_boxes(N, self.size, generator) if aug.resized_crop else none
        changes, turns = augment.draw_jitter(N, aug.color_jitter, generator) if aug.color_jitter else (none, none)
        corners, centres, boxes, changes = (part.to(self._device) for part in (corners, centres, boxes, changes))
        return order.to(self._order_on), corners, centres, mirrored, boxes, changes, turns


class Batches:
    """Mini-batches (input (B, 3, H, W) float32 in channels-last, target (B,)) of a set of images.

    `batch(epoch, step)` is shuffled and augmented; iteration yields the plain images in order. A last training batch
    of a single image is left out: batch norm has nothing to normalise there.

    Of several processes, each has its share of the same batch: every N-th image. A last training batch of less than two
    images for each goes to every one of them whole.

    Args:
        images: Images, or StreamedImages, of which the batches to come are read ahead, and the next one is made.
        augmentation: None for a set that is not trained on.
        key: two integers, the seed of the run and a number that tells its data streams apart.
        steps: as of Plan.
        team: the processes that share the batches.

    Raises:
        ValueError: a single image to train on.
    """

    def __init__(self, images, batch_size, normalization, augmentation, key=(0, 0), steps=None, team=ALONE):
        self.augmentation, self.labels, self.size = augmentation, images.labels, images.size
        self.batch_size, self.team = batch_size, team
        self._device, S = images.device, images.size
        if augmentation and len(images) < 2:
            raise ValueError("training needs two images or more, for batch norm's sake")
        self._pad = augmentation.pad if augmentation else 0
        self._P = S + 2 * self._pad
        self._lines = torch.arange(S, device=self._device) * 3 * self._P
        mean, std = (torch.tensor(values, device=self._device) for values in normalization)
        self._scale, self._shift = (values.repeat(S) for values in (1 / (255 * std), -mean / std))
        if augmentation and augmentation.cutout_length:
            place, half = torch.arange(S, device=self._device), augmentation.cutout_length // 2
            offset = place - place[:, None]
            # 0 for the rows, and for the columns (with their colours), that a cutout around a centre takes
            self._kept_rows = ((offset < -half) | (offset >= half)).float()  # (S of centres, S)
            self._kept_columns = self._kept_rows.repeat_interleave(3, dim=1)
            # kept from batch to batch: what is freed in such pieces may go back to the system, to be cleared again
            self._kept = torch.empty(min(batch_size, len(images)), S, 3 * S, device=self._device)
        self._plan = Plan(
            len(images), batch_size, augmentation, S, key, self._device, images.labels.device, steps, team
        )
        self._reader = images.reader(self._plan.ahead) if isinstance(images, StreamedImages) else None
        self._ahead = stream.Ahead() if self._reader else None
        self._rows = None if self._reader else self._lay_out(images.pixels)

    def __len__(self):
        """Training batches an epoch."""
        return len(self._plan)

    @property
    def waited(self):
        """Seconds that have been spent waiting for images from the disk."""
        return self._ahead.waited if self._ahead else 0.0

    def images(self, step):
        """How many images the batch of a step has, of all processes."""
        return self._plan.images(step)

    def batch(self, epoch, step):
        """The augmented batch of a step; after the last step of an epoch, a newly shuffled pass begins."""
        return self._get((epoch, step))

    def __iter__(self):
        return (self._get((None, step)) for step in range(len(self._plan.plain)))

    def _get(self, place):
        if self._ahead:
            return self._ahead.get(self._make, place, self._plan.after(place))
        return self._make(place)

    def _make(self, place):
        """The batch of a place, as of `Plan.after`."""
        return self._make_plain(place) if place[0] is None else self._make_augmented(place)

    def _make_plain(self, place):
        indices = self._plan.plain[place[1]]
        input = torch.empty(0, 3, self.size, self.size, device=self._device)
        if len(indices):
            input = self._normalize(self._crop(place, indices, self._pad, self._pad))
        return input, self._target(indices)

    def _make_augmented(self, place):
        indices, corners, centres, mirrored, boxes, changes, turns = self._plan.batch(*place)
        input = self._crop(place, indices, *corners, mirrored=int(mirrored.sum()))
        if self.augmentation.resized_crop:
            input = augment.resize(input, boxes)
        if self.augmentation.color_jitter:
            input = augment.jitter(input, changes, turns)
        input = self._normalize(input)
        if self.augmentation.cutout_length:
            y, x = centres
            kept = self._kept[: len(indices)]
            torch.maximum(self._kept_rows[y][:, :, None], self._kept_columns[x][:, None], out=kept)
            input.permute(0, 2, 3, 1).flatten(2).mul_(kept)
        return input, self._target(indices)

    def _target(self, indices):
        return self.labels[indices].to(self._device)

    def _lay_out(self, pixels):
        """What the rows of crops may be: 3 S bytes from any place of the padded images on (a view of them)."""
        padded = torch.nn.functional.pad(pixels, (0, 0, *[self._pad] * 4))
        return padded.flatten().unfold(0, 3 * self.size, 1)

    def _crop(self, place, indices, y, x, mirrored=0):
        """S x S crops at (y, x) of the padded images, 0 to 255, (B, 3, S, S); the first `mirrored` are mirrored.

        Args:
            place: of this batch, as of `Plan.after`.
            indices: of its images, on the device of the labels.
        """
        S, P, rows = self.size, self._P, self._rows
        if self._reader:
            rows = self._lay_out(self._reader.read(place).to(self._device, non_blocking=True))
            indices = torch.arange(len(indices), device=self._device)
        starts = 3 * ((indices * P + y) * P + x)
        pixels = rows.index_select(0, (starts[:, None] + self._lines).flatten()).view(len(indices), S, S, 3)
        pixels[:mirrored] = pixels[:mirrored].flip(2)
        return pixels.float().permute(0, 3, 1, 2)

    def _normalize(self, input):
        """Images (B, 3, S, S) of 0 to 255, normalised, in channels-last."""
        # all colours of a row at once: a vector of three would be too short
        input = input.permute(0, 2, 3, 1).flatten(2)
        torch.addcmul(self._shift, input, self._scale, out=input)
        return input.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


def load(dataset, root, train, image_size=None, subset=None, seed=0, device="cpu", **reading):
    """The training or the test images of a data set.

    Args:
        dataset: cifar10, cifar100, digits, or folder, which reads `root/train/<class>/*` and `root/test/<class>/*` (or
            `val`).
        image_size: pixels; None is the data set's own.
        subset: at most this many images, drawn with `seed`; None is all.
        reading: of `folder`, how it is read: see `_load_folder`.

    Returns:
        Images or StreamedImages.

    Raises:
        UserError: images that are missing, broken or not downloadable.
    """
    size, part, device = image_size or NATIVE_SIZE[dataset], "train" if train else "test", torch.device(device)
    what = "%s: %d of %d images, %d classes (%s)"
    if dataset == "folder":
        folder, classes, samples = image_folder.scan(Path(root), train)
        chosen = [samples[k] for k in _choose(len(samples), subset, seed)]
        images = _load_folder(folder, classes, chosen, size, part, device, **reading)
        where = "in memory" if isinstance(images, Images) else f"on disk, --workers {images.workers}"
        megabytes, most = 3 * len(images) * size**2 / 1e6, IN_MEMORY / 1e6
        what += f", {where} ({megabytes:,.1f} MB of pixels; without --data_in, up to {most:,.0f} MB are in memory)"
        logger.info(what, part, len(images), len(samples), len(classes), folder)
        return images
    if reading.get("data_in") == "disk":
        raise UserError(f"--data_in disk is for --dataset folder: {dataset} is kept in memory")
    pixels, labels, classes = _load_digits(train) if dataset == "digits" else _load_cifar(dataset, root, train)
    chosen = _choose(len(labels), subset, seed)
    logger.info(what, part, len(chosen), len(labels), len(classes), dataset)
    pixels, labels = pixels[chosen], torch.from_numpy(labels[chosen]).to(device)
    if pixels.shape[1] != size:
        pixels = np.stack([np.asarray(Image.fromarray(p).resize((size, size), Image.BILINEAR)) for p in pixels])
    return Images(torch.from_numpy(pixels).to(device), labels, classes, [f"image {k}" for k in chosen])


def image_size(args):
    """The pixels that the flags of a script ask for: by default the data set's own, 8 for digits, else 32."""
    return args.image_size or NATIVE_SIZE[args.dataset]


def load_as(args, train, device):
    """`load` with the flags of a script."""
    reading = {name: getattr(args, name) for name in ("skip_broken", "fit", "data_in", "workers")}
    return load(args.dataset, args.data, train, args.image_size, args.subset, args.seed, device, **reading)


def _load_folder(
    folder, classes, samples, size, part, device, skip_broken=False, fit="crop", data_in=None, workers=None
):
    """The images of the (path, label) pairs.

    Args:
        skip_broken: leave out image files that cannot be read.
        fit: "crop" or "squeeze", what makes them square (as of `image_folder.read`).
        data_in: "memory", or "disk": they are read as they are needed; None is memory for up to `IN_MEMORY` bytes.
        workers: processes that decode them; None is `stream.default_workers()`.
    """
    workers = workers or stream.default_workers()
    in_memory = data_in == "memory" or (data_in is None and 3 * len(samples) * size**2 <= IN_MEMORY)
    options = dict(part=part, skip_broken=skip_broken, workers=workers)
    if in_memory:
        samples, marks, pixels = image_folder.read(samples, size, fit, **options)
    else:
        samples, marks = image_folder.check(samples, **options)
    names, labels = [path for path, _ in samples], torch.tensor([label for _, label in samples])
    marks = [f"{name.removeprefix(str(folder))} {mark}" for name, mark in zip(names, marks, strict=True)]
    if in_memory:
        return Images(torch.from_numpy(pixels).to(device), labels.to(device), classes, names, marks)
    return StreamedImages(names, labels, classes, marks, device, size, fit, workers)


def load_pictures(places, args, classes, device):
    """Pictures of a user's own, files or folders of them, as images without labels (all of class 0).

    They are resized as those of the data set of `args`, the flags of a script.

    Raises:
        UserError: a place that is not there, a folder without pictures, a file that is none.
    """
    samples = [(path, 0) for path in image_folder.find(places)]
    reading = {name: getattr(args, name) for name in ("skip_broken", "fit", "data_in", "workers")}
    return _load_folder("", classes, samples, image_size(args), "given", device, **reading)


def split(images, train_portion, seed):
    """A random split of the training images of a search: (for the weights, for the alphas).

    Each is decoded by half of the workers, as both are at the same time, but by one at least.

    Raises:
        UserError: a part without images.
    """
    order = torch.from_numpy(np.random.default_rng([seed, 2]).permutation(len(images)))
    cut = int(len(images) * train_portion)
    if cut in (0, len(images)):
        raise UserError(f"--train_portion {train_portion} of {len(images)} images leaves one part empty")
    if isinstance(images, StreamedImages):
        images = dataclasses.replace(images, workers=max(1, images.workers // 2))
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
    """What tells a set of images from another (a dict of plain values): 0.2 s for 60,000 images of 32x32 pixels.

    sha256 is of pixels in memory; files of the names of files, their lengths and checksums of their ends.
    """
    labels = images.labels.cpu()
    found = {"classes": list(images.classes), "counts": labels.bincount(minlength=len(images.classes)).tolist()}
    if isinstance(images, Images):
        digest = hashlib.sha256(images.pixels.cpu().numpy())
        digest.update(labels.numpy())
        found["sha256"] = digest.hexdigest()
    if images.marks:
        found["files"] = hashlib.sha256("\0".join(images.marks).encode(errors="surrogateescape")).hexdigest()
    return found


def check_unchanged(part, before, now):
    """Raise UserError, naming what differs, unless two fingerprints are those of the same images.

    Args:
        part: "train" or "test".
    """
    if what := difference(before, now):
        raise UserError(
            f"the {part} images are not those that the run began with ({what}): put them back, or start anew"
        )


def difference(before, now):
    """In words, how the images of two fingerprints differ; "" if they do not.

    Pixels decide where both have been seen, else the files: images may move from memory to the disk and back.
    """
    same = [before[name] == now[name] for name in ("sha256", "files") if name in before and name in now]
    if before["classes"] != now["classes"]:
        differing = sorted(set(before["classes"]) ^ set(now["classes"])) or now["classes"]
        return f"the classes differ in {differing[0]!r}"
    if before["counts"] != now["counts"]:
        counts = zip(now["classes"], before["counts"], now["counts"], strict=True)
        name, had, has = next(count for count in counts if count[1] != count[2])
        return f"class {name!r} had {had} images and has {has}"
    # of runs that are older than files on disk, there may be neither
    return "" if all(same[:1]) else "as many images, but other pixels or another order of the files"


def check_classes(images, expected):
    """Raise UserError unless test images have the expected class names (those of the training images)."""
    missing, more = (sorted(one) for one in (set(expected) - {*images.classes}, {*images.classes} - set(expected)))
    if missing or more:
        what = f"they lack {missing[0]!r}" if missing else f"{more[0]!r} is not one of those"
        raise UserError(f"the test images must have the classes of the training images; {what}")
