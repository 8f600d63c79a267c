"""train_search.py as people run it: the command line, exact resume, bad input."""

import csv
import os
import shutil
import signal
import time
from argparse import Namespace

import pytest
import torch

import data
import genotypes
import scripts
import train_search
import utils
from conftest import assert_one_clear_line, assert_same_curves, only_run
from model_search import Network

TINY = "--dataset digits --subset 64 --batch_size 16 --init_channels 4 --layers 3 --epochs 2 --report_freq 1".split()
QUICK = [*TINY, "--search_space", "s3"]  # where the primitives are not what matters
SECOND_ORDER = ["--unrolled", *QUICK, "--drop_path_prob", "0.4"]

ALPHAS = {f"alphas_{what}.png" for what in ("normal", "reduction", "heat_map")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a second-order search with drop path that nobody stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = scripts.run(folder, "train_search.py", *SECOND_ORDER, drawn=True)
    assert result.returncode == 0, result.stderr
    return only_run(folder, "search"), result.stdout


def test_a_search_leaves_everything_in_its_folder(uninterrupted):
    folder, printed = uninterrupted
    genotype = genotypes.parse(folder)
    assert printed.count(f"genotype = {genotypes.format(genotype)}") >= 1
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert genotypes.parse(rows[-1]["genotype"]) == genotype
    for name in ("curves.png", "normal.gv", "reduction.gv"):
        assert (folder / "figures" / name).stat().st_size > 0
    for name in ALPHAS:
        assert (folder / "figures" / name).read_bytes()[:4] == b"\x89PNG"
    if shutil.which("dot"):
        assert (folder / "figures" / "normal.png").read_bytes()[:4] == b"\x89PNG"
        assert (folder / "figures" / "evolution.gif").read_bytes()[:3] == b"GIF"
    assert "involution backend" in (folder / "log.txt").read_text()


def test_piped_output_is_plain_lines(uninterrupted):
    _, printed = uninterrupted
    assert "\r" not in printed and "epoch 1/2 step 2/2 loss" in printed


def assert_same_run(folder, expected):
    assert (folder / "metrics.csv").read_bytes() == (expected / "metrics.csv").read_bytes()
    of_a_search = ("alphas.csv", "winners.csv") if expected.name.startswith("search-") else ()
    for name in ("genotype.json", *of_a_search):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert_same_curves(folder, expected)
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, expected)]
    for a, b in zip(states[0]["model"].items(), states[1]["model"].items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    for name in {"optimizer", "arch_optimizer"} & {*states[1]}:
        for k, state in states[1][name]["state"].items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(states[0][name]["state"][k][key]), torch.as_tensor(value))


def start_and_signal(folder, number, line):
    """Start the search, send a signal when `line` has been printed, and return (exit code, run folder)."""
    code = scripts.stop_at(line, number, folder, "train_search.py", *SECOND_ORDER)
    return code, only_run(folder, "search")


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("epoch 1/2 step 1/2", id="in the first epoch", marks=pytest.mark.slow),
        pytest.param("epoch 2/2 step 1/2", id="in the second epoch"),
    ],
)
def test_a_killed_search_resumes_exactly(uninterrupted, tmp_path, line):
    code, folder = start_and_signal(tmp_path, signal.SIGKILL, line)
    assert code == -signal.SIGKILL
    result = scripts.run(tmp_path, "train_search.py", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, uninterrupted[0])


def interrupt(folder, number):
    """The run folder of a search that got a signal in its first step, and has saved and said how to go on."""
    code, run = start_and_signal(folder, number, "epoch 1/2 step 1/2")
    assert code == 128 + number
    assert f"train_search.py --resume {run.relative_to(folder)}" in (run / "log.txt").read_text()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] > 0
    return run


def test_control_c_saves_and_says_how_to_resume(tmp_path):
    interrupt(tmp_path, signal.SIGINT)


def test_an_interrupted_search_resumes_exactly(uninterrupted, tmp_path):
    folder = interrupt(tmp_path, signal.SIGTERM)
    result = scripts.run(tmp_path, "train_search.py", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, uninterrupted[0])


@pytest.fixture(scope="module")
def resumed_after_its_end(uninterrupted, tmp_path_factory):
    """A finished search of CUDA graphs whose results were lost, once it has been resumed; and what that printed."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(uninterrupted[0], folder / "run")
    (folder / "run" / "metrics.csv").unlink()
    (folder / "run" / "genotype.json").unlink()
    config = folder / "run" / "config.json"
    config.write_text(config.read_text().replace('"cuda_graph": false', '"cuda_graph": true'))
    result = scripts.run(folder, "train_search.py", "--resume", "run", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stdout


def test_a_finished_search_can_be_resumed_to_write_its_results(uninterrupted, resumed_after_its_end):
    assert_same_run(resumed_after_its_end[0], uninterrupted[0])


def test_a_run_with_cuda_graphs_goes_on_without_a_gpu(resumed_after_its_end):
    assert "no CUDA graphs on this device: going on without" in resumed_after_its_end[1]


@pytest.mark.parametrize("space", ["darts", pytest.param("mixed", marks=pytest.mark.slow)])
def test_first_order_in_the_other_spaces(script, tmp_path, space):
    assert script("train_search.py", *TINY, "--epochs", 1, "--search_space", space).returncode == 0
    names = {primitive for primitive, _ in genotypes.parse(only_run(tmp_path, "search")).normal}
    assert names <= set(genotypes.SEARCH_SPACES[space])


def test_a_search_that_stops_early_has_ended(script, tmp_path):
    """In a space of which every second operation is a skip connection, two of them are there at once."""
    line = [*TINY, "--search_space", "s2", "--eigenvalue_every", 1, "--early_stop", "skips", "--folder", "run"]
    result = script("train_search.py", *line)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "run" / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    assert row["kept_epoch"] == "1" and float(row["eigenvalue"]) != 0
    assert genotypes.parse(tmp_path / "run") == genotypes.parse(row["genotype"]) == genotypes.parse(f"{tmp_path}/run@1")
    says = "stopped early by --early_stop skips after epoch 1 of 2; the genotype is that of epoch 1"
    assert f"the normal cell has {row['skip_connects']} skip connections after epoch 1" in result.stdout
    assert says in result.stdout
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    again = script("train_search.py", "--resume", "run")
    assert again.returncode == 0 and says in again.stdout and "step" not in again.stdout, again.stderr
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    more = script("train_search.py", "--resume", "run", "--epochs", 9)
    assert_one_clear_line(more, "it was stopped early after epoch 1", "start a new run with --early_stop none")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("given, expected", [(None, 1), (1, 1), (5, 5), (0, None), (6, None)])
def test_an_early_stop_needs_eigenvalues(given, expected):
    args = Namespace(early_stop="eigenvalue", eigenvalue_every=given, epochs=50, unrolled=True)
    if expected is None:
        with pytest.raises(utils.UserError, match=f"it needs --eigenvalue_every 1 to 5, got {given}"):
            train_search.choose_interval(args, 391)
    else:
        assert train_search.choose_interval(args, 391) == expected


@pytest.mark.parametrize("more", [dict(drop_path_prob=0.1), dict(search_space="s4")])
def test_a_recording_has_no_chance_in_it(more):
    args = Namespace(**dict(cuda_graph=True, resume=None, drop_path_prob=0.0, search_space="s3") | more)
    with pytest.raises(utils.UserError, match="--cuda_graph records a step once: leave it out"):
        train_search.check_cuda_graph(args, torch.device("cuda"))


def test_noise_in_a_validation_is_not_what_a_run_goes_on_with():
    """A run that is stopped in its validation does all of it again, and draws what it would have drawn."""
    torch.manual_seed(0)
    primitives = genotypes.SEARCH_SPACES["s4"]
    net = Network(4, 10, 3, torch.nn.CrossEntropyLoss(), primitives=primitives)
    images = data.Images(torch.randint(256, (6, 8, 8, 3), dtype=torch.uint8), torch.arange(6), [*"abcdefghij"])
    batches = data.Batches(images, 2, data.Normalization((0.5,) * 3, (0.5,) * 3), augmentation=None)
    before, saved = torch.get_rng_state(), []
    keep = lambda: saved.append(torch.get_rng_state())  # noqa: E731
    losses = utils.infer(batches, net, after_batch=keep).losses
    assert len(saved) == 3 and all(torch.equal(state, before) for state in saved)
    torch.randn(3)
    assert (utils.infer(batches, net, after_batch=keep).losses == losses).all()


def test_mixed_precision(script, tmp_path):
    result = script("train_search.py", *TINY, "--unrolled", "--amp", "--epochs", 1)
    assert result.returncode == 0, result.stderr
    assert "epoch 1/1 step 2/2 loss" in (only_run(tmp_path, "search") / "log.txt").read_text()


def test_own_images_of_an_odd_size(script, image_folder, tmp_path):
    own = ["--dataset", "folder", "--data", image_folder, "--image_size", 9, "--batch_size", 8, "--cutout"]
    result = script("train_search.py", "--unrolled", *TINY, *own, "--cutout_length", 3, "--epochs", 1, "--gpu", 0)
    assert result.returncode == 0, result.stderr
    assert "--gpu 0: no CUDA device here, going on with the CPU" in result.stdout or torch.cuda.is_available()


def test_without_dot_the_search_goes_on_and_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("INVOLUTION_BACKEND", "torch")  # there is no compiler either
    result = scripts.run(tmp_path, "train_search.py", *QUICK)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("install Graphviz") == 1
    assert "searched" in result.stdout
    assert "Genotype(" in (only_run(tmp_path, "search") / "report.html").read_text()  # without its drawings
    figures = {path.name for path in (only_run(tmp_path, "search") / "figures").iterdir()}
    assert figures == {"curves.png", "normal.gv", "reduction.gv", *ALPHAS}


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--epochs", 0], "--epochs: must be an integer at least 1, got 0"),
        (["--layers", 2], "--layers: must be an integer at least 3 and at most 1000, got 2"),
        (["--init_channels", "many"], "--init_channels: must be an integer at least 1 and at most 4096, got 'many'"),
        (["--batch_size", 0], "--batch_size: must be an integer at least 2, got 0"),
        (["--batch_size", 64], "--batch_size 64 is larger than the train_portion: 32 images"),
        (["--train_portion", 1], "--train_portion: must be a number above 0 and below 1, got 1"),
        (["--train_portion", 0.9], "--batch_size 16 is larger than the rest of the training images: 7 images"),
        (["--learning_rate", -1], "--learning_rate: must be a number above 0, got -1"),
        (
            ["--arch_learning_rate", "3e38"],
            "--arch_learning_rate: must be a number at most 1e+30 and above 0, got 3e38",
        ),
        (["--subset", 0], "--subset: must be an integer at least 2, got 0"),
        (["--search_space", "dart"], "invalid choice: 'dart'"),
        (["--dataset", "folder", "--data", "missing"], "--data missing: no such folder"),
        (["--cutout"], "--cutout_length 16 can cover a whole image of 8x8 pixels"),
        (["--resume", "nothing"], "--resume nothing: no such folder"),
        (["--resume", ""], "must be the path of a run folder"),
        (["--epochs", "1" + 400 * "0"], "--epochs: must be an integer at least 1"),
        (["--device", "cuda"], "--device cpu"),
        (["--device", "cpu", "--cuda_graph"], "--cuda_graph needs a CUDA device, and this run is on cpu"),
        (["--search_space", "s4", "--early_stop", "skips"], "counts skip connections, and space s4 has none"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input(script, tmp_path, arguments, says):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert_one_clear_line(script("train_search.py", *TINY, *arguments), says)
    assert not list(tmp_path.iterdir())


def test_a_failed_download_names_the_way_out(script, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    result = script("train_search.py", "--unrolled", "--data", "a/b/c")
    assert_one_clear_line(result, "cannot be downloaded", "--dataset digits", "--dataset folder")
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_no_longer_finite_stop_the_search(script, tmp_path):
    result = script("train_search.py", *QUICK, "--learning_rate", 1e30, "--grad_clip", 1e30)
    run = only_run(tmp_path, "search").relative_to(tmp_path)
    says = "the gradient of the alphas became", "step", "learning rate 1e+30", f"{run}/checkpoint.pt"
    assert_one_clear_line(result, *says, code=3)


def test_a_run_of_other_settings_is_not_resumed(script, uninterrupted):
    result = script("train_search.py", "--resume", uninterrupted[0], "--layers", 4)
    assert_one_clear_line(result, "--layers is 3 in that run, not 4")


def test_a_truncated_checkpoint_is_not_resumed(script, uninterrupted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], folder)
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    before = time.time_ns()
    assert_one_clear_line(script("train_search.py", "--resume", folder), "checkpoint.pt is truncated, damaged")
    assert not [path for path in folder.rglob("*") if path.stat().st_mtime_ns > before]


def test_help_shows_groups_and_defaults(script):
    text = script("train_search.py", "--help").stdout
    for part in ("supernet:", "alphas:", "(default: 0.0003)", "--unrolled", "(default: 64)"):
        assert part in text


@pytest.mark.parametrize("channels", [1, 3])
def test_few_channels(script, channels):
    """PyTorch's strided 1x1 convolution of few channels-last channels corrupts memory: a crash is what is tested."""
    line = [*TINY, "--epochs", 1, "--search_space", "s2", "--init_channels", channels]  # with skip connections
    result = script("train_search.py", *line)
    assert result.returncode == 0, result.stderr


def test_a_dot_program_that_fails_is_one_warning(tmp_path, monkeypatch):
    dot = tmp_path / "bin" / "dot"
    dot.parent.mkdir()
    dot.write_text("#!/bin/sh\nexit 1\n")
    dot.chmod(0o755)
    monkeypatch.setenv("PATH", f"{dot.parent}:{os.environ['PATH']}")
    result = scripts.run(tmp_path, "train_search.py", *QUICK)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("dot failed on") == 1
