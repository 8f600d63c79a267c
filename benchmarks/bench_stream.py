"""Training images from the disk: --data_in disk against torchvision's ImageFolder in a plain DataLoader.

python benchmarks/bench_stream.py                                      # photographs of two sizes, at 96 and 224 pixels
python benchmarks/bench_stream.py --update                             # and the tables into RESULTS.md

Both make the same distribution: shorter side resized, middle, pad, random crop, random flip, normalisation, cutout.
The photographs are details of the two that scikit-learn ships, saved as JPEG of quality 90. What an image costs is
processor time of one thread, which other work on the machine disturbs little. How much of the time a training waits is
measured with steps that take no processor time, as a GPU's: they sleep, for multiples (--pace) of the time in which the
processes of this code decode a batch when nobody sleeps.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets, io, transforms
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

import tables
from bench_data import Cutout

import data
from images import image_folder

BATCH = 32
PLAIN = data.Normalization((0.45, 0.45, 0.45), (0.25, 0.25, 0.25))


def make_folder(root, width, height, count):
    """Half of the files in each of two classes."""
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    for name in ("china", "flower"):
        photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))
        place = root / "train" / name
        place.mkdir(parents=True)
        for k in range(count // 2):
            x, y = rng.integers(128), rng.integers(43)
            detail = photograph.resize((width, height), Image.BICUBIC, box=(x, y, x + 512, y + 384))
            detail.save(place / f"{k:03d}.jpg", quality=90)


def augmentation(size):
    return data.Augmentation(size // 8, True, size // 4)


def torchvision_set(root, size):
    aug = augmentation(size)
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.RandomCrop(size, padding=aug.pad)]
    steps += [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*PLAIN)]
    return datasets.ImageFolder(root / "train", transforms.Compose([*steps, Cutout(aug.cutout_length)]))


def decoders(root, size):
    """{name: a function that makes a batch, k}, each in this process: all of it, and decoding alone."""
    files = image_folder.as_array(path for path, _ in image_folder.scan(root, True)[2])
    theirs = torchvision_set(root, size)
    resize = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])

    def ours(k):
        pixels = image_folder.decode(size, "crop", files[k : k + BATCH])
        images = data.Images(pixels, torch.zeros(BATCH, dtype=torch.int64), ["a", "b"])
        return data.Batches(images, BATCH, PLAIN, augmentation(size)).batch(0, 0)

    return {
        "this code": ours,
        "torchvision": lambda k: torch.utils.data.default_collate([theirs[i] for i in range(k, k + BATCH)]),
        "decoded by Pillow, at a fraction": lambda k: image_folder.decode(size, "crop", files[k : k + BATCH]),
        "decoded by torchvision.io": lambda k: [
            resize(io.decode_jpeg(io.read_file(str(path, "utf8")))) for path in files[k : k + BATCH]
        ],
    }


def cost(root, size, rounds):
    """{name: milliseconds of processor time an image, of every round}; all take turns."""
    found, batches = {}, len(image_folder.scan(root, True)[2]) // BATCH
    for k in range(1 + rounds):
        for name, make in decoders(root, size).items():
            start = time.thread_time()
            make(k % batches * BATCH)
            found.setdefault(name, []).append(1000 * (time.thread_time() - start) / BATCH)
    return {name: values[1:] for name, values in found.items()}


def cost_of_check(root, rounds):
    samples, found = image_folder.scan(root, True)[2], []
    for _ in range(1 + rounds):
        start = time.thread_time()
        image_folder.check(samples, "train")
        found.append(1000 * (time.thread_time() - start) / len(samples))
    return found[1:]


def feeds(root, size, workers):
    """{name: an endless iterator of batches}, whose processes are at work."""
    images = data.load("folder", root, True, size, data_in="disk", workers=workers)
    batches = data.Batches(images, BATCH, PLAIN, augmentation(size))
    loader = torch.utils.data.DataLoader(
        torchvision_set(root, size), BATCH, shuffle=True, num_workers=workers, persistent_workers=True
    )
    return {
        "this code": (batches.batch(epoch, step) for epoch in itertools.count() for step in range(len(batches))),
        "torchvision": itertools.chain.from_iterable(itertools.repeat(loader)),
    }


def consume(feed, step, count):
    """Images a second, and the share (percent) of the time that steps of so many seconds wait for batches."""
    next(feed)
    start, waited = time.perf_counter(), 0.0
    for _ in range(count):
        time.sleep(step)
        begin = time.perf_counter()
        next(feed)
        waited += time.perf_counter() - begin
    passed = time.perf_counter() - start
    return count * BATCH / passed, 100 * waited / passed


def spread(values, digits):
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def costs_table(roots, args):
    lines = ["| files | pixels | check | this code | torchvision | ratio | decoded alone: Pillow | torchvision.io |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for (width, height), root in roots.items():
        checked = spread(cost_of_check(root, args.rounds), 3)
        for size in args.size:
            found = cost(root, size, args.rounds)
            ours, theirs = (statistics.median(found[name]) for name in ("this code", "torchvision"))
            cells = [spread(values, 2) for values in found.values()]
            cells.insert(2, f"**{theirs / ours:.1f}×**")
            lines.append(f"| {width}×{height} | {size} | {checked} | {' | '.join(cells)} |")
    return lines


def feeds_table(root, args):
    lines = ["| pixels | workers | a step | this code | torchvision | waits | torchvision waits |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for size, workers in itertools.product(args.size, args.workers):
        both, batch = feeds(root, size, workers), 0.0
        for pace in (0, *args.pace):
            found = {name: [] for name in both}
            for _ in range(args.rounds):
                for name, feed in both.items():
                    found[name].append(consume(feed, pace * batch, args.steps))
            rates, waits = ([[each[k] for each in of] for of in found.values()] for k in range(2))
            if pace == 0:
                batch = BATCH / statistics.median(rates[0])
            cells = [spread(values, 0) for values in rates] + [f"{spread(values, 1)} %" for values in waits]
            lines.append(f"| {size} | {workers} | {1000 * pace * batch:.0f} ms | {' | '.join(cells)} |")
    return lines


def parse_args():
    parser = argparse.ArgumentParser(
        description="Training images from the disk.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs="+", default=[96, 224], help="pixels of an image")
    parser.add_argument("--width", type=int, nargs="+", default=[500, 2000], help="of the files; their height is 3/4")
    parser.add_argument("--files", type=int, default=128, help=f"of each size; {BATCH} or more")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pace", type=float, nargs="+", default=[2], help="length of a step, in batches")
    parser.add_argument("--steps", type=int, default=8, help="of each, a round")
    parser.add_argument("--rounds", type=int, default=5)
    tables.add_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(1)
    sizes = [(width, 3 * width // 4) for width in args.width]
    with tempfile.TemporaryDirectory() as folder:
        roots = {size: Path(folder) / str(size[0]) for size in sizes}
        for size, root in roots.items():
            make_folder(root, *size, args.files)
        table = costs_table(roots, args)
        more = feeds_table(next(iter(roots.values())), args)
    lines = [
        f"{tables.machine()}; {args.files} JPEG files, batches of {BATCH}; {args.rounds} rounds: median (least–most).",
        "",
        "Processor time of one thread, milliseconds an image:",
        "",
        *table,
        "",
        f"Images a second, and the share of the time spent waiting for them, of files of {sizes[0][0]}×{sizes[0][1]}:",
        "",
        *more,
    ]
    tables.save("bench_stream", "\n".join(lines), tables.out(args), args.update)


if __name__ == "__main__":
    main()
