"""Run folders: everything that a run needs to go on, its log, its numbers, its curves.

runs/search-NAME-TIMESTAMP/      or train-…
    config.json                  every setting, versions, device, git commit
    log.txt
    metrics.csv                  one row an epoch
    genotype.json                readable by genotypes.parse
    checkpoint.pt                weights, alphas, optimizers, scheduler, epoch, step, random states
    figures/                     curves.png, normal.png, reduction.png, and the .gv sources
"""

import argparse
import csv
import io
import json
import logging
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import genotypes
import involution
import visualize
from operations import KERNEL_NORM
from utils import (
    AverageMeter,
    UserError,
    load_checkpoint,
    load_weights,
    log_device,
    number,
    replacing,
    user_value,
    write_text,
)

logger = logging.getLogger("darts.run")

# settings that may differ between a run and its continuation: they do not change what is computed
PORTABLE = ("data", "device", "gpu", "report_freq", "cuda_graph")
_BEFORE = {"kernel_norm": "none"}  # what runs did that are older than the setting
_SAVE_EVERY = 300  # seconds between two checkpoints within an epoch


# --------------------------------------------------------------------------------------------- command lines


def add_arguments(parser, seed):
    group = parser.add_argument_group("run")
    group.add_argument("--save", default="EXP", type=user_value(_run_name), help="name of the run folder, in runs/")
    group.add_argument(
        "--resume",
        metavar="RUN_FOLDER",
        type=user_value(_not_empty),
        help="go on with an interrupted run, with its own settings",
    )
    group.add_argument("--seed", type=number(int, low=0, high=2**63 - 1), default=seed, help="random seed")
    group.add_argument("--report_freq", type=number(int, low=1), default=50, help="steps between two report lines")


def settings(saved):
    """The settings (a dict) that a run keeps, with those that are younger than the run."""
    return _BEFORE | saved


def _not_empty(text):
    if not text:
        raise ValueError("must be the path of a run folder, got ''")
    return text


def _run_name(text):
    if Path(text).name != text or not 1 <= len(text) <= 100 or text == "..":
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
    actions = {action.dest: action for action in parser._actions}
    for name, value in saved.items():
        if name not in actions:
            raise UserError(f"--resume {args.resume}: the run has a setting {name!r} that this version does not know")
        if not _is_setting(actions[name], value):
            raise UserError(f"--resume {args.resume}: config.json is damaged: {name} is {value!r}")
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


def _is_setting(action, value):
    """Whether the command line can give `action` this value."""
    if value is None or isinstance(value, bool):
        return type(value) is type(action.default)
    try:
        return (action.type or str)(str(value)) == value and (action.choices is None or value in action.choices)
    except (ValueError, argparse.ArgumentTypeError):
        return False


def _read_config(folder, script):
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such folder")
    if not (folder / "checkpoint.pt").is_file():
        raise UserError(f"--resume {folder}: no checkpoint.pt in it; nothing to go on with")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["script"] != script:
            raise UserError(f"--resume {folder}: that run is one of {config['script']}, not of {script}")
        return settings(dict(config["args"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--resume {folder}: config.json is missing or damaged ({error})") from None


# ---------------------------------------------------------------------------------------------- run folders


class Run:
    """A run folder, and where the run in it stands.

    Everything that the next step depends on is in `checkpoint.pt`: the parts' state dicts, epoch, step, the sums of
    the epoch so far, the finished epochs, the random states. As a context manager it turns SIGINT and SIGTERM into
    "finish this step, save, exit and say how to resume".

    Args:
        kind: "search" or "train".
        parts: name -> object with `state_dict` and `load_state_dict`; needs `model`, `optimizer` and `scheduler`.
        facts: further plain values to keep in the checkpoint, for those who read it.
    """

    def __init__(self, kind, args, device, parts, **facts):
        self.args, self.device, self.parts, self.facts = args, device, parts, facts
        self.epoch = self.step = 0
        self.meter = AverageMeter()
        self.history = []  # a dict of numbers for every finished epoch
        self._signal = None
        self._threads = torch.get_num_threads()  # of a run that is resumed: those it was saved with
        self._said_why_no_drawing = self._said_not_finite = False
        self.folder = Path(args.resume) if args.resume is not None else _new_folder(kind, args.save)
        self.checkpoint = self.folder / "checkpoint.pt"
        if args.resume is not None:
            self._restore()
        else:
            write_text(self.folder / "config.json", json.dumps(_config(args, device), indent=2) + "\n")
            self.save()
        handler = logging.FileHandler(self.folder / "log.txt")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logging.getLogger().addHandler(handler)
        logger.info("%s %s", "resuming" if args.resume else "run folder", self.folder)
        log_device(device)
        threads = torch.get_num_threads()
        if device.type == "cpu" and self._threads != threads:
            what = "this run had %d CPU threads and now has %d: its numbers will differ in their last digits; "
            logger.warning(what + "OMP_NUM_THREADS=%d goes on exactly", self._threads, threads, self._threads)

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
            raise self.diverged(f"the loss became {loss}", self.step + 1)
        self.meter.update(loss, logits, target)

    def diverged(self, what, step):
        """The UserError that says what is no longer finite, where, and where to go on from."""
        lr = self.parts["optimizer"].param_groups[0]["lr"]
        return UserError(
            f"{what} in epoch {self.epoch + 1}, step {step}, at learning rate {lr:.3g}; "
            f"the last good checkpoint is {self.checkpoint}; {self._cure()}"
        )

    def _cure(self):
        """What a user can do about numbers that are not finite."""
        layers = [m for m in self.parts["model"].modules() if isinstance(m, involution.Involution2d)]
        if any(layer.kernel_norm == "none" for layer in layers):
            return f"bound the kernels of the involutions: a new run with --kernel_norm {KERNEL_NORM}"
        return "try a lower --learning_rate"

    def stop_if_asked(self):
        """After SIGINT or SIGTERM: save, say how to go on, exit with 128 + signal."""
        if self._signal is not None:
            self.save()
            logger.info("stopped in epoch %d after step %d; go on with:", self.epoch + 1, self.step)
            logger.info("  %s", command(Path(sys.argv[0]).name, "--resume", self.folder))
            sys.exit(128 + self._signal)

    def end_epoch(self, valid, **more):
        """Log and keep an epoch's numbers, step the scheduler, save, and write metrics.csv and the curves.

        Args:
            valid: AverageMeter of the validation images.
            more: further columns of metrics.csv.

        Raises:
            UserError: not one validation image has finite logits; the old checkpoint stays.
        """
        lr = self.parts["optimizer"].param_groups[0]["lr"]
        logger.info(
            "epoch %d/%d lr %.3e | train %s | valid %s", self.epoch + 1, self.args.epochs, lr, self.meter, valid
        )
        if valid.finite_images == 0:
            raise self.diverged("no validation image has finite logits any more", self.step)
        lost = valid.images - valid.finite_images
        if lost and not self._said_not_finite:
            what = "%d of %d validation images have logits that are not finite, and count as misses; %s"
            logger.warning(what, lost, valid.images, self._cure())
        self._said_not_finite |= lost > 0
        row = dict(epoch=self.epoch + 1, lr=lr, train_loss=self.meter.loss, train_acc=self.meter.top1)
        self.history.append(row | dict(valid_loss=valid.loss, valid_acc=valid.top1) | more)
        self.parts["scheduler"].step()
        self.epoch, self.step, self.meter = self.epoch + 1, 0, AverageMeter()
        self.save()
        self.write_history()

    def report(self, genotype):
        """Log the genotype as a line that --arch takes; write genotype.json and the drawings of the two cells."""
        logger.info("genotype = %s", genotypes.format(genotype))
        write_text(self.folder / "genotype.json", genotypes.to_json(genotype))
        try:
            visualize.draw(genotype, self.folder / "figures")
        except visualize.DrawingError as error:
            if not self._said_why_no_drawing:
                logger.warning("%s", error)
            self._said_why_no_drawing = True

    def write_history(self):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_text(self.folder / "metrics.csv", text.getvalue())
        plot_curves(self.history, self.folder / "figures" / "curves.png")

    def save(self):
        """Replace checkpoint.pt.

        Raises:
            UserError: the weights are not finite; the old checkpoint stays.
        """
        weights = [*self.parts["model"].state_dict().values()]
        if not all(w.isfinite().all() for w in weights):
            raise self.diverged("the weights became infinite or NaN", self.step)
        state = self.facts | {name: part.state_dict() for name, part in self.parts.items()}
        state.update(
            args=vars(self.args) | {"resume": None},
            epoch=self.epoch,
            step=self.step,
            sums=self.meter.sums,
            history=self.history,
            threads=torch.get_num_threads(),
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
            self._threads = int(state.get("threads", self._threads))  # older runs do not say
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


def command(script, *arguments):
    """The line that runs one of our scripts, in this folder and with this Python."""
    python = os.path.relpath(sys.executable)
    script = os.path.relpath(Path(__file__).with_name(script))
    return shlex.join([sys.executable if python.startswith("..") else python, script, *map(str, arguments)])


def _config(args, device):
    versions = {"torch": torch.__version__} | {name: version(name) for name in ("torchvision", "numpy")}
    return {
        "script": Path(sys.argv[0]).name,
        "args": vars(args) | {"resume": None},
        "versions": {"python": sys.version.split()[0], **versions},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "involution_backend": involution.backend(device),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def _git_commit():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git on this machine
        return None


def off_scale(values):
    """Where to cut an axis off whose values are a few huge ones above many usual ones; None for nowhere."""
    finite = [value for value in values if math.isfinite(value)]
    usual = statistics.median(finite) if finite else 0
    return 2.5 * usual if finite and max(finite) > 10 * usual else None


def plot_curves(history, path):
    """Training and validation accuracy and loss over the epochs, two panels, as a PNG."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, what, unit in zip(figure.subplots(1, 2), ("acc", "loss"), ("accuracy (%)", "loss"), strict=True):
        for part, color in (("train", "tab:blue"), ("valid", "tab:orange")):
            values = [row[f"{part}_{what}"] for row in history]
            axes.plot(epochs, values, color=color, marker="o" if len(epochs) < 30 else None, ms=3, label=part)
        axes.set(xlabel="epoch", ylabel=unit)
        top = off_scale([row[f"{part}_{what}"] for row in history for part in ("train", "valid")])
        if top is not None:
            axes.set_ylim(0, top)
            axes.set_title("values above the frame: see metrics.csv", fontsize="small")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
