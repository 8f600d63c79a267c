"""The tables of the README's Results are those of results/."""

import contextlib
import json
from pathlib import Path

import pytest

import genotypes
import train
from utils import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import results

    return results


def make_run(folder, accuracy):
    """What a training of two epochs leaves, half an hour of work."""
    args = train.parse_args("--arch DARTS --epochs 2 --init_channels 4 --layers 3".split())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(script="train.py", args=vars(args))))
    (folder / "metrics.csv").write_text(f"epoch,valid_acc\n1,10.0\n2,{accuracy}\n")
    (folder / "genotype.json").write_text(genotypes.to_json(genotypes.DARTS))
    (folder / "summary.json").write_text(json.dumps(dict(hours=0.5, processor_hours=0.4)))
    (folder / "checkpoint.pt").write_bytes(bytes(1000))
    return folder


def test_the_readme_says_what_the_runs_say(results):
    """A table that was changed by hand, or not made anew after a run was added, fails."""
    for name, make in results.TABLES.items():
        assert results.tables.put(ROOT / "README.md", name, make(ROOT / "results"), only_look=True), name


def test_every_run_behind_a_table_says_what_it_was(results):
    configs = sorted((ROOT / "results").glob("*/*/config.json"))
    assert configs
    for path in configs:
        config = json.loads(path.read_text())
        assert config["git_commit"] and "seed" in config["args"] and config["data"]["train"]["counts"], path
        assert sum((path.parent / name).stat().st_size for name in results._KEPT) < 20_000, path.parent


def test_a_table_that_differs_is_noticed(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- hour: begin -->\n| 1 |\n<!-- hour: end -->\nafter\n")
    assert results.tables.put(page, "hour", "| 1 |", only_look=True)
    assert not results.tables.put(page, "hour", "| 2 |", only_look=True)
    assert "| 1 |" in page.read_text()
    assert not results.tables.put(page, "hour", "| 2 |")
    assert page.read_text() == "before\n<!-- hour: begin -->\n| 2 |\n<!-- hour: end -->\nafter\n"


def test_trainings_that_differ_in_their_seeds_are_one_line(results, tmp_path):
    for name, accuracy in {"small-seed0": 80.0, "small-seed1": 82.0, "large-seed0": 90.0}.items():
        make_run(tmp_path / "hour" / name, accuracy)
    *_, first, second = results.hour(tmp_path).splitlines()
    assert first.startswith("| large | 3 | 4 |") and first.endswith("| 2 | 24 | 720 | 90.00 (n = 1), test |")
    assert second.startswith("| small | 3 | 4 |") and second.endswith("| 2 | 24 | 720 | 81.00 ± 1.41 (n = 2), test |")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(epochs=3), "small-seed1 differs from small-seed0 in epochs"),
        (dict(train_portion=0.9), "in train_portion"),
        (dict(seed=7, save="EXP"), None),
    ],
)
def test_trainings_with_other_settings_are_no_line_together(results, tmp_path, change, message):
    for k in range(2):
        run = make_run(tmp_path / "hour" / f"small-seed{k}", 80.0)
    config = json.loads((run / "config.json").read_text())
    config["args"].update(change)
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        results.hour(tmp_path)


def test_a_training_that_has_not_ended_is_in_no_table(results, tmp_path):
    run = make_run(tmp_path / "hour" / "small-seed0", 80.0)
    (run / "metrics.csv").write_text("epoch,valid_acc\n1,10.0\n")
    with pytest.raises(UserError, match="small-seed0 is no whole training"):
        results.hour(tmp_path)


def test_gpus_have_a_run_each(results):
    """plans/long.toml: four searches, four short and three final trainings at once on eight GPUs."""
    text = results.cost("long")
    hours = [float(line.split("|")[-2].replace(",", "")) for line in text.splitlines()[2:5]]
    expected = hours[0] / 4 + hours[1] / 4 + hours[2] / 3
    assert abs(float(text.partition("need ")[2].split()[0]) - expected) < 2


def test_of_a_run_a_few_files_are_kept(results, tmp_path):
    results.keep(make_run(tmp_path / "run", 80.0), tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == set(results._KEPT)
    assert genotypes.parse(tmp_path / "kept") == genotypes.DARTS
    with pytest.raises(UserError, match="has no config.json, metrics.csv"):
        results.keep(tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_images_are_for_what_is_kept(results, monkeypatch):
    monkeypatch.setattr("sys.argv", ["results.py", "--images", "pretrained/images"])
    with pytest.raises(UserError, match="--images only with them"):
        results.parse_args()
