"""Time and memory of the involution operator and module against the textbook way and a depthwise convolution.

    python benchmarks/bench_involution.py                           # two CPU threads, a few minutes
    python benchmarks/bench_involution.py --device cuda --dtype bfloat16
    python benchmarks/bench_involution.py --update                  # also put the table into benchmarks/RESULTS.md

Providers, channels-last, kernels given unless said otherwise:
    unfold: the textbook way, F.unfold into (N, C*K*K, H*W), product and sum; autograd's backward.
    torch: the plain PyTorch passes of kernels/involution_torch.py.
    cpu, triton: the backend in use on the device.
    cuda peer: a straight CUDA kernel that reads given kernels (cuda_peer.py), on NCHW tensors; where PyTorch can
        compile one.
    fused: kernels made from hidden features (C/4) inside the pass, as in Involution2d.
    depthwise: PyTorch's depthwise convolution of the same size, the yardstick: as many multiply-adds, a K*K kernel
        for each channel instead of one for each pixel.
    module unfold, module: the whole Involution2d (1x1 convolutions, batch norm, ReLU), textbook and ours.

Modes: forward; backward (of a forward that was timed as such); full (both). The providers take turns within a round,
so that a busy machine slows all of them, and each runs once unmeasured before its turn; medians over the rounds, and
the spread from the first to the third quartile. Every provider's result and gradients are compared with the
textbook's before anything is timed. Peak memory is what the allocator held at most during one full pass beyond the
inputs.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import involution
from benchmarks import cuda_peer, tables
from involution import Involution2d, involution2d, involution2d_fused

SHAPES = ((16, 32), (32, 16), (64, 8))  # channels and image size of a search's three stages
PANELS = {  # what a row of panels shows: {provider: (its name for readers, which of tables.STYLES)}
    "kernels given": {
        "unfold": ("textbook (unfolded patches)", 1),
        "torch": ("plain PyTorch, tap by tap", 2),
        "cuda peer": ("straight CUDA kernel", 3),
        "depthwise": ("depthwise convolution", 4),
        "cpu": ("this code, C++", 0),
        "triton": ("this code, Triton", 0),
    },
    "kernels made of the input": {
        "module unfold": ("module, textbook", 3),
        "fused unfold": ("operator, textbook", 1),
        "module": ("module, this code", 2),
        "depthwise": ("depthwise convolution", 4),
        "fused": ("operator, this code", 0),
    },
}
# Bytes a second, and FLOPs a second in float32 outside of tensor cores, which are not used: the kernels' sums are
# in float32 whatever the images are in. Published figures of the cards that CUDA calls so.
CARDS = {"A100-SXM4-80GB": (2.039e12, 19.5e12), "H100 80GB HBM3": (3.35e12, 67e12)}


# --------------------------------------------------------------------------------------------------- providers


def unfold(input, weight, stride=1, dilation=1):
    """Involution by unfolded patches, N x C*K*K x H*W (Algorithm 1 of arXiv 2103.06255)."""
    N, C = input.shape[:2]
    G, taps, H, W = weight.shape[1:]
    K = int(taps**0.5)
    patches = F.unfold(input, K, dilation, dilation * (K // 2), stride).view(N, G, C // G, taps, H, W)
    return (weight.unsqueeze(2) * patches).sum(3).view(N, C, H, W)


class TextbookModule(Involution2d):
    """Involution2d with the kernel tensor and unfolded patches."""

    def forward(self, x):
        weight = self.conv2(self.conv1(self.avgpool(x))).unflatten(1, (self.groups, self.kernel_size**2))
        return unfold(x, weight, self.stride, self.dilation)


def providers(N, C, size, K, device, dtype):
    """name -> (function, its differentiable inputs, the name of the provider it must agree with)."""
    torch.manual_seed(0)
    G, hidden = max(1, C // 16), C // 4

    def image(channels):
        x = torch.randn(N, channels, size, size, device=device, dtype=dtype)
        return x.to(memory_format=torch.channels_last)

    def leaf(tensor):
        return tensor.detach().requires_grad_()

    x, features = leaf(image(C)), leaf(image(hidden))
    span_weight = leaf(torch.randn(K * K * G, hidden, 1, 1, device=device, dtype=dtype) / K)
    span_bias = leaf(torch.randn(K * K * G, device=device, dtype=dtype) / K)
    weight = leaf(F.conv2d(features, span_weight, span_bias).unflatten(1, (G, K * K)))
    depthwise = leaf(torch.randn(C, 1, K, K, device=device, dtype=dtype))
    textbook, module = (kind(C, K).to(device, dtype) for kind in (TextbookModule, Involution2d))
    module.load_state_dict(textbook.state_dict())
    used = involution.backend(device)

    def unfused(x, features, span_weight, span_bias):
        return unfold(x, F.conv2d(features, span_weight, span_bias).unflatten(1, (G, K * K)))

    spans = (x, features, span_weight, span_bias)
    straight = {}
    if device.type == "cuda" and dtype in cuda_peer.TYPES and cuda_peer.available():
        # its tensors in the layout that it reads in place
        straight["cuda peer"] = cuda_peer.involution2d, (leaf(x.contiguous()), leaf(weight.contiguous())), "unfold"
    return {
        "unfold": (unfold, (x, weight), None),
        "torch": (involution2d, (x, weight), "unfold"),
        used: (involution2d, (x, weight), "unfold"),
        **straight,
        "fused unfold": (unfused, spans, None),
        "fused": (lambda *a: involution2d_fused(*a, K), spans, "fused unfold"),
        "depthwise": (lambda x, w: F.conv2d(x, w, padding=K // 2, groups=C), (x, depthwise), None),
        "module unfold": (lambda x, *_: textbook(x), (x, *textbook.parameters()), None),
        "module": (lambda x, *_: module(x), (x, *module.parameters()), "module unfold"),
    }


@contextlib.contextmanager
def backend_of(provider):
    """Force plain PyTorch, forward and backward, for the provider of that name."""
    if provider == "torch":
        os.environ["INVOLUTION_BACKEND"] = provider
    try:
        yield
    finally:
        os.environ.pop("INVOLUTION_BACKEND", None)


def check_agreement(cases, grad_output, dtype):
    """Raise AssertionError unless every provider's output and gradients are those of the textbook."""
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
    for name, (function, inputs, peer) in cases.items():
        if peer:
            results = []
            for run, arguments in ((function, inputs), cases[peer][:2]):
                with backend_of(name):
                    output = run(*arguments)
                    results.append([output, *torch.autograd.grad(output, arguments, grad_output)])
            for ours, theirs in zip(*results, strict=True):
                scale = theirs.abs().max().float()
                torch.testing.assert_close(ours.float() / scale, theirs.float() / scale, **tolerance)


# ------------------------------------------------------------------------------------------------- measurements


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory():
    """Let glibc reuse what was freed, as a run of equal steps on a GPU's allocator would.

    By default it gives hundreds of megabytes back and asks for them again, page by page: more than half of the
    textbook's time, and at times in the turn of whoever comes next.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries have no mallopt
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def time_once(function, inputs, grad_output):
    """Seconds of the forward and of the backward pass."""
    device = grad_output.device
    synchronize(device)
    start = time.perf_counter()
    output = function(*inputs)
    synchronize(device)
    middle = time.perf_counter()
    torch.autograd.grad(output, inputs, grad_output)
    synchronize(device)
    return middle - start, time.perf_counter() - middle


def peak_memory(function, device="cpu"):
    """Bytes held at most during the call, beyond those at its start."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(N, C, size, K, device, dtype, rounds):
    """Rows (a dict each) of one shape."""
    cases = providers(N, C, size, K, device, dtype)
    grad_output = torch.randn_like(cases["depthwise"][1][0])
    check_agreement(cases, grad_output, dtype)
    times = {name: [] for name in cases}
    gc.disable()  # a collection takes longer than most passes, and would strike the same provider every round
    for turn in range(rounds + 1):  # the first warms up
        for name, (function, inputs, _) in cases.items():
            with backend_of(name):
                time_once(function, inputs, grad_output)  # what another left in caches and allocator is gone
                seconds = time_once(function, inputs, grad_output)
            if turn >= 1:
                times[name].append((*seconds, sum(seconds)))
    gc.enable()
    rows = []
    for name, (function, inputs, _) in cases.items():
        row = {"C": C, "size": size, "K": K, "provider": name}
        for mode, samples in zip(("forward", "backward", "full"), zip(*times[name], strict=True), strict=True):
            low, median, high = statistics.quantiles(samples, n=4)
            row[mode], row[mode + " spread"] = median * 1e3, (low * 1e3, high * 1e3)
        with backend_of(name):
            row["memory"] = peak_memory(functools.partial(time_once, function, inputs, grad_output), device) / 2**20
        rows.append(row)
    return rows


def pass_limits(row, batch, element, bandwidth, rate):
    """Seconds that the forward and the backward pass of a row need at least for their bytes and FLOPs.

    Every tensor is read or written once. FLOPs as in kernels/involution_ops.py: with fused kernels the products with
    the span are made once forward and three times backward.
    """
    C, K, pixels = row["C"], row["K"], batch * row["size"] ** 2
    fused, taps = row["provider"] == "fused", max(1, C // 16) * K * K
    kernels = C // 4 if fused else taps  # numbers a pixel: its features, or its kernels themselves
    span = 2 * pixels * taps * (C // 4) if fused else 0
    product = 2 * pixels * C * K * K
    work = (2 * C + kernels, product + span), (3 * C + 2 * kernels, 2 * product + 3 * span)
    return [max(numbers * pixels * element / bandwidth, flops / rate) for numbers, flops in work]


# ------------------------------------------------------------------------------------------------------ output


def heading(device, args):
    return (
        f"{tables.machine(device)}, {torch.get_num_threads()} threads; backend `{involution.backend(device)}`; batch "
        f"{args.batch}, {args.dtype}, channels-last; C allocator: {args.allocator}; median of {args.rounds} rounds in "
        "ms (first to third quartile)."
    )


def markdown(rows, peers):
    """A table; the last column is how many times faster than its peer the full pass of a provider is."""
    lines = ["| C, image | K | provider | forward | backward | full | peak MiB | × faster than |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    full = {(row["C"], row["K"], row["provider"]): row["full"] for row in rows}
    for row in rows:
        cells = [f"{row['C']}, {row['size']}×{row['size']}", str(row["K"]), row["provider"]]
        for mode in ("forward", "backward", "full"):
            low, high = row[mode + " spread"]
            cells.append(f"{row[mode]:.2f} ({low:.2f}–{high:.2f})")
        cells.append(f"{row['memory']:.1f}")
        ratios = [
            f"{full[row['C'], row['K'], peer] / row['full']:.1f} {peer}" for peer in peers.get(row["provider"], ())
        ]
        cells.append(", ".join(ratios))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def data_sheet_of(device):
    """The card among CARDS that the device is, or None."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    return next((card for card in CARDS if card in name), None)


def limits_table(rates, rows, used, args, bandwidth, rate):
    element = getattr(torch, args.dtype).itemsize
    lines = [
        f"{rates} Limit: the longer of bytes (every tensor once) and FLOPs at these rates, in ms; × is how many times "
        "it the pass takes.",
        "",
        "| C, image | K | provider | forward limit | × | backward limit | × |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["provider"] in (used, "fused"):
            limits = [1e3 * limit for limit in pass_limits(row, args.batch, element, bandwidth, rate)]
            cells = [f"{row['C']}, {row['size']}×{row['size']}", str(row["K"]), row["provider"]]
            for limit, mode in zip(limits, ("forward", "backward"), strict=True):
                cells += [f"{limit:.2g}" if limit < 0.1 else f"{limit:.2f}", f"{row[mode] / limit:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows, rounds, path):
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row["C"], row["size"]) for row in rows))
    figure = Figure(figsize=(3.2 * len(shapes) + 2.6, 6.4), layout="constrained")
    figure.suptitle(f"Forward and backward pass: median of {rounds} rounds, first to third quartile", fontsize="medium")
    panels = figure.subplots(len(PANELS), len(shapes), sharex=True, sharey=True, squeeze=False)
    for line, (what, names) in zip(panels, PANELS.items(), strict=True):
        names = {name: how for name, how in names.items() if any(row["provider"] == name for row in rows)}
        for panel, (C, size) in zip(line, shapes, strict=True):
            for name, (label, style) in names.items():
                found = [row for row in rows if (row["C"], row["provider"]) == (C, name)]
                times = [(row["full"], *row["full spread"]) for row in found]
                middles, bars = [t[0] for t in times], tables.spread(times)
                panel.errorbar([row["K"] for row in found], middles, bars, label=label, ms=5, **tables.STYLES[style])
            panel.set(title=f"{C} channels, {size}×{size}", yscale="log", xticks=sorted({row["K"] for row in rows}))
            panel.grid(alpha=0.3)
        line[0].set_ylabel(f"{what}\nmilliseconds")
        line[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for panel in panels[-1]:
        panel.set_xlabel("kernel size K")
    tables.round_ticks(panels[0][0].yaxis)  # which all share
    figure.savefig(path, dpi=110)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64], choices=[16, 32, 64])
    parser.add_argument(
        "--allocator",
        default="keep",
        choices=["keep", "default"],
        help="whether the C library keeps freed memory",
    )
    parser.add_argument("--kernel_sizes", type=int, nargs="+", default=[3, 5, 7])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of every provider")
    tables.add_arguments(parser)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: one measurement has no spread")
    return args


def main():
    args = parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    if args.allocator == "keep":
        keep_freed_memory()
    if device.type == "cuda" and not cuda_peer.available():
        print("no cuda peer: this PyTorch cannot compile CUDA kernels (torch.cuda._compile_kernel)", file=sys.stderr)
    limits = tables.machine_limits(device, dtype)
    rows = []
    for C, size in (shape for shape in SHAPES if shape[0] in args.channels):
        for K in args.kernel_sizes:
            rows += measure(args.batch, C, size, K, device, dtype, args.rounds)
            print(f"measured C={C}, {size}x{size}, K={K}", file=sys.stderr)
    used = involution.backend(device)
    peers = {"torch": ["unfold"], used: ["unfold", "depthwise"], "fused": ["fused unfold", "depthwise"]}
    peers["module"] = ["module unfold"]
    if any(row["provider"] == "cuda peer" for row in rows):
        peers[used].append("cuda peer")
    text = f"{heading(device, args)}\n\n{markdown(rows, peers)}"
    bandwidth, rate = limits
    rates = f"Copying moves {bandwidth / 1e9:.1f} GB/s here, a matrix product does {rate / 1e9:.0f} GFLOP/s."
    text += f"\n\n{limits_table(rates, rows, used, args, *limits)}"
    if (card := data_sheet_of(device)) is not None:
        bandwidth, rate = CARDS[card]
        rates = f"Prediction for {card}: {bandwidth / 1e9:.0f} GB/s and {rate / 1e9:.0f} GFLOP/s by its data sheet."
        text += f"\n\n{limits_table(rates, rows, used, args, *CARDS[card])}"
    tables.save("bench_involution", text, tables.out(args), args.update)
    plot(rows, args.rounds, tables.out(args) / "bench_involution.png")


if __name__ == "__main__":
    main()
