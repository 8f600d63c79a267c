"""What comes out of an experiment: statistics against known values, tables, plots, a page of its own."""

import math
import re
from collections import defaultdict

import pytest

import measure
from experiments import comparison, plan


def entry(name, kind, short=(), final=(), diverged=0):
    group = name.rpartition("-")[0] or "named"
    lost = defaultdict(int, short=diverged)
    accuracies = defaultdict(list, short=list(short), final=list(final))
    cost = measure.Count(2 * 10**6, 3 * 10**8, 10**6)
    return comparison.Entry(plan.Candidate(name, group, kind), cost, defaultdict(float, search=1.5), accuracies, lost)


def group(name, kind, values):
    return [entry(f"{name}-{k}", kind, [value]) for k, value in enumerate(values)]


@pytest.fixture
def separated():
    """Three searched genotypes that are all better than six random ones."""
    return group("found", "searched", [71.0, 72.0, 73.0]) + group(
        "drawn", "random", [60.0, 61.0, 62.0, 63.0, 64.0, 65.0]
    )


def test_the_interval_of_a_mean():
    """Student's t with two degrees of freedom: 4.303 standard errors."""
    assert comparison.interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert comparison.interval([1.0]) == math.inf


def test_the_tests_of_separated_groups_are_exact(separated):
    """Of the 84 ways to choose three of nine, two are as extreme: p = 0.0238 by ranks and by means."""
    (sentence,) = comparison.compare(separated)
    assert sentence.startswith("found (n = 3) against drawn (n = 6), accuracy after the short training: ")
    assert "Mann-Whitney U = 18, two-sided p = 0.0238" in sentence
    assert "difference of the means +9.50 points, permutation test p = 0.0238" in sentence


def test_a_genotype_that_diverged_is_the_worst_in_rank_and_in_no_mean(separated):
    (sentence,) = comparison.compare([*separated, entry("found-3", "searched", diverged=1)])
    assert "found (n = 4)" in sentence and "U = 18," in sentence  # it loses against all six
    assert "means +9.50 points" in sentence and "1 diverged" in sentence


def test_groups_of_one_are_not_compared():
    assert comparison.compare(group("found", "searched", [70.0]) + group("drawn", "random", [60.0, 61.0])) == []


def test_the_ranking_holds_or_does_not():
    def tau(final):
        return comparison.compare([entry(f"a-{k}", "random", [60.0 + k], [value]) for k, value in enumerate(final)])

    assert "Kendall's τ = 1.00, p = 0.0833, n = 4 genotypes" in tau([80.0, 81.0, 82.0, 83.0])[0]
    assert "τ = -1.00" in tau([83.0, 82.0, 81.0, 80.0])[0]
    assert tau([80.0, 81.0]) == []


def test_tables(separated):
    entries = [
        *separated,
        entry("DARTS_V2", "named", [50.0, 52.0], [90.0, 92.0]),
        entry("found-9", "searched", diverged=1),
        entry("lost", "named", [1.0], diverged=0),
    ]
    entries[-1].diverged["final"] = 3
    _, head, lines = comparison.by_group(entries)
    assert [len(line) for line in lines] == [len(head)] * 3
    found, drawn, named = lines
    assert found[:3] == ["found", "72.00 ± 1.00 (n = 3, 1 diverged)", "73.00"]
    assert drawn[1] == "62.50 ± 1.87 (n = 6)"
    assert named == [
        "named",
        "26.00 ± 35.36 (n = 2)",
        "51.00",
        "91.00 ± 1.41 (n = 2, 3 diverged)",
        "92.00",
        "2",
        "300",
        "3.00",
        "0.00",
        "0.00",
    ]
    _, head, lines = comparison.by_genotype(entries)
    assert [line[0] for line in lines[:4]] == ["found-2", "found-1", "found-0", "found-9"]  # best first
    assert lines[-1][2] == "diverged (3)" and lines[3][1] == "diverged (1)" and lines[-2][1] == "51.00 ± 1.41 (n = 2)"


def in_frame(axes, artist):
    box = artist.get_window_extent()
    return axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1


def test_every_genotype_is_a_dot_and_groups_of_three_have_an_interval(separated):
    entries = [*separated, *group("pair", "random", [50.0, 90.0]), entry("lost-1", "random", diverged=1)]
    figure = comparison.plot_groups(entries)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    dots = [line for line in axes.lines if line.get_marker() in {style["marker"] for style in comparison._STYLES}]
    assert sorted(value for line in dots for value in line.get_ydata()) == sorted([*range(60, 66), 71, 72, 73, 50, 90])
    assert all(in_frame(axes, line) for line in dots)
    assert len(axes.containers) == 2  # not of the pair
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["found\n(n = 3)", "drawn\n(n = 6)", "pair\n(n = 2)"]


def test_the_ranking_is_drawn_where_two_genotypes_have_both_accuracies():
    both = [entry(f"a-{k}", "random", [60.0 + k], [80.0 + k, 82.0]) for k in range(2)]
    figure = comparison.plot_ranking([*both, entry("b-0", "searched", [70.0])])
    (axes,) = figure.axes
    assert list(axes.containers[0].lines[0].get_xdata()) == [60.0, 61.0] and len(axes.containers) == 1
    assert comparison.plot_ranking(both[:1]) is None and comparison.plot_groups([]) is None


def test_the_page_needs_no_other_file(tmp_path, separated):
    (tmp_path / "figures").mkdir()
    comparison.plot_groups(separated).savefig(tmp_path / "figures" / "groups.png")
    tables = [comparison.by_group(separated), comparison.by_genotype(separated)]
    page = comparison._page(
        "a <b> & c", tmp_path, tables, ["p < 0.05"], ["groups.png"], {}, [("found-0", "Genotype(…)")]
    )
    assert "a &lt;b&gt; &amp; c" in page and "p &lt; 0.05" in page and "found-0" in page
    assert re.findall(r'src="(.{22})', page) == ["data:image/png;base64,"]
    assert "http" not in page and page.count("<tr>") == 2 + 2 + 9 + 1
