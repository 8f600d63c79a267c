"""What Triton's compiler makes of the involution kernels for cards that are not here, and what these should take.

    python benchmarks/bench_triton.py                        # about an hour of CPU time; no GPU is needed
    python benchmarks/bench_triton.py --archs 80 90 --dtypes bfloat16 --kernel_sizes 7 --channels 16
    python benchmarks/bench_triton.py --channels 64 --update # also put the tables into benchmarks/RESULTS.md

Compiled: the seven kernels of kernels/involution_triton.py, as its launchers ask for them on channels-last images of
16 and 64 channels (a search) and of 36 and 144 (a retraining), in every block among which a launch chooses. The
launchers are called on tensors without memory, and a driver that knows a card's architecture alone: types, compile-time
constants and what is divisible by 16 are those of a launch of 64 images. Equal specialisations are compiled once, and
what Triton's cache holds is not compiled again.

Registers, shared memory and stack are read from the cubin by Triton's cuobjdump. The kernels have no arrays of their
own: their stack is what ptxas spilled, in bytes a thread, rounded up to its alignment. Occupancy is

    blocks * warps / max_warps,  blocks = min(max_blocks, max_warps / warps, register_warps / warps, shared / used)

rounded down, with register_warps = 4 * floor(16384 / (32 * registers, rounded up to 256)) (four partitions of 16384
registers each), and `used` the shared memory of a block and what the driver reserves for it, rounded up to 128 bytes
(256 on sm_75): the formula of NVIDIA's cuda_occupancy.h. The limits are those of cuda/__device/arch_traits.h in
NVIDIA's CCCL.

The prediction is the longer of bytes and FLOPs, each at the rate of NVIDIA's data sheet: see `pass_limits` and `CARDS`
of bench_involution.py, which compares what it measures on a card of that name.
"""

import argparse
import concurrent.futures
import csv
import functools
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import bench_involution, tables
from involution import Involution2d
from kernels import involution_triton as backend

CSV = Path(__file__).resolve().parent.parent / "results" / "bench_triton.csv"
IMAGES = {16: 32, 32: 16, 64: 8, 36: 32, 72: 16, 144: 8}  # channels -> image size of a network's three stages
BATCH = 64


class Multiprocessor(NamedTuple):
    max_warps: int
    max_blocks: int
    shared: int  # bytes
    reserved: int  # bytes of shared memory, for every block
    granularity: int  # of shared memory, bytes


ARCHITECTURES = {
    75: Multiprocessor(32, 16, 64 * 1024, 0, 256),
    80: Multiprocessor(64, 32, 164 * 1024, 1024, 128),
    90: Multiprocessor(64, 32, 228 * 1024, 1024, 128),
    100: Multiprocessor(64, 32, 228 * 1024, 1024, 128),
    120: Multiprocessor(48, 24, 100 * 1024, 1024, 128),
}


def occupancy(arch, warps, registers, shared):
    """Warps that a multiprocessor holds at once, as a share of those that it could hold."""
    limit = ARCHITECTURES[arch]
    register_warps = 4 * (65536 // 4 // (-(-32 * registers // 256) * 256))
    used = -(-(shared + limit.reserved) // limit.granularity) * limit.granularity
    by_shared = limit.shared // used if used else limit.max_blocks
    blocks = min(limit.max_blocks, limit.max_warps // warps, register_warps // warps, by_shared)
    return blocks * warps / limit.max_warps


# ---------------------------------------------------------------------------------------------------- compilation


class Driver:
    """What Triton asks of a driver before it compiles; a process that has one of these launches nothing any more."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # kernels are kept by device

    def get_current_stream(self, device):
        return 0


def intercepted(arch, launched):
    """Hand every launch of an autotuned kernel to `launched(kernel, args, options)`, with compilation for `arch`."""

    def run(self, *args, grid, warmup, **options):
        launched(self.fn, args, options)

    triton.runtime.driver.set_active(Driver(arch))
    return mock.patch.object(Autotuner, "run", run)


def launch_all(C, dtype, K, stride, dilation):
    """Call the launchers of all passes for C channels."""
    size, G, R = IMAGES[C], *groups_and_hidden(C)
    Ho = -(-size // stride)

    def image(channels, side):
        shape = BATCH, channels, side, side
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

    x, grad, hidden = image(C, size), image(C, Ho), image(R, Ho)
    weight = image(G * K * K, Ho).unflatten(1, (G, K * K))
    span_weight, span_bias = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((G * K * K, R), (G * K * K,))
    )
    backend.forward(x, weight, stride, dilation)
    backend.grad_input(grad, weight, size, size, stride, dilation)
    backend.grad_weight(grad, x, K, G, stride, dilation)
    backend.fused_forward(x, hidden, span_weight, span_bias, K, stride, dilation)
    backend.fused_backward(grad, x, hidden, span_weight, span_bias, K, stride, dilation)


@functools.cache
def groups_and_hidden(C):
    """Groups and hidden features of an involution of C channels in a network."""
    with torch.device("meta"):
        module = Involution2d(C, 3)
    return module.groups, module.conv1.conv.out_channels


def compile_case(blocks, C, dtype, K, stride, dilation, arch):
    """A row (a dict) for every kernel and block; one that does not compile has the `error`."""
    rows = []

    def launched(kernel, args, options):
        for name in blocks:
            row = {"arch": arch, "dtype": dtype, "C": C, "K": K, "stride": stride, "dilation": dilation}
            row |= {"kernel": kernel.__name__.strip("_").removesuffix("_kernel"), "block": name}
            try:
                compiled = kernel.warmup(*args, grid=(1,), **options, **backend.BLOCKS[name].all_kwargs())
            except Exception as error:  # Triton's are of many kinds, down to those of ptxas
                row["error"] = (str(error) or type(error).__name__).splitlines()[0]
            else:
                registers, spilled = resources(compiled.asm["cubin"])
                shared = compiled.metadata.shared
                row |= {"registers": registers, "spilled": spilled, "shared": shared}
                row["occupancy"] = occupancy(arch, compiled.metadata.num_warps, registers, shared)
            rows.append(row)

    with intercepted(arch, launched):
        launch_all(C, getattr(torch, dtype), K, stride, dilation)
    return rows


@functools.cache  # equal specialisations have equal cubins
def resources(cubin):
    """Registers and bytes of stack a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(word.split(":", 1) for word in text.split() if ":" in word)
    return int(usage["REG"]), int(usage["STACK"])


def compile_all(args):
    """The rows of all cases, `--jobs` processes at work."""
    names = ("channels", "dtypes", "kernel_sizes", "strides", "dilations", "archs")
    cases = list(itertools.product(*(getattr(args, name) for name in names)))
    rows = []
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # less to write, the same instructions
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
        compile_blocks = functools.partial(compile_case, args.blocks)
        for case, found in zip(cases, pool.map(compile_blocks, *zip(*cases, strict=True)), strict=True):
            rows += found
            print(
                f"compiled: {', '.join(f'{key} {value}' for key, value in zip(names, case, strict=True))}",
                file=sys.stderr,
            )
    return rows


# ---------------------------------------------------------------------------------------------------------- tables


def resource_table(rows):
    """A line for every kernel and architecture, over all its variants."""
    lines = [
        "| kernel | card | compiled | registers | spill | most bytes spilled | no block without | shared memory "
        "| occupancy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel, arch in dict.fromkeys((row["kernel"], row["arch"]) for row in rows):
        all_rows = [row for row in rows if (row["kernel"], row["arch"]) == (kernel, arch)]
        good = [row for row in all_rows if "error" not in row]
        cells = [kernel, f"sm_{arch}", f"{len(good)} of {len(all_rows)}"]
        if good:
            spilled = [row["spilled"] for row in good]
            variants = by_variant(good)  # autotuning chooses among the blocks of each
            cells += [span([row["registers"] for row in good]), str(sum(bytes > 0 for bytes in spilled))]
            cells += [str(max(spilled)), str(sum(all(row["spilled"] for row in blocks) for blocks in variants))]
            cells += [span([row["shared"] for row in good])]
            cells += [span([round(100 * max(row["occupancy"] for row in blocks)) for blocks in variants]) + " %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_variant(rows):
    """The rows of one kernel and architecture in lists of those that differ in nothing but their block."""
    variants = {}
    for row in rows:
        key = tuple(row[name] for name in ("dtype", "C", "K", "stride", "dilation"))
        variants.setdefault(key, []).append(row)
    return list(variants.values())


def span(values):
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def prediction_table(batch):
    """Least times of the passes that bench_involution.py times, in microseconds."""
    cards = bench_involution.CARDS
    columns = [(name, dtype) for name in cards for dtype in ("float32", "bfloat16")]
    lines = ["| C, image | K | provider | " + " | ".join(f"{name}, {dtype}" for name, dtype in columns) + " |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(columns))
    for (C, size), K, provider in itertools.product(bench_involution.SHAPES, (3, 5, 7), ("triton", "fused")):
        row = {"C": C, "size": size, "K": K, "provider": provider}
        cells = [f"{C}, {size}×{size}", str(K), provider]
        for name, dtype in columns:
            limits = bench_involution.pass_limits(row, batch, getattr(torch, dtype).itemsize, *cards[name])
            cells.append(" / ".join(f"{1e6 * seconds:.1f}" for seconds in limits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text_of(rows, args):
    failed = [row for row in rows if "error" in row]
    lines = [
        f"Triton {triton.__version__}; {', '.join(args.dtypes)}; K = {', '.join(map(str, args.kernel_sizes))}; "
        f"{', '.join(map(str, args.channels))} channels; stride {span(args.strides)}, dilation "
        f"{span(args.dilations)}; blocks {', '.join(args.blocks)}. Ranges run over all variants; `no block without`: "
        "variants that spill in every block; occupancy is that of the block which holds the most warps.",
        "",
        resource_table(rows),
        *(f"\nNot compiled: {row}" for row in failed),
        "",
        f"Least time of the forward / backward pass on a batch of {args.batch}, in µs:",
        "",
        prediction_table(args.batch),
    ]
    return "\n".join(lines)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--archs", type=int, nargs="+", default=[*ARCHITECTURES], choices=[*ARCHITECTURES])
    names = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", default=names, choices=names)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 64, 36, 144], choices=[*IMAGES])
    parser.add_argument("--kernel_sizes", type=int, nargs="+", default=[3, 5, 7], choices=[3, 5, 7])
    parser.add_argument("--strides", type=int, nargs="+", default=[1], choices=[1, 2])
    parser.add_argument("--dilations", type=int, nargs="+", default=[1], choices=[1, 2])
    parser.add_argument("--blocks", nargs="+", default=[*backend.BLOCKS], choices=[*backend.BLOCKS])
    parser.add_argument("--batch", type=int, default=512, help="images, of the prediction")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--csv", type=Path, default=CSV, help="file for a row of every kernel")
    tables.add_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    rows = compile_all(args)
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    tables.save("bench_triton", text_of(rows, args), tables.out(args), args.update)
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
