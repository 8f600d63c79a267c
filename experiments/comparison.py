"""What comes out of an experiment: results.csv, results.md, two plots, and report.html with all of them.

    results.csv    one row a job: what the other files are made of
    results.md     a table by group and one by genotype; a test of the searched cells against the random ones
    figures/       groups.png: every genotype a dot, mean and 95 % interval; ranking.png: short against final accuracy
    report.html    one file that needs no other

A genotype's accuracy is the mean over its seeds, a group's the mean over its genotypes, at the last epoch. A genotype
whose training diverged has none: it counts as the worst of all in the rank test, and tables say how many there are.
"""

import base64
import csv
import html
import io
import itertools
import json
import math
import statistics
from collections import defaultdict
from typing import NamedTuple

from matplotlib.figure import Figure
from scipy import stats

import genotypes
import measure
from experiments import jobs, plan, protocol
from utils import replacing, write_text

_COLUMNS = (
    "stage", "group", "candidate", "seed", "status", "epochs", "measured_on", "accuracy", "loss", "train_accuracy",
    "parameters", "multiply_adds", "hours", "run", "line",
)  # fmt: skip
_STYLES = [  # of the groups, in turn; told apart without colours too
    dict(color=colour, marker=marker, ls="", ms=6)
    for colour, marker in zip(
        ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#666666"),
        ("o", "s", "^", "D", "v", "P", "X"),
        strict=True,
    )
]


class Entry(NamedTuple):
    """What is known of a candidate."""

    candidate: plan.Candidate
    cost: measure.Count | None  # None while it has no genotype
    hours: dict  # by stage
    accuracies: dict  # by stage, "short" and "final": one a seed of the trainings that have finished
    diverged: dict  # by stage: how many

    def accuracy(self, stage):
        """The mean over the seeds; None where there is none, or one of them diverged."""
        values = self.accuracies[stage]
        return statistics.mean(values) if values and not self.diverged[stage] else None


def write(the_plan, folder, states, found):
    """Write all files.

    Args:
        states: Job -> jobs.State, of the jobs that can be named by now.
        found: Candidate -> (genotype, what names it); None where a search has not ended.
    """
    entries = collect(the_plan, folder, states, found)
    write_text(folder / "results.csv", _csv(rows(folder, states, entries)))
    pictures = {"groups.png": plot_groups(entries), "ranking.png": plot_ranking(entries)}
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in pictures.items():
        path = folder / "figures" / name
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    tables, sentences = [by_group(entries), by_genotype(entries)], compare(entries)
    sentences += filter(None, [protocol.same_cells(found)])
    title = f"Experiment {the_plan.name}"
    drawn = [name for name, figure in pictures.items() if figure]
    write_text(folder / "results.md", _markdown(title, tables, sentences, drawn))
    genotype_list = [(c.name, genotypes.format(known[0])) for c, known in found.items() if known]
    write_text(folder / "report.html", _page(title, folder, tables, sentences, drawn, states, genotype_list))


def collect(the_plan, folder, states, found):
    """An Entry for every candidate of a plan."""
    network = the_plan.network
    classes = _classes(folder, states)
    of = defaultdict(list)
    for job, state in states.items():
        of[job.candidate].append((job, state))
    entries = []
    for candidate in the_plan.candidates:
        known = found[candidate]
        cost = measure.count(known[0], network, classes) if known else None
        hours, accuracies, diverged = defaultdict(float), defaultdict(list), defaultdict(int)
        for job, state in of[candidate.name]:
            hours[job.stage] += jobs.seconds(job, folder) / 3600
            diverged[job.stage] += state.status == "diverged"
            if state.status == "finished" and job.stage != "search":
                accuracies[job.stage].append(state.value("valid_acc"))
        entries.append(Entry(candidate, cost, hours, accuracies, diverged))
    return entries


def _classes(folder, states):
    """The number of classes of the images: that of the first training that has begun; 10 before there is one."""
    for job in states:
        path = folder / job.name / "config.json"
        if job.stage != "search" and path.exists():
            return len(json.loads(path.read_text())["data"]["train"]["classes"])
    return 10


def rows(folder, states, entries):
    """The rows of results.csv."""
    entry_of = {entry.candidate.name: entry for entry in entries}
    for job, state in states.items():
        entry = entry_of[job.candidate]
        last = state.rows[-1] if state.rows else {}
        yield dict(
            stage=job.stage,
            group=entry.candidate.group,
            candidate=job.candidate,
            seed=job.seed,
            status=state.status,
            epochs=state.epochs,
            measured_on=job.measured_on,
            accuracy=last.get("valid_acc"),
            loss=last.get("valid_loss"),
            train_accuracy=last.get("train_acc"),
            parameters=entry.cost and entry.cost.parameters,
            multiply_adds=entry.cost and entry.cost.multiply_adds,
            hours=round(jobs.seconds(job, folder) / 3600, 4),
            run=job.name,
            line=state.line,
        )


def _csv(of):
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(of)
    return text.getvalue()


# ------------------------------------------------------------------------------------------------ statistics


def interval(values):
    """The half-width of the 95 % interval of a mean (Student's t); infinite for a single value."""
    if len(values) < 2:
        return math.inf
    return stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def compare(entries):
    """A sentence for each group of searches against each other one and each of random genotypes, one of the ranking."""
    groups = defaultdict(list)
    for entry in entries:
        groups[entry.candidate.kind, entry.candidate.group].append(entry)
    sentences = []
    for one, other in itertools.combinations(groups, 2):
        if {one[0], other[0]} in ({"searched"}, {"searched", "random"}):
            one, other = sorted((one, other), key=lambda group: group[0] == "random")
            sentences += _compare_two(one[1], groups[one], other[1], groups[other])
    ranking = _ranking(entries)
    return sentences + [f"Short against final accuracy: {ranking} genotypes."] * bool(ranking)


def _ranking(entries):
    """Whether the best of the short training are the best of the final one, in numbers; "" for fewer than three."""
    pairs = [pair for pair in map(_short_and_final, entries) if None not in pair]
    if len(pairs) < 3:
        return ""
    tau = stats.kendalltau(*zip(*pairs, strict=True))
    return f"Kendall's τ = {tau.statistic:.2f}, p = {tau.pvalue:.3g}, n = {len(pairs)}"


def _compare_two(name, searched, other, drawn):
    trained = [[e.accuracy("short") for e in of if e.accuracy("short") is not None] for of in (searched, drawn)]
    lost = [sum(e.diverged["short"] > 0 for e in of) for of in (searched, drawn)]
    ranked = [values + [-1.0] * n for values, n in zip(trained, lost, strict=True)]  # diverged: the worst
    if min(map(len, ranked)) < 2:
        return
    ranks = stats.mannwhitneyu(*ranked, alternative="two-sided")
    sentence = (
        f"{name} (n = {len(ranked[0])}) against {other} (n = {len(ranked[1])}), accuracy after the short training: "
        f"Mann-Whitney U = {ranks.statistic:g}, two-sided p = {ranks.pvalue:.3g}"
    )
    if min(map(len, trained)) > 1:
        difference = statistics.mean(trained[0]) - statistics.mean(trained[1])
        permuted = stats.permutation_test(
            trained, lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True, n_resamples=99_999, rng=0
        )
        sentence += f"; difference of the means {difference:+.2f} points, permutation test p = {permuted.pvalue:.3g}"
    if any(lost):
        sentence += f"; {sum(lost)} diverged, the worst in rank and in no mean"
    yield sentence + "."


def _short_and_final(entry):
    return entry.accuracy("short"), entry.accuracy("final")


# ---------------------------------------------------------------------------------------------------- tables


def spread(values, lost=0):
    """Mean, standard deviation and number of some accuracies, in words."""
    more = f", {lost} diverged" if lost else ""
    if not values:
        return f"diverged ({lost})" if lost else "–"
    if len(values) == 1:
        return f"{values[0]:.2f} (n = 1{more})"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} (n = {len(values)}{more})"


def _best(values):
    return f"{max(values):.2f}" if values else "–"


def _costs(entries):
    known = [entry.cost for entry in entries if entry.cost]
    if not known:
        return "–", "–"
    return tuple(value_range([getattr(c, what) / 1e6 for c in known]) for what in ("parameters", "multiply_adds"))


def value_range(values):
    """The smallest and the largest, or the only one, in words."""
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _hours(entries):
    return [f"{sum(entry.hours[stage] for entry in entries):.2f}" for stage in plan.STAGES]


_COST_HEADS = ["parameters (M)", "multiply-adds (M)", "search (h)", "short (h)", "final (h)"]


def by_group(entries):
    """Title, head and rows of the table of groups."""
    groups = defaultdict(list)
    for entry in entries:
        groups[entry.candidate.group].append(entry)
    lines = []
    for name, members in groups.items():
        short = [e.accuracy("short") for e in members if e.accuracy("short") is not None]
        final = [value for e in members for value in e.accuracies["final"]]
        lost = [sum(e.diverged["short"] > 0 for e in members), sum(e.diverged["final"] for e in members)]
        accuracy = [spread(short, lost[0]), _best(short), spread(final, lost[1]), _best(final)]
        lines.append([name, *accuracy, *_costs(members), *_hours(members)])
    head = ["group", "short: validation (%)", "best", "final: test (%)", "best", *_COST_HEADS]
    return "By group: n is the number of genotypes (short) and of trainings of the best ones (final)", head, lines


def by_genotype(entries):
    """Title, head and rows of the table of genotypes, the best of each group first."""
    order = {name: k for k, name in enumerate(dict.fromkeys(e.candidate.group for e in entries))}
    ranked = sorted(entries, key=lambda e: (order[e.candidate.group], -(e.accuracy("short") or -1)))
    lines = []
    for entry in ranked:
        short, final = (entry.accuracies[stage] for stage in ("short", "final"))
        accuracy = [spread(short, entry.diverged["short"]), spread(final, entry.diverged["final"]), _best(final)]
        lines.append([entry.candidate.name, *accuracy, *_costs([entry]), *_hours([entry])])
    head = ["genotype", "short: validation (%)", "final: test (%)", "best", *_COST_HEADS]
    return "By genotype: n is the number of seeds", head, lines


def markdown_table(head, lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _markdown(title, tables, sentences, pictures):
    parts = [f"# {title}"]
    parts += [f"{name}.\n\n{markdown_table(head, lines)}" for name, head, lines in tables]
    parts += sentences
    parts += [f"![{_CAPTIONS[name]}](figures/{name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------- plots

_CAPTIONS = {
    "groups.png": "Every genotype a dot; of groups of three or more, the mean and its 95 % interval",
    "ranking.png": "Accuracy after the short training and after the final one (mean, standard deviation over seeds)",
}


def _styles(entries):
    """The group of every entry -> how it is drawn, the same in all plots."""
    groups = dict.fromkeys(entry.candidate.group for entry in entries)
    return {group: _STYLES[k % len(_STYLES)] for k, group in enumerate(groups)}


def plot_groups(entries):
    """Every genotype's accuracy after the short training by group, mean and 95 % interval; None before there is one."""
    groups = defaultdict(list)
    for entry in entries:
        if entry.accuracy("short") is not None:
            groups[entry.candidate.group].append(entry.accuracy("short"))
    if not groups:
        return None
    figure = Figure(figsize=(max(4.0, 1.6 + 1.3 * len(groups)), 3.8), layout="constrained")
    axes = figure.subplots()
    for k, (group, values) in enumerate(groups.items()):
        # side by side, so that equal ones are seen
        shift = [0.3 * ((i + 0.5) / len(values) - 0.5) for i in range(len(values))]
        axes.plot([k + s for s in shift], sorted(values), alpha=0.75, mec="none", **_styles(entries)[group])
        if len(values) > 2:  # the interval of two is wider than any axis
            mean, half = statistics.mean(values), interval(values)
            ends = [[mean - max(0, mean - half)], [min(100, mean + half) - mean]]
            axes.errorbar(k + 0.28, mean, ends, color="black", marker="_", ms=12, capsize=4, lw=1.2)
    axes.set_xticks(range(len(groups)), [f"{name}\n(n = {len(of)})" for name, of in groups.items()])
    axes.set(xlim=(-0.6, len(groups) - 0.4), ylabel="validation accuracy, short training (%)")
    axes.grid(axis="y", alpha=0.3)
    return figure


def plot_ranking(entries):
    """Final against short accuracy, a dot a genotype; None unless two have both."""
    known = [entry for entry in entries if None not in _short_and_final(entry)]
    if len(known) < 2:
        return None
    figure = Figure(figsize=(4.8, 3.8), layout="constrained")
    axes = figure.subplots()
    for group, style in _styles(entries).items():
        members = [entry for entry in known if entry.candidate.group == group]
        if members:
            short, final = zip(*map(_short_and_final, members), strict=True)
            bars = [statistics.stdev(e.accuracies["final"]) if len(e.accuracies["final"]) > 1 else 0 for e in members]
            axes.errorbar(short, final, bars, label=group, elinewidth=1, capsize=3, **style)
    axes.set(xlabel="validation accuracy, short training (%)", ylabel="test accuracy, final training (%)")
    axes.set_title(_ranking(entries), fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


# ------------------------------------------------------------------------------------------------------ page

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .7em; text-align: left; white-space: nowrap }
tr { border-bottom: 1px solid #ddd } code { font-size: 12px; overflow-wrap: anywhere } img { max-width: 100% }
.wide { overflow-x: auto }"""


def _page(title, folder, tables, sentences, pictures, states, genotype_list):
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [_table(*table) for table in tables]
    parts += [f"<p>{html.escape(sentence)}</p>" for sentence in sentences]
    for name in pictures:
        content = base64.b64encode((folder / "figures" / name).read_bytes()).decode()
        caption = html.escape(_CAPTIONS[name])
        parts.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{content}"></figure><p>{caption}.</p>')
    lines = []
    for job, state in states.items():
        accuracy = f"{state.value('valid_acc'):.2f}" if state.rows else "–"
        what = f"{state.epochs} of {job.args.epochs}"
        lines.append([job.name, state.status, what, f"{accuracy} ({job.measured_on})", state.line])
    parts.append(_table("Jobs: the run folders here", ["job", "state", "epochs", "accuracy (%)", ""], lines))
    parts.append("<h2>Genotypes, for --arch</h2>")
    parts += [f"<p><b>{html.escape(n)}</b><br><code>{html.escape(text)}</code></p>" for n, text in genotype_list]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>' + "\n".join(parts) + "</body></html>\n"


def _table(title, head, lines):
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<h2>{html.escape(title)}</h2><div class="wide"><table><tr>{cells}</tr>{body}</table></div>'
