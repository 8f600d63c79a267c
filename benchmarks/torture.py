"""Nothing lost, nothing silently wrong: kills at random moments, damaged checkpoints, random command lines.

make torture                                                            # the sanitizers over the C++, then all of this
python benchmarks/torture.py --update                                   # and its table to RESULTS.md
python benchmarks/torture.py --kills 4 --ranks 2 --damages 20 --lines 20  # a small draw
python benchmarks/torture.py --kills 0 --ranks 0 --damages 0 --lines 50 --seed 3  # other command lines

*kills*: a search or a training saves after every step, is killed (SIGKILL) at a random moment and resumed, again and
again; it must end in the checkpoint, metrics.csv and genotype.json of one that nobody killed, bit for bit.
*ranks*: the same with two processes under torchrun's agent: one of them is killed, and all are started again by it.
*damages*: a checkpoint with flipped, zeroed or missing bytes must be refused, or hold what was saved.
*lines*: a random command line of one of the scripts, on runs and images some of which are damaged, must end in success
or in exit code 2 and one line, and end at all.

The scripts run in forks of this process, which has imported PyTorch: a start takes no seconds, so that a kill meets the
work and not the imports. What fails is printed with the line that does it again. Exit status: 1 if anything failed.
"""

import argparse
import functools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import tables
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import involution  # noqa: E402
import report  # noqa: E402
import run_folder  # noqa: E402
import test  # noqa: E402
import train  # noqa: E402
import train_search  # noqa: E402
import utils  # noqa: E402
import visualize  # noqa: E402
from runtime import checkpoint  # noqa: E402

SCRIPTS = {
    "train_search.py": train_search,
    "train.py": train,
    "test.py": test,
    "visualize.py": visualize,
    "report.py": report,
}
TINY = "--dataset digits --subset 64 --batch_size 16 --init_channels 4 --epochs 2 --report_freq 1".split()
RUNS = {"search": ["train_search.py", "--unrolled", "--layers=3", *TINY], "train": ["train.py", "--layers=2", *TINY]}
HANGS = 120  # seconds after which a tiny run hangs
WORDS = (  # what a command line may hold where a number, a name or a path belongs
    *(
        "0",
        "1",
        "2",
        "3",
        "7",
        "-1",
        "0.5",
        "0.3",
        "1e-300",
        "1e30",
        "3e38",
        "1e400",
        "nan",
        "inf",
        "9" * 30,
        "9" * 5000,
    ),
    *("", " ", "x", "ü", "None", "[]", "'", "-dash", "a/b", "..", ".", "/", "/dev/null", "search", "train", "images"),
    *("search/checkpoint.pt", "train/checkpoint.pt", "DARTS", "DARTS_V2", "DRATS", "\n", "x" * 300, "%s", "\udcff"),
)
GENOTYPE = (
    "Genotype(normal=[('sep_invo_3x3', 1), ('max_pool_3x3', 0)], normal_concat=[2], "
    "reduce=[('skip_connect', 0), ('dil_invo_3x3', 1)], reduce_concat=range(2, 3))"
)


# ------------------------------------------------------------------------------------------------------ scripts


def start(folder, script, *arguments, save_always=False):
    """A script as a process of its own, in a folder that gets its output as `stdout` and `stderr`."""
    process = multiprocessing.get_context("fork").Process(target=_script, args=(folder, script, arguments, save_always))
    process.start()
    return process


def _script(folder, script, arguments, save_always):
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", errors="backslashreplace", closefd=False)
    sys.argv = [str(ROOT / script), *arguments]
    os.environ["http_proxy"] = os.environ["https_proxy"] = "http://127.0.0.1:9"  # nothing is downloaded
    if save_always:
        run_folder._SAVE_EVERY = -1
    utils.run_script(SCRIPTS[script].main)


def start_team(folder, script, *arguments):
    """A script as two processes, with the agent that torchrun is: it starts them again whenever one has been killed."""
    process = multiprocessing.get_context("fork").Process(target=_agent, args=(folder, script, arguments))
    process.start()
    return process


def _agent(folder, script, arguments):
    how = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="torture", monitor_interval=0.05)
    place = dict(min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", max_restarts=10**6)
    logging.disable()  # its own lines, which tell of every kill
    elastic_launch(LaunchConfig(**how, **place), _member)(folder, script, arguments)


def _member(folder, script, arguments):
    logging.disable(logging.NOTSET)
    _script(folder, script, arguments, save_always=True)


def finish(process, folder, seconds=HANGS):
    """What is wrong with how a script ended, or None."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return f"no end after {seconds} s"
    said = (folder / "stderr").read_text(errors="replace").strip()
    said = "\n".join(line for line in said.splitlines() if "%|" not in line)  # a progress bar
    if "Traceback" in said or process.exitcode not in (0, 2):
        return f"exit code {process.exitcode}: {said[-300:]}"
    if process.exitcode == 2 and len(said.splitlines()) != 1:
        return f"not one line: {said[-300:]}"
    return None


def progress(total, label):
    """Count up to `total`; a line at least every ten seconds says how far it is."""
    said = time.monotonic()
    for k in range(total):
        yield k
        if time.monotonic() - said > 10 or k == total - 1:
            said = time.monotonic()
            print(f"{label} {k + 1}/{total}", flush=True)


# -------------------------------------------------------------------------------------------------------- kills


def make_reference(kind, folder, start):
    """A run that nobody kills: its run folder, and the seconds that it takes."""
    folder.mkdir()
    began = time.monotonic()
    wrong = finish(start(folder, *RUNS[kind]), folder)
    if wrong:
        sys.exit(f"the {kind} that nobody kills fails: {wrong}")
    return next((folder / "runs").iterdir()), time.monotonic() - began


def kill(references, kills, draw, folder):
    """Kill runs until there have been as many kills: how many, and what went wrong."""
    failures, done = [], 0
    counter = progress(kills, "kills")
    while done < kills:
        kind = draw.choice([*references])
        reference, seconds = references[kind]
        place = folder / f"killed-{done}"
        place.mkdir()
        moments = []
        while True:
            runs = [path.parent for path in place.glob("runs/*/checkpoint.pt")]
            line = [RUNS[kind][0], f"--resume={runs[0]}"] if runs else RUNS[kind]
            if not runs:  # killed before there was anything to lose
                shutil.rmtree(place / "runs", ignore_errors=True)
            process = start(place, *line, save_always=True)
            if done == kills:
                break
            moment = draw.uniform(0, 0.7 * seconds)
            process.join(moment)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            moments.append(round(moment, 3))
            done += 1
            next(counter, None)
        wrong = finish(process, place) or differing(runs[0] if runs else next((place / "runs").iterdir()), reference)
        if wrong:
            failures.append(f"{kind} killed after {moments} s: {wrong}")
        shutil.rmtree(place)
    next(counter, None)
    return done, failures


def kill_ranks(kills, draw, folder):
    """Kill one of two processes that work as one until there have been as many kills: how many, and what went wrong."""
    failures, done, counter = [], 0, progress(kills, "kills of one of two processes")
    references = {}
    while done < kills:
        kind = draw.choice([*RUNS])
        if kind not in references:
            references[kind] = make_reference(kind, folder / f"{kind} of two", start_team)
        reference, seconds = references[kind]
        place = folder / f"ranks-{done}"
        place.mkdir()
        process, moments = start_team(place, *RUNS[kind]), []
        while process.exitcode is None and done < kills:
            moment = draw.uniform(0, 0.7 * seconds)
            process.join(moment)
            members = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if process.exitcode is None and members:
                os.kill(int(draw.choice(members)), signal.SIGKILL)
                moments.append(round(moment, 3))
                done += 1
                next(counter, None)
        wrong = finish(process, place) or differing(next((place / "runs").iterdir()), reference)
        if wrong:
            failures.append(f"one of two processes of a {kind} killed after {moments} s: {wrong}")
        shutil.rmtree(place)
    return done, failures


def differing(folder, reference):
    """What of a run is not what it is in the run that nobody killed, or None."""
    for name in ("metrics.csv", "genotype.json", "alphas.csv", "winners.csv"):
        if not (reference / name).exists():  # a training has no alphas
            continue
        if (folder / name).read_bytes() != (reference / name).read_bytes():
            return f"another {name}"
    if list(folder.glob(".*")):
        return "temporary files are left"
    states = [checkpoint.load(path / checkpoint.NAME) for path in (folder, reference)]
    for state in states:
        del state["observed"]["cost"]  # what the clock says
    where = difference(*states)
    return where and f"another checkpoint: {where}"


def difference(a, b, where="it"):
    """Where two checkpoints do not hold the same values, bit for bit, or None."""
    if type(a) is not type(b):
        return where
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return None if same else where
    if isinstance(a, (dict, list, tuple)):
        a, b = (value if isinstance(value, dict) else dict(enumerate(value)) for value in (a, b))
        if a.keys() != b.keys():
            return where
        return next(filter(None, (difference(a[key], b[key], f"{where}[{key!r}]") for key in a)), None)
    return None if a == b or (a != a and b != b) else where


# ------------------------------------------------------------------------------------------------------ damages


def damage(paths, damages, draw, folder):
    """Damage checkpoints: how many were refused, and what went wrong."""
    refused, failures = 0, []
    wholes = [(path, path.read_bytes(), checkpoint.load(path)) for path in paths]
    place = folder / "damaged.pt"
    for _ in progress(damages, "damages"):
        path, whole, state = draw.choice(wholes)
        what, content = _damaged(whole, draw)
        place.write_bytes(content)
        try:
            if difference(checkpoint.load(place), state):
                failures.append(f"{path.parent.name}, {what}: loads with other values")
        except utils.UserError:
            refused += 1
        except Exception as error:
            failures.append(f"{path.parent.name}, {what}: {error!r}")
    return refused, failures


def _damaged(whole, draw):
    content, at = bytearray(whole), draw.randrange(len(whole))
    kind = draw.choice(("bit", "bits", "bytes", "zeros", "truncated", "hole"))
    if kind in ("bit", "bits"):
        for place in [at] + [draw.randrange(len(whole)) for _ in range(7 * (kind == "bits"))]:
            content[place] ^= 1 << draw.randrange(8)
    elif kind in ("bytes", "zeros"):
        length = min(draw.choice((1, 16, 512, 4096)), len(whole) - at)
        content[at : at + length] = draw.randbytes(length) if kind == "bytes" else bytes(length)
    else:
        del content[at : at + draw.randint(1, 512) if kind == "hole" else len(whole)]
    return f"{kind} at {at}", bytes(content)


# -------------------------------------------------------------------------------------------------------- lines


def call(references, lines, draw, folder):
    """Call random command lines: how many succeeded, and what went wrong."""
    succeeded, failures = 0, []
    for k in progress(lines, "lines"):
        place = folder / f"line-{k}"
        place.mkdir()
        make_images(place / "images", broken=draw.random() < 0.2)
        changes = [_doctored(shutil.copytree(path, place / kind), draw) for kind, (path, _) in references.items()]
        script = draw.choice([*SCRIPTS][:-2] * 3 + [*SCRIPTS][-2:])
        arguments = _line(script, draw)
        process = start(place, script, *arguments)
        wrong = finish(process, place)
        succeeded += process.exitcode == 0
        if wrong:
            failures.append(f"{script} {arguments!r} on {changes}: {wrong}")
        shutil.rmtree(place)
    return succeeded, failures


def _line(script, draw):
    """Arguments of a script: of a tiny run or of a resumed one, with some flags besides, most of which it takes."""
    if script == "visualize.py":
        genotype = draw.choice((draw.choice(WORDS), "search", "train", _genotype(draw), _genotype(draw)))
        return [genotype, f"--format={draw.choice(('pdf', 'png', 'svg', 'x'))}", f"--output={draw.choice('.xü')}"]
    if script == "report.py":
        return [draw.choice(("search", "train", *draw.sample(WORDS, 1)))]
    kind = "search" if script == "train_search.py" else "train"
    arguments = [*RUNS[kind][1:], "--epochs=1"]
    if script == "test.py":
        arguments = [f"--model_path={draw.choice(('train', 'train', 'train', *draw.sample(WORDS, 1)))}"]
    elif draw.random() < 0.4:
        arguments = [f"--resume={kind}"]
    elif draw.random() < 0.4:
        arguments += ["--dataset=folder", "--data=images", "--batch_size=4"]
    parser = test.build_parser() if script == "test.py" else SCRIPTS[script].build_parser()
    actions = [a for a in parser._actions if a.dest not in ("help", "compile")]  # which compiles for minutes
    for action in draw.sample(actions, draw.choice((0, 1, 1, 2, 3))):
        value = "" if action.nargs == 0 else f"={_word(action, draw)}"
        arguments.append(action.option_strings[0] + value)
    return arguments


def _word(action, draw):
    words = [*(action.choices or ()), *WORDS, *((_genotype(draw),) if action.dest == "arch" else ())]
    taken = [word for word in words if _takes(action, word)]
    return draw.choice(taken if taken and draw.random() < 0.85 else words)


def _takes(action, word):
    try:
        value = (action.type or str)(word)
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return action.choices is None or value in action.choices


def _genotype(draw):
    text = list(GENOTYPE)
    for _ in range(draw.choice((0, 0, 1, 2))):
        text[draw.randrange(len(text))] = draw.choice(("", "(", ")", "[", "'", "9", ",", "-", "x" * 50))
    return "".join(text)


def _doctored(run, draw):
    """Change a value of a run's checkpoint or of its config.json, or nothing: what was changed."""
    kind = draw.choice(("nothing", "nothing", "bytes", "checkpoint", "config"))
    path = run / ("config.json" if kind == "config" else checkpoint.NAME)
    if kind == "bytes":
        what, content = _damaged(path.read_bytes(), draw)
        path.write_bytes(content)
        return f"{run.name}: {what}"
    if kind == "nothing":
        return f"{run.name}: as it was"
    state = json.loads(path.read_text()) if kind == "config" else checkpoint.load(path)
    place, keys = state, []
    while True:
        keys.append(draw.choice([*place] if isinstance(place, dict) else range(len(place))))
        inner = place[keys[-1]]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.2:
            break
        place = inner
    values = [None, True, -1, 0, 3, 10**6, 10**100, 0.5, float("nan"), 1e300, "", "zz", [], [[]], {}, {"zz": 1}]
    value = draw.choice(
        values if kind == "config" else [*values, torch.zeros(3), torch.tensor(float("nan")), b"x", (1, 2)]
    )
    if draw.random() < 0.3:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(state)) if kind == "config" else torch.save(state, path)
    return f"{run.name}: {kind} {keys} = {value!r}"


def make_images(folder, broken):
    """A folder of images of three classes, 8x8 pixels, in which links and pipes lead astray."""
    from PIL import Image

    for part in ("train", "test"):
        for k, name in enumerate(("red", "green", "blue")):
            (folder / part / name).mkdir(parents=True)
            for shade in range(4):
                colour = tuple(60 * shade + 10 if k == c else 0 for c in range(3))
                Image.new("RGB", (8, 8), colour).save(folder / part / name / f"{shade}.png")
    (folder / "train" / "red" / "up").symlink_to("..")
    os.mkfifo(folder / "train" / "red" / "pipe.png")
    if broken:
        (folder / "train" / "green" / "0.png").write_bytes(b"\x89PNG")


# --------------------------------------------------------------------------------------------------------- main


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 100), ("ranks", 20), ("damages", 200), ("lines", 500)):
        parser.add_argument(f"--{name}", type=utils.number(int, low=0), default=count, help=f"(default: {count})")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    tables.add_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(1)
    involution.backend(torch.device("cpu"))
    data.load("digits", "", True)  # what the forks then have at hand
    began = time.monotonic()
    draws = {name: random.Random(f"{name} {args.seed}") for name in ("kills", "ranks", "damages", "lines")}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        start_saving = functools.partial(start, save_always=True)
        references = {kind: make_reference(kind, folder / kind, start_saving) for kind in RUNS}
        killed, of_kills = kill(references, args.kills, draws["kills"], folder)
        ranks_killed, of_ranks = kill_ranks(args.ranks, draws["ranks"], folder)
        paths = [path / checkpoint.NAME for path, _ in references.values()]
        refused, of_damages = damage(paths, args.damages, draws["damages"], folder)
        succeeded, of_lines = call(references, args.lines, draws["lines"], folder)
    failures = of_kills + of_ranks + of_damages + of_lines
    rows = (
        f"| SIGKILLs at random moments of a search or a training that saves after every step | {killed} | "
        f"{len(of_kills)} runs that end in other bits |",
        f"| SIGKILLs of one of two processes of such a run, which torchrun's agent starts again | {ranks_killed} | "
        f"{len(of_ranks)} runs that end in other bits |",
        f"| checkpoints with flipped, zeroed or missing bytes | {args.damages} ({refused} refused) | "
        f"{len(of_damages)} accepted with other values |",
        f"| random command lines, on damaged runs and images too | {args.lines} ({succeeded} succeeded) | "
        f"{len(of_lines)} tracebacks, hangs or unclear ends |",
    )
    head = f"{tables.machine()}; seed {args.seed}; {(time.monotonic() - began) / 60:.0f} minutes.\n"
    tables.save(
        "torture",
        "\n".join((head, "| what | drawn | failed |", "| --- | --- | --- |", *rows)),
        tables.out(args),
        args.update,
    )
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
