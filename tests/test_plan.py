"""Plans: what they ask for, and what is wrong with those that are wrong."""

import pytest

import genotypes
import utils
from experiments import plan
from scripts import ROOT

SMALL = """
[flags]
dataset = "digits"
layers = 3

[search]
epochs = 2
init_channels = 4

[searches.first]
seeds = [2, 3]

[searches.second]
seeds = [2]
unrolled = true
layers = 4

[random.uniform]
seeds = [5, 6]
search_space = "darts"

[random.equal]
seeds = [0, 1, 2]
parameters_of = "first"
tolerance = 0.02

[named]
genotypes = ["DARTS_V2"]

[short]
epochs = 3
train_portion = 0.8

[final]
seeds = [0, 1]
best = 2
epochs = 7
auxiliary = false
"""


@pytest.fixture(scope="module")
def small():
    return plan.parse(SMALL, "small", "small.toml")


def test_searches_are_settings_times_seeds(small):
    jobs = {job.name: job for job in small.searches.values()}
    assert list(jobs) == ["search-first-2", "search-first-3", "search-second-2"]
    first, second = jobs["search-first-3"].args, jobs["search-second-2"].args
    assert (first.seed, first.unrolled, first.layers, first.epochs) == (3, False, 3, 2)
    assert (second.seed, second.unrolled, second.layers, second.init_channels) == (2, True, 4, 4)


def test_candidates_have_a_genotype_each(small):
    groups = {}
    for candidate in small.candidates:
        groups.setdefault((candidate.kind, candidate.group), []).append(candidate.name)
    assert groups == {
        ("searched", "first"): ["first-2", "first-3"],
        ("searched", "second"): ["second-2"],
        ("random", "uniform"): ["uniform-5", "uniform-6"],
        ("random", "equal"): ["equal-0", "equal-1", "equal-2"],
        ("named", "named"): ["DARTS_V2"],
    }
    assert [c.budget for c in small.candidates if c.group == "equal"] == ["first-2", "first-3", "first-2"]
    assert small.candidates[3].search_space == "darts"


def test_trainings_of_a_candidate(small):
    candidate = small.candidates[0]
    (short,) = small.training("short", candidate, "DARTS_V1")
    assert short.name == "short-first-2-seed0" and short.measured_on == "validation"
    assert short.args.arch == genotypes.format(genotypes.DARTS_V1)
    final = list(small.training("final", candidate, "DARTS_V1"))
    assert [job.name for job in final] == ["final-first-2-seed0", "final-first-2-seed1"]
    assert [job.args.seed for job in final] == [0, 1] and final[0].measured_on == "test"


def test_the_epochs_of_all_stages(small):
    """Three searches; short trainings of nine candidates; final ones of 2 + 1 + 2 + 2 + 1, two seeds each."""
    assert small.epochs() == {"search": [2] * 3, "short": [3] * 9, "final": [7] * (8 * 2)}


@pytest.mark.parametrize(
    "name, kinds, stages",
    [
        ("quick", "searched random", "short final"),
        ("small", "searched random", "short"),
        ("paper", "searched random", "short final"),
        ("long", "searched", "short final"),
    ],
)
def test_the_plans_that_ship_are_right(name, kinds, stages):
    loaded = plan.load(ROOT / "plans" / f"{name}.toml")
    assert {candidate.kind for candidate in loaded.candidates} >= {*kinds.split()}
    assert " ".join(stage for stage, seeds in loaded.seeds.items() if seeds) == stages


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("[flags]", "[flag", "not a TOML file"),
        ("[flags]", "[flgas]", "has 'flgas', which is none of flags, search,"),
        ("layers = 3", "layer = 3", "train.py has no flag --layer; did you mean layers?"),
        ("layers = 3", "layers = 0", "[short]: argument --layers: must be an integer at least 1"),
        ("layers = 4", "layers = 2", "[searches.second]: argument --layers: must be an integer at least 3"),
        ("layers = 3", "layers = [3]", "[short]: layers must be a number or a text, got [3]"),
        ("unrolled = true", "unrolled = 1", "--unrolled takes no value: unrolled must be true or false, got 1"),
        ("layers = 4", "layers = true", "layers must be a number or a text, got True"),
        ("epochs = 7", "epochs = 7\nwarmup_epochs = 7", "[final]: --warmup_epochs 7 must be less than --epochs 7"),
        ("layers = 4", "seed = 4", "--seed is not for a plan to set; use seeds"),
        ("layers = 4", "folder = 'x'", "--folder is not for a plan to set"),
        ('dataset = "digits"', 'dataset = "imagenet"', "invalid choice: 'imagenet'"),
        ("seeds = [2, 3]", "seeds = 2", "[searches.first] seeds must be a list of integers from 0 on"),
        ("seeds = [2, 3]", "seeds = [true]", "seeds must be a list of integers from 0 on"),
        ("seeds = [2, 3]", "seeds = [2, 2]", "has one seed twice: [2, 2]"),
        ("seeds = [2, 3]", "epochs = 2", "[searches.first]: seeds is missing"),
        ("[searches.first]", '[searches."a/b"]', "[searches.a/b]: a group is named by"),
        ("[searches.first]", "[searches.named]", "a group is named by"),
        ("[searches.second]", "[searches.equal]", "two genotypes would be called equal-2: rename a group"),
        ("[searches.second]\nseeds", "[searches]\nsecond", "[searches] holds groups"),
        ('"darts"', '"dart"', ", got 'dart'"),
        ('"first"', '"frist"', "[random.equal] parameters_of must name a group of searches, got 'frist'"),
        ("tolerance = 0.02", "tolerance = 0", "tolerance must be a share of the parameters"),
        ("tolerance = 0.02", "tolerence = 0.1", "has 'tolerence', which is none of search_space, parameters_of, toler"),
        ('["DARTS_V2"]', '"DARTS_V2"', "[named] genotypes must be a list of names"),
        ('["DARTS_V2"]', '["DRATS"]', "[named] genotypes: 'DRATS' is none of NASNet"),
        ("best = 2", "best = 0", "[final] best must be a number of genotypes of each group, at least 1, got 0"),
        ("train_portion = 0.8", "", "[short] ranks, and not by the test images: train_portion"),
        ("[short]\nepochs = 3\ntrain_portion = 0.8", "", "[short] is missing"),
        ("best = 2", "best = 2\ntrain_portion = 0.9", "[final] trains on all images and is tested: put train_portion"),
    ],
)
def test_a_wrong_plan_is_told_in_a_line(old, new, says):
    assert old in SMALL
    with pytest.raises(utils.UserError) as caught:
        plan.parse(SMALL.replace(old, new, 1), "small", "small.toml")
    assert str(caught.value).startswith("small.toml: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_without_anything_to_compare():
    with pytest.raises(utils.UserError, match="nothing to compare"):
        plan.parse("[short]\ntrain_portion = 0.9\n", "small", "small.toml")
    with pytest.raises(utils.UserError, match="short must be a table"):
        plan.parse("short = 3\n", "small", "small.toml")


def test_a_plan_of_100_000_nested_lists_is_none():
    with pytest.raises(utils.UserError, match="small.toml: not a TOML file"):
        plan.parse("a = " + 10**5 * "[" + 10**5 * "]", "small", "small.toml")


def test_a_plan_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(utils.UserError, match="cannot read the plan"):
            plan.load(path)
