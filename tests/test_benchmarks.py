"""The benchmarks run and write their tables and plots; what they measure is nobody's test."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = "--init_channels 4 --layers 3 --image_size 8 --rounds 1 --threads 1".split()


def run(script, *flags):
    command = [sys.executable, BENCHMARKS / script, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_bench_search_measures_variants_and_limits(tmp_path):
    variants = ("fast", "plain", "textbook")
    done = run("bench_search.py", *SMALL, "--settings", 0, "--limits", "--out", tmp_path, "--variants", *variants)
    assert done.returncode == 0, done.stderr
    rows = [line for line in (tmp_path / "bench_search.md").read_text().splitlines() if line.startswith("| involution")]
    assert len(rows) == 4  # of the variants, and of the limits
    memory = [float(row.split("|")[-2].removesuffix(" GB ")) for row in rows[:3]]
    assert all(0.1 < gigabytes < 5 for gigabytes in memory)
    assert (tmp_path / "bench_search.png").stat().st_size > 1000


@pytest.mark.parametrize("flags", [["--variants", "eager"], ["--rounds", 0], ["--settings"]])
def test_bench_search_names_a_wrong_flag(flags):
    done = run("bench_search.py", *flags)
    assert done.returncode == 2 and flags[0] in done.stderr and "Traceback" not in done.stderr


def test_only_a_lack_of_memory_is_out_of_memory(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from bench_search import is_out_of_memory

    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_bench_data_compares_both_pipelines(tmp_path):
    done = run("bench_data.py", "--batch_size", 8, "--seconds", 0.1, "--rounds", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    row = (tmp_path / "bench_data.md").read_text().splitlines()[-1]
    assert row.startswith("| 8 |") and row.endswith("×** |")
    assert (tmp_path / "bench_data.png").stat().st_size > 1000
