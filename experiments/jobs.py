"""One job of a plan: what has been done of it, as its run folder shows, and how it is started or gone on with.

An experiment keeps no list of what it did. A job is finished where its run folder says so; where its script ended with
an error, `logs/JOB.failed` has the last line, until the job is retried; else it is started, or resumed where it
stopped. A run whose loss diverged has ended too: that is its result.

Nothing is lost when an experiment is killed. Its jobs have checkpoints of their own, and those that are still at work
are waited for by whoever wants to go on with them.
"""

import contextlib
import csv
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import data
import diagnostics
import genotypes
import report
import run_folder
from runtime import checkpoint, progress, settings
from utils import Diverged, UserError, write_text

logger = logging.getLogger("darts.jobs")

ENDED = ("finished", "diverged", "failed")
# settings that make no other run: names, how often a search looks at its sharpness, what --arch random draws from
_OWN = {
    "train_search.py": ("save", "folder", "resume", "eigenvalue_every"),
    "train.py": ("save", "folder", "resume", "search_space"),
}
_PROBE = 2.0  # seconds between two looks at a run that another process is at work on


class State(NamedTuple):
    """What has been done of a job."""

    status: str  # "waiting", "begun", "finished", "diverged" or "failed"
    rows: list  # of metrics.csv, as texts
    line: str = ""  # the last line of one that failed or diverged

    @property
    def epochs(self):
        return int(self.rows[-1]["epoch"]) if self.rows else 0

    def value(self, column):
        """A number of the last epoch; None before there is one."""
        return float(self.rows[-1][column]) if self.rows else None


def look(job, folder):
    """The State of a job, from the files in the experiment's folder."""
    run, rows = folder / job.name, []
    with contextlib.suppress(OSError), (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    state = State("begun" if (run / checkpoint.NAME).exists() else "waiting", rows)
    ended = state.epochs >= job.args.epochs or (rows and rows[-1].get("kept_epoch"))
    if ended and (job.stage != "search" or _has_its_genotype(run, rows)):
        return state._replace(status="finished")
    try:
        failure = json.loads(_failure(job, folder).read_text())
    except OSError:
        return state
    status = "diverged" if failure["exit_code"] == Diverged.exit_code else "failed"
    return state._replace(status=status, line=failure["line"])


def _has_its_genotype(run, rows):
    """Whether genotype.json is that which the search ends with: a kill may have come between."""
    try:
        texts = run, diagnostics.final_row(rows)["genotype"]
        of_folder, of_last = (genotypes.to_json(genotypes.parse(text)) for text in texts)
        return of_folder == of_last
    except ValueError:
        return False


def retry(job, folder):
    """Forget that a job failed, so that it is taken up again; one that diverged would do so again."""
    if look(job, folder).status == "failed":
        _failure(job, folder).unlink()


def check(job, folder):
    """Raise UserError if what lies in the run folder of a job is a run of other settings."""
    run = folder / job.name
    path = run / "config.json"
    try:
        config = json.loads(path.read_text())
        script, saved = config["script"], config["args"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): move {run} away") from None
    if script != job.script:
        raise UserError(f"{run} is a run of {checkpoint.shown(script)}, and the plan wants one of {job.script} there")
    saved = settings.check(saved, job.parser, path)
    for name, value in vars(job.args).items():
        if name not in (*settings.PORTABLE, *_OWN[job.script]) and saved[name] != value:
            raise UserError(
                f"{run} is a run with --{name} {saved[name]}, and the plan says {value}: change the plan, or move "
                "that folder away"
            )


_READ = "dataset", "data", "image_size", "fit", "skip_broken", "subset"  # what decides which images a job reads


def check_images(of, folder):
    """Raise UserError if two jobs that read the same images, by the plan, have read different ones."""
    seen = {}
    for job in of:
        read = [getattr(job.args, name) for name in _READ]
        drawn = job.args.seed if job.args.subset else None
        for part, images in _read_images(folder / job.name).items():
            first, before = seen.setdefault((part, drawn, *read), (job, images))
            if what := data.difference(before, images):
                raise UserError(
                    f"{folder / job.name} has other {part} images than {folder / first.name} ({what}): move away what "
                    "was made of the wrong ones"
                )


def _read_images(run):
    """The fingerprints of what a run has read, by its part; none of a run that has not begun, or of before them."""
    try:
        return json.loads((run / "config.json").read_text()).get("data", {})
    except (OSError, ValueError, RecursionError):
        return {}


def seconds(job, folder):
    """How long the processes of a job have been at work."""
    return report.seconds(folder / job.name)


def now(job, folder):
    """What a job that is at work does: the last line of its log, without the time; None if none is at work."""
    log = folder / job.name / "log.txt"
    try:
        if time.time() - log.stat().st_mtime > 4 * progress.SILENCE:
            return None
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    steps = [line[20:] for line in lines if line[20:].startswith("epoch ")]
    return steps[-1] if steps else "starting"


# ------------------------------------------------------------------------------------------------- running


class Children:
    """The processes that this one has started, so that all can be asked to stop."""

    def __init__(self):
        self.stopping, self._processes = False, set()

    def call(self, command, output, environment):
        """Run a command to its end; its exit code."""
        # a session of its own: Ctrl-C in a terminal reaches this process, which passes it on once
        pipes = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        process = subprocess.Popen(command, env=environment, **pipes)
        self._processes.add(process)
        if self.stopping:
            process.terminate()
        try:
            return process.wait()
        finally:
            self._processes.discard(process)

    def stop(self):
        """Ask the processes to save and exit, and start no more."""
        self.stopping = True
        for process in list(self._processes):
            process.terminate()


def arguments(job, folder):
    """The arguments of the script that start a job, or go on with it."""
    run = folder / job.name
    goes_on = (run / checkpoint.NAME).exists()
    return ["--resume", run] if goes_on else [*job.flags, "--folder", run]


def run(job, folder, children, threads=None, gpu=None):
    """Take a job to its end. What became of it is in the folder: its run folder, `logs/JOB.txt`, `logs/JOB.failed`."""
    log, waits = folder / "logs" / f"{job.name}.txt", False
    while look(job, folder).status not in ENDED and not children.stopping:
        if run_folder.is_busy(folder / job.name):  # as after this experiment, or a worker of a cluster, was killed
            if not waits:
                logger.info("%s: %s: waiting for it", job.name, run_folder.BUSY)
            waits = True
            time.sleep(_PROBE)
            continue
        line = [sys.executable, Path(__file__).parent.with_name(job.script), *arguments(job, folder)]
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(map(str, line))}\n".encode())
            output.flush()
            begin = output.tell()
            code = children.call(line, output, _environment(job, folder, threads, gpu))
        with log.open("rb") as output:
            output.seek(begin)
            lines = output.read().decode(errors="replace").split("\n")
        last = next((text.strip() for text in reversed(lines) if text.strip()), "no output")
        if run_folder.BUSY in last:
            continue
        if 0 < code < 128:  # more, or less: it was stopped or killed, and can be gone on with
            write_text(_failure(job, folder), json.dumps({"exit_code": code, "line": last}) + "\n")
        break


def _failure(job, folder):
    return folder / "logs" / f"{job.name}.failed"


def _environment(job, folder, threads, gpu):
    """The environment of a job: a GPU of its own, and the number of threads that its run began with."""
    environment = dict(os.environ)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        threads = int(json.loads((folder / job.name / "config.json").read_text())["threads"])
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    return environment
