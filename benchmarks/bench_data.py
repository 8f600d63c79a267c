"""Augmented training images a second: data.Batches against torchvision's transforms in a DataLoader with two workers.

python benchmarks/bench_data.py                                        # images of 32x32, with cutout
python benchmarks/bench_data.py --update                               # and the table into RESULTS.md

Both make the same distribution: pad 4, random crop, random flip, normalisation, cutout 16. The loader's workers start
before the clock does. Both take turns; a rate is the median over the rounds, with the smallest and the largest.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))

import tables

import data

WORKERS = 2
OURS, THEIRS = "data.Batches", f"torchvision, {WORKERS} workers"


class Cutout:
    """Cut a square out of an image (3, S, S), as the original DARTS code's transform does."""

    def __init__(self, length):
        self.length = length

    def __call__(self, image):
        S = image.shape[1]
        y, x = torch.randint(S, (2,)).tolist()
        half = self.length // 2
        image[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
        return image


class ImageSet(torch.utils.data.Dataset):
    def __init__(self, images, normalization):
        self.pixels, self.labels = images.pixels.numpy(), images.labels.tolist()
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(*normalization), Cutout(16)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def of_batches(batches, seconds):
    """A function that makes batches for some time and says how many images a second that was; each time, an epoch."""
    epochs = iter(range(10**6))

    def rate():
        epoch = next(epochs)
        return images_a_second((batches.batch(epoch, step) for step in range(10**9)), seconds)

    return rate


def of_loader(loader, seconds):
    """The same of a DataLoader, whose workers have finished what the last call asked them for."""

    def rate():
        time.sleep(0.5)
        return images_a_second(itertools.chain.from_iterable(itertools.repeat(loader)), seconds)

    return rate


def images_a_second(batches, seconds):
    next(batches)  # workers are at work, caches warm
    images, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        images += len(next(batches)[1])
    return images / passed


def measure(images, batch_size, args):
    """{input pipeline: images a second of every round}."""
    normalization = data.Normalization.of("cifar10", lambda: images)
    batches = data.Batches(images, batch_size, normalization, data.Augmentation(4, True, 16))
    loader = torch.utils.data.DataLoader(
        ImageSet(images, normalization), batch_size, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )
    rates = {OURS: of_batches(batches, args.seconds), THEIRS: of_loader(loader, args.seconds)}
    found = {name: [] for name in rates}
    for round in range(1 + args.rounds):
        for name, rate in rates.items():
            value = rate()
            if round:
                found[name].append(value)
    return found


def plot(found, rounds, path):
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.set_title(f"median of {rounds} rounds, least to most", fontsize="medium")
    for (name, label), style in zip({OURS: "this code", THEIRS: THEIRS}.items(), tables.STYLES, strict=False):
        rates = [(statistics.median(rates[name]), min(rates[name]), max(rates[name])) for rates in found.values()]
        axis.errorbar(list(found), [rate[0] for rate in rates], tables.spread(rates), label=label, capsize=3, **style)
    axis.set(xlabel="images a batch", ylabel="augmented images a second", xscale="log", yscale="log")
    axis.set_xticks(list(found), [str(size) for size in found])
    axis.xaxis.minorticks_off()
    tables.round_ticks(axis.yaxis)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def parse_args():
    parser = argparse.ArgumentParser(
        description="Augmented training images a second.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each, a round")
    parser.add_argument("--rounds", type=int, default=7)
    tables.add_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    torch.manual_seed(0)
    pixels = torch.randint(256, (25_000, 32, 32, 3), dtype=torch.uint8)  # half of CIFAR-10, as in a search
    images = data.Images(pixels, torch.randint(10, (len(pixels),)), [str(k) for k in range(10)])
    found = {size: measure(images, size, args) for size in args.batch_size}
    lines = [
        f"{tables.machine()}; {torch.get_num_threads()} threads; images of 32x32 with cutout, images/s, median of "
        f"{args.rounds} rounds (least–most).",
        "",
        f"| batch size | {OURS} | {THEIRS} | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for size, rates in found.items():
        cells = [f"{statistics.median(v):,.0f} ({min(v):,.0f}–{max(v):,.0f})" for v in rates.values()]
        ratio = statistics.median(rates[OURS]) / statistics.median(rates[THEIRS])
        lines.append(f"| {size} | {' | '.join(cells)} | **{ratio:.1f}×** |")
    tables.save("bench_data", "\n".join(lines), tables.out(args), args.update)
    plot(found, args.rounds, tables.out(args) / "bench_data.png")


if __name__ == "__main__":
    main()
