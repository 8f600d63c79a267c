"""A step beside other work: how threads that wait for each other fare on a machine with busy processes.

python benchmarks/bench_busy.py --update                        # idle, then beside as many busy processes as cores
python benchmarks/bench_busy.py --busy 0 --rounds 41            # idle only: what sleeping costs
python benchmarks/bench_busy.py --spins 100 1000 --works train  # and spinning a little before sleeping

*asleep* and *brief* wait as the scripts do on a busy and on an idle machine (runtime/threads.py), *spinning* as OpenMP
does when left alone, all with a thread for each core. Every way is a process of its own. They take turns, one step
each in an order drawn anew every round, after two steps that are not counted. A busy process is an endless loop in
Python.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from runtime import memory, threads  # noqa: E402

CORES = os.cpu_count()
WORKS = {
    "search": dict(init_channels=8, layers=4, batch_size=16),  # second order, default space less 7x7
    "train": dict(init_channels=16, layers=8, batch_size=64),  # DARTS
}
WAYS = {  # name: environment
    "one thread": {"OMP_NUM_THREADS": "1"},
    "asleep": threads.ASLEEP,
    "brief": threads.BRIEF,
    "spinning": {},
}
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(10**5))"  # ends with this process


# ------------------------------------------------------------------------------------------------- one process


def make_step(name, sizes):
    """A function that does one step of a name in WORKS."""
    if name == "search":
        import bench_search

        setting = sizes | dict(space="involution", without="sep_invo_7x7", image_size=32, threads=0, device="cpu")
        setting |= dict(fast=True, textbook=False, amp=False, cuda_graph=False)
        step = bench_search.make_step(setting)
        return lambda: [step(phase) for phase in bench_search.STEP]

    import torch

    import genotypes
    from model import NetworkCIFAR

    torch.manual_seed(0)
    net = NetworkCIFAR(sizes["init_channels"], 10, sizes["layers"], False, genotypes.DARTS)
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    images = torch.randn(sizes["batch_size"], 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (sizes["batch_size"],))

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images)[0], labels).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()

    return step


def work(name, sizes):
    """Do a step for every line of standard input; answer with its seconds."""
    memory.keep_freed()  # as the scripts
    step = make_step(name, sizes)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - start), flush=True)


# ----------------------------------------------------------------------------------------------- all processes


class Worker:
    """A process that does a step when asked."""

    def __init__(self, name, sizes, changes):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
        command = [sys.executable, __file__, "--worker", name, json.dumps(sizes)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, env=environment | changes, **pipes)

    def step(self):
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker has ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def busy(count):
    """That many busy processes, in sessions of their own as other people's are: Linux may share cores by session."""
    command = [sys.executable, "-c", BUSY, str(os.getpid())]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(name, sizes, ways, counts, rounds):
    """{number of busy processes: {way: seconds of the step of every round}}."""
    times = {count: {way: [] for way in ways} for count in counts}
    workers = {way: Worker(name, sizes, changes) for way, changes in ways.items()}
    try:
        for worker in [*workers.values()] * 2:
            worker.step()
        for count in counts:
            with busy(count):
                for _ in range(rounds):
                    for way in random.sample(list(workers), len(workers)):
                        times[count][way].append(workers[way].step())
    finally:
        for worker in workers.values():
            worker.close()
    return times


def ratio(times, others):
    """Median of the ratios of the rounds, with the quartiles."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(times, others, strict=True)], n=4)
    return f"{median:.3g} ({low:.3g}–{high:.3g})"


def table(works, ways, counts, rounds):
    lines = [
        "| step | busy processes | threads | seconds (least–most) | against one thread | against spinning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, sizes in works.items():
        label = f"{name}, {sizes['init_channels']} channels, {sizes['layers']} cells, batch {sizes['batch_size']}"
        for count, times in measure(name, sizes, ways, counts, rounds).items():
            for way, seconds in times.items():
                spread = f"{statistics.median(seconds):.3g} ({min(seconds):.3g}–{max(seconds):.3g})"
                ratios = [ratio(seconds, times[other]) for other in ("one thread", "spinning")]
                lines.append(f"| {label} | {count} | {way} | {spread} | {' | '.join(ratios)} |")
                print(lines[-1], file=sys.stderr, flush=True)
    return lines


def parse_args():
    import tables

    parser = argparse.ArgumentParser(
        description="Steps beside busy processes.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), help="what a step does")
    for name in WORKS["train"]:
        parser.add_argument(f"--{name}", type=int, help="in place of those of the works")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, CORES], help="numbers of busy processes")
    parser.add_argument("--rounds", type=int, default=15, help="steps that are measured")
    parser.add_argument("--spins", type=int, nargs="+", default=[], help="further ways: spin so often, then sleep")
    tables.add_arguments(parser)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2, for the quartiles")
    return args


def main():
    import tables

    args = parse_args()
    ways = WAYS | {f"{spins} spins": {"GOMP_SPINCOUNT": str(spins)} for spins in args.spins}
    given = {name: getattr(args, name) for name in WORKS["train"] if getattr(args, name) is not None}
    works = {name: WORKS[name] | given for name in args.works}
    text = [
        f"{tables.machine()}; {CORES} threads or one; median of {args.rounds} steps (least–most), and of the ratios of "
        "the rounds (quartiles).",
        "",
        *table(works, ways, args.busy, args.rounds),
    ]
    tables.save("bench_busy", "\n".join(text), tables.out(args), args.update)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
