"""What all benchmarks say of the machine, and where their tables go."""

import platform
import time
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def machine(device="cpu"):
    """The processor or the card, and versions."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        from utils import processor  # of the folder above, which every benchmark puts on its path before it measures

        name = processor()
    return f"{name}; PyTorch {torch.__version__}, Python {platform.python_version()}"


def machine_limits(device="cpu", dtype=torch.float32):
    """Bytes moved a second by copying 256 MB, FLOPs a second of a matrix product of 2048 x 2048; the best of twelve."""
    source, square = torch.ones(2**26, device=device), torch.ones(2048, 2048, device=device, dtype=dtype)
    target = torch.empty_like(source)
    works = {"copy": lambda: target.copy_(source), "product": lambda: square @ square}
    seconds = {name: [] for name in works}
    for _ in range(12):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if source.is_cuda:
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    copied, multiplied = (min(times) for times in seconds.values())
    return 2 * 4 * source.numel() / copied, 2 * 2048**3 / multiplied


def save(name, text, out, update):
    """Print a text, write it to `out`/NAME.md, and with `update` put it between NAME's marks in RESULTS.md."""
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text + "\n")
    if update:
        put(FOLDER / "RESULTS.md", name, text)


def put(path, name, text, only_look=False):
    """Put a text between NAME's marks in a Markdown file; whether it was there already."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = path.read_text()
    before, found, rest = whole.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{path} has no place for this table: the lines {begin} and {end} are missing")
    new = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    if new != whole and not only_look:
        path.write_text(new)
    return new == whole


STYLES = (  # of at most five curves a panel; told apart by the colour-blind, and without colours
    dict(color="#0072b2", marker="o"),
    dict(color="#d55e00", marker="s", linestyle="--"),
    dict(color="#009e73", marker="^", linestyle="-."),
    dict(color="#cc79a7", marker="D", linestyle=":"),
    dict(color="#000000", marker="x", linestyle=(0, (5, 1))),
)


def round_ticks(axis):
    """Ticks at 1, 2, 5, 10, …, written out, on a logarithmic axis (a panel's `xaxis` or `yaxis`)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def spread(samples):
    """What matplotlib's `errorbar` wants: distances from the middle of every (middle, least, most)."""
    return [[middle - least for middle, least, _ in samples], [most - middle for middle, _, most in samples]]


def add_arguments(parser):
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the table and the plots (default: runs/benchmarks, or benchmarks)",
    )
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/RESULTS.md too")


def out(args):
    """The folder for the table and the plots: those of the repository are replaced together with its table alone."""
    return args.out or (FOLDER if args.update else FOLDER.parent / "runs" / "benchmarks")
