"""Images in folders: ROOT/train/CLASS/* and ROOT/test/CLASS/* (or val/), every file accounted for.

What is left out (files that are no images, links that lead back) and what cannot be read is said by name. Hidden files
and folders, which file managers and notebooks leave behind, are not looked at.
"""

import logging
import os

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils import UserError

logger = logging.getLogger("darts.data")

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_NAMED = 10  # files that a message names at most


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


def read(samples, size, part, skip_broken=False):
    """Pixels (N, size, size, 3) uint8 and labels (N,) of those of the (path, label) pairs that can be read, and these.

    Args:
        part: what the progress bar and the messages call them.
        skip_broken: leave broken files out, with a warning.

    Raises:
        UserError: names the broken files.
    """
    pixels = np.empty((len(samples), size, size, 3), dtype=np.uint8)
    kept, broken = [], []
    for path, label in tqdm(samples, desc=f"reading {part} images", disable=None):
        try:
            pixels[len(kept)] = _read_image(path, size)
            kept.append((path, label))
        except Exception as error:  # Pillow's readers raise a dozen kinds
            broken.append(f"{path} ({getattr(error, 'strerror', None) or error})")
    if broken and (not skip_broken or not kept):
        raise UserError(f"broken image {_listed(broken)}; mend or remove them, or leave them out with --skip_broken")
    if broken:
        logger.warning("left out of the %s images, being broken: %s", part, _listed(broken))
    return pixels[: len(kept)], np.array([label for _, label in kept], np.int64), [path for path, _ in kept]


def _read_image(path, size):
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)  # as every viewer shows the photographs of a telephone
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers, whose range nobody knows")
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip to 8
            values = np.asarray(image)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError("its pixels have more than 16 bits")
            image = Image.fromarray((values >> 8).astype(np.uint8))
        image = image.convert("RGB")
        return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.BILINEAR))
