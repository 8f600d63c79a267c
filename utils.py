"""What the scripts share: command lines, devices, meters, run folders that can be resumed, curves."""

import argparse
import csv
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from tqdm import tqdm

logger = logging.getLogger("darts")

# settings that may differ between a run and its continuation: they do not change what is computed
PORTABLE = ("data", "device", "gpu", "report_freq")
_SAVE_EVERY = 300  # seconds between two checkpoints within an epoch


class UserError(ValueError):
    """Something the user can mend; scripts show it as one line and exit with code 2."""


# --------------------------------------------------------------------------------------------- command lines


class ArgumentParser(argparse.ArgumentParser):
    """Shows defaults in --help; a wrong argument gets one line and exit code 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def given(self, argv=None):
        """The arguments that the command line names, without the defaults, as a dict."""
        unset = object()
        blank = argparse.Namespace(**{action.dest: unset for action in self._actions})
        return {k: v for k, v in vars(self.parse_args(argv, blank)).items() if v is not unset}


def number(kind, low=-math.inf, high=math.inf, above=None, below=None):
    """An argparse type: an int or float within [low, high] and, where given, strictly within (above, below)."""

    def convert(text):
        bounds = [f"at least {low}"] * (low > -math.inf) + [f"at most {high}"] * (high < math.inf)
        bounds += [f"above {above}"] * (above is not None) + [f"below {below}"] * (below is not None)
        rule = f"must be {'an integer' if kind is int else 'a number'} {' and '.join(bounds)}".rstrip()
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{rule}, got {text!r}") from None
        within = low <= value <= high and (above is None or value > above) and (below is None or value < below)
        if not within or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{rule}, got {text}")
        return value

    return convert


def user_value(function):
    """An argparse type from a function that raises ValueError with a message for the user."""

    def convert(text):
        try:
            return function(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def add_data_arguments(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="data", help="folder of the data set; CIFAR is downloaded to it when missing")
    group.add_argument(
        "--dataset",
        choices=("cifar10", "cifar100", "folder", "digits"),
        default="cifar10",
        help="folder: your own images in DATA/train/CLASS/* and DATA/test/CLASS/*; digits: 8x8 scans, no download",
    )
    group.add_argument(
        "--image_size", type=number(int, low=1), help="pixels; images are resized to it (unset: 8 for digits, else 32)"
    )
    group.add_argument("--subset", metavar="N", type=number(int, low=2), help="use at most N images of each set")
    return group


def add_device_arguments(parser):
    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    group.add_argument("--gpu", type=number(int, low=0), help="CUDA device id (unset: 0)")


def add_run_arguments(parser, seed):
    group = parser.add_argument_group("run")
    group.add_argument("--save", default="EXP", type=user_value(_run_name), help="name of the run folder, in runs/")
    group.add_argument("--resume", metavar="RUN_FOLDER", help="go on with an interrupted run, with its own settings")
    group.add_argument("--seed", type=number(int, low=0, high=2**63 - 1), default=seed, help="random seed")
    group.add_argument("--report_freq", type=number(int, low=1), default=50, help="steps between two report lines")


def _run_name(text):
    if not text or Path(text).name != text or len(text) > 100:
        raise ValueError(f"must be a name, not a path, of 1 to 100 characters, got {text[:110]!r}")
    return text


def parse_args(parser, argv=None):
    """The arguments of a script; with --resume, those of the run.

    Raises:
        UserError: a folder that is no run, or a setting that differs from the run's.
    """
    args = parser.parse_args(argv)
    if args.resume is None:
        return args
    given = parser.given(argv)
    saved = _read_config(Path(args.resume), parser.prog)
    for name, value in saved.items():
        if not hasattr(args, name):
            raise UserError(f"--resume {args.resume}: the run has a setting {name!r} that this version does not know")
        if name in PORTABLE and name in given:
            continue
        if name in given and given[name] != value and name != "resume":
            raise UserError(
                f"--resume {args.resume}: --{name} is {value} in that run, not {given[name]}; leave --{name} out, "
                "or start a new run"
            )
        if name != "resume":
            setattr(args, name, value)
    return args


def _read_config(folder, script):
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such folder")
    if not (folder / "checkpoint.pt").is_file():
        raise UserError(f"--resume {folder}: no checkpoint.pt in it; nothing to go on with")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["script"] != script:
            raise UserError(f"--resume {folder}: that run is one of {config['script']}, not of {script}")
        return dict(config["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--resume {folder}: config.json is missing or damaged ({error})") from None


def run_script(main):
    """Call a script's `main`; what the user can mend ends in one line and exit code 2."""
    handler = _ConsoleHandler()
    handler.setLevel(logging.INFO if sys.stdout.isatty() else logging.DEBUG)
    logging.getLogger().addHandler(handler)
    logger.setLevel(logging.DEBUG)
    script = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        message = " ".join(str(error).split())
        sys.exit(_fail(f"{script}: error: {message}", 2))
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        sys.exit(_fail(f"{script}: error: out of memory: lower --batch_size or --init_channels ({reason})", 2))
    except KeyboardInterrupt:
        sys.exit(_fail(f"{script}: stopped at once; what was saved last is what --resume goes on with", 130))


def _fail(message, code):
    print(message, file=sys.stderr)
    return code


class _ConsoleHandler(logging.Handler):
    """Prints log lines above the progress bar, if one is up."""

    def emit(self, record):
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{time.strftime('%H:%M:%S')} {prefix}{record.getMessage()}", file=sys.stdout)
        sys.stdout.flush()


def pick_device(args):
    """The torch.device that --device and --gpu ask for.

    Raises:
        UserError: a device that is not there.
    """
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu (or auto)")
    if args.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: PyTorch sees no MPS device here; use --device cpu (or auto)")
    if args.device == "auto" and not has_cuda and args.gpu is not None:
        logger.warning("--gpu %d: no CUDA device here, going on with the CPU", args.gpu)
    if args.device == "cuda" or (args.device == "auto" and has_cuda):
        index = args.gpu or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"--gpu {index}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
        torch.cuda.set_device(index)
        torch.backends.cudnn.benchmark = True
        return torch.device("cuda", index)
    return torch.device("cpu" if args.device == "auto" else args.device)


# ----------------------------------------------------------------------------------------- meters, small help


class AverageMeter:
    """Loss, top-1 and top-5 accuracy (percent), averaged over images."""

    def __init__(self, sums=(0, 0.0, 0.0, 0.0)):
        self.sums = list(sums)  # images, loss, top-1, top-5

    def update(self, loss, logits, target):
        """Add a batch: its mean loss (a number), logits (N, classes), target (N,)."""
        n = len(target)
        top1, top5 = accuracy(logits, target, topk=(1, 5))
        for k, value in enumerate((1, loss, top1, top5)):
            self.sums[k] += value * n

    @property
    def loss(self):
        return self.sums[1] / max(1, self.sums[0])

    @property
    def top1(self):
        return self.sums[2] / max(1, self.sums[0])

    @property
    def top5(self):
        return self.sums[3] / max(1, self.sums[0])

    def __str__(self):
        return f"loss {self.loss:.4f} acc {self.top1:.2f}%"


@torch.no_grad()
def accuracy(logits, target, topk=(1,)):
    """Percentages of the batch whose target is among the k largest logits (all of them, if there are fewer)."""
    ranked = logits.topk(min(max(topk), logits.shape[1]), dim=1).indices
    hits = ranked.eq(target[:, None]).cpu()
    return [100 * hits[:, :k].any(dim=1).double().mean().item() for k in topk]


def count_parameters_in_MB(model):
    """Millions of weights, without the auxiliary head."""
    return sum(p.numel() for name, p in model.named_parameters() if "auxiliary" not in name) / 1e6


@contextmanager
def replacing(path):
    """Yield a temporary path; its file takes the place of `path` once it is complete."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text)


def load_checkpoint(path, device="cpu"):
    """What torch.save wrote, tensors and plain values only: a pickle that could run code is refused.

    Raises:
        UserError: a file that is missing, truncated or no checkpoint.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises a dozen kinds for damaged files
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{path} is truncated, damaged or not a checkpoint of tensors ({reason})") from None


def load_weights(model, weights, path):
    """Load a state dict strictly.

    Raises:
        UserError: weights of another network, naming the first key that does not fit.
    """
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = lines[min(1, len(lines) - 1)][:200]
        raise UserError(f"the weights of {path} are not those of this network: {first}") from None


# ---------------------------------------------------------------------------------------------- run folders


class Run:
    """A run folder, and where the run in it stands.

    Everything that the next step depends on is in `checkpoint.pt`: the parts' state dicts, epoch, step, the sums of
    the epoch so far, the finished epochs, the random states. As a context manager it turns SIGINT and SIGTERM into
    "finish this step, save, exit and say how to resume".

    Args:
        kind: "search" or "train".
        parts: name -> object with `state_dict` and `load_state_dict`; needs `model` and `optimizer`.
        facts: further plain values to keep in the checkpoint, for those who read it.
    """

    def __init__(self, kind, args, device, parts, **facts):
        self.args, self.device, self.parts, self.facts = args, device, parts, facts
        self.epoch = self.step = 0
        self.meter = AverageMeter()
        self.history = []  # a dict of numbers for every finished epoch
        self._signal = None
        self.folder = Path(args.resume) if args.resume else _new_folder(kind, args.save)
        self.checkpoint = self.folder / "checkpoint.pt"
        if args.resume:
            self._restore()
        else:
            write_text(self.folder / "config.json", json.dumps(_config(args, device), indent=2) + "\n")
            self.save()
        handler = logging.FileHandler(self.folder / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logging.getLogger().addHandler(handler)
        logger.info("%s %s on %s", "resuming" if args.resume else "run folder", self.folder, device)

    def __enter__(self):
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number_, handler in self._handlers.items():
            signal.signal(number_, handler)

    def _on_signal(self, number_, _):
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number_
        tqdm.write("finishing this step, then saving (once more stops at once)", file=sys.stderr)

    def steps(self, batches):
        """Yield the augmented batches that are left of this epoch, with a progress bar or report lines."""
        self.batches = len(batches)
        label = f"epoch {self.epoch + 1}/{self.args.epochs}"
        bar = tqdm(total=len(batches), initial=self.step, desc=label, disable=not sys.stdout.isatty(), leave=False)
        with bar:
            while self.step < len(batches):
                yield batches.batch(self.epoch, self.step)
                self.step += 1
                bar.set_postfix_str(str(self.meter), refresh=False)
                bar.update()
                if self.step % self.args.report_freq == 0 or self.step == len(batches):
                    logger.debug("%s step %d/%d %s", label, self.step, len(batches), self.meter)
                self.stop_if_asked()
                if time.monotonic() - self._saved_at > _SAVE_EVERY:
                    self.save()

    def record(self, loss, logits, target):
        """Add a training batch to the averages of the epoch.

        Raises:
            UserError: the loss is not finite: names the step, the learning rate and the last good checkpoint.
        """
        loss = loss.item()
        if not math.isfinite(loss):
            lr = self.parts["optimizer"].param_groups[0]["lr"]
            raise UserError(
                f"the loss became {loss} in epoch {self.epoch + 1}, step {self.step + 1}, at learning rate {lr:.3g}; "
                f"the last good checkpoint is {self.checkpoint}; try a lower --learning_rate"
            )
        self.meter.update(loss, logits, target)

    def stop_if_asked(self):
        """After SIGINT or SIGTERM: save, say how to go on, exit with 128 + signal."""
        if self._signal is not None:
            self.save()
            logger.info("stopped in epoch %d after step %d; go on with:", self.epoch + 1, self.step)
            logger.info("  python %s --resume %s", Path(sys.argv[0]).name, self.folder)
            sys.exit(128 + self._signal)

    def end_epoch(self, row):
        """Keep an epoch's numbers, save, and write metrics.csv and the curves."""
        self.history.append(row)
        self.epoch, self.step, self.meter = self.epoch + 1, 0, AverageMeter()
        self.save()
        self.write_history()

    def write_history(self):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_text(self.folder / "metrics.csv", text.getvalue())
        plot_curves(self.history, self.folder / "figures" / "curves.png")

    def save(self):
        state = self.facts | {name: part.state_dict() for name, part in self.parts.items()}
        state.update(
            args=vars(self.args) | {"resume": None},
            epoch=self.epoch,
            step=self.step,
            sums=self.meter.sums,
            history=self.history,
            random=torch.get_rng_state(),
            cuda_random=torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        )
        with replacing(self.checkpoint) as temporary:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # a crash of the machine leaves the old checkpoint or the new one
        self._saved_at = time.monotonic()

    def _restore(self):
        self._saved_at = time.monotonic()
        state = load_checkpoint(self.checkpoint)
        try:
            load_weights(self.parts["model"], state["model"], self.checkpoint)
            for name, part in self.parts.items():
                if name != "model":
                    part.load_state_dict(state[name])
            self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
            self.meter = AverageMeter(state["sums"])
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda" and state["cuda_random"]:
                torch.cuda.set_rng_state_all(state["cuda_random"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.checkpoint} is not a checkpoint of this script ({error!r})") from None
        if self.history:
            self.write_history()  # a kill may have come between the checkpoint and these


def _new_folder(kind, name):
    stamp = f"{kind}-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(100):  # several runs may start in one second
        folder = Path("runs") / (stamp if attempt == 0 else f"{stamp}-{attempt + 1}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder}: {error.strerror}") from None
        (folder / "figures").mkdir()
        return folder
    raise UserError(f"cannot make a new run folder runs/{stamp}: too many of that name")


def _config(args, device):
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, np, matplotlib)}
    return {
        "script": Path(sys.argv[0]).name,
        "args": vars(args) | {"resume": None},
        "versions": {"python": sys.version.split()[0], **versions},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def _git_commit():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git on this machine
        return None


def plot_curves(history, path):
    """Training and validation accuracy and loss over the epochs, two panels, as a PNG."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, what, unit in zip(figure.subplots(1, 2), ("acc", "loss"), ("accuracy (%)", "loss"), strict=True):
        for part, color in (("train", "tab:blue"), ("valid", "tab:orange")):
            values = [row[f"{part}_{what}"] for row in history]
            axes.plot(epochs, values, color=color, marker="o" if len(epochs) < 30 else None, ms=3, label=part)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
