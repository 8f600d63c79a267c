"""What should bound the kernels of involutions: short retrainings on real images with each form, over several seeds.

python benchmarks/bench_kernel_norm.py --data data/cifar10_images                    # everything, one run at a time
python benchmarks/bench_kernel_norm.py --data data/cifar10_images --jobs 2           # two runs at once, a thread each
python benchmarks/bench_kernel_norm.py --update                                      # table and plot from the CSV
python benchmarks/bench_kernel_norm.py --cost 11 --threads 2                         # and the time that it takes

--data is a folder as `train.py --dataset folder` reads it. A run is a genotype, a form of `involution.KERNEL_NORMS`,
how the layer that makes the kernels starts (*shared*: weights zero, so that all pixels have one kernel, as in
operations.py; *own*: PyTorch's usual ones) and a seed; the rest is as in train.py without drop path. Its epochs are
rows of results/kernel_norm.csv, written when it has ended: what is in there is not run again, so that this may be
stopped at any time. Logits are those of the test images, with running statistics, after each epoch. --cost times steps
of one network with and without bounds in turn, so many rounds after one that is not counted.
"""

import argparse
import concurrent.futures
import csv
import io
import itertools
import multiprocessing
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import tables

import data
import genotypes
from architect import Architect
from involution import KERNEL_NORMS, Involution2d, set_kernel_norm
from model import NetworkCIFAR
from model_search import Network
from operations import KERNEL_NORM
from utils import replacing

CSV = Path(__file__).parent.parent / "results" / "kernel_norm.csv"
ARCHS = {
    "DARTS": "DARTS",
    "DARTS_L20": "DARTS_L20",
    "no skips": "Genotype(normal=[('dil_invo_3x3', 0), ('sep_invo_7x7', 1), ('sep_invo_7x7', 0), ('sep_invo_7x7', 2), "
    "('dil_invo_3x3', 1), ('sep_invo_5x5', 3), ('dil_invo_3x3', 0), ('dil_invo_3x3', 3)], normal_concat=range(2, 6), "
    "reduce=[('dil_invo_5x5', 0), ('dil_invo_3x3', 1), ('dil_invo_5x5', 0), ('dil_invo_3x3', 2), ('dil_invo_3x3', 2), "
    "('sep_invo_7x7', 3), ('sep_invo_3x3', 0), ('sep_invo_7x7', 3)], reduce_concat=range(2, 6))",
}
YARDSTICK = "DARTS_V2"  # convolutions
FORMS = {  # in the plot
    "none": "unbounded",
    "relu6": "ReLU6",
    "tanh": "tanh",
    "rms": "RMS norm",
    "soft_rms": "soft RMS norm",
    "filter": "filter norm",
}
COLUMNS = "arch kernel_norm start seed epoch accuracy loss not_finite spread cpu_seconds".split()
SETTINGS = "init_channels layers images test_images epochs batch_size learning_rate".split()


# ------------------------------------------------------------------------------------------------------- one run


def make_network(arch, kernel_norm, start, args):
    net = NetworkCIFAR(args.init_channels, 10, args.layers, False, genotypes.parse(ARCHS.get(arch, arch)), kernel_norm)
    for layer in net.modules():
        if start == "own" and isinstance(layer, Involution2d):
            layer.conv2.conv.reset_parameters()
    return net.to(memory_format=torch.channels_last)


def train_epoch(net, batches, epoch, optimizer):
    net.train()
    for step in range(len(batches)):
        input, target = batches.batch(epoch, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(input)[0], target).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()


@torch.no_grad()
def test(net, batches):
    """Accuracy (%), mean loss, images whose logits are not all finite, the largest |logit| over the median one."""
    net.eval()
    logits, targets = map(torch.cat, zip(*((net(input)[0], target) for input, target in batches), strict=True))
    finite = logits.isfinite().all(1)
    hits = (logits.argmax(1) == targets) & finite
    sizes = logits[finite].abs().flatten()
    return dict(
        accuracy=100 * hits.double().mean().item(),
        loss=nn.functional.cross_entropy(logits, targets).item(),
        not_finite=int((~finite).sum()),
        spread=(sizes.max() / sizes.median()).item() if len(sizes) else float("nan"),
    )


def run(key, args):
    """The rows of a run's epochs."""
    torch.set_num_threads(args.threads)
    arch, kernel_norm, start, seed = key
    torch.manual_seed(seed)
    images, test_images = (
        data.load("folder", args.data, train, None, subset, seed)
        for train, subset in ((True, args.images), (False, args.test_images))
    )
    normalization = data.Normalization.of("folder", lambda: images)
    augmentation = data.Augmentation.of("folder", images.pixels.shape[1], 0)
    batches = data.Batches(images, args.batch_size, normalization, augmentation, key=(seed, 0))
    test_batches = data.Batches(test_images, 100, normalization, augmentation=None)
    net = make_network(arch, kernel_norm, start, args)
    optimizer = torch.optim.SGD(net.parameters(), args.learning_rate, momentum=0.9, weight_decay=3e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    rows = []
    for epoch in range(args.epochs):
        begin = time.process_time()
        train_epoch(net, batches, epoch, optimizer)
        seconds = time.process_time() - begin
        scheduler.step()
        row = dict(zip(COLUMNS, (*key, epoch + 1), strict=False)) | test(net, test_batches)
        rows.append(row | {"cpu_seconds": seconds} | {name: getattr(args, name) for name in SETTINGS})
    return rows


# ---------------------------------------------------------------------------------------------------------- cost


def training_step(batch_size=64):
    net = NetworkCIFAR(16, 10, 8, False, genotypes.DARTS).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    input, target = random_batch(batch_size)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(input)[0], target).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()

    return net, step


def search_step(batch_size=16):
    net = Network(16, 10, 8, nn.CrossEntropyLoss()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    settings = dict(momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-4, arch_weight_decay=1e-3)
    architect = Architect(net, argparse.Namespace(**settings))
    train, valid = random_batch(batch_size), random_batch(batch_size)
    return net, lambda: architect.step(*train, *valid, 0.025, optimizer, unrolled=True)


def random_batch(batch_size):
    return torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (batch_size,))


def cost_table(rounds):
    """Time of a step whose kernels are bounded over that of one whose are not; pairs in turn."""
    yield f"{torch.get_num_threads()} threads; median of {rounds} rounds (first to third quartile of the ratio)."
    yield ""
    yield f"| step, 16 channels, 8 cells | `none` | `{KERNEL_NORM}` | ratio |"
    yield "| --- | --- | --- | --- |"
    for name, (net, step) in {
        "training, `DARTS`, batch 64": training_step(),
        "second-order update of the alphas, default space, batch 16": search_step(),
    }.items():
        seconds = {"none": [], KERNEL_NORM: []}
        for _ in range(1 + rounds):
            for kernel_norm, times in seconds.items():
                set_kernel_norm(net, kernel_norm)
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
        plain, bounded = (times[1:] for times in seconds.values())
        low, middle, high = statistics.quantiles([b / a for a, b in zip(plain, bounded, strict=True)])
        medians = " | ".join(f"{statistics.median(times):.3f} s" for times in (plain, bounded))
        yield f"| {name} | {medians} | **{middle:.3f}** ({low:.3f}–{high:.3f}) |"


# ------------------------------------------------------------------------------------------------------ all runs


def plan(archs, seeds):
    """(genotype, form, start, seed) of every run, so that the first seeds of all come first."""
    for seed in range(seeds):
        yield YARDSTICK, "none", "shared", seed
        for arch, kernel_norm in itertools.product(archs, KERNEL_NORMS):
            yield arch, kernel_norm, "shared", seed
        for arch in archs:
            yield arch, KERNEL_NORM, "own", seed


def read(args):
    """The rows of the CSV, numbers as such; and which of them have the settings of `args`."""
    rows = _read(args.csv) if args.csv.exists() else []
    return rows, [row for row in rows if all(row[name] == getattr(args, name) for name in SETTINGS)]


def _read(path):
    with path.open(newline="") as file:
        return [
            {name: value if name in COLUMNS[:3] else _number(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def _number(text):
    return int(text) if text.isdigit() else float(text)


def write(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS + SETTINGS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue())


def run_missing(args):
    rows, same = read(args)
    done = {tuple(row[name] for name in COLUMNS[:4]) for row in same}
    missing = [key for key in plan(args.archs, args.seeds) if key not in done]
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context)
    try:
        futures = [pool.submit(run, key, args) for key in missing]
        for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), desc="runs"):
            rows += [{name: _plain(value) for name, value in row.items()} for row in future.result()]
            write(args.csv, rows)
    finally:
        pool.shutdown(cancel_futures=True)


def _plain(value):
    return round(value, 4) if isinstance(value, float) else value


# -------------------------------------------------------------------------------------------------------- report


def last_epochs(rows):
    """{(genotype, form, start): the rows of the last epoch, one a seed}, and the images lost in any epoch of each."""
    last, lost = defaultdict(list), defaultdict(int)
    for row in rows:
        key = row["arch"], row["kernel_norm"], row["start"]
        lost[key] = max(lost[key], int(row["not_finite"]))
        if row["epoch"] == row["epochs"]:
            last[key].append(row)
    return last, lost


def mean_and_std(values):
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def make_table(rows):
    last, lost = last_epochs(rows)
    yield (
        "{images} training and {test_images} test images, {init_channels} channels, {layers} cells, "
        "batch {batch_size}, learning rate {learning_rate}, {epochs} epochs. Test accuracy: mean ± standard "
        "deviation over n seeds. Not finite: images without finite logits, in the worst epoch of any seed. Largest "
        "logit: over the median one, the median of the seeds. CPU s: of a training epoch on one thread, median. "
        "Start: whether all pixels share one kernel at first, or each has its own.".format(**rows[0])
    )
    yield ""
    yield "| genotype | kernels | start | n | test accuracy (%) | test loss | not finite | largest logit | CPU s |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for (arch, kernel_norm, start), found in sorted(last.items(), key=lambda item: _place(item[0])):
        name = "–" if arch == YARDSTICK else f"`{kernel_norm}`"
        loss, spread, seconds = (
            statistics.median(row[column] for row in found) for column in ("loss", "spread", "cpu_seconds")
        )
        yield (
            f"| {arch} | {name} | {'–' if arch == YARDSTICK else start} | {len(found)} | "
            f"{mean_and_std([row['accuracy'] for row in found])} | {loss:.3g} | {lost[arch, kernel_norm, start]} | "
            f"{spread:.2g} | {seconds:.1f} |"
        )


def _place(key):
    arch, kernel_norm, start = key
    return [YARDSTICK, *ARCHS].index(arch), start == "own", list(KERNEL_NORMS).index(kernel_norm)


def plot(rows, path):
    """Test accuracy of each form: a dot a seed, a line at the mean; a panel a genotype."""
    last, _ = last_epochs(rows)
    yardstick = [row["accuracy"] for row in last[YARDSTICK, "none", "shared"]]
    forms = [(name, "shared") for name in KERNEL_NORMS] + [(KERNEL_NORM, "own")]
    labels = [FORMS[name] + (" (default)" if name == KERNEL_NORM else "") for name in KERNEL_NORMS]
    labels.append(f"{FORMS[KERNEL_NORM]}, at first\na kernel for each pixel")
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, arch in zip(figure.subplots(1, len(ARCHS), sharex=True, sharey=True), ARCHS, strict=True):
        for y, (name, start) in enumerate(forms):
            values = [row["accuracy"] for row in last[arch, name, start]]
            axes.plot(values, [y] * len(values), "o", color="#0072b2", ms=5, alpha=0.7, label="one seed")
            if values:
                axes.plot([statistics.mean(values)] * 2, [y - 0.3, y + 0.3], color="black", lw=1.5, label="mean")
        convolutions = f"convolutions ({YARDSTICK}), mean of {len(yardstick)}"
        axes.axvline(statistics.mean(yardstick), color="#d55e00", ls="--", label=convolutions)
        axes.set_title("genotype without skips" if arch == "no skips" else f"genotype {arch}", fontsize="medium")
        axes.set_xlabel("test accuracy (%)")
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].set_yticks(range(len(forms)), labels)
    figure.axes[0].invert_yaxis()  # which all share
    entries = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def parse_args():
    parser = argparse.ArgumentParser(
        description="What should bound the kernels of involutions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", help="folder of images; without it, the table is made of the runs that there are")
    parser.add_argument("--images", type=int, default=1536, help="for training")
    parser.add_argument("--test_images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=0.025)
    parser.add_argument("--init_channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=[*ARCHS], help="genotypes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--cost", type=int, default=0, metavar="ROUNDS", help="of steps that are timed, 2 or more")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--csv", type=Path, default=CSV, help="where the runs are kept")
    tables.add_arguments(parser)
    args = parser.parse_args()
    if args.data is None and not read(args)[1]:
        parser.error(f"{args.csv} holds no runs of these settings yet: give --data FOLDER")
    return args


def main():
    args = parse_args()
    if args.data is not None:
        run_missing(args)
    _, rows = read(args)
    lines = [tables.machine(), "", *make_table(rows)]
    if args.cost:
        torch.set_num_threads(args.threads)
        lines += ["", *cost_table(args.cost)]
    tables.save("bench_kernel_norm", "\n".join(lines), tables.out(args), args.update)
    plot(rows, tables.out(args) / "bench_kernel_norm.png")


if __name__ == "__main__":
    main()
