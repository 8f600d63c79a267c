"""What several processes pay for being one: collectives and bytes of a step, and the share of it that they take.

torchrun --nproc_per_node 2 benchmarks/bench_processes.py                  # two processes on CPUs, over gloo
torchrun --nproc_per_node 2 benchmarks/bench_processes.py --update         # and the table to RESULTS.md
torchrun --nproc_per_node 8 benchmarks/bench_processes.py --batch_size 64 --steps 20     # on GPUs

A second-order step of a search (alphas, then weights) on random images, after one that is not counted. The clock of a
collective starts when all have come to it: what it takes is flattening, sending, adding and putting back, and not that
one process is slower than another. On a CPU a step is timed by the processor's time of its thread, which other work
delays less than the clock on the wall; a collective by that clock, of which the least is told besides the median.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import tables

import utils
from architect import Architect
from genotypes import SEARCH_SPACES
from gradients import Gradients
from model_search import Network
from runtime.processes import Processes


class Clocked(Processes):
    """Processes that measure the seconds of their collectives."""

    seconds = 0.0

    def mean_(self, tensors, images):
        self._clock(lambda: super(Clocked, self).mean_(tensors, images))

    def total(self, numbers):
        return self._clock(lambda: super(Clocked, self).total(numbers))

    def _clock(self, collective):
        super().total([0])  # all have come
        start = time.perf_counter()
        result = collective()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return result


def make_step(team, args, device):
    """A function that takes one step of a second-order search, as train_search.py does."""
    torch.manual_seed(0)
    criterion, primitives = torch.nn.CrossEntropyLoss(), SEARCH_SPACES[args.space]
    net = Network(args.init_channels, 10, args.layers, criterion, primitives=primitives)
    net.to(device, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    how = argparse.Namespace(momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-4, arch_weight_decay=1e-3)
    architect = Architect(net, how, Gradients(net, team=team))
    share = (args.batch_size - team.rank - 1) // team.count + 1
    input = torch.randn(share, 3, args.image_size, args.image_size, device=device)
    input = input.contiguous(memory_format=torch.channels_last)
    target = torch.randint(10, (share,), device=device)

    def step():
        architect.step(input, target, input, target, 0.025, sgd, unrolled=True)
        for w, grad in zip(net.parameters(), architect.gradients("weights", input, target)[2], strict=True):
            w.grad = grad
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        sgd.step()
        team.total([0] * 8)  # of the metrics, a signal, a checkpoint: Run._agree

    return step


def measure(team, step, steps, device):
    """(seconds of a step, seconds of its collectives) of some steps, and its collectives and bytes."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    step()
    samples = []
    for _ in range(steps):
        team.seconds, team.reached, team.bytes, start = 0.0, 0, 0, clock()
        step()
        samples.append((clock() - start, team.seconds))
    waits = team.reached // 2  # half of them are Clocked's own
    return samples, team.reached - waits, team.bytes - 8 * waits


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = utils.number(int, low=1)
    for name, default in (("batch_size", 64), ("image_size", 32), ("init_channels", 16), ("layers", 8), ("steps", 5)):
        parser.add_argument(f"--{name}", type=number, default=default, help=f"(default: {default})")
    parser.add_argument("--space", choices=SEARCH_SPACES, nargs="+", default=["involution", "darts"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    tables.add_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    team = Clocked.start()
    if team.count == 1:
        raise utils.UserError("there is one process: start this with torchrun --nproc_per_node 2")
    device = torch.device(args.device, team.local_rank) if args.device == "cuda" else torch.device("cpu")
    team.join(device, timeout=3600)
    rows = []
    for space in args.space:
        step = make_step(team, argparse.Namespace(**vars(args) | {"space": space}), device)
        samples, collectives, size = measure(team, step, args.steps, device)
        took, shared = zip(*samples, strict=True)
        median, middle, least = statistics.median(took), statistics.median(shared), min(shared)
        what = f"`{space}`, {args.init_channels} channels, {args.layers} cells, batch {args.batch_size}"
        rows.append(
            f"| {what} | {collectives} | {size / 1e6:.3g} MB "
            f"| {median:.3g} s ({min(took):.3g}–{max(took):.3g}) "
            f"| {1000 * middle:.3g} ms ({1000 * least:.3g}–{1000 * max(shared):.3g}) "
            f"| {100 * middle / (median + middle):.2g} % |"
        )
    head = (
        f"{tables.machine(device)}; {team.count} processes, {torch.get_num_threads()} threads each; median of "
        f"{args.steps} steps (least–most).\n\n| search | collectives a step | bytes a step | step, "
        f"{'processor time of a process' if args.device == 'cpu' else 'seconds'} | in collectives | share |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    if team.rank == 0:
        tables.save("bench_processes", "\n".join([head, *rows]), tables.out(args), args.update)
    team.leave()


if __name__ == "__main__":
    utils.run_script(main)
