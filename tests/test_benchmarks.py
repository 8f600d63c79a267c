"""The benchmarks run and write their tables and plots; what they measure is nobody's test."""

import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

import scripts
from runtime import checkpoint

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = "--init_channels 4 --layers 3 --image_size 8 --rounds 1 --threads 1".split()


@pytest.fixture
def run(tmp_path):
    """Call a benchmark in an empty folder."""
    return lambda name, *flags: scripts.run(tmp_path, BENCHMARKS / name, *flags)


def test_bench_search_measures_variants_and_limits(run, tmp_path):
    variants = ("fast", "textbook")
    done = run("bench_search.py", *SMALL, "--batch_size", 2, "--limits", "--out", tmp_path, "--variants", *variants)
    assert done.returncode == 0, done.stderr
    rows = [line for line in (tmp_path / "bench_search.md").read_text().splitlines() if line.startswith("| involution")]
    assert len(rows) == 3  # of the variants, and of the limits
    memory = [float(row.split("|")[-2].removesuffix(" GB ")) for row in rows[:2]]
    assert all(0.1 < gigabytes < 5 for gigabytes in memory)
    assert (tmp_path / "bench_search.png").stat().st_size > 1000


@pytest.mark.parametrize("flags", [["--variants", "eager"], ["--rounds", 0], ["--settings"]])
def test_bench_search_names_a_wrong_flag(run, flags):
    done = run("bench_search.py", *flags)
    assert done.returncode == 2 and flags[0] in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow  # its workers are those of bench_search.py
def test_bench_train_measures_variants(run, tmp_path):
    flags = "--settings 0 --batch_size 4 --rounds 1 --threads 1 --out".split()
    done = run("bench_train.py", *flags, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in (tmp_path / "bench_train.md").read_text().splitlines() if line.startswith("| `DARTS`")]
    assert len(rows) == 2
    assert "1.00×" in rows[0] and "module by module" in rows[1]
    assert (tmp_path / "bench_train.png").stat().st_size > 1000


def test_the_limits_of_a_training_step(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_train
    import tables

    monkeypatch.setattr(tables, "machine_limits", lambda device: (1e10, 1e11))  # bytes and FLOPs a second
    monkeypatch.setattr("sys.argv", "bench_train.py --settings 0 --batch_size 4 --threads 1".split())
    row = bench_train.limits_table(bench_train.parse_args(), {})[-1].split("|")
    assert row[1].strip().startswith("`DARTS`")
    flops, seconds = sum(map(float, row[2:4])) * 1e9, float(row[4].removesuffix("s "))
    assert flops > 0 and seconds == pytest.approx(flops / 1e11, rel=0.1)


@pytest.mark.parametrize("flags", [["--rounds", 0], ["--peer", "nowhere"]])
def test_bench_train_names_a_wrong_flag(run, flags):
    done = run("bench_train.py", *flags)
    assert done.returncode == 2 and flags[0] in done.stderr and "Traceback" not in done.stderr


def test_only_a_lack_of_memory_is_out_of_memory(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from bench_search import is_out_of_memory

    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_the_plot_of_involutions_names_every_provider_and_has_five_curves_a_panel(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from bench_involution import plot, providers
    from matplotlib.figure import Figure

    names = [*providers(1, 16, 8, 3, torch.device("cpu"), torch.float32), "cuda peer"]
    row = {"C": 16, "size": 8, "full": 3.0, "full spread": (0.2, 40.0)}
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    plot([row | {"provider": name, "K": K} for name in names for K in (3, 5)], 7, tmp_path)
    figures[0].draw_without_rendering()
    curves = [[bar.get_label() for bar in panel.containers] for panel in figures[0].axes]
    assert sum(map(len, curves)) == len(names) + 1  # the depthwise convolution is in both panels
    assert max(map(len, curves)) <= 5 and not {*names} & {label for labels in curves for label in labels}
    ticks = {text.get_text() for text in figures[0].axes[0].get_yticklabels(which="both")}
    assert {"0.2", "0.5", "1", "2", "5", "10", "20"} <= ticks
    assert {tick.strip("0.") for tick in ticks} <= {"1", "2", "5", ""}


def test_a_card_of_a_data_sheet_has_a_prediction(monkeypatch):
    from benchmarks import bench_involution as bench

    row = {"C": 16, "size": 32, "K": 3, "provider": "fused", "forward": 0.1, "backward": 0.4}
    args = Namespace(batch=512, dtype="float32")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    bandwidth, rate = bench.CARDS[bench.data_sheet_of("cuda")]
    # reads 16 + 4 numbers a pixel and writes 16: 75.5 MB, 37 us; 452 MFLOP take 23 us
    assert bench.pass_limits(row, 512, 4, bandwidth, rate)[0] == 512 * 1024 * 36 * 4 / 2.039e12
    line = bench.limits_table("Prediction.", [row], "triton", args, bandwidth, rate).splitlines()[-1]
    assert line == "| 16, 32×32 | 3 | fused | 0.037 | 2.7 | 0.058 | 6.9 |"
    assert bench.data_sheet_of("cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert bench.data_sheet_of("cuda") is None


def test_bench_data_compares_both_pipelines(run, tmp_path):
    done = run("bench_data.py", "--batch_size", 8, "--seconds", 0.1, "--rounds", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    row = (tmp_path / "bench_data.md").read_text().splitlines()[-1]
    assert row.startswith("| 8 |") and row.endswith("×** |")
    assert (tmp_path / "bench_data.png").stat().st_size > 1000


def test_bench_stream_compares_costs_and_waits(run, tmp_path):
    small = ["--width", 64, "--size", 16, "--files", 32, "--workers", 1, "--pace", 2, "--steps", 1, "--rounds", 1]
    done = run("bench_stream.py", *small, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "bench_stream.md").read_text().splitlines()
    assert sum(row.startswith("| 64×48 | 16 |") for row in rows) == 1
    assert rows[-2].startswith("| 16 | 1 | 0 ms |") and rows[-1].count(" % |") == 2


def test_bench_busy_compares_ways_to_wait(run, tmp_path):
    small = "--init_channels 4 --layers 3 --batch_size 2 --rounds 2".split()
    done = run("bench_busy.py", *small, "--busy", 0, 1, "--works", "train", "--spins", 100, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in (tmp_path / "bench_busy.md").read_text().splitlines() if "batch 2" in line]
    ways = ["one thread", "asleep", "brief", "spinning", "100 spins"]
    assert [row[1:3] for row in rows] == [[count, way] for count in "01" for way in ways]
    assert all(float(row[3].split()[0]) > 0 for row in rows) and rows[0][4] == "1 (1–1)"


def test_bench_kernel_norm_keeps_the_runs_that_it_has(run, tmp_path):
    for number in range(32):
        folder = tmp_path / "images" / ("train" if number < 16 else "test") / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (8 * number, 0, 0)).save(folder / f"{number}.png")
    small = "--archs DARTS_L20 --init_channels 4 --layers 3 --batch_size 8 --epochs 1 --seeds 1".split()
    command = ["bench_kernel_norm.py", *small, "--csv", tmp_path / "runs.csv", "--out", tmp_path]
    done = run(*command, "--data", tmp_path / "images")
    assert done.returncode == 0, done.stderr
    runs = (tmp_path / "runs.csv").read_text()
    assert len(runs.splitlines()) == 1 + 1 + 6 + 1  # header, yardstick, every form, one with other first kernels
    assert "| DARTS_L20 | `soft_rms` | shared | 1 |" in (tmp_path / "bench_kernel_norm.md").read_text()
    kept = "".join(runs.splitlines(keepends=True)[:-1])
    (tmp_path / "runs.csv").write_text(kept)
    assert run(*command, "--data", tmp_path / "images").returncode == 0  # makes the run that is missing
    again = (tmp_path / "runs.csv").read_text()
    assert again.startswith(kept) and len(again.splitlines()) == len(runs.splitlines())
    assert (tmp_path / "bench_kernel_norm.png").stat().st_size > 1000


def test_a_small_draw_of_torture(run, tmp_path):
    done = run("torture.py", "--kills", 1, "--ranks", 0, "--damages", 10, "--lines", 5, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "torture.md").read_text().splitlines()[-4:]
    assert [row.split("|")[-2].split()[0] for row in rows] == 4 * ["0"]


def test_torture_notices_what_it_is_for(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import torture

    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"weight": torch.randn(30, 30), "epoch": 1, "loss": float("nan")}, path)
    refused, failures = torture.damage([path], 40, random.Random(0), tmp_path)
    assert refused > 20 and not failures
    monkeypatch.setattr(checkpoint, "_verify", lambda path: None)
    assert any("other values" in failure for failure in torture.damage([path], 40, random.Random(0), tmp_path)[1])
    for wrong in ("raise SystemExit(3)", "raise KeyError('zz')", "import time; time.sleep(9)"):
        monkeypatch.setattr(torture.visualize, "main", lambda line=wrong: exec(line))
        assert torture.finish(torture.start(tmp_path, "visualize.py"), tmp_path, seconds=1)
