"""Run folders: everything that a run needs to go on, its log, its numbers, its curves.

runs/search-NAME-TIMESTAMP/      or train-…
    config.json                  every setting, versions, device, git commit, what the images are
    log.txt
    metrics.csv                  one row an epoch
    genotype.json                readable by genotypes.parse
    checkpoint.pt                weights, alphas, optimizers, scheduler, epoch, step, random states
    checkpoint.previous.pt       the checkpoint before it
    figures/                     curves.png, eigenvalue.png, normal.png, reduction.png, and the .gv sources
    summary.json, events/        what it cost, TensorBoard's events, and what a search has of its alphas: watch/
    report.html                  the page of the run (report.py)
"""

import contextlib
import csv
import io
import json
import logging
import logging.handlers
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

import genotypes
import involution
import visualize
from data import check_unchanged
from images.stream import ReadError
from operations import KERNEL_NORM
from runtime import checkpoint, processes, progress, schedule, settings
from utils import AverageMeter, Diverged, UserError, log_device, processor, remove_temporaries, write_text
from watch.curves import plot_curves, plot_eigenvalue
from watch.observer import Bystander, Observer

try:
    import fcntl
except ImportError:  # Windows: runs are not locked
    fcntl = None

logger = logging.getLogger("darts.run")

BUSY = "another process is at work on this run"
_SAVE_EVERY = 300  # seconds between two checkpoints within an epoch
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TOO_LONG = 0.1  # of an epoch, to wait for images


class Run:
    """A run folder, and where the run in it stands.

    Everything that the next step depends on is in `checkpoint.pt`: the parts' state dicts, epoch, step, the sums of
    the epoch so far, the finished epochs, the random states. As a context manager it turns SIGINT and SIGTERM into
    "finish this step, save, exit and say how to resume".

    Several processes are one run: each calls every method, and the first one alone makes the folder, draws and saves.
    What one of them is asked to do, all do after the same step.

    Args:
        kind: "search" or "train".
        parts: name -> object with `state_dict` and `load_state_dict`; needs `model`, `optimizer` and `scheduler`.
        team: the `processes.Processes` of the run.
        facts: further plain values to keep in the checkpoint, for those who read it; `data` has the fingerprints of
            the images (`data.fingerprint`) by name: other ones are not gone on with.

    Raises:
        UserError: a folder that cannot be made or resumed; processes that were started with other settings or images.
    """

    def __init__(self, kind, args, device, parts, team=processes.ALONE, **facts):
        self.kind, self.args, self.device, self.parts, self.facts = kind, args, device, parts, facts
        self.team, self.leads = team, team.rank == 0
        self.epoch = self.step = 0
        self.meter = AverageMeter()
        self._batch = None  # the sums of this process's share of a batch, and the norm of the gradient
        self.history = []  # a dict of numbers for every finished epoch
        self._asked = self._signal = None  # the signal that this process has got, and that all of them know of
        self._handlers = {}
        self._threads = torch.get_num_threads()  # of a run that is resumed: those it was saved with
        self._said_why_no_drawing = self._said_not_finite = False
        self._check_settings()
        self.folder = Path(args.resume if args.resume is not None else team.agreed("folder", self._make_folder))
        self.checkpoint = self.folder / checkpoint.NAME
        self._log, self.observer = None, (Observer if self.leads else Bystander)(self)
        try:
            self._log = _LogFile(self.folder / "log.txt") if self.leads else None
            if args.resume is not None:
                self._restore()
            else:
                if self.leads:
                    config = dict(script=Path(sys.argv[0]).name, args=vars(args) | {"resume": None})
                    config |= environment(device) | {"processes": team.count, "data": facts.get("data", {})}
                    write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
                self.save()
            self.observer.begin(resumed=args.resume is not None)
        except Exception as error:
            self.__exit__(type(error))
            raise
        if self.leads:
            self._log.open_to_all()
        logger.info("%s %s", "resuming" if args.resume else "run folder", self.folder)
        log_device(device)
        if team.count > 1:
            logger.info("%d processes, which share the images of every batch", team.count)
        threads = torch.get_num_threads()
        if device.type == "cpu" and self._threads != threads:
            what = "this run had %d CPU threads and now has %d: its numbers will differ in their last digits; "
            logger.warning(what + "OMP_NUM_THREADS=%d goes on exactly", self._threads, threads, self._threads)

    def __enter__(self):
        self._handlers = {s: signal.signal(s, self._on_signal) for s in _SIGNALS}
        return self

    def __exit__(self, kind=None, error=None, *_):
        """End the log, so that another process may go on; a run that failed before its first step leaves nothing.

        Images that cannot be read any more stop a run where a signal does, between two steps: it is saved.
        """
        try:
            if isinstance(error, ReadError) and self._begun and self.team.count == 1:  # the others know nothing of it
                self.stop_if_asked()  # a signal to all processes may have ended those that read
                self._save_and_say_how_to_go_on()
        finally:
            for number_, handler in self._handlers.items():
                signal.signal(number_, handler)
            if self._log:
                self._log.close()
            self.observer.close()
        if self.leads and kind is not None and issubclass(kind, Exception) and not self._begun:
            if self._log:
                shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds other runs, or another process is at work in it
                if not self._log:
                    self.folder.rmdir()
                self.folder.parent.rmdir()

    @property
    def judged_by(self):
        """The images behind the columns valid_*: "test", or "validation" where training images are held out."""
        return judged_by(self.kind, vars(self.args))

    @property
    def stopped(self):
        """Whether an early stop has ended the run, with the genotype of the epoch in the last column `kept_epoch`."""
        return bool(self.history) and "kept_epoch" in self.history[-1]

    @property
    def _begun(self):
        return self.args.resume is not None or self.epoch + self.step > 0

    def _on_signal(self, number_, _):
        several = self.team.count > 1
        if self._asked is not None and not several:  # torchrun passes a signal on as often as it likes
            raise KeyboardInterrupt
        self._asked = number_
        if self.leads:
            more = "" if several else " (once more stops at once)"
            tqdm.write(f"finishing this step, then saving{more}", file=sys.stderr)

    def _make_folder(self):
        folder = Path(self.team.recorded() or _folder(self.kind, self.args))
        folder.mkdir(parents=True, exist_ok=True)  # of processes that were killed before they had a checkpoint
        self.team.record(folder)
        return str(folder)

    def _check_settings(self):
        mine = {name: value for name, value in vars(self.args).items() if name not in settings.PORTABLE}
        others = self.team.differing(repr((mine, self.facts)).encode())
        if others:
            raise UserError(f"rank {others[0]} was started with other settings, or reads other images, than rank 0")

    def steps(self, batches, *others):
        """Yield the augmented batches that are left of this epoch, with a progress bar or report lines.

        Args:
            others: further batches that a step takes, whose waiting for images counts too.
        """
        start, waited = time.monotonic(), -sum(each.waited for each in (batches, *others))
        label = f"epoch {self.epoch + 1}/{self.args.epochs}"
        if self.step > len(batches):
            raise UserError(f"{self.checkpoint} is damaged: step {self.step} of an epoch of {len(batches)} steps")
        bar = tqdm(total=len(batches), initial=self.step, desc=label, disable=not sys.stdout.isatty(), leave=False)
        self.observer.begin_epoch(len(batches))
        with bar:
            while self.step < len(batches):
                progress.doing(f"{label} step {self.step + 1}/{len(batches)}")
                self.team.seed(self.args.seed, self.epoch, self.step)
                yield batches.batch(self.epoch, self.step)
                due = self._agree(batches.images(self.step))
                self.step += 1
                self.observer.step()
                if not bar.disable:
                    bar.set_postfix_str(f"{self.meter}, {self.observer.remaining()}", refresh=False)
                bar.update()
                if self.step % self.args.report_freq == 0 or self.step == len(batches):
                    logger.debug("%s step %d/%d %s", label, self.step, len(batches), self.meter)
                self._stop_if_agreed()
                if due:
                    self.save()
        waited += sum(each.waited for each in (batches, *others))
        if waited > 0:
            share = waited / (time.monotonic() - start)
            level, advice = (logging.WARNING, "; more --workers may help") if share > _TOO_LONG else (logging.DEBUG, "")
            logger.log(level, "%s: %.1f%% of the time spent waiting for images%s", label, 100 * share, advice)

    def _agree(self, images=0):
        """What all processes know together, in one collective: the sums of a batch, a signal, whether to save.

        Args:
            images: of the batch, in all shares.

        Returns:
            Whether a checkpoint is due, by the clock of the first process.
        """
        batch, norm = self._batch if self._batch else (5 * [0], None)
        asked = [self._asked == number for number in _SIGNALS]
        due = self.leads and time.monotonic() - self._saved_at > _SAVE_EVERY
        *sums, due = self.team.total([*batch, *asked, due])
        if sums[0]:
            self.meter.add_shares(sums[:5], images)
            self.observer.batch(images, norm)
        self._batch = None
        self._signal = next((number for number, count in zip(_SIGNALS, sums[5:], strict=True) if count), None)
        return due

    def record(self, loss, logits, target, grad_norm=None):
        """Add this process's share of a training batch to the averages of the epoch, which they enter with the step.

        Args:
            loss: mean over the batch, of all processes.
            grad_norm: the norm of its gradient, for the curves alone.

        Raises:
            Diverged: the loss is not finite: names the step, the learning rate and the last good checkpoint.
        """
        loss = loss.item()
        if not math.isfinite(loss):
            raise self.diverged(f"the loss became {loss}", self.step + 1)
        batch = AverageMeter()
        batch.update(loss, logits, target)
        self._batch = batch.sums, grad_norm

    def diverged(self, what, step):
        """The Diverged that says what is no longer finite, where, and where to go on from."""
        lr = self.parts["optimizer"].param_groups[0]["lr"]
        good = f"the last good checkpoint is {self.checkpoint}; " if self._begun else ""
        return Diverged(
            f"{what} in epoch {self.epoch + 1}, step {step}, at learning rate {lr:.3g}; {good}{self._cure()}"
        )

    def _cure(self):
        """What a user can do about numbers that are not finite."""
        layers = [m for m in self.parts["model"].modules() if isinstance(m, involution.Involution2d)]
        if any(layer.kernel_norm == "none" for layer in layers):
            return f"bound the kernels of the involutions: a new run with --kernel_norm {KERNEL_NORM}"
        return "try a lower --learning_rate"

    def stop_if_asked(self):
        """After SIGINT or SIGTERM to one of the processes: save, say how to go on, exit with 128 + signal."""
        self._agree()
        self._stop_if_agreed()

    def _stop_if_agreed(self):
        if self._signal is not None:
            self._save_and_say_how_to_go_on()
            sys.exit(128 + self._signal)

    def _save_and_say_how_to_go_on(self):
        self.save()
        logger.info("stopped in epoch %d after step %d; go on with:", self.epoch + 1, self.step)
        logger.info("  %s", command(Path(sys.argv[0]).name, "--resume", self.folder, team=self.team))

    def end_epoch(self, valid, **more):
        """Log and keep an epoch's numbers, step the scheduler, save, and write metrics.csv and the curves.

        Args:
            valid: Evaluation of the validation images.
            more: further columns of metrics.csv.

        Raises:
            Diverged: not one validation image has finite logits; the old checkpoint stays.
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
        explosion = valid.explosion("validation")
        if explosion:
            logger.warning("%s", explosion)
        row = dict(epoch=self.epoch + 1, lr=lr, train_loss=self.meter.loss, train_acc=self.meter.top1)
        self.history.append(row | dict(valid_loss=valid.loss, valid_acc=valid.top1) | more)
        self.parts["scheduler"].step()
        self.epoch, self.step, self.meter = self.epoch + 1, 0, AverageMeter()
        self.observer.end_epoch()
        self.save()
        self.write_history()
        self.observer.write()

    def report(self, genotype):
        """Log the genotype as a line that --arch takes; write genotype.json and the drawings of the two cells."""
        logger.info("genotype = %s", genotypes.format(genotype))
        if not self.leads:
            return
        write_text(self.folder / "genotype.json", genotypes.to_json(genotype))
        try:
            self.observer.cells(visualize.draw(genotype, self.figures(), name=self.folder.name))
        except visualize.DrawingError as error:
            if not self._said_why_no_drawing:
                logger.warning("%s", error)
            self._said_why_no_drawing = True

    def figures(self):
        """The folder of its pictures."""
        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    def write_history(self):
        if not self.leads:
            return
        text = io.StringIO()
        columns = dict.fromkeys(name for row in self.history for name in row)
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_text(self.folder / "metrics.csv", text.getvalue())
        plot_curves(self.history, self.judged_by, self.figures() / "curves.png")
        if any("eigenvalue" in row for row in self.history):
            plot_eigenvalue(self.history, self.figures() / "eigenvalue.png")

    def save(self):
        """Replace checkpoint.pt.

        Raises:
            Diverged: the weights are not finite.
            UserError: they are not the same in all processes. The old checkpoint stays.
        """
        self._check_processes()
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
            processes=self.team.count,
            observed=self.observer.state_dict(),
            random=torch.get_rng_state(),
            cuda_random=[torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [],
        )
        if self.leads:
            checkpoint.save(state, self.checkpoint)
        self._saved_at = time.monotonic()
        self.team.meet()  # none goes on, or ends, before it is written

    def _check_processes(self):
        """Raise UserError unless weights, alphas, running statistics and optimizers are the same in all processes."""
        if self.team.count == 1:
            return
        states = [part.state_dict() for part in self.parts.values()]
        others = self.team.differing(processes.digest(_tensors(states)))
        if others:
            raise UserError(
                f"rank {others[0]} no longer holds the weights of rank 0 in epoch {self.epoch + 1}, step {self.step} "
                f"(are they machines of one kind?); the last checkpoint at which they agreed is {self.checkpoint}"
            )

    def _restore(self):
        self._saved_at = time.monotonic()
        if self.leads:
            remove_temporaries(self.folder)
        state = checkpoint.load(self.checkpoint)
        self.team.meet()  # none writes before all have read
        checkpoint.check(state, self.checkpoint, needs={*self.parts, *self.facts} - {"data"})
        fingerprints = self.facts.get("data")
        if "data" in state and fingerprints:  # not kept by runs of before
            for part, now in fingerprints.items():
                check_unchanged(part, state["data"].get(part, now), now)
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.meter = AverageMeter(state["sums"])
        self._threads = state.get("threads", self._threads)  # older runs do not say
        before = state.get("processes", 1)
        if before != self.team.count:
            what = (
                "this run had %d processes and now has %d: batch norm sees other shares of a batch, and other numbers "
            )
            logger.warning(what + "come out than with %d", before, self.team.count, before)
        self._restore_parts(state)
        before = state["args"]["epochs"]
        if self.args.epochs != before:
            if self.stopped:
                what = (
                    f"--resume {self.folder}: it was stopped early after epoch {self.epoch}, and more --epochs do not"
                )
                raise UserError(f"{what} change that; start a new run with --early_stop none")
            self._extend(before)
        if self.history:
            self.write_history()  # a kill may have come between the checkpoint and these

    def _restore_parts(self, state):
        checkpoint.load_weights(self.parts["model"], state["model"], self.checkpoint)
        name = "scheduler"
        try:
            checkpoint.load_scheduler(self.parts[name], state[name], self.epoch)
            for name in sorted({*self.parts} - {"model", "scheduler"}):
                checkpoint.load_optimizer(self.parts[name], state[name])
            self.parts["optimizer"].step()  # without gradients, moves nothing; the scheduler wants one before its own
            name = "observed"
            self.observer.load_state_dict(state.get(name))  # not kept by runs of before
            name = "random"
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda" and state["cuda_random"]:
                of_devices = state["cuda_random"]  # runs of before kept that of every GPU, one after the other
                own = (self.device.index or 0) if len(of_devices) > 1 else 0
                torch.cuda.set_rng_state(of_devices[min(own, len(of_devices) - 1)], self.device)
        except Exception as error:  # as many kinds as there are wrong values
            what = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self.checkpoint} is damaged or of another script: its {name}: {what}") from None

    def _extend(self, before):
        """Go on along the schedule of the new number of epochs, from where it is at this epoch."""
        scheduler, optimizer, epochs = self.parts["scheduler"], self.parts["optimizer"], self.args.epochs
        was = optimizer.param_groups[0]["lr"]
        for group, rate in zip(optimizer.param_groups, schedule.learning_rates(scheduler, self.epoch), strict=True):
            group["lr"] = rate
        if self.leads:
            path = self.folder / "config.json"
            config = json.loads(path.read_text())
            config["args"]["epochs"] = epochs
            write_text(path, json.dumps(config, indent=2) + "\n")
        self.save()
        logger.info(
            "extended from %d to %d epochs: the learning rate is that of a schedule of %d epochs, %.3g from here on "
            "(it was %.3g)",
            *(before, epochs, epochs, optimizer.param_groups[0]["lr"], was),
        )


def judged_by(kind, settings):
    """What the images behind the columns valid_* of a run with these settings (a dict) are."""
    return "validation" if kind == "search" or settings.get("train_portion", 1) < 1 else "test"


class _LogFile(logging.FileHandler):
    """log.txt. Only one process at a time has it: the lock ends with the process, however that ends.

    Raises:
        UserError: another process has it.
    """

    def __init__(self, path):
        super().__init__(path)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        try:
            if fcntl:
                fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"{path.parent}: {BUSY}; stop it first") from None
        except OSError:  # a file system without locks
            pass

    def open_to_all(self):
        """Write down what is logged from now on, and what has been before there was a log.txt."""
        root = logging.getLogger()
        root.addHandler(self)
        for early in [handler for handler in root.handlers if isinstance(handler, logging.handlers.MemoryHandler)]:
            root.removeHandler(early)
            early.setTarget(self)
            early.close()

    def handleError(self, record):
        error = sys.exc_info()[1]
        if isinstance(error, OSError):  # a full disk
            raise OSError(error.errno, error.strerror, self.baseFilename) from None
        super().handleError(record)

    def close(self):
        logging.getLogger().removeHandler(self)
        with contextlib.suppress(OSError):  # of a full disk, which has been told
            super().close()


def is_busy(folder):
    """Whether a process, on any machine that shares the folder, is at work on the run in it."""
    try:
        with open(Path(folder) / "log.txt") as log:
            if fcntl:
                fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no run yet, or a file system without locks
        pass
    return False


def _folder(kind, args):
    """The run folder that --resume or --folder names, or a new one."""
    if args.resume is not None:
        return Path(args.resume)
    return _new_folder(kind, args.save) if args.folder is None else _named_folder(Path(args.folder))


def _named_folder(folder):
    """Make the folder of --folder; one that a run left which was killed before its first checkpoint is taken over."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error.strerror}") from None
    if (folder / checkpoint.NAME).exists():
        raise UserError(f"--folder {folder} holds a run already: go on with it (--resume {folder}), or name another")
    left = re.compile(r"config\.json|log\.txt|\..+\.\d+")  # the last: what was being written, and is not yet in place
    other = {path.name for path in folder.iterdir() if not left.fullmatch(path.name)}
    if other:
        raise UserError(f"--folder {folder} holds {min(other)}, which is not of a run: name a new or an empty folder")
    return folder


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
        return folder
    raise UserError(f"cannot make a new run folder runs/{stamp}: too many of that name")


def _tensors(value):
    """The tensors in nested dicts and lists, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def command(script, *arguments, team=processes.ALONE):
    """The line that runs one of our scripts, in this folder and with this Python, or as the processes of a team."""
    python = os.path.relpath(sys.executable)
    script = os.path.relpath(Path(__file__).with_name(script))
    # a folder of our own may have the name of a flag or of a genotype
    arguments = [os.path.join(".", a) if isinstance(a, Path) and len(a.parts) == 1 else str(a) for a in arguments]
    if team.count > 1:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        how = [f"--nproc_per_node={here}"] if here == team.count else ["(as", "before)"]
        return " ".join(["torchrun", *how, shlex.join([script, *arguments])])
    return shlex.join([sys.executable if python.startswith("..") else python, script, *arguments])


def environment(device):
    """What a result was computed with, as plain values for a JSON file."""
    versions = {"torch": torch.__version__} | {name: version(name) for name in ("torchvision", "numpy")}
    return {
        "versions": {"python": sys.version.split()[0], **versions},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": processor(),
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
