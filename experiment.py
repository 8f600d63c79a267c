"""The protocol of DARTS as one command: searches with several seeds, random cells beside them, ranking, final training.

python experiment.py --quick                             # on digits, nothing to download
python experiment.py plans/small.toml                    # again: goes on, whatever stopped it
python experiment.py plans/small.toml --jobs 4           # four jobs at a time
python experiment.py plans/paper.toml --cluster dask://HOST:8786
python experiment.py plans/small.toml --list             # the jobs, their state and their commands

Every job is a run of train_search.py or train.py in a folder of the experiment, and can be looked at, resumed and
repeated by itself. In experiments/, plan.py says what a plan may hold, protocol.py what is done when, jobs.py how a job
is run, comparison.py what comes out.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import joblib
import torch

import run_folder
import utils
from experiments import comparison, jobs, plan, protocol
from runtime import progress

logger = logging.getLogger("darts.experiment")

_QUICK = Path(__file__).with_name("plans") / "quick.toml"


# ------------------------------------------------------------------------------------------------- running


def run_jobs(todo, known, the_plan, folder, args, children):
    """Run jobs, as many at a time as --jobs says or the cluster has room for, and tell what they do."""
    if args.cluster is None:
        with Report(todo, known, the_plan, folder, args.jobs):
            return run_here(todo, folder, args, children)
    command = [sys.executable, str(Path(__file__).resolve()), str(folder / plan.NAME), "--folder", str(folder)]
    command += ["--threads", str(args.threads)] if args.threads else []
    # a worker need not be able to import this code: what it calls is of the standard library
    call = joblib.delayed(partial(subprocess.call, cwd=os.getcwd()))
    try:
        with Report(todo, known, the_plan, folder, joblib.effective_n_jobs(-1)):
            codes = joblib.Parallel(batch_size=1)(call([*command, "--job", job.name]) for job in todo)
    except KeyboardInterrupt:
        logger.info("stopped; jobs that are at work on the cluster go on, and the same command waits for them")
        sys.exit(130)
    for job, code in zip(todo, codes, strict=True):
        if code:
            logger.warning("%s: a worker could not run it (exit code %d, see its output)", job.name, code)


def run_here(todo, folder, args, children):
    """Run jobs as processes of this one, with a share of the cores each, and with a GPU each where there are some."""
    gpus = queue.SimpleQueue()
    for k in range(args.jobs):
        gpus.put(visible_gpus()[k % len(visible_gpus())] if visible_gpus() else None)
    threads = args.threads or (None if "OMP_NUM_THREADS" in os.environ else max(1, cores() // args.jobs))

    def run_one(job):
        gpu = gpus.get()
        try:
            jobs.run(job, folder, children, threads, gpu)
        finally:
            gpus.put(gpu)

    # threads, which only wait for the processes of the jobs
    joblib.Parallel(n_jobs=args.jobs, backend="threading", batch_size=1)(joblib.delayed(run_one)(job) for job in todo)


def check_cluster(address):
    """Raise UserError unless this is `dask://HOST:PORT` or `ray`, and its package is installed."""
    kind, _, scheduler = address.partition("://")
    package = {"dask": "distributed", "ray": "ray"}.get(kind)
    if package is None or (kind == "dask") != bool(scheduler):
        raise utils.UserError(f"--cluster must be dask://HOST:PORT or ray, got {address!r}")
    if find_spec(package) is None:
        raise utils.UserError(f"--cluster {kind} needs the package {package}: pip install {package}")


def cluster(address):
    """The joblib.parallel_config of an address that has been checked.

    Raises:
        UserError: nothing answers there.
    """
    try:
        if address != "ray":
            return joblib.parallel_config("dask", n_jobs=-1, scheduler_host=address.partition("://")[2])
        import ray
        from ray.util.joblib import register_ray

        ray.init(address="auto", ignore_reinit_error=True)
        register_ray()
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        return joblib.parallel_config("ray", n_jobs=-1, ray_remote_args={"num_gpus": gpus})
    except (OSError, ValueError) as error:  # a ConnectionError is an OSError
        reason = " ".join(str(error).split())[:200]
        raise utils.UserError(f"--cluster {address}: no cluster answers there ({reason})") from None


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def visible_gpus():
    """What CUDA_VISIBLE_DEVICES calls the GPUs of this machine."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]


class Report:
    """While in use, logs every job that begins or ends, and now and then what all are at and how long is left."""

    EVERY = 60  # seconds

    def __init__(self, todo, known, the_plan, folder, at_once):
        self.todo, self.known, self.plan, self.folder, self.at_once = todo, known, the_plan, folder, at_once
        self._seen = {job.name: jobs.look(job, folder).status for job in todo}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        self._tell_changes()

    def _watch(self):
        last = time.monotonic()
        while not self._over.wait(1):
            self._tell_changes()
            if time.monotonic() - last > self.EVERY:
                last = time.monotonic()
                for job in self.todo:
                    at = jobs.now(job, self.folder) if self._seen[job.name] not in jobs.ENDED else None
                    if at:
                        logger.info("  %s: %s", job.name, at)
                logger.info("%s", self.left())

    def _tell_changes(self):
        ended = sum(status in jobs.ENDED for status in self._seen.values())
        progress.doing(f"{ended} of {len(self.todo)} jobs have ended")
        for job in self.todo:
            state = jobs.look(job, self.folder)
            if state.status == self._seen[job.name]:
                continue
            self._seen[job.name] = state.status
            if state.status == "begun":
                logger.info("%s has begun", job.name)
            else:
                ended += 1
                logger.info("%d of %d: %s: %s", ended, len(self.todo), job.name, tell(job, state, self.folder))

    def left(self):
        """How long the rest of the experiment takes at the rates so far, in words."""
        done, spent = Counter(), Counter()
        for job in self.known:
            state = jobs.look(job, self.folder)
            spent[job.stage] += jobs.seconds(job, self.folder) if state.epochs else 0
            done[job.stage] += job.args.epochs if state.status in jobs.ENDED else state.epochs
        left, unknown = 0.0, []
        for stage, epochs in self.plan.epochs().items():
            if done[stage]:
                left += max(0, sum(epochs) - done[stage]) * spent[stage] / done[stage]
            elif epochs:
                unknown.append(stage)
        words = [f"about {utils.duration(left / self.at_once)} left"] * (left > 0 or not unknown)
        words += [f"how long {' and '.join(unknown)} takes is not known yet"] * bool(unknown)
        return ", and ".join(words)


def tell(job, state, folder):
    """What became of a job, in a line."""
    if state.status in ("failed", "diverged"):
        return f"{state.status}: {state.line}"
    if state.status != "finished":
        return f"{state.status}, {state.epochs} of {job.args.epochs} epochs"
    return f"{state.value('valid_acc'):.2f} % {job.measured_on} accuracy, {utils.duration(jobs.seconds(job, folder))}"


# ------------------------------------------------------------------------------------------------- the script


def build_parser():
    parser = utils.ArgumentParser(description="Run a plan of searches and trainings, and compare what comes out.")
    parser.add_argument(
        "plan", nargs="?", metavar="PLAN.toml", help="see plans/; experiments/plan.py says what it may hold"
    )
    parser.add_argument("--quick", action="store_true", help="plans/quick.toml, on digits")
    parser.add_argument("--folder", help="the experiment's folder (default: runs/experiment-PLAN)")
    parser.add_argument("--list", action="store_true", help="list the jobs, their state and their commands; run none")
    parser.add_argument("--retry", action="store_true", help="take up failed jobs again")
    parser.add_argument("--job", metavar="NAME", help="run this job alone")
    group = parser.add_argument_group("where the jobs run")
    group.add_argument(
        "--jobs",
        type=utils.number(int, low=1, high=1000),
        help="jobs at a time here (default: one a GPU, or 1)",
    )
    group.add_argument(
        "--threads",
        type=utils.number(int, low=1, high=1000),
        help="CPU threads of a job (default: OMP_NUM_THREADS, else the cores divided by --jobs)",
    )
    group.add_argument(
        "--cluster", metavar="ADDRESS", help="dask://HOST:PORT or ray: machines that share this folder and its images"
    )
    return parser


def parse_args(argv=None):
    args = build_parser().parse_args(argv)
    if args.quick == (args.plan is not None):
        raise utils.UserError("name a plan, such as plans/small.toml, or give --quick" + ", not both" * args.quick)
    if args.cluster and args.jobs:
        raise utils.UserError("--jobs is for this machine: the workers of a --cluster say how many jobs run at a time")
    if args.cluster:
        check_cluster(args.cluster)
    args.plan = args.plan or _QUICK
    args.jobs = args.jobs or max(1, len(visible_gpus()))
    return args


def open_folder(folder, path):
    """Make the experiment's folder, with a copy of the plan of that path."""
    try:
        for made in (folder, folder / "logs", folder / "genotypes"):
            made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise utils.UserError(f"cannot make the folder {error.filename}: {error.strerror}") from None
    text = Path(path).read_text()
    copy = folder / plan.NAME
    if not copy.exists() or copy.read_text() != text:
        utils.write_text(copy, text)


def listen(children):
    """Let SIGINT and SIGTERM stop the jobs; they save, and the experiment ends with what there is."""

    def stop(number, _):
        logger.info("stopping: the jobs finish their step and save (once more stops them at once)")
        children.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def main():
    args = parse_args()
    the_plan = plan.load(args.plan)
    progress.doing("looks at what there is to do")
    folder, children = Path(args.folder or f"runs/experiment-{the_plan.name}"), jobs.Children()
    if args.list:
        return list_jobs(the_plan, folder)
    if args.job and args.job not in {job.name for job in protocol.known_jobs(the_plan, folder)}:
        raise utils.UserError(f"--job {args.job}: no job of this plan, or not yet; --list says which there are")
    with cluster(args.cluster) if args.cluster else contextlib.nullcontext():
        open_folder(folder, args.plan)
        if args.cluster is None:
            listen(children)
        if args.job:
            return run_one(args, the_plan, folder, children)
        run_all(args, the_plan, folder, children)
    conclude(the_plan, folder, children.stopping)


def run_all(args, the_plan, folder, children):
    """Run the jobs that can be named, until there are no more."""
    tried, same = set(), None
    while not children.stopping:
        known = name_jobs(the_plan, folder)
        same, before = protocol.same_cells(protocol.find_genotypes(the_plan, folder)), same
        if same != before:
            logger.warning("%s", same)
        for job in known:
            jobs.check(job, folder)
            if args.retry and job.name not in tried:
                jobs.retry(job, folder)
        jobs.check_images(known, folder)
        todo = [job for job in known if job.name not in tried and jobs.look(job, folder).status not in jobs.ENDED]
        if not todo:
            break
        for job in todo:
            logger.info("%s", run_folder.command(job.script, *jobs.arguments(job, folder)))
        run_jobs(todo, known, the_plan, folder, args, children)
        tried |= {job.name for job in todo}


def name_jobs(the_plan, folder):
    """The jobs that can be named by now; what they need is in the folder."""
    protocol.keep_genotypes(the_plan, folder)
    return protocol.known_jobs(the_plan, folder)


def list_jobs(the_plan, folder):
    for job in protocol.known_jobs(the_plan, folder):
        state = jobs.look(job, folder)
        logger.info("%s: %s", job.name, tell(job, state, folder))
        if state.status not in jobs.ENDED:
            logger.info("    %s", run_folder.command(job.script, *jobs.arguments(job, folder)))


def run_one(args, the_plan, folder, children):
    job = next(job for job in name_jobs(the_plan, folder) if job.name == args.job)
    jobs.check(job, folder)
    progress.doing(args.job)
    jobs.run(job, folder, children, args.threads)


def conclude(the_plan, folder, stopped):
    """Write the results, and say what is left to do.

    Raises:
        UserError: jobs have failed, or have not ended.
    """
    known = protocol.known_jobs(the_plan, folder)
    states = {job: jobs.look(job, folder) for job in known}
    comparison.write(the_plan, folder, states, protocol.find_genotypes(the_plan, folder))
    logger.info("results: %s, %s", folder / "results.md", folder / "report.html")
    failed = [job for job, state in states.items() if state.status == "failed"]
    for job in failed:
        logger.warning("%s failed: %s", job.name, states[job].line)
    left = [job.name for job, state in states.items() if state.status not in jobs.ENDED]
    again = run_folder.command("experiment.py", *(argument for argument in sys.argv[1:] if argument != "--retry"))
    if left:
        raise utils.UserError(f"{len(left)} jobs have not ended ({', '.join(left)[:100]}); {again} goes on")
    if failed:
        raise utils.UserError(f"{len(failed)} jobs failed; {again} --retry takes them up again")


if __name__ == "__main__":
    utils.run_script(main)
