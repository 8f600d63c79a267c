"""Makes the tables and figures of the README's Results from the runs in results/, and takes runs in there.

python benchmarks/results.py                # make them all anew, in README.md and Figures/
python benchmarks/results.py --check        # an error if a table in README.md is another; the tests do this
python benchmarks/results.py --keep runs/experiment-small --to results/choice      # take in what an experiment has done
python benchmarks/results.py --keep runs/train-EXP-20250101-120000 --to results/NAME   # or a run
python benchmarks/results.py --keep RUN --to pretrained/NAME --images pretrained/images     # with weights

Of a run, four files are kept, a few kB: config.json (settings, seed, commit, machine, images), metrics.csv (a row an
epoch), genotype.json and summary.json (time). They are a run folder still: `--arch`, `visualize.py`, `report.py` and
`experiment.py` take it.
"""

import csv
import json
import math
import re
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tables  # noqa: E402

import genotypes  # noqa: E402
import measure  # noqa: E402
import run_folder  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
import visualize  # noqa: E402
from experiments import comparison, jobs, plan, protocol  # noqa: E402
from runtime import checkpoint  # noqa: E402
from watch import curves  # noqa: E402

_KEPT = ("config.json", "metrics.csv", "genotype.json", "summary.json")
_SEARCH = "choice/search-second-2"  # whose cells and curves are shown
_REPORTED = "the code that this one replaces"
_TO_BEAT = {"8": "82.07", "10": "83.23", "20": "93.17"}  # its validation accuracies, by cells; n is not said
_NETWORKS = {"second-2": "found here in second order"}  # by the names of their runs in results/hour
# of a plan's stages: share of the training images in an epoch, batch size
_EPOCHS = {"search": (0.5, 64), "short": (0.9, 96), "final": (1.0, 96)}
# and the rows of benchmarks/RESULTS.md that have the seconds of a step: of the search, of the networks of each plan
_SEARCH_STEP = r"\| involution, 64 \| fast \|.*?\*\*([\d.]+) s\*\*"
_STEP = r"\| `DARTS`, 36 channels, {} cells, auxiliary head, batch 96 \| this code \| ([\d.]+) s"
_CELLS = {"paper": 20, "long": 8}
_GPUS = 8  # that the cost of a plan is said for
# what trainings on one line of a table may differ in
_FREE = {"seed", "save", "folder", "data", "resume", "workers", "data_in", "report_freq"}


def keep_weights(source, target, images):
    """Keep a run of train.py with its weights, as test.py and export.py take it, and a folder of images as its data."""
    _keep_run(source, target)
    checkpoint.save(
        checkpoint.of_weights(checkpoint.load(source / checkpoint.NAME), data=str(images)), target / checkpoint.NAME
    )


def keep(source, target):
    """Copy what tables are made of, of a run folder or of all ended runs of an experiment's folder."""
    if not (source / plan.NAME).exists():
        return _keep_run(source, target)
    the_plan = plan.load(source / plan.NAME)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / plan.NAME, target)
    shutil.copytree(source / "genotypes", target / "genotypes", dirs_exist_ok=True)
    for job in protocol.known_jobs(the_plan, source):
        status = jobs.look(job, source).status
        # one that diverged in its first epoch left no run
        if status == "finished" or (status == "diverged" and not _missing(source / job.name)):
            _keep_run(source / job.name, target / job.name)
    for path in source.glob("logs/*.failed"):
        (target / "logs").mkdir(exist_ok=True)
        shutil.copy(path, target / "logs")


def _missing(run):
    return [name for name in _KEPT if not (run / name).is_file()]


def _keep_run(source, target):
    if missing := _missing(source):
        raise utils.UserError(f"{source} is no run that has ended: it has no {', '.join(missing)}")
    target.mkdir(parents=True, exist_ok=True)
    for name in _KEPT:
        shutil.copy(source / name, target)


# ------------------------------------------------------------------------------------------------- tables


def choice(results):
    """Searched cells beside random ones: the table of groups, and the tests."""
    folder = results / "choice"
    the_plan, found, entries = _entries(folder)
    _, head, lines = comparison.by_group(entries)
    # without the hours, which are those of several machines
    shown = [k for k in range(len(head)) if not head[k].endswith("(h)") and any(line[k] != "–" for line in lines)]
    lines = [[line[k] for k in shown] + [_entropy(the_plan, folder, line[0])] for line in lines]
    head = [head[k] for k in shown] + ["entropy of the normal cell's alphas, by epoch (of no choice)"]
    pooled = comparison.compare(_pooled(entries, found))
    return "\n\n".join([comparison.markdown_table(head, lines), *comparison.compare(entries), *pooled])


def _entries(folder):
    the_plan = plan.load(folder / plan.NAME)
    states = {job: jobs.look(job, folder) for job in protocol.known_jobs(the_plan, folder)}
    found = protocol.find_genotypes(the_plan, folder)
    return the_plan, found, comparison.collect(the_plan, folder, states, found)


def _pooled(entries, found):
    """All searched cells as one group and all random ones as another, each genotype once."""
    once = {genotypes.format(found[entry.candidate][0]): entry for entry in entries if found[entry.candidate]}
    names = {"searched": "all searched cells", "random": "all random cells"}
    return [e._replace(candidate=e.candidate._replace(group=names[e.candidate.kind])) for e in once.values()]


def _entropy(the_plan, folder, group):
    """That after every epoch, in nats, as a mean over the searches of a group."""
    searches = [job for name, job in the_plan.searches.items() if name.rpartition("-")[0] == group]
    runs = [folder / job.name for job in searches if (folder / job.name).exists()]
    if not runs:
        return "–"
    by_run = [[row["entropy_normal"] for row in _history(run)] for run in runs]
    means = ", ".join(f"{statistics.mean(of_epoch):.2f}" for of_epoch in zip(*by_run, strict=True))
    primitives = genotypes.SEARCH_SPACES[searches[0].args.search_space]
    return f"{means} ({math.log(len(primitives)):.2f})"


def hour(results):
    """The numbers to beat, then networks that were trained here: a line for those that differ in their seeds alone."""
    found = [_trained(name, folders) for name, folders in _by_seed(results / "hour").items()]
    head = ["network", "cells", "channels", "parameters (M)", "multiply-adds (M)", "epochs"]
    head += ["minutes of one core", "seconds an epoch", "accuracy (%)"]
    lines = [[_REPORTED, cells, *["–"] * 6, f"{value} (n not said), validation"] for cells, value in _TO_BEAT.items()]
    return comparison.markdown_table(head, lines + [line for _, line in sorted(found, reverse=True)])


def rate(results):
    """Short trainings at several learning rates, of which the hour has one."""
    lines = []
    for folders in _by_seed(results / "rate").values():
        args, accuracies, _ = _read(folders)
        lines.append([f"{args.learning_rate:g}", _accuracy(args, accuracies)])
    return comparison.markdown_table(["learning rate", "accuracy (%)"], lines)


def _by_seed(folder):
    """The run folders of every NAME-seedN, by NAME."""
    groups = defaultdict(list)
    for run in sorted(folder.glob("*/")):
        groups[run.name.rpartition("-seed")[0]].append(run)
    return groups


def _read(folders):
    """The settings, the last accuracies and the processor hours of trainings that differ in their seeds alone.

    Raises:
        UserError: a setting is not that of the first, a training has not ended, or its processor time is not known.
    """
    settings = [json.loads((folder / "config.json").read_text())["args"] for folder in folders]
    histories = [_history(folder) for folder in folders]
    hours = [json.loads((folder / "summary.json").read_text())["processor_hours"] for folder in folders]
    for folder, own, history, spent in zip(folders, settings, histories, hours, strict=True):
        other = [key for key in own if key not in _FREE and own[key] != settings[0].get(key)]
        if other:
            raise utils.UserError(
                f"{folder} differs from {folders[0].name} in {', '.join(other)}: it needs another name"
            )
        if len(history) != own["epochs"] or spent is None:
            raise utils.UserError(f"{folder} is no whole training with its processor time: take it out")
    args = train.parse_args([])
    vars(args).update(settings[0])
    return args, [history[-1]["valid_acc"] for history in histories], hours


def _trained(name, folders):
    """The mean accuracy of some trainings, and what a table says of them."""
    args, accuracies, hours = _read(folders)
    cost = measure.count(genotypes.parse(folders[0]), args, 10)
    minutes, seconds = (comparison.value_range([unit * spent for spent in hours]) for unit in (60, 3600 / args.epochs))
    size = str(args.layers), str(args.init_channels), f"{cost.parameters / 1e6:.3f}", f"{cost.multiply_adds / 1e6:.1f}"
    named = _NETWORKS.get(name, name)
    return statistics.mean(accuracies), [named, *size, str(args.epochs), minutes, seconds, _accuracy(args, accuracies)]


def _accuracy(args, accuracies):
    return f"{comparison.spread(accuracies)}, {run_folder.judged_by('train', vars(args))}"


def sharpness(results):
    """The dominant eigenvalue and the skip connections of one search in each of three spaces."""
    lines = []
    for space in ("involution", "darts", "s2"):
        rows = _history(results / "sharpness" / space)
        eigenvalues = ", ".join(f"{row['eigenvalue']:.2f}".replace("-", "−") for row in rows)
        skips = ", ".join(f"{row['skip_connects']:.0f}" for row in rows)
        most = math.log(len(genotypes.SEARCH_SPACES[space]))
        entropy = f"{rows[-1]['entropy_normal']:.3f} ({most:.3f})"
        lines.append([f"`{space}`", eigenvalues, skips, entropy, f"{rows[-1]['valid_acc']:.1f} %"])
    head = ["space", "dominant eigenvalue, by epoch", "skip connections in the normal cell"]
    head += ["entropy of its edges (of no choice)", "validation accuracy"]
    return comparison.markdown_table(head, lines)


def cost(name):
    """What a plan would take at the rates that RESULTS.md has of two cores.

    Raises:
        UserError: RESULTS.md has no such rate.
    """
    the_plan, lines, total, on_gpus = plan.load(ROOT / "plans" / f"{name}.toml"), [], 0.0, 0.0
    for stage, epochs in the_plan.epochs().items():
        share, batch_size = _EPOCHS[stage]
        seconds = _seconds_of_a_step(_SEARCH_STEP if stage == "search" else _STEP.format(_CELLS[name]))
        steps = [n * math.ceil(share * 50_000 / batch_size) for n in epochs]
        hours = sum(steps) * seconds / 3600
        lines.append([stage, f"{sum(epochs):,}", f"{sum(steps):,}", f"{seconds:g} s", f"{hours:,.0f}"])
        total += hours
        # rounds of a run on each, as long as the longest
        on_gpus += sum(sorted(steps, reverse=True)[::_GPUS]) * seconds / 3600
    lines.append(["all", "", "", "", f"{total:,.0f}"])
    head = ["stage", "epochs", "steps", "a step on two cores", "hours on two cores"]
    sentence = (
        f"{_GPUS} GPUs, each with the speed of two such cores and one run at a time, need {on_gpus:,.0f} hours "
        f"({on_gpus / 24:.1f} days), stage after stage; n times as fast, an nth of that."
    )
    return f"{comparison.markdown_table(head, lines)}\n\n{sentence}"


def begun(results):
    """The first epochs of a final training of plans/long.toml."""
    rows = _history(results / "long" / "final-second-2-seed0")
    head = ["epoch", *(f"{row['epoch']:.0f}" for row in rows)]
    names = {"train_acc": "training (%), augmented", "valid_acc": "test (%)"}
    return comparison.markdown_table(
        head, [[name, *(f"{row[column]:.1f}" for row in rows)] for column, name in names.items()]
    )


def _seconds_of_a_step(row):
    measured = ROOT / "benchmarks" / "RESULTS.md"
    found = re.search(row, measured.read_text())
    if not found:
        raise utils.UserError(f"{measured} has no row like {row}: change it here if the benchmark's table has changed")
    return float(found[1])


TABLES = {  # by the place in README.md
    "hour": hour,
    "rate": rate,
    "choice": choice,
    "sharpness": sharpness,
    "paper": lambda _: cost("paper"),
    "long": lambda _: cost("long"),
    "begun": begun,
}


def draw(results, figures):
    """Make the figures of README's Results."""
    with utils.replacing(figures / "choice.png") as temporary:
        comparison.plot_groups(_entries(results / "choice")[-1]).savefig(temporary, format="png", dpi=150)
    run = results / _SEARCH
    curves.plot_curves(_history(run), "validation", figures / "search_curves.png")
    curves.plot_eigenvalue(_history(results / "sharpness" / "s2"), figures / "sharpness_s2.png")
    with tempfile.TemporaryDirectory() as folder:
        for picture in visualize.draw(genotypes.parse(run), folder, name=_SEARCH):
            shutil.move(picture, figures / f"search_{picture.name}")


def _history(run):
    """The rows of a run's metrics.csv; `visualize.read_history` without the genotypes."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v and k != "genotype"} for row in csv.DictReader(file)]


def main():
    args = parse_args()
    if args.keep and args.images:
        return keep_weights(args.keep, args.to, args.images)
    if args.keep:
        return keep(args.keep, args.to)
    made = {name: make(ROOT / "results") for name, make in TABLES.items()}
    wrong = [name for name, text in made.items() if not tables.put(ROOT / "README.md", name, text, args.check)]
    if args.check and wrong:
        raise utils.UserError(
            f"README.md is not what results/ says of {', '.join(wrong)}: python benchmarks/results.py"
        )
    if not args.check:
        draw(ROOT / "results", ROOT / "Figures")


def parse_args():
    parser = utils.ArgumentParser(description="Make the tables and figures of the README's Results, of results/.")
    parser.add_argument("--check", action="store_true", help="change nothing; an error if a table is not the README's")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="take in a run, or the ended runs of an experiment")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="keep weights too, with these as the run's images"
    )
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where it goes")
    args = parser.parse_args()
    if (args.keep is None) != (args.to is None) or (args.images and not args.keep):
        raise utils.UserError("--keep and --to go together, and --images only with them")
    return args


if __name__ == "__main__":
    utils.run_script(main)
