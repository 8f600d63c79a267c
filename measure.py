"""What genotypes cost: parameters, multiply-adds, activations, memory of a training step, latency; side by side.

python measure.py DARTS_V2                                              # 36 channels, 20 cells: 3.35 M parameters
python measure.py DARTS DARTS_V2 runs/search-EXP-20250101-120000 --init_channels 16 --layers 8 --csv cost.csv

Counted, for one image and without the auxiliary head, are
    parameters;
    multiply-adds, by PyTorch's FlopCounterMode: of convolutions (those too that make an involution's kernels),
    involutions and the classifier, not of batch norms, pooling and sums, as in the literature (DARTS_V2 for ImageNet,
    48 channels and 14 cells, has 530 M; the DARTS paper has 574 M and does not say what it counts; others count 523 M
    and 545 M: issue 46 of its code, quark0/darts);
    activations: the values that these layers put out (arXiv 2003.13678), without an involution's kernels, which are
    made where they are used and never written to memory.
Measured, on this device, are
    memory: the most that a process of its own holds in two training steps with --batch_size images, beyond what it held
    before there was the network (CUDA: what PyTorch has allocated);
    latency: the median over --repeats evaluations of one image and of 64, with the smallest and the largest; the
    genotypes take turns.
"""

import argparse
import contextlib
import csv
import functools
import io
import logging
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from runtime import threads

if __name__ == "__main__":
    threads.choose_waiting()  # before PyTorch is imported

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
import genotypes
import train
import utils
from involution import Involution2d
from model import NETWORKS
from runtime import memory

logger = logging.getLogger("darts.measure")

BATCHES = (1, 64)  # images of a latency


class Count(NamedTuple):
    """What a network costs for one image, on whatever device."""

    parameters: int  # without the auxiliary head, which takes no part after training
    multiply_adds: int
    activations: int


def build(genotype, args, classes=10):
    """The evaluation network of a genotype."""
    own = vars(args) | {"arch": genotypes.format(genotype)}
    return train.make_network(argparse.Namespace(**own), classes)


def parameters(genotype, args):
    """The number of parameters of an evaluation network, fast for many genotypes: a sum over their edges."""
    form = args.network, args.init_channels, args.layers, args.kernel_norm
    steps = len(genotype.normal) // 2, len(genotype.reduce) // 2
    concats = tuple(genotype.normal_concat), tuple(genotype.reduce_concat)
    total = empty = _parameters_of(form, steps, concats, None)
    for cell, edges in (("normal", genotype.normal), ("reduce", genotype.reduce)):
        for primitive, node in edges:
            # operations on the inputs of a reduction cell have stride 2
            total += _parameters_of(form, steps, concats, (cell, primitive, min(node, 2))) - empty
    return total


@functools.cache
def _parameters_of(form, steps, concats, edge):
    """Parameters of a network that has no operations but for one edge, (cell, primitive, node), of each such cell."""
    network, C, layers, kernel_norm = form
    cells = {"normal": [("none", 0)] * 2 * steps[0], "reduce": [("none", 0)] * 2 * steps[1]}
    if edge is not None:
        cell, primitive, node = edge
        cells[cell][-1] = (primitive, node)
    genotype = genotypes.Genotype(cells["normal"], concats[0], cells["reduce"], concats[1])
    with torch.device("meta"):
        return utils.count_parameters(NETWORKS[network](C, 10, layers, False, genotype, kernel_norm))


@torch.no_grad()
def count(genotype, args, classes=10):
    """The `Count` of an evaluation network, by one image that goes through it."""
    net, size = build(genotype, args, classes).eval(), data.image_size(args)
    net.fast = False  # module by module, so that every layer is seen
    kernels = {layer.conv2.conv for layer in net.modules() if isinstance(layer, Involution2d)}
    sizes = []
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, Involution2d)) and layer not in kernels:
            layer.register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, size, size))
    return Count(utils.count_parameters(net), counter.get_total_flops() // 2, sum(sizes))


# ------------------------------------------------------------------------------------------------- measured


def peak_memory(genotype, args):
    """Bytes that a process of its own needs for training steps; None where this system does not tell.

    Raises:
        UserError: the process came to an end, as one does that gets no memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_train_and_look, genotypes.format(genotype), args).result()
        except BrokenProcessPool:
            raise utils.UserError("a training step was killed, as without memory: lower --batch_size") from None


def _train_and_look(text, args):
    """In a process of its own: two training steps, and the most bytes that they held."""
    genotype, device = genotypes.parse(text), utils.pick_device(args)
    small = vars(args) | dict(init_channels=4, auxiliary=False)
    _train(genotype, argparse.Namespace(**small), device, 2)  # what libraries take at their first use is not counted
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _train(genotype, args, device, args.batch_size)
        return torch.cuda.max_memory_allocated(device) - before
    _forget_peak()
    before = _resident("VmRSS")
    _train(genotype, args, device, args.batch_size)
    return before and max(0, _resident("VmHWM") - before)


def _train(genotype, args, device, batch_size):
    """Two training steps on random images; the first makes the optimizer's state."""
    net = build(genotype, args, args.classes).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9)
    input, target = _images(batch_size, args.image_size, device), torch.zeros(batch_size, dtype=torch.int64).to(device)
    for _ in range(2):
        memory.clear_gradients(optimizer)
        logits, logits_aux = net(input)
        loss = nn.functional.cross_entropy(logits, target)
        if logits_aux is not None:
            loss = loss + nn.functional.cross_entropy(logits_aux, target)
        loss.backward()
        optimizer.step()


def _images(count, size, device):
    return torch.randn(count, 3, size, size).to(device, memory_format=torch.channels_last)


def _resident(field):
    """VmRSS, what this process holds, or VmHWM, the most that it held, in bytes; None on systems without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def _forget_peak():
    """Let VmHWM begin anew at VmRSS, on Linux: the imports of a process may have held more than a small network."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def latencies(networks, args, device):
    """Seconds of all evaluations, {(network, images): [...]}; networks take turns, after one that is not counted."""
    inputs = {images: _images(images, args.image_size, device) for images in BATCHES}
    seconds = {(k, images): [] for images in BATCHES for k in range(len(networks))}
    for turn in range(args.repeats + 1):
        for (k, images), times in seconds.items():
            utils.synchronize(device)
            start = time.perf_counter()
            networks[k](inputs[images])
            utils.synchronize(device)
            if turn:
                times.append(time.perf_counter() - start)
    return seconds


# -------------------------------------------------------------------------------------------------- the script


def measure(archs, args, device):
    """A dict of numbers for every genotype."""
    rows, networks = [], []
    for name, genotype in archs.items():
        logger.info("%s: counting, and a training step", name)
        cost = count(genotype, args, args.classes)
        rows.append(dict(genotype=name, **cost._asdict(), memory_bytes=peak_memory(genotype, args)))
        networks.append(build(genotype, args, args.classes).to(device, memory_format=torch.channels_last).eval())
    logger.info("latency: %d turns", args.repeats)
    for (k, images), times in latencies(networks, args, device).items():
        for what, value in (("median", statistics.median(times)), ("min", min(times)), ("max", max(times))):
            rows[k][f"latency_{images}_{what}_seconds"] = value
    return rows


def table(rows, batch_size):
    """The rows as Markdown."""
    head = ["genotype", "parameters (M)", "multiply-adds (M)", "activations (M)", f"memory, batch {batch_size} (MB)"]
    lines = [head + [f"latency, batch {images} (ms)" for images in BATCHES]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        counts = [f"{row[what] / 1e6:.3f}" for what in Count._fields]
        memory = "–" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:.0f}"
        lines.append([row["genotype"], *counts, memory])
        for images in BATCHES:
            median, low, high = (1e3 * row[f"latency_{images}_{what}_seconds"] for what in ("median", "min", "max"))
            lines[-1].append(f"{median:.3g} ({low:.3g}–{high:.3g})")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _named(text):
    """What a table calls a genotype, and the genotype."""
    genotype = genotypes.parse(text)
    return (Path(text).name if "(" not in text else text), genotype


def build_parser():
    parser = utils.ArgumentParser(description="Count and measure what genotypes cost, side by side.")
    parser.add_argument(
        "arch",
        metavar="ARCH",
        nargs="+",
        type=utils.user_value(_named),
        help="a name, a Genotype(...) expression, a run folder or a genotype file",
    )
    train.add_form_arguments(parser)
    group = parser.add_argument_group("images")
    group.add_argument("--image_size", type=utils.number(int, low=1, high=1024), default=32, help="pixels")
    group.add_argument("--classes", type=utils.number(int, low=2, high=10**6), default=10, help="number of classes")
    group.add_argument("--batch_size", type=utils.number(int, low=2), default=64, help="images of the training step")
    utils.add_device_arguments(parser)
    group = parser.add_argument_group("measuring")
    group.add_argument("--repeats", type=utils.number(int, low=1, high=10**6), default=11, help="timed evaluations")
    group.add_argument("--csv", help="a file for the numbers, unrounded")
    return parser


def main():
    args = build_parser().parse_args()
    train.choose_network(args)
    train.check_auxiliary(args)
    if args.csv and not Path(args.csv).absolute().parent.is_dir():
        raise utils.UserError(f"--csv {args.csv}: there is no folder {Path(args.csv).parent}")
    device = utils.pick_device(args)
    archs = {}
    for name, genotype in args.arch:
        name = name if len(name) <= 40 else f"genotype {len(archs) + 1}"
        archs[name if name not in archs else f"{name} ({len(archs) + 1})"] = genotype
    utils.log_device(device)
    rows = measure(archs, args, device)
    print(table(rows, args.batch_size))
    if args.csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        utils.write_text(args.csv, text.getvalue())


if __name__ == "__main__":
    utils.run_script(main)
