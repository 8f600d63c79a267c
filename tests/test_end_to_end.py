"""From nothing to a drawn architecture, with the commands of the README."""

import shutil

import pytest

import genotypes
from conftest import only_run


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_search_train_test_visualize(script, photographs, tmp_path, kind):
    own = ["--dataset", "folder", "--data", photographs, "--image_size", 8, "--batch_size", 6, "--subset", 30]
    own += ["--data_in", "disk", "--workers", 1]
    data = own if kind == "folder" else ["--dataset", "digits", "--subset", 96, "--batch_size", 16]
    small = ["--init_channels", 4, "--layers", 3, "--epochs", 1]
    assert script("train_search.py", "--unrolled", *data, *small, drawn=True).returncode == 0
    search = only_run(tmp_path, "search")
    result = script("train.py", *data, *small, "--arch", search.relative_to(tmp_path), drawn=True)
    assert result.returncode == 0, result.stderr
    train = only_run(tmp_path, "train")
    assert genotypes.parse(train) == genotypes.parse(search)
    result = script("test.py", "--model_path", train.relative_to(tmp_path), drawn=True)
    assert result.returncode == 0, result.stderr
    assert "top-1" in result.stdout
    if shutil.which("dot"):
        assert script("visualize.py", search.relative_to(tmp_path)).stdout.split() == ["normal.pdf", "reduction.pdf"]
