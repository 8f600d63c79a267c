"""Time and memory of a search step: the weight update, and the first-order and second-order update of the alphas.

python benchmarks/bench_search.py                               # fast cells against plain ones, three settings
python benchmarks/bench_search.py --against HEAD~1              # and against another commit, in the same run
python benchmarks/bench_search.py --growth --update             # and as batch, channels and layers grow; to RESULTS.md
python benchmarks/bench_search.py --settings 0 --variants fast textbook     # against unfolded involutions (8 GB)
python benchmarks/bench_search.py --limits                      # and the time that FLOPs and bytes take at least
python benchmarks/bench_search.py --profile                     # one step by operator
python benchmarks/bench_search.py --device cuda --batch_size 64 256      # eager, mixed precision, CUDA graphs

Every variant is a process of its own, which says what its memory was. They take turns, one step each, after a first
step that is not counted; on a GPU, whose memory they could not share, one comes after the other. A time is the median
over the rounds, with the smallest and the largest. *textbook* is the supernet edge by edge, contiguous, its involutions
unfolded.
"""

import argparse
import contextlib
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT_OF_MEMORY = 3  # a worker's exit code
PHASES = ("weights", "first order", "second order")
STEP = PHASES[::2]  # of a second-order search
SETTINGS = (  # space, without, batch size
    ("involution", "sep_invo_7x7", 16),
    ("involution", "", 64),
    ("darts", "", 64),
)
GROWTH = {"batch_size": (16, 32, 64, 128), "init_channels": (8, 16, 32), "layers": (4, 8, 16)}
VARIANTS = {
    "cpu": {"fast": {}, "plain": {"fast": False}, "textbook": {"fast": False, "textbook": True}},
    "cuda": {
        "eager": {},
        "amp": {"amp": True},
        "CUDA graphs": {"cuda_graph": True},
        "amp, CUDA graphs": {"amp": True, "cuda_graph": True},
    },
}
SPACES = {"involution": "involutions", "darts": "convolutions"}
NAMES = {  # of variants, in the plot
    "fast": "this code",
    "plain": "edge by edge",
    "textbook": "edge by edge, unfolded",
    "eager": "float32",
    "amp": "mixed precision",
    "CUDA graphs": "CUDA graphs",
    "amp, CUDA graphs": "mixed precision, CUDA graphs",
}
SIZES = {"batch_size": "images a batch", "init_channels": "channels of the first cells", "layers": "cells"}


# ------------------------------------------------------------------------------------------------- one process


def make_supernet(setting):
    """The supernet of a setting and two random batches."""
    import torch

    from genotypes import SEARCH_SPACES
    from model_search import Network

    torch.manual_seed(0)
    if setting["threads"]:
        torch.set_num_threads(setting["threads"])
    device, B, S = setting["device"], setting["batch_size"], setting["image_size"]
    primitives = [p for p in SEARCH_SPACES[setting["space"]] if p != setting["without"]]
    net = Network(setting["init_channels"], 10, setting["layers"], torch.nn.CrossEntropyLoss(), primitives=primitives)
    net.fast = setting["fast"]
    layout = torch.channels_last
    if setting["textbook"]:
        from bench_involution import Involution2d, TextbookModule

        layout = torch.contiguous_format
        for module in net.modules():
            if type(module) is Involution2d:
                module.__class__ = TextbookModule
    net.to(device, memory_format=layout)
    batches = [
        (torch.randn(B, 3, S, S).to(device, memory_format=layout), torch.randint(10, (B,)).to(device)) for _ in range(2)
    ]
    return net, *batches


def make_step(setting):
    """A function that does one phase of a search step with the supernet of a setting."""
    import torch

    from architect import Architect

    net, train, valid = make_supernet(setting)
    weights = [*net.parameters()]
    optimizer = torch.optim.SGD(weights, 0.025, momentum=0.9, weight_decay=3e-4)
    args = argparse.Namespace(momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-4, arch_weight_decay=1e-3)
    architect = Architect(net, args)
    if hasattr(architect, "gradients"):  # an older commit has none
        architect = Architect(net, args, type(architect.gradients)(net, setting["amp"], setting["cuda_graph"]))

    def step(phase):
        if phase == "weights":
            if hasattr(architect, "gradients"):
                for w, grad in zip(weights, architect.gradients("weights", *train)[2], strict=True):
                    w.grad = grad
            else:
                optimizer.zero_grad()
                net._loss(*train).backward()
            torch.nn.utils.clip_grad_norm_(weights, 5.0)
            optimizer.step()
        else:
            architect.step(*train, *valid, 0.025, optimizer, unrolled=phase == "second order")
        if setting["device"] == "cuda":
            torch.cuda.synchronize()

    gc.collect()
    gc.freeze()  # as in train_search.py
    return step


def count_flops(net, images):
    """FLOPs of a forward pass: of all convolutions, and of all involutions with given kernels."""
    import torch
    from torch import nn

    from involution import Involution2d

    flops = dict.fromkeys((nn.Conv2d, Involution2d), 0)

    def count(module, _, output):
        taps = module.kernel_size**2 if type(module) is Involution2d else module.weight[0].numel()
        flops[type(module)] += 2 * output.numel() * taps

    handles = [module.register_forward_hook(count) for module in net.modules() if type(module) in flops]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return flops.values()


def count_kept_bytes(net, images):
    """Bytes that a forward pass keeps for the backward pass, parameters left out."""
    import torch

    known, kept = {w.untyped_storage().data_ptr() for w in net.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = net(images)  # what it holds must live while it is counted
    del output
    return sum(kept.values())


def work(make_step, setting):
    """Answer every line of standard input with the seconds of each phase, wall and CPU, and the memory so far."""
    import torch

    step = make_step(setting)
    if setting["device"] == "cpu":
        with contextlib.suppress(ImportError):  # an older commit, whose scripts do not
            from runtime import memory

            memory.keep_freed()
    for _ in sys.stdin:
        answer = {}
        for phase in setting["phases"]:
            wall, cpu = time.perf_counter(), time.process_time()
            step(phase)
            answer[phase] = time.perf_counter() - wall, time.process_time() - cpu
        if setting["device"] == "cuda":
            answer["memory"] = torch.cuda.max_memory_reserved() / 1e9
        else:
            answer["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps(answer), flush=True)


def run(make_step, main):
    """The script: a worker where it is called as one, else `main`."""
    if sys.argv[1:2] != ["--worker"]:
        return main()
    try:
        work(make_step, json.loads(sys.argv[2]))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {error}", file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)


def is_out_of_memory(error):
    """Whether it says that memory is used up, on either device; a CUDA error about memory accesses does not.

    The rule of utils.run_script, written again because a worker may run on an older commit's modules.
    """
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def profile(setting):
    import torch.profiler

    step = make_step(setting)
    for phase in STEP:
        step(phase)
    for phase in STEP:
        with torch.profiler.profile() as profiler:
            step(phase)
        print(f"\n{phase}: {setting}\n")
        print(profiler.key_averages().table(sort_by=f"self_{setting['device']}_time_total", row_limit=25))


# ----------------------------------------------------------------------------------------------- all processes


class Worker:
    """A process that holds a network and does a step when asked; `script` says how, with the modules of `tree`."""

    def __init__(self, tree, setting, script):
        command = [sys.executable, script, "--worker", json.dumps(setting)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        path = os.pathsep.join([str(tree), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
        self.process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes)
        self.answers = []

    def step(self):
        with contextlib.suppress(BrokenPipeError):
            print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if line:
            self.answers.append(json.loads(line))
        elif self.process.wait() != OUT_OF_MEMORY:
            raise RuntimeError(f"a worker has ended with exit code {self.process.returncode}")

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def seconds(self, phase, clock=0):
        """Median, least and most over the rounds, without the first."""
        times = [answer[phase][clock] for answer in self.answers[1:]]
        return statistics.median(times), min(times), max(times)

    def step_seconds(self):
        """The same for a weight and a second-order update, as sums of theirs."""
        return tuple(map(sum, zip(*map(self.seconds, STEP), strict=True)))


def measure(variants, setting, rounds, script=__file__):
    """{name: Worker} after a first step and `rounds` more; variants are {name: (folder, changes of the setting)}."""
    if setting["device"] == "cuda" and len(variants) > 1:
        return {name: measure({name: variant}, setting, rounds, script)[name] for name, variant in variants.items()}
    workers = {name: Worker(tree, setting | changes, script) for name, (tree, changes) in variants.items()}
    try:
        for _ in range(1 + rounds):
            for worker in workers.values():
                worker.step()
    finally:
        for worker in workers.values():
            worker.close()
    return workers


@contextlib.contextmanager
def worktree(ref):
    """A temporary checkout of another commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, ref], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def label(space, without, batch_size):
    return f"{space} without {without}, {batch_size}" if without else f"{space}, {batch_size}"


def describe(space, without, batch_size):
    without = f"\nwithout {without.removeprefix('sep_invo_').replace('x', '×')}" if without else ""
    return f"{SPACES.get(space, space)}{without},\nbatch {batch_size}"


def step_table(variants, base, settings, rounds):
    """Lines of the table, and {setting: {variant: seconds of a weight and a second-order update, with the spread}}."""
    bars = {}
    lines = [
        "| supernet, batch | variant | weights | first order | second order | weights + second order | CPU time of it "
        "| against weights + first order | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for space, without, batch_size in settings:
        setting = base | {"space": space, "without": without, "batch_size": batch_size}
        place = label(space, without, batch_size)
        for name, worker in measure(variants, setting, rounds).items():
            if len(worker.answers) <= rounds:
                lines.append(f"| {place} | {name} | out of memory | | | | | | |")
                print(lines[-1], file=sys.stderr, flush=True)
                continue
            steps = ["{:.3g} s ({:.3g}–{:.3g})".format(*worker.seconds(phase)) for phase in PHASES]
            weights, first, second = (worker.seconds(phase)[0] for phase in PHASES)
            cpu = sum(worker.seconds(phase, clock=1)[0] for phase in STEP)
            bars.setdefault(place, {})[name] = worker.step_seconds()
            lines.append(
                f"| {place} | {name} | {' | '.join(steps)} | **{weights + second:.3g} s** | {cpu:.3g} s "
                f"| {(weights + second) / (weights + first):.1f}× | {worker.answers[-1]['memory']:.2f} GB |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return lines, bars


def limits_table(base, settings, bars):
    """Lines of a table: the least time that FLOPs and bytes take, and how many times it the first variant takes.

    A pass through the supernet is forward and backward. Of a step's five, two give gradients of alpha alone, where a
    convolution makes one product backward (that of its input); else it makes two, as an involution always does, whose
    kernels depend on its input. Bytes: what this code keeps for backward, once written and once read.
    """
    import tables

    bandwidth, rate = tables.machine_limits(base["device"])
    lines = [
        f"Copying moves {bandwidth / 1e9:.1f} GB/s here, a matrix product does {rate / 1e9:.0f} GFLOP/s.",
        "",
        "| supernet, batch | GFLOP of convolutions | of involutions | FLOP limit | a step against it "
        "| GB kept for backward | byte limit | a step against it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for space, without, batch_size in settings:
        place = label(space, without, batch_size)
        net, (images, _), _ = make_supernet(base | {"space": space, "without": without, "batch_size": batch_size})
        convolutions, involutions = count_flops(net, images)
        convolutions, involutions = (5 + 3 * 2 + 2 * 1) * convolutions, 5 * (1 + 2) * involutions
        kept = count_kept_bytes(net, images)
        flops_take, bytes_take = (convolutions + involutions) / rate, 5 * 2 * kept / bandwidth
        seconds = next(iter(bars.get(place, {"": (float("nan"),)}).values()))[0]
        lines.append(
            f"| {place} | {convolutions / 1e9:.3g} | {involutions / 1e9:.3g} "
            f"| {flops_take:.2g} s | {seconds / flops_take:.1f}× | {kept / 1e9:.2g} | {bytes_take:.2g} s "
            f"| {seconds / bytes_take:.1f}× |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def growth_table(base, rounds):
    """Time of a weight and a second-order update as one size grows from batch 16, 16 channels, 8 cells; as above."""
    lines = [
        "| grows | size | weights + second order | per unit of size, against the smallest | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    curves = {}
    for name, sizes in GROWTH.items():
        for size in sizes:
            setting = base | {"batch_size": 16} | {name: size, "phases": STEP}
            (worker,) = measure({"": (ROOT, {})}, setting, rounds).values()
            if len(worker.answers) <= rounds:
                lines.append(f"| {name} | {size} | out of memory | | |")
                break
            curves.setdefault(name, []).append(worker.step_seconds())
            total = curves[name][-1][0]
            share = total / size / (curves[name][0][0] / sizes[0])
            lines.append(f"| {name} | {size} | {total:.2f} s | {share:.2f} | {worker.answers[-1]['memory']:.2f} GB |")
            print(lines[-1], file=sys.stderr, flush=True)
    return lines, curves


def plot(settings, bars, curves, rounds, path):
    """Bars: a weight and a second-order update by supernet and variant; curves: the same as a size grows.

    Args:
        bars: {label of a setting: {variant: seconds}}; curves: {size: [seconds, …]}; seconds: (median, least, most).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 + 2.6 * len(curves), 3.6), layout="constrained")
    figure.suptitle(f"Seconds of a second-order search step: median of {rounds}, least to most", fontsize="medium")
    ratios = [2.2] + [1] * len(curves)
    axis, *axes = figure.subplots(1, 1 + len(curves), squeeze=False, width_ratios=ratios)[0]
    bars = {describe(*setting): bars[label(*setting)] for setting in settings if label(*setting) in bars}
    plot_bars(axis, bars, NAMES)
    axis.set(xlabel="seconds", xlim=(0, 1.2 * max(t[2] for times in bars.values() for t in times.values())))
    for other in axes[1:]:
        other.sharey(axes[0])
    for axis, (name, times) in zip(axes, curves.items(), strict=True):
        plot_growth(axis, name, GROWTH[name], times)
    figure.savefig(path, dpi=110)


def plot_bars(axis, bars, names):
    """A bar for every variant, by its name, of each setting: bars are {setting: {variant: (median, least, most)}}."""
    import tables

    variants = list(dict.fromkeys(name for times in bars.values() for name in times))
    height = 0.8 / len(variants)
    for k, (name, style) in enumerate(zip(variants, tables.STYLES, strict=False)):
        label = names.get(name, f"commit {name}")
        places = [y + k * height for y, times in enumerate(bars.values()) if name in times]
        times = [times[name] for times in bars.values() if name in times]
        axis.barh(places, [t[0] for t in times], 0.9 * height, color=style["color"], label=label)
        axis.errorbar([t[0] for t in times], places, xerr=tables.spread(times), fmt="none", color="black", capsize=2)
        for y, (middle, _, most) in zip(places, times, strict=True):
            axis.text(most, y, f"  {middle:.3g}", va="center", fontsize="small")
    axis.set_yticks([y + (len(variants) - 1) * height / 2 for y in range(len(bars))], list(bars))
    axis.invert_yaxis()
    axis.legend(fontsize="small")


def plot_growth(axis, name, sizes, times):
    """Times (median, least, most) as a size grows, as long as there is memory."""
    import tables

    sizes, middles = sizes[: len(times)], [t[0] for t in times]
    axis.errorbar(sizes, middles, tables.spread(times), label="measured", **tables.STYLES[0])
    axis.plot(sizes, [middles[0] * size / sizes[0] for size in sizes], ":", color="grey", label="linear")
    axis.set(xlabel=SIZES[name], xscale="log", yscale="log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.xaxis.minorticks_off()
    tables.round_ticks(axis.yaxis)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="upper left")


def parse_args():
    import tables

    parser = argparse.ArgumentParser(
        description="Time and memory of a search step.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=VARIANTS, default="cpu")
    parser.add_argument("--init_channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=32, help="pixels")
    parser.add_argument("--batch_size", type=int, nargs="+", help="of the default space, in place of the settings")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are measured")
    parser.add_argument("--threads", type=int, default=0, help="0 for PyTorch's choice")
    parser.add_argument("--settings", type=int, nargs="+", choices=range(len(SETTINGS)), help="of the step table")
    parser.add_argument("--variants", nargs="+", choices=[name for names in VARIANTS.values() for name in names])
    parser.add_argument("--against", metavar="REF", help="a commit to compare with")
    parser.add_argument("--growth", action="store_true", help="the growth table too")
    parser.add_argument("--limits", action="store_true", help="the table of FLOPs and bytes too")
    parser.add_argument("--profile", action="store_true", help="one step by operator instead of tables")
    tables.add_arguments(parser)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not set(args.variants or ()) <= set(VARIANTS[args.device]):
        parser.error(f"--variants on {args.device}: {', '.join(VARIANTS[args.device])}")
    return args


def main():
    import tables

    args = parse_args()
    base = {name: getattr(args, name) for name in ("init_channels", "layers", "image_size", "threads", "device")}
    base |= {"space": "involution", "without": "", "phases": PHASES}
    base |= {"fast": True, "textbook": False, "amp": False, "cuda_graph": False}
    settings = [SETTINGS[k] for k in args.settings] if args.settings is not None else SETTINGS
    if args.batch_size:
        settings = [("involution", "", batch_size) for batch_size in args.batch_size]
    sys.path.insert(0, str(ROOT))
    if args.profile:
        for space, without, batch_size in settings:
            profile(base | {"space": space, "without": without, "batch_size": batch_size})
        return
    chosen = VARIANTS[args.device]
    names = args.variants or [name for name in chosen if name != "textbook"]  # which can take all of a machine's memory
    variants = {name: (ROOT, chosen[name]) for name in names}
    text = [f"{tables.machine(args.device)}; median of {args.rounds} steps (least–most).", ""]
    with contextlib.ExitStack() as stack:
        if args.against:
            variants[args.against] = stack.enter_context(worktree(args.against)), {}
        lines, bars = step_table(variants, base, settings, args.rounds)
        text += lines
    curves = {}
    if args.growth:
        lines, curves = growth_table(base, args.rounds)
        text += ["", *lines]
    if args.limits:  # last: a worker that starts later would have this process's peak memory for its own
        text += ["", *limits_table(base, settings, bars)]
    tables.save("bench_search", "\n".join(text), tables.out(args), args.update)
    if bars:
        plot(settings, bars, curves, args.rounds, tables.out(args) / "bench_search.png")


if __name__ == "__main__":
    run(make_step, main)
