"""The network in pretrained/ is used as any run, on a fresh clone, with the images that come with it."""

import json
import shutil

import pytest
import torch

import genotypes
from runtime import checkpoint
from scripts import ROOT

RUN = "pretrained/hour"


@pytest.fixture
def run(tmp_path):
    """The run below the folder where `script` calls the scripts: test.py writes to it."""
    for name in ("images", "hour"):
        shutil.copytree(ROOT / "pretrained" / name, tmp_path / "pretrained" / name)
    return tmp_path / RUN


def test_it_is_small_and_that_of_the_table():
    file = ROOT / RUN / checkpoint.NAME
    assert file.stat().st_size < 2_000_000
    state = torch.load(file, weights_only=True)
    kept = ROOT / "results" / "hour" / f"second-2-seed{state['args']['seed']}"
    assert genotypes.parse(ROOT / RUN) == genotypes.parse(kept)
    assert (ROOT / RUN / "metrics.csv").read_text() == (kept / "metrics.csv").read_text()
    accuracy = float(kept.joinpath("metrics.csv").read_text().splitlines()[-1].split(",")[5])
    assert f"({accuracy:.2f} %; " in (ROOT / "README.md").read_text()


def test_it_classifies_the_images_that_come_with_it(script, run):
    result = script("test.py", "--model_path", RUN)
    assert result.returncode == 0, result.stderr
    found = json.loads((run / "test" / "test.json").read_text())
    assert found["images"] == 20 and found["top1"] >= 90, found


@pytest.mark.slow
def test_it_is_exported(script, run):
    result = script("export.py", RUN, "--format", "pt2", "--output", "network.pt2")
    assert result.returncode == 0, result.stderr
