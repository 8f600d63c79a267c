"""Time and memory of retraining: a training step and an evaluation of the derived network.

python benchmarks/bench_train.py                                   # fast cells against plain ones, every setting
python benchmarks/bench_train.py --against 97c7725                 # and against another commit, in the same run
python benchmarks/bench_train.py --peer FOLDER --settings 1        # and the original DARTS code, a checkout of it
python benchmarks/bench_train.py --growth --limits --update        # as sizes grow; FLOPs and bytes; to RESULTS.md
CXX="g++ -march=x86-64-v3" python benchmarks/bench_train.py        # the C++ without AVX-512

Every variant is a process of its own, which says what its memory was. They take turns, one training step and one
evaluation each, after a first one that is not counted. A time is the median over the rounds, with the smallest and the
largest. A step is forward, backward, gradient clipping and SGD, without drop path; an evaluation is that of ten
batches, given for 10,000 images. As in train.py, Python looks for garbage among what is younger than the network only.
"""

import argparse
import contextlib
import gc
import statistics
import sys
from pathlib import Path

from bench_search import (
    ROOT,
    SIZES,
    count_flops,
    count_kept_bytes,
    measure,
    plot_bars,
    plot_growth,
    run,
    worktree,
)

PHASES = ("training", "evaluation")
EVALUATED = 10  # batches
SETTINGS = (  # genotype, channels, cells, auxiliary head, batch size
    ("DARTS", 16, 8, False, 64),
    ("DARTS_V2", 16, 8, False, 64),
    ("DARTS", 36, 20, True, 96),
    ("DARTS", 36, 8, True, 96),
)
GROWTH = {"batch_size": (16, 32, 64, 128), "init_channels": (8, 16, 32), "layers": (4, 8, 16)}
NAMES = {"fast": "this code", "plain": "module by module", "peer": "original DARTS"}


# ------------------------------------------------------------------------------------------------- one process


def make_network(setting):
    """The derived network of a setting, and a random batch."""
    import torch

    import genotypes
    from model import NetworkCIFAR

    torch.manual_seed(0)
    if setting["threads"]:
        torch.set_num_threads(setting["threads"])
    genotype = getattr(genotypes, setting["arch"])
    with contextlib.redirect_stdout(sys.stderr):  # the original prints its channels
        net = NetworkCIFAR(setting["init_channels"], 10, setting["layers"], setting["auxiliary"], genotype)
    net.drop_path_prob, net.fast = 0.0, setting["fast"]
    layout = torch.contiguous_format if setting["peer"] else torch.channels_last
    images = torch.randn(setting["batch_size"], 3, 32, 32)
    target = torch.randint(10, (setting["batch_size"],))
    device = setting["device"]
    return net.to(device, memory_format=layout), images.to(device, memory_format=layout), target.to(device)


def make_step(setting):
    """A function that does one phase with the network of a setting."""
    import torch
    import torch.nn.functional as F

    net, images, target = make_network(setting)
    weights = [*net.parameters()]
    optimizer = torch.optim.SGD(weights, 0.025, momentum=0.9, weight_decay=3e-4, fused=True)  # as in train.py
    clear_gradients = torch.optim.SGD.zero_grad
    with contextlib.suppress(ImportError):  # another commit or the original, whose scripts do not
        from runtime.memory import clear_gradients

    def train():
        clear_gradients(optimizer)
        with torch.autocast(setting["device"], torch.bfloat16, enabled=setting["amp"]):
            logits, logits_aux = net(images)
            loss = F.cross_entropy(logits, target)
            if logits_aux is not None:
                loss = loss + 0.4 * F.cross_entropy(logits_aux, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 5.0)
        optimizer.step()

    def evaluate():
        with torch.no_grad():
            for _ in range(EVALUATED):
                net(images)

    def step(phase):
        if net.training != (phase == "training"):
            net.train(phase == "training")
        {"training": train, "evaluation": evaluate}[phase]()
        if setting["device"] == "cuda":
            torch.cuda.synchronize()

    gc.collect()
    gc.freeze()
    return step


# ----------------------------------------------------------------------------------------------- all processes


def make_setting(args, arch, init_channels, layers, auxiliary, batch_size):
    batch_size = args.batch_size or batch_size
    setting = dict(arch=arch, init_channels=init_channels, layers=layers, auxiliary=auxiliary, batch_size=batch_size)
    return setting | dict(threads=args.threads, device=args.device, fast=True, peer=False, amp=False, phases=PHASES)


def label(setting):
    head = ", auxiliary head" if setting["auxiliary"] else ""
    size = f"{setting['init_channels']} channels, {setting['layers']} cells"
    return f"`{setting['arch']}`, {size}{head}, batch {setting['batch_size']}"


def has_peer(arch):
    return arch in ("DARTS_V1", "DARTS_V2", "NASNet", "AmoebaNet")


def ratio(worker, first, phase):
    """How many times as long as the first one a worker takes: the median over the rounds, and the quartiles."""
    pairs = zip(worker.answers[1:], first.answers[1:], strict=True)
    ratios = [one[phase][0] / other[phase][0] for one, other in pairs]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return f"{statistics.median(ratios):.2f}× ({quartiles[0]:.2f}–{quartiles[2]:.2f})"


def step_table(args, variants):
    """Lines of the table, and {setting: {variant: seconds of a training step}}."""
    lines = [
        "| network, batch | variant | training step | as a multiple of this code's | evaluation of 10,000 images "
        "| as a multiple | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    bars = {}
    for place in args.settings:
        setting = make_setting(args, *SETTINGS[place])
        chosen = {name: v for name, v in variants.items() if name != "peer" or has_peer(setting["arch"])}
        workers = measure(chosen, setting, args.rounds, __file__)
        for name, worker in workers.items():
            if len(worker.answers) <= args.rounds:
                lines.append(f"| {label(setting)} | {NAMES.get(name, name)} | out of memory | | | | |")
                continue
            first = next(iter(workers.values()))
            images = EVALUATED * setting["batch_size"]
            evaluation = [10_000 / images * seconds for seconds in worker.seconds("evaluation")]
            bars.setdefault(label(setting), {})[name] = worker.seconds("training")
            lines.append(
                f"| {label(setting)} | {NAMES.get(name, name)} "
                + "| {:.3g} s ({:.3g}–{:.3g}) ".format(*worker.seconds("training"))
                + f"| {ratio(worker, first, 'training')} "
                + "| {:.3g} s ({:.3g}–{:.3g}) ".format(*evaluation)
                + f"| {ratio(worker, first, 'evaluation')} | {worker.answers[-1]['memory']:.2f} GB |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return lines, bars


def growth_table(args):
    """Time of a training step as one size grows from batch 64, 16 channels, 8 cells."""
    lines = ["| grows | size | training step | per unit of size, against the smallest | peak memory |"]
    lines.append("| --- | --- | --- | --- | --- |")
    curves = {}
    for name, sizes in GROWTH.items():
        for size in sizes:
            setting = make_setting(args, *SETTINGS[0]) | {name: size, "phases": PHASES[:1]}
            (worker,) = measure({"": (ROOT, {})}, setting, args.rounds, __file__).values()
            if len(worker.answers) <= args.rounds:
                lines.append(f"| {SIZES[name]} | {size} | out of memory | | |")
                break
            curves.setdefault(name, []).append(worker.seconds("training"))
            seconds, memory = curves[name][-1][0], worker.answers[-1]["memory"]
            share = seconds / size / (curves[name][0][0] / sizes[0])
            lines.append(f"| {SIZES[name]} | {size} | {seconds:.3g} s | {share:.2f} | {memory:.2f} GB |")
            print(lines[-1], file=sys.stderr, flush=True)
    return lines, curves


def limits_table(args, bars):
    """Lines of a table: the least time that a training step's FLOPs and bytes take, and how this code compares.

    Backward makes two products for each one of forward. Bytes: what is kept for backward, once written and once read.
    """
    import tables

    bandwidth, rate = tables.machine_limits(args.device)
    lines = [
        f"Copying moves {bandwidth / 1e9:.1f} GB/s here, a matrix product does {rate / 1e9:.0f} GFLOP/s.",
        "",
        "| network, batch | GFLOP of convolutions | of involutions | FLOP limit | a step against it "
        "| GB kept for backward | byte limit | a step against it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for place in args.settings:
        setting = make_setting(args, *SETTINGS[place])
        net, images, _ = make_network(setting)
        convolutions, involutions = (3 * flops for flops in count_flops(net, images))
        kept = count_kept_bytes(net, images)
        flops_take, bytes_take = (convolutions + involutions) / rate, 2 * kept / bandwidth
        seconds = next(iter(bars.get(label(setting), {"": (float("nan"),)}).values()))[0]
        lines.append(
            f"| {label(setting)} | {convolutions / 1e9:.3g} | {involutions / 1e9:.3g} | {flops_take:.2g} s "
            f"| {seconds / flops_take:.1f}× | {kept / 1e9:.2g} | {bytes_take:.2g} s | {seconds / bytes_take:.1f}× |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def plot(bars, curves, path):
    """Bars: a training step by network and variant; curves: that of the first network as a size grows."""
    import tables
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 + 2.6 * len(curves), 3.6), layout="constrained")
    figure.suptitle("Seconds of a training step: median, least to most", fontsize="medium")
    axis, *axes = figure.subplots(1, 1 + len(curves), squeeze=False, width_ratios=[2.2] + [1] * len(curves))[0]
    plot_bars(axis, {name.replace("`", "").replace(", ", "\n", 1): times for name, times in bars.items()}, NAMES)
    axis.tick_params(axis="y", labelsize="small")
    axis.set(xlabel="seconds", xscale="log")
    axis.set_xlim(right=2 * max(t[2] for times in bars.values() for t in times.values()))
    tables.round_ticks(axis.xaxis)
    for axis, (name, times) in zip(axes, curves.items(), strict=True):
        plot_growth(axis, name, GROWTH[name], times)
    figure.savefig(path, dpi=110)


def parse_args():
    import tables

    parser = argparse.ArgumentParser(
        description="Time and memory of retraining.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="steps that are measured")
    parser.add_argument("--threads", type=int, default=0, help="0 for PyTorch's choice")
    places = range(len(SETTINGS))
    parser.add_argument("--settings", type=int, nargs="+", choices=places, default=[*places], help="of the step table")
    parser.add_argument("--batch_size", type=int, help="in place of the settings'")
    parser.add_argument("--against", metavar="REF", help="a commit to compare with")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of the original DARTS code")
    parser.add_argument("--growth", action="store_true", help="the growth table too")
    parser.add_argument("--limits", action="store_true", help="the table of FLOPs and bytes too")
    tables.add_arguments(parser)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.peer and not (args.peer / "cnn" / "model.py").is_file():
        parser.error(f"--peer: {args.peer} has no cnn/model.py; it must be a checkout of quark0/darts")
    return args


def main():
    import tables

    args = parse_args()
    sys.path.insert(0, str(ROOT))
    if args.device == "cuda":
        variants = {"fast": (ROOT, {}), "amp": (ROOT, {"amp": True})}
    else:
        variants = {"fast": (ROOT, {}), "plain": (ROOT, {"fast": False})}
    if args.peer:
        variants["peer"] = args.peer / "cnn", {"peer": True}
    text = [f"{tables.machine(args.device)}; median of {args.rounds} steps (least–most; of ratios: quartiles).", ""]
    with contextlib.ExitStack() as stack:
        if args.against:
            variants[args.against] = stack.enter_context(worktree(args.against)), {}
        lines, bars = step_table(args, variants)
        text += lines
    curves = {}
    if args.growth:
        lines, curves = growth_table(args)
        text += ["", *lines]
    if args.limits:  # last: a worker that starts later would have this process's peak memory for its own
        text += ["", *limits_table(args, bars)]
    tables.save("bench_train", "\n".join(text), tables.out(args), args.update)
    if bars:
        plot(bars, curves, tables.out(args) / "bench_train.png")


if __name__ == "__main__":
    run(make_step, main)
