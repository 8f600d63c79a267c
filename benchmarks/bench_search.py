"""Time and memory of a search step: the weight update, and the first-order and second-order update of the alphas.

python benchmarks/bench_search.py                               # fast cells against plain ones, three settings
python benchmarks/bench_search.py --against main                # and against another commit, in the same run
python benchmarks/bench_search.py --growth                      # step time as batch, channels and layers grow
python benchmarks/bench_search.py --profile                     # one step by operator
python benchmarks/bench_search.py --growth --write benchmarks/RESULTS_SEARCH.part.md

Every provider is a process of its own, which says what its memory was; they take turns, one step each, after a first
step that is not counted. A time is the median over the rounds, with the smallest and the largest.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PHASES = ("weights", "first order", "second order")
SETTINGS = (  # space, without, batch size
    ("involution", "sep_invo_7x7", 16),
    ("involution", "", 64),
    ("darts", "", 64),
)
GROWTH = {"batch_size": (16, 32, 64, 128), "init_channels": (8, 16, 32), "layers": (4, 8, 16)}


# ------------------------------------------------------------------------------------------------- one process


def make_step(setting):
    """The supernet of a setting and a function that does one phase of a search step."""
    import torch

    from architect import Architect
    from genotypes import SEARCH_SPACES
    from model_search import Network

    torch.manual_seed(0)
    if setting["threads"]:
        torch.set_num_threads(setting["threads"])
    primitives = [p for p in SEARCH_SPACES[setting["space"]] if p != setting["without"]]
    net = Network(setting["init_channels"], 10, setting["layers"], torch.nn.CrossEntropyLoss(), primitives=primitives)
    net.fast = setting["fast"]
    net.to(setting["device"], memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    args = argparse.Namespace(momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-4, arch_weight_decay=1e-3)
    architect = Architect(net, args)
    shape = setting["batch_size"], 3, setting["image_size"], setting["image_size"]
    batches = [
        (
            torch.randn(shape).to(setting["device"], memory_format=torch.channels_last),
            torch.randint(10, shape[:1]).to(setting["device"]),
        )
        for _ in range(2)
    ]

    def step(phase):
        if phase == "weights":
            optimizer.zero_grad()
            net._loss(*batches[0]).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
        else:
            architect.step(*batches[0], *batches[1], 0.025, optimizer, unrolled=phase == "second order")
        if setting["device"] == "cuda":
            torch.cuda.synchronize()

    return step


def work(setting):
    """Answer every line of standard input with the seconds of each phase, wall and CPU, and the memory so far."""
    import torch

    step = make_step(setting)
    for _ in sys.stdin:
        answer = {}
        for phase in setting["phases"]:
            wall, cpu = time.perf_counter(), time.process_time()
            step(phase)
            answer[phase] = time.perf_counter() - wall, time.process_time() - cpu
        if setting["device"] == "cuda":
            answer["memory"] = torch.cuda.max_memory_allocated() / 1e9
        else:
            answer["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # of kilobytes
        print(json.dumps(answer), flush=True)


def profile(setting):
    import torch.profiler

    step = make_step(setting)
    for phase in ("weights", "second order"):
        step(phase)
    for phase in ("weights", "second order"):
        with torch.profiler.profile() as profiler:
            step(phase)
        print(f"\n{phase}: {setting}\n")
        print(profiler.key_averages().table(sort_by=f"self_{setting['device']}_time_total", row_limit=25))


# ----------------------------------------------------------------------------------------------- all processes


class Provider:
    """A process that holds a supernet and does a step when asked."""

    def __init__(self, tree, setting):
        # a thread that waits for others must not spin on a core that they need
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, __file__, "--worker", json.dumps(setting)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.answers = []

    def step(self):
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker has ended with exit code {self.process.wait()}")
        self.answers.append(json.loads(line))

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def seconds(self, phase, clock=0):
        """Median, least and most over the rounds, without the first."""
        times = [answer[phase][clock] for answer in self.answers[1:]]
        return statistics.median(times), min(times), max(times)


def measure(trees, setting, rounds):
    """{name: Provider} after a first step and `rounds` interleaved ones; trees are {name: (folder, fast)}."""
    providers = {name: Provider(tree, setting | {"fast": fast}) for name, (tree, fast) in trees.items()}
    try:
        for _ in range(1 + rounds):
            for provider in providers.values():
                provider.step()
    finally:
        for provider in providers.values():
            provider.close()
    return providers


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


def step_table(trees, base, settings, rounds):
    lines = [
        "| supernet | batch | cells | weights | first order | second order | weights + second order | CPU time of it "
        "| peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for space, without, batch_size in settings:
        setting = base | {"space": space, "without": without, "batch_size": batch_size}
        for name, provider in measure(trees, setting, rounds).items():
            steps = ["{:.2f} s ({:.2f}–{:.2f})".format(*provider.seconds(phase)) for phase in PHASES]
            total, cpu = (sum(provider.seconds(phase, clock)[0] for phase in PHASES[::2]) for clock in (0, 1))
            label = f"{space} without {without}" if without else space
            memory = provider.answers[-1]["memory"]
            cells = f"| {label} | {batch_size} | {name} | {' | '.join(steps)} | **{total:.2f} s** | {cpu:.2f} s "
            lines.append(cells + f"| {memory:.2f} GB |")
            print(lines[-1], flush=True)
    return lines


def growth_table(base, rounds, figure):
    """Time of a weight and a second-order update as one size grows from batch 16, 16 channels, 8 cells."""
    lines = [
        "| grows | size | weights + second order | per unit of size, against the smallest | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    curves = {}
    for name, sizes in GROWTH.items():
        for size in sizes:
            setting = base | {"batch_size": 16} | {name: size, "phases": PHASES[::2]}
            (provider,) = measure({"fast": (ROOT, True)}, setting, rounds).values()
            total = sum(provider.seconds(phase)[0] for phase in PHASES[::2])
            curves.setdefault(name, []).append(total)
            share = total / size / (curves[name][0] / sizes[0])
            memory = provider.answers[-1]["memory"]
            lines.append(f"| {name} | {size} | {total:.2f} s | {share:.2f} | {memory:.2f} GB |")
            print(lines[-1], flush=True)
    if figure:
        plot(curves, figure)
    return lines


def plot(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(11, 3.2))
    for axis, (name, times) in zip(axes, curves.items(), strict=True):
        sizes = GROWTH[name]
        axis.plot(sizes, times, "o-", label="measured")
        axis.plot(sizes, [times[0] * size / sizes[0] for size in sizes], ":", color="grey", label="linear")
        axis.set(xlabel=name, ylabel="seconds a step", xscale="log", yscale="log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def describe_machine(base):
    import torch

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip()
    threads = base["threads"] or torch.get_num_threads()
    device = torch.cuda.get_device_name() if base["device"] == "cuda" else f"{processor}, {threads} threads"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return f"{device}; PyTorch {torch.__version__}, Python {platform.python_version()}; load average {load:.1f}"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Time and memory of a search step.")
    parser.add_argument("--init_channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=32, help="pixels")
    parser.add_argument("--batch_size", type=int, help="of all settings (default: 16 or 64, by setting)")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are measured")
    parser.add_argument("--threads", type=int, default=0, help="0 for PyTorch's choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--settings", type=int, nargs="*", choices=range(len(SETTINGS)), help="of the step table")
    parser.add_argument("--against", metavar="REF", help="a commit to compare with")
    parser.add_argument("--no_plain", action="store_true", help="leave the plain cells out")
    parser.add_argument("--growth", action="store_true", help="the growth table too")
    parser.add_argument("--profile", action="store_true", help="one step by operator instead of tables")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables, and a plot beside them")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.worker:
        return work(args.worker)
    base = {name: getattr(args, name) for name in ("init_channels", "layers", "image_size", "threads", "device")}
    base |= {"space": "involution", "without": "", "phases": PHASES, "fast": True}
    settings = [SETTINGS[k] for k in args.settings] if args.settings is not None else SETTINGS
    settings = [(space, without, args.batch_size or batch_size) for space, without, batch_size in settings]
    if args.profile:
        sys.path.insert(0, str(ROOT))
        for space, without, batch_size in settings:
            profile(base | {"space": space, "without": without, "batch_size": batch_size})
        return
    trees = {"fast": (ROOT, True)} | ({} if args.no_plain else {"plain": (ROOT, False)})
    text = [describe_machine(base), ""]
    print(text[0])
    with contextlib.ExitStack() as stack:
        if args.against:
            trees[args.against] = stack.enter_context(worktree(args.against)), True
        text += step_table(trees, base, settings, args.rounds)
    if args.growth:
        text += ["", *growth_table(base, args.rounds, args.write and args.write.with_name("search_growth.png"))]
    if args.write:
        args.write.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
