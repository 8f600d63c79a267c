"""Images in folders: ROOT/train/CLASS/* and ROOT/test/CLASS/* (or val/), every file accounted for.

What is left out (files that are no images, links that lead back) and what cannot be read is said by name. Hidden files
and folders, which file managers and notebooks leave behind, are not looked at.

An image becomes a square of three colours: turned as its EXIF orientation says, transparency on white, 16 bits scaled
to 8, of several frames the first.
"""

import functools
import logging
import os
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps

from images import stream
from utils import UserError

logger = logging.getLogger("darts.data")

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_NAMED = 10  # files that a message names at most
_TAIL = 4096  # bytes at the end of a file that tell it from others


def scan(root, train):
    """What is below ROOT/train, or below ROOT/test or ROOT/val, in a fixed order.

    Returns:
        The folder of the split, the class names, and (path, label) of every image.

    Raises:
        UserError: a folder that is missing, empty or there twice.
    """
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; --dataset folder needs {root}/train and {root}/test")
    names = ("train",) if train else ("test", "val")
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"--data {root}: the folder {' or '.join(names)} is missing in it")
    entries = sorted((entry for entry in folder.iterdir() if entry.name[0] != "."), key=lambda entry: entry.name)
    places = [entry for entry in entries if entry.is_dir()]
    if len(places) < 2:
        raise UserError(f"{folder} needs two class folders or more, with images in {folder}/CLASS/; got {len(places)}")
    left_out = [str(entry) for entry in entries if not entry.is_dir()]
    samples = []
    for label, images in enumerate(_walk(folder, places, left_out)):
        if not images:
            raise UserError(f"the class folder {places[label]} holds no image file")
        samples += [(path, label) for path in images]
    if left_out:
        logger.warning("left out, being no images or read already: %s", _listed(left_out))
    return folder, [place.name for place in places], samples


def _walk(root, places, left_out):
    """The image files below each class folder; what is left out is added to a list.

    Links to folders are followed, but not to what lies in `root` or above it: there they would bring the images of
    one class into another, or lead back and never end.
    """
    own = {_identity(place) for place in (*root.resolve().parents, *(place for place, _, _ in os.walk(root)))}
    entered = {}
    for place in places:
        other = entered.setdefault(_identity(place), place)
        if other is not place:
            raise UserError(f"the class folders {other} and {place} are one and the same")
    for place in places:
        images = []
        for folder, folders, files in os.walk(place, followlinks=True, onerror=_fail):
            paths = [os.path.join(folder, name) for name in folders if name[0] != "."]
            links = [path for path in paths if os.path.islink(path) and _identity(path) in own]
            fresh = [path for path in paths if path not in links and _identity(path) not in entered]
            entered.update((_identity(path), path) for path in fresh)
            folders[:] = map(os.path.basename, fresh)
            left_out += [path for path in paths if path not in fresh]
            for path in (os.path.join(folder, name) for name in files if name[0] != "."):
                (images if _is_image(path) else left_out).append(path)
        yield sorted(images, key=os.path.split)


def find(places):
    """The paths of image files: those given, and those in and below given folders, sorted.

    Raises:
        UserError: a place that is not there, or a folder without an image file.
    """
    paths = []
    for place in places:
        if not os.path.isdir(place):
            if not os.path.isfile(place):
                raise UserError(f"{place}: no such file or folder")
            paths.append(place)
            continue
        below = []
        for folder, folders, files in os.walk(place, onerror=_fail):
            folders[:] = [name for name in folders if name[0] != "."]
            below += [os.path.join(folder, name) for name in files if name[0] != "."]
        images = sorted(filter(_is_image, below), key=os.path.split)
        if not images:
            raise UserError(f"{place} holds no image file ({', '.join(EXTENSIONS)})")
        paths += images
    return paths


def _identity(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _fail(error):
    raise error


def _is_image(path):
    # a dangling link is an image that cannot be read; a pipe would wait for its writer
    there = os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))
    return there and path.lower().endswith(EXTENSIONS)


def _listed(paths):
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return f"{len(paths)} files: {', '.join(paths[:_NAMED])}{more}" if len(paths) > 1 else paths[0]


def read(samples, size, fit, part, skip_broken=False, workers=0):
    """Those of the (path, label) pairs that can be read, a mark of each file, and pixels (N, size, size, 3) uint8.

    Args:
        fit: what happens to images that are not square. crop: their middle is kept; squeeze: they are distorted.
        part: what the progress bar and the messages call them.
        skip_broken: leave broken files out, with a warning.
        workers: processes that share the work, if it is much.

    Raises:
        UserError: names the broken files.
    """
    pixels = np.empty((len(samples), size, size, 3), dtype=np.uint8)
    kept, marks, broken = [], [], []
    read = functools.partial(_read_and_mark, size, fit)
    results = stream.each(read, _paths(samples), workers, f"reading {part} images")
    for sample, result in zip(samples, results, strict=True):
        if isinstance(result, stream.Failure):
            broken.append(result)
        else:
            mark, pixels[len(kept)] = result
            kept.append(sample)
            marks.append(mark)
    _account_for(broken, kept, samples, part, skip_broken)
    return kept, marks, pixels[: len(kept)]


def check(samples, part, skip_broken=False, workers=0):
    """As `read`, without pixels: 0.1 to 0.3 ms a file, since of a JPEG only the head and the end are looked at."""
    results = list(stream.each(_check, _paths(samples), workers, f"checking {part} images"))
    broken = [result for result in results if isinstance(result, stream.Failure)]
    good = [pair for pair in zip(samples, results, strict=True) if not isinstance(pair[1], stream.Failure)]
    _account_for(broken, [sample for sample, _ in good], samples, part, skip_broken)
    return [sample for sample, _ in good], [mark for _, mark in good]


def decode_each(paths, size, fit, workers):
    """Yield the pixels (size, size, 3) of each file, decoded by worker processes if they are many.

    Raises:
        UserError: a broken file.
    """
    results = stream.each(
        functools.partial(_read_all, size, fit), as_array(paths), workers, "reading a sample of images"
    )
    for result in results:
        if isinstance(result, stream.Failure):
            raise UserError(f"broken image {result}; mend or remove it")
        yield result


def decode(size, fit, paths):
    """A batch: pixels (B, size, size, 3) uint8, or the Failure that the first broken file makes."""
    pixels = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for k, result in enumerate(_read_all(size, fit, paths)):
        if isinstance(result, stream.Failure):
            return stream.Failure(f"cannot read {result} any more")
        pixels[k] = result
    return torch.from_numpy(pixels)


def as_array(paths):
    """Paths as processes can share them, without a copy for each: a list would be copied as it is counted."""
    return np.array([os.fsencode(path) for path in paths])


def _paths(samples):
    return as_array(path for path, _ in samples)


def _account_for(broken, kept, samples, part, skip_broken):
    if broken and (not skip_broken or not kept):
        raise UserError(f"broken image {_listed(broken)}; mend or remove them, or leave them out with --skip_broken")
    if broken:
        left = {label for _, label in kept}
        lost = {os.path.basename(os.path.dirname(path)) for path, label in samples if label not in left}
        none = f"; no image is left of {', '.join(sorted(lost))}" if lost else ""
        logger.warning("left out of the %s images, being broken: %s%s", part, _listed(broken), none)


def _tried(function, paths):
    """function(path), or why it failed, of every path, in turn."""
    for path in map(os.fsdecode, paths):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow, about files that it then refuses
                yield function(path)
        except Exception as error:  # Pillow's readers raise a dozen kinds
            yield stream.Failure(f"{path} ({getattr(error, 'strerror', None) or error})")


def _read_all(size, fit, paths):
    return list(_tried(functools.partial(_read_image, size, fit), paths))


def _read_and_mark(size, fit, paths):
    return list(_tried(lambda path: (_mark(path)[0], _read_image(size, fit, path)), paths))


def _check(paths):
    return list(_tried(_check_image, paths))


def _mark(path):
    """What tells a file from another at little cost, its length and a checksum of its end, as text; and that end."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - _TAIL))
        end = file.read()
    return f"{length} {zlib.crc32(end):08x}", end


def _check_image(path):
    """The mark of an image file; raises if `_read_image` would (all but surely), at a fraction of its cost."""
    mark, end = _mark(path)
    with Image.open(path) as image:
        _check_mode(image)
        if image.format == "PNG" and not image.mode.startswith("I"):
            image.verify()  # its checksums
        elif image.format != "JPEG" or b"\xff\xd9" not in end:  # the end of an image
            image.draft(None, (1, 1))
            _eight_bits(image)
    return mark


def _read_image(size, fit, path):
    with Image.open(path) as image:
        _check_mode(image)
        # a JPEG is decoded at a half, a quarter or an eighth, while that leaves twice the pixels that are needed: on
        # photographs, up to eight times as fast, and 0.2 of 255 grey levels from what decoding all of it gives
        image.draft(None, (2 * size, 2 * size))
        ImageOps.exif_transpose(image, in_place=True)
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if image.size == (size, size):
        return np.asarray(image)
    if fit == "crop":
        return np.asarray(ImageOps.fit(image, (size, size), Image.BILINEAR))
    return np.asarray(image.resize((size, size), Image.BILINEAR))


def _check_mode(image):
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range nobody knows")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # whose 16 bits Pillow opens in this mode too
        raise ValueError("its pixels have 32 bits, whose range nobody knows")


def _eight_bits(image):
    """The image, decoded; of 16 bits, which convert() would clip, the upper 8."""
    image.load()
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels have more than 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))
