"""The tables and figures of the README's Results, made of what results/ holds of every run behind them.

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
import train  # noqa: E402
import utils  # noqa: E402
import visualize  # noqa: E402
from experiments import comparison, jobs, plan, protocol  # noqa: E402
from runtime import checkpoint  # noqa: E402
from watch import curves  # noqa: E402

_KEPT = ("config.json", "metrics.csv", "genotype.json", "summary.json")
_SEARCH = "choice/search-second-2"  # whose cells and curves are shown
_REPORTED, _TO_BEAT = "the code that this one replaces", {"8": "82.07", "10": "83.23", "20": "93.17"}  # by cells
_NETWORKS = {"second-2": "found here in second order"}  # by the names of their runs in results/hour
# of a plan's stages: share of the training images in an epoch, batch size
_EPOCHS = {"search": (0.5, 64), "short": (0.9, 96), "final": (1.0, 96)}
# and the rows of benchmarks/RESULTS.md that have the seconds of a step: of the search, of the networks of each plan
_SEARCH_STEP = r"\| involution, 64 \| fast \|.*?\*\*([\d.]+) s\*\*"
_STEP = r"\| `DARTS`, 36 channels, {} cells, auxiliary head, batch 96 \| this code \| ([\d.]+) s"
_CELLS = {"paper": 20, "long": 8}


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
    the_plan, entries = _entries(folder)
    _, head, lines = comparison.by_group(entries)
    shown = [k for k in range(len(head)) if any(line[k] not in ("–", "0.00") for line in lines)]
    lines = [[line[k] for k in shown] + [_entropy(the_plan, folder, line[0])] for line in lines]
    head = [head[k] for k in shown] + ["entropy of the normal cell's alphas (of no choice)"]
    return "\n\n".join([comparison.markdown_table(head, lines), *comparison.compare(entries)])


def _entries(folder):
    the_plan = plan.load(folder / plan.NAME)
    states = {job: jobs.look(job, folder) for job in protocol.known_jobs(the_plan, folder)}
    found = {candidate: protocol.find_genotype(the_plan, candidate, folder) for candidate in the_plan.candidates}
    return the_plan, comparison.collect(the_plan, folder, states, found)


def _entropy(the_plan, folder, group):
    """That after the last epoch, in nats, as a mean over the searches of a group."""
    searches = [job for name, job in the_plan.searches.items() if name.rpartition("-")[0] == group]
    runs = [folder / job.name for job in searches if (folder / job.name).exists()]
    ends = [float(visualize.read_history(run)[-1]["entropy_normal"]) for run in runs]
    if not ends:
        return "–"
    primitives = genotypes.SEARCH_SPACES[searches[0].args.search_space]
    return f"{statistics.mean(ends):.2f} ({math.log(len(primitives)):.2f})"


def hour(results):
    """The numbers to beat, then networks that were trained here: a line for those that differ in their seeds alone."""
    groups = defaultdict(list)
    for folder in sorted((results / "hour").glob("*/")):
        groups[folder.name.rpartition("-seed")[0]].append(folder)
    found = [_trained(name, folders) for name, folders in groups.items()]
    head = ["network", "cells", "channels", "parameters (M)", "multiply-adds (M)", "epochs"]
    head += ["minutes of one core", "seconds an epoch", "accuracy (%)"]
    lines = [[_REPORTED, cells, *["–"] * 6, f"{accuracy} (n = 1), validation"] for cells, accuracy in _TO_BEAT.items()]
    return comparison.markdown_table(head, lines + [line for _, line in sorted(found, reverse=True)])


def _trained(name, folders):
    """The mean test accuracy of some trainings, and what a table says of them."""
    args = train.parse_args([])
    vars(args).update(json.loads((folders[0] / "config.json").read_text())["args"])
    cost = measure.count(genotypes.parse(folders[0]), args, 10)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    accuracies = [_history(folder / "metrics.csv")[-1]["valid_acc"] for folder in folders]
    minutes, seconds = (
        comparison.value_range([unit * summary["processor_hours"] for summary in summaries])
        for unit in (60, 3600 / args.epochs)
    )
    size = str(args.layers), str(args.init_channels), f"{cost.parameters / 1e6:.3f}", f"{cost.multiply_adds / 1e6:.1f}"
    return statistics.mean(accuracies), [
        _NETWORKS.get(name, name),
        *size,
        str(args.epochs),
        minutes,
        seconds,
        f"{comparison.spread(accuracies)}, test",
    ]


def sharpness(results):
    """The dominant eigenvalue and the skip connections of one search in each of three spaces."""
    lines = []
    for space in ("involution", "darts", "s2"):
        with (results / f"sharpness_{space}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        shown, last = [row for row in rows if int(row["epoch"]) % 3 == 1], rows[-1]
        eigenvalues, skips = ([row[name] for row in shown] for name in ("eigenvalue", "skip_connects"))
        most = math.log(len(genotypes.SEARCH_SPACES[space]))
        lines.append(
            [
                f"`{space}`",
                ", ".join(f"{float(value):.3f}".replace("-", "−") for value in eigenvalues),
                ", ".join(skips),
                f"{float(last['entropy_normal']):.3f} ({most:.3f})",
                f"{float(last['valid_acc']):.1f} %",
            ]
        )
    head = ["space", "dominant eigenvalue, epochs 1, 4, 7, 10", "skip connections in the normal cell"]
    head += ["entropy of its edges (of no choice)", "validation accuracy"]
    return comparison.markdown_table(head, lines)


def cost(name):
    """What a plan would take at the rates that RESULTS.md has of two cores."""
    the_plan, total, lines = plan.load(ROOT / "plans" / f"{name}.toml"), 0.0, []
    measured = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    for stage, epochs in the_plan.epochs().items():
        share, batch_size = _EPOCHS[stage]
        row = _SEARCH_STEP if stage == "search" else _STEP.format(_CELLS[name])
        seconds = float(re.search(row, measured)[1])
        steps = epochs * math.ceil(share * 50_000 / batch_size)
        total += steps * seconds / 3600
        lines.append([stage, f"{epochs:,}", f"{steps:,}", f"{seconds:g} s", f"{steps * seconds / 3600:,.0f}"])
    lines.append(["all", "", "", "", f"{total:,.0f}"])
    head = ["stage", "epochs", "steps", "a step on two cores", "hours on two cores"]
    return (
        f"{comparison.markdown_table(head, lines)}\n\nEight GPUs, each of the speed of two such cores, need "
        f"{total / 8:,.0f} hours ({total / 8 / 24:.1f} days); n times as fast, an nth of that."
    )


TABLES = {  # by the place in README.md
    "hour": hour,
    "choice": choice,
    "sharpness": sharpness,
    "paper": lambda _: cost("paper"),
    "long": lambda _: cost("long"),
}


def draw(results, figures):
    """Make the figures of README's Results."""
    with utils.replacing(figures / "choice.png") as temporary:
        comparison.plot_groups(_entries(results / "choice")[1]).savefig(temporary, format="png", dpi=150)
    run = results / _SEARCH
    curves.plot_curves(_history(run / "metrics.csv"), "validation", figures / "search_curves.png")
    curves.plot_eigenvalue(_history(results / "sharpness_s2.csv"), figures / "sharpness_s2.png")
    with tempfile.TemporaryDirectory() as folder:
        for picture in visualize.draw(genotypes.parse(run), folder, name=_SEARCH):
            shutil.move(picture, figures / f"search_{picture.name}")


def _history(path):
    with path.open(newline="") as file:
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
