"""train.py and test.py as people run them: retraining, evaluation, exact resume, bad input."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import genotypes
import original_darts
import scripts
import test as test_script
from conftest import assert_one_clear_line, assert_same_curves, only_run
from model import NetworkCIFAR
from runtime import checkpoint
from runtime.processes import ALONE
from train import (
    _not_compiled,
    compiled,
    infer,
    load_data,
    make_criterion,
    make_network,
    parse_args,
    size_of_epoch,
    train,
)
from utils import UserError

TINY = "--dataset digits --subset 96 --batch_size 16 --init_channels 4 --layers 2 --epochs 2 --report_freq 1".split()
PRINTED_ARCH = """Genotype(normal=[('sep_invo_3x3', 1), ('sep_invo_3x3', 0), ('sep_invo_3x3', 2), ('dil_invo_3x3', 1),
        ('skip_connect', 0), ('skip_connect', 2), ('skip_connect', 2), ('skip_connect', 3)],
        normal_concat=range(2,6), reduce=[('avg_pool_3x3', 0), ('sep_invo_5x5', 1), ('sep_invo_5x5', 2),                   ('skip_connect', 0),('avg_pool_3x3', 0), ('dil_invo_5x5', 3), ('skip_connect', 4), ('sep_invo_5x5', 0)],            reduce_concat=range(2,6))"""  # noqa: E501  the runs of spaces are the point

_EDGES = "[('sep_invo_3x3', 0), ('skip_connect', 1)]"
SMALLEST = f"Genotype(normal={_EDGES}, normal_concat=[2], reduce={_EDGES}, reduce_concat=[2])"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a training with drop-path that nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = scripts.run(folder, "train.py", *TINY, "--drop_path_prob", 0.5, "--first_image_size", 4, drawn=True)
    assert result.returncode == 0, result.stderr
    return only_run(folder, "train")


def test_the_printed_command_works(script, image_folder, tmp_path):
    line = ["--gpu", 0, "--batch_size", 8, "--learning_rate", 0.05, "--cutout", "--auxiliary", "--layer", 4]
    result = script(
        "train.py", *line, "--arch", PRINTED_ARCH, "--dataset", "folder", "--data", image_folder, "--epochs", 1,
        "--init_channels", 4,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert genotypes.parse(only_run(tmp_path, "train")) == genotypes.DARTS
    assert result.stdout.count(f"genotype = {genotypes.format(genotypes.DARTS)}") == 1
    assert "DARTS is DARTS_L10, of involutions; the convolutional result" in result.stdout
    tested = script("test.py", "--model_path", only_run(tmp_path, "train"))
    assert "top-1" in tested.stdout and "top-5" not in tested.stdout  # of three classes


def test_a_resumed_run_keeps_the_genotype_that_was_drawn(uninterrupted, monkeypatch):
    """As torchrun starts a run again: with its own arguments, and --resume."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    resume = ["--resume", str(uninterrupted)]
    assert parse_args([*resume, "--arch", "random"]).arch == parse_args(resume).arch != "random"
    with pytest.raises(UserError, match="--arch is .* in that run, not"):
        parse_args([*resume, "--arch", "DARTS_V2"])


def test_a_killed_training_resumes_exactly(uninterrupted, tmp_path):
    scripts.stop_at(
        "epoch 2/2 step 2/6",
        signal.SIGKILL,
        tmp_path,
        "train.py",
        *TINY,
        "--drop_path_prob",
        0.5,
        "--first_image_size",
        4,
    )
    folder = only_run(tmp_path, "train")
    result = scripts.run(tmp_path, "train.py", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "metrics.csv").read_bytes() == (uninterrupted / "metrics.csv").read_bytes()
    assert_same_curves(folder, uninterrupted)
    states = [torch.load(f / "checkpoint.pt", weights_only=True)["model"] for f in (folder, uninterrupted)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_a_training_from_the_disk_survives_a_file_that_breaks(photographs, tmp_path):
    """It names the file, and goes on once that is mended, from memory too, to the bits of one that met no trouble."""
    root = shutil.copytree(photographs, tmp_path / "images")
    own = ["--dataset", "folder", "--data", root, "--image_size", 8, "--batch_size", 8, "--subset", 50, *TINY[6:]]
    own += ["--drop_path_prob", 0.5, "--arch", "DARTS_L20", "--data_in", "disk", "--workers", 2]
    result = scripts.run(tmp_path, "train.py", *own, "--save", "whole")
    assert result.returncode == 0, result.stderr
    process = scripts.Script(tmp_path, "train.py", *own, "--save", "broken")
    path = root / "train" / "noon" / "001.JPEG"
    content = path.read_bytes()
    for printed in process.stdout:
        if "epoch 1/2 step 2/7" in printed:
            path.write_bytes(content[:100])
            break
    output, errors = process.communicate(timeout=120)
    assert_one_clear_line(
        SimpleNamespace(returncode=process.returncode, stdout=output, stderr=errors), f"cannot read {path}"
    )
    whole, broken = (next((tmp_path / "runs").glob(f"train-{name}-*")) for name in ("whole", "broken"))
    assert "go on with:" in output and f"--resume runs/{broken.name}" in output
    path.write_bytes(content)
    result = scripts.run(tmp_path, "train.py", "--resume", broken, "--data_in", "memory")
    assert result.returncode == 0, result.stderr
    assert (broken / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    states = [torch.load(f / "checkpoint.pt", weights_only=True)["model"] for f in (broken, whole)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_the_protocol_for_large_images_resumes_exactly(script, tmp_path):
    """The other network, schedule and augmentation, in a run that is killed; test.py knows them all."""
    own = [*TINY, *"--network imagenet --image_size 32 --augment resized_crop --color_jitter 0.4".split()]
    own += "--label_smooth 0.1 --lr_scheduler linear --warmup_epochs 1 --subset 64 --arch DARTS_V2 --cutout".split()
    assert script("train.py", *own, "--save", "whole").returncode == 0
    scripts.stop_at("epoch 2/2 step 1/4", signal.SIGKILL, tmp_path, "train.py", *own, "--save", "killed")
    whole, killed = (next((tmp_path / "runs").glob(f"train-{name}-*")) for name in ("whole", "killed"))
    assert script("train.py", "--resume", killed).returncode == 0
    assert (killed / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    last = list(csv.DictReader((whole / "metrics.csv").open()))[-1]
    assert float(last["lr"]) == pytest.approx(0.025 / 2)
    tested = script("test.py", "--model_path", killed).stdout
    assert f"top-1 {float(last['valid_acc']):.2f}%, top-5 {float(last['valid_top5']):.2f}% on 64 images" in tested


@pytest.mark.parametrize("size, network", [(64, "cifar"), (65, "imagenet")])
def test_the_network_goes_by_the_size_of_the_images(size, network):
    assert parse_args(["--image_size", str(size)]).network == network
    assert parse_args(["--image_size", str(size), "--network", "cifar"]).network == "cifar"


def test_images_grow_and_those_of_evaluation_are_whole():
    seen, images = [], [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]
    model = NetworkCIFAR(4, 2, 2, False, genotypes.DARTS_V2)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
    args = parse_args("--first_image_size 16 --epochs 8 --layers 2".split())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = SimpleNamespace(team=ALONE, steps=iter, record=lambda *_: None)
    for run.epoch in range(8):
        train(run, images, model, model, torch.nn.functional.cross_entropy, optimizer, args)
    assert seen == [16, 20, 20, 24, 28, 28, 32, 32]


def test_smoothed_labels_are_trained_on_and_not_tested_on():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 5), torch.arange(6) % 5
    spread = 0.8 * torch.nn.functional.one_hot(target, 5) + 0.2 / 5  # arXiv 1512.00567, section 7
    expected = -(spread * logits.log_softmax(1)).sum(1).mean()
    assert make_criterion(parse_args(["--label_smooth", "0.2"]))(logits, target).item() == pytest.approx(
        expected.item()
    )


def test_a_random_genotype_is_kept_as_itself():
    args = parse_args(["--arch", "random", "--search_space", "darts", "--seed", "3"])
    assert genotypes.parse(args.arch) == genotypes.sample(genotypes.SEARCH_SPACES["darts"], 3)


def test_what_chooses_is_a_part_of_the_training_images(script, image_folder, tmp_path):
    """The rest of --train_portion is measured; there are no test images to read."""
    shutil.copytree(image_folder / "train", tmp_path / "images" / "train")
    own = ["--dataset", "folder", "--data", "images", "--batch_size", 8, "--init_channels", 4, "--layers", 2]
    own += ["--epochs", 1, "--image_size", 8, "--folder", "held"]
    result = script("train.py", *own, "--train_portion", 0.75)
    assert result.returncode == 0, result.stderr
    args = parse_args([str(value) for value in own + ["--train_portion", 0.75, "--data", tmp_path / "images"]])
    train_batches, valid_batches, facts = load_data(args, "cpu")
    assert (len(train_batches.labels), len(valid_batches.labels), set(facts["data"])) == (18, 6, {"train"})
    model = NetworkCIFAR(4, 3, 2, False, genotypes.DARTS)
    state = torch.load(tmp_path / "held" / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    assert infer(valid_batches, model).top1 == pytest.approx(state["history"][-1]["valid_acc"])
    assert_one_clear_line(script("train.py", *own[:-2], "--train_portion", 0.001), "leaves one part empty")
    assert script("train.py", "--resume", "held").returncode == 0


@pytest.mark.parametrize("flag", ["amp", pytest.param("compile", marks=pytest.mark.slow)])  # a minute of compiling
def test_amp_and_compile_resume_exactly(flag, tmp_path, monkeypatch):
    """A cell of one involution: compiling takes long."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes for a single network
    small = [*TINY, "--layers", 1, "--arch", SMALLEST, "--drop_path_prob", 0.5, f"--{flag}"]
    result = scripts.run(tmp_path, "train.py", *small, "--save", "whole")
    assert result.returncode == 0, result.stderr
    scripts.stop_at("epoch 2/2 step 2/6", signal.SIGKILL, tmp_path, "train.py", *small, "--save", "killed")
    whole, killed = (next((tmp_path / "runs").glob(f"train-{name}-*")) for name in ("whole", "killed"))
    assert f'"{flag}": true' in (killed / "config.json").read_text()
    result = scripts.run(tmp_path, "train.py", "--resume", killed)
    assert result.returncode == 0, result.stderr
    assert (killed / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (killed, whole)]
    assert states[0]["args"][flag] is True
    assert set(states[0]["model"]) == set(NetworkCIFAR(4, 10, 1, False, genotypes.parse(whole)).state_dict())
    assert all(torch.equal(states[0]["model"][name], value) for name, value in states[1]["model"].items())


def test_amp_is_in_bfloat16_but_for_the_losses():
    net, seen = NetworkCIFAR(4, 10, 1, True, genotypes.DARTS_L20), []
    net.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    keep = lambda loss, logits, target, norm: seen.append(logits.dtype)  # noqa: E731
    run = SimpleNamespace(epoch=0, steps=lambda batches: batches, record=keep, team=ALONE)
    batch = torch.randn(4, 3, 29, 29), torch.arange(4)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for amp in (False, True):
        args = parse_args(["--auxiliary", "--image_size", "29", *["--amp"] * amp])
        train(run, [batch], net, net, torch.nn.functional.cross_entropy, optimizer, args)
    assert seen == [torch.float32, torch.float32, torch.bfloat16, torch.float32]


def test_images_that_grow_are_compiled_size_by_size(monkeypatch):
    """More shapes than PyTorch compiles if nobody asks it to."""
    args = parse_args("--layers 1 --init_channels 2 --first_image_size 8 --epochs 20 --compile".split())
    limit, sizes = torch._dynamo.config.recompile_limit, {size_of_epoch(args, epoch) for epoch in range(args.epochs)}
    assert 2 * len(sizes) > limit
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=limit):  # and put back
        forward = compiled(make_network(args, 10), args)
        for size in sizes:
            for batch in (3, 2):
                assert forward(torch.randn(batch, 3, size, size))[0].shape == (batch, 10)


def test_a_step_that_cannot_be_compiled_is_told_in_a_line():
    lost = torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no working C++ compiler\nTraceback"), None)
    assert re.fullmatch(r"torch.compile failed \(.*\): start a run without --compile", str(_not_compiled(lost)))
    other = RuntimeError("something else")
    assert _not_compiled(other) is other


@pytest.mark.slow  # half a minute of compiling
def test_without_a_compiler_for_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = [*TINY, "--layers", "1", "--arch", SMALLEST, "--compile"]
    command = [sys.executable, scripts.ROOT / "train.py", *line]  # a process that has not read CXX before
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "torch.compile failed" in result.stderr and "start a run without --compile" in result.stderr


def test_a_trained_network_is_tested_as_it_was_in_training(script, uninterrupted):
    with open(uninterrupted / "metrics.csv") as file:
        last = list(csv.DictReader(file))[-1]
    for path in (uninterrupted, uninterrupted / "checkpoint.pt"):
        result = script("test.py", "--model_path", path)
        assert result.returncode == 0, result.stderr
        expected = f"test loss {float(last['valid_loss']):.4f}, top-1 {float(last['valid_acc']):.2f}%"
        assert expected in result.stdout
        assert ", top-5 " in result.stdout and "on 96 images" in result.stdout
        assert ("tables and pictures: " in result.stdout) == path.is_dir()


def test_a_run_keeps_what_bounds_its_kernels(script, tmp_path):
    arguments = [*TINY, "--epochs", 1, "--learning_rate", 0.5, "--arch", "DARTS_L20", "--layers", 3]
    for kernel_norm in ("none", "tanh"):
        result = script("train.py", *arguments, "--kernel_norm", kernel_norm, "--save", kernel_norm)
        assert result.returncode == 0, result.stderr
        (folder,) = (tmp_path / "runs").glob(f"train-{kernel_norm}-*")
        assert f'"kernel_norm": "{kernel_norm}"' in (folder / "config.json").read_text()
        path = folder / "checkpoint.pt"
        state = torch.load(path, weights_only=True)
        if kernel_norm == "none":  # as in a run from before there was the setting
            del state["args"]["kernel_norm"]
            torch.save(state, path)
        last = state["history"][-1]
        expected = f"test loss {last['valid_loss']:.4f}, top-1 {last['valid_acc']:.2f}%"
        assert expected in script("test.py", "--model_path", path).stdout
        assert expected not in script("test.py", "--model_path", path, "--kernel_norm", "soft_rms").stdout


def test_bare_weights_do_not_say_what_bounds_their_kernels(script, tmp_path):
    torch.save(NetworkCIFAR(4, 10, 3, False, genotypes.DARTS).state_dict(), tmp_path / "weights.pt")
    network = "--model_path weights.pt --init_channels 4 --layers 3 --dataset digits --subset 20".split()
    warning = "warning: weights.pt does not say what bounds the kernels of its involutions: --kernel_norm soft_rms"
    assert warning in script("test.py", *network).stdout
    assert "warning" not in script("test.py", *network, "--kernel_norm", "none").stdout


def test_images_that_make_the_loss_are_named(script, image_folder, tmp_path):
    """A network that is never in doubt about one class: it is not that."""
    network = NetworkCIFAR(4, 3, 3, False, genotypes.DARTS)
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.copy_(torch.tensor([0.0, 0.0, -1e5]))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    own = ["--dataset", "folder", "--data", image_folder, "--init_channels", 4, "--layers", 3]
    result = script("test.py", "--model_path", "weights.pt", *own)
    assert "4 of 12 test images make 100.0% of the loss, up to 1e+05 each; the median" in result.stdout
    assert result.stdout.count("loss 1e+05  ") == 4 and "test/red/003.png" in result.stdout


def test_a_run_has_its_page(uninterrupted):
    page = (uninterrupted / "report.html").read_text()
    assert "2 of 2 epochs" in page and page.count('src="data:image/png') >= 1 and "test images, SHA-256" in page


def test_results_go_to_the_run_and_its_page(script, uninterrupted, tmp_path):
    run = tmp_path / "runs" / "train-tested"
    shutil.copytree(uninterrupted, run)
    result = script("test.py", "--model_path", run)
    assert result.returncode == 0, result.stderr
    numbers = json.loads((run / "test" / "test.json").read_text())
    assert f"top-1 {numbers['top1']:.2f}%" in result.stdout and numbers["epoch"] == 2
    assert {path.suffix for path in (run / "test").iterdir()} == {".csv", ".json", ".png"}
    page = (run / "report.html").read_text()
    assert "Test after 2 epochs" in page and page.count('src="data:image/png') >= 5
    assert script("report.py", run / "test").returncode == 0  # a page of the test alone
    assert f'test.py <span class="flag">--model_path</span> {run}' in (run / "test" / "report.html").read_text()


def test_weights_alone_are_tested_and_not_gone_on_with(script, uninterrupted, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(uninterrupted, folder)
    checkpoint.save(checkpoint.of_weights(checkpoint.load(folder / "checkpoint.pt")), folder / "checkpoint.pt")
    results = [script("test.py", "--model_path", run, "--output", tmp_path / "out") for run in (folder, uninterrupted)]
    assert results[0].returncode == 0, results[0].stderr
    lines = [result.stdout.partition("test loss")[2].splitlines()[0] for result in results]
    assert lines[0] == lines[1] and "on 96 images" in lines[0]
    assert_one_clear_line(script("train.py", "--resume", folder), "it has the weights alone")


def test_results_go_where_output_says(script, uninterrupted, tmp_path):
    result = script("test.py", "--model_path", uninterrupted / "checkpoint.pt", "--output", "mine")
    assert result.returncode == 0 and "tables and pictures: mine" in result.stdout
    assert "its page: mine/report.html" in result.stdout
    assert (tmp_path / "mine" / "test.json").exists()
    (tmp_path / "taken").touch()
    assert_one_clear_line(script("test.py", "--model_path", uninterrupted, "--output", "taken"), "taken is no folder")
    into_run = script("test.py", "--model_path", uninterrupted, "--output", uninterrupted)
    assert_one_clear_line(into_run, "is a run folder; results go to its test/: leave it out")


def test_pictures_of_ones_own(script, uninterrupted, tmp_path):
    """A photograph that is turned by its EXIF, a palette, one with transparency: as if they were plain."""
    digit = Image.fromarray(np.kron(load_digits().images[0] * 15, np.ones((4, 4))).astype(np.uint8)).convert("RGB")
    (tmp_path / "own" / "below").mkdir(parents=True)
    digit.save(tmp_path / "own" / "a.png")
    turned, exif = digit.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # as it is shown: turned by 270 degrees
    turned.save(tmp_path / "own" / "b.png", exif=exif)
    digit.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "own" / "below" / "c.gif")
    digit.convert("RGBA").save(tmp_path / "d.webp", lossless=True)
    result = script("test.py", "--model_path", uninterrupted, "--images", "d.webp", "own")
    assert result.returncode == 0, result.stderr
    lines = [line.split(": ") for line in result.stdout.splitlines() if "%" in line]
    assert [name for name, _ in lines] == ["d.webp", "own/a.png", "own/b.png", "own/below/c.gif"]
    assert len({found for _, found in lines}) == 1
    shares = [part.split() for part in lines[0][1].split(", ")]
    assert len(shares) == 5 and {name for name, _ in shares} < set("0123456789")
    values = [float(share.rstrip("%")) for _, share in shares]
    assert values == sorted(values, reverse=True) and sum(values) <= 100.3


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["notes.txt"], "broken image notes.txt"),
        (["missing.png"], "missing.png: no such file or folder"),
        (["empty"], "empty holds no image file"),
        (["notes.txt", "--output", "there"], "--output is for the results of a test"),
    ],
)
def test_what_is_no_picture(script, uninterrupted, tmp_path, arguments, says):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    assert_one_clear_line(script("test.py", "--model_path", uninterrupted, "--images", *arguments), says)


def test_pictures_need_a_run_that_knows_its_classes(script, tmp_path):
    torch.save(NetworkCIFAR(4, 10, 3, False, genotypes.DARTS).state_dict(), tmp_path / "weights.pt")
    assert_one_clear_line(script("test.py", "--model_path", "weights.pt", "--images", "."), "--images needs a run")


def test_settings_given_to_test_win(script, uninterrupted):
    assert "on 50 images" in script("test.py", "--model_path", uninterrupted, "--subset", 50).stdout


def test_the_published_checkpoint_of_imagenet_is_tested(script, tmp_path):
    """Which is wrapped by the original's script, and older than batch norm's counters."""
    shapes = original_darts.network_imagenet(4, 10, 3, True, genotypes.DARTS_V2)
    weights = {k: torch.ones(s) for k, s in shapes.items() if not k.endswith("num_batches_tracked")}
    torch.save({"epoch": 250, "state_dict": weights, "best_acc_top1": 73.3, "optimizer": {}}, tmp_path / "imagenet.pt")
    network = "--arch DARTS_V2 --init_channels 4 --layers 3 --auxiliary --dataset digits --subset 4 --image_size 65"
    result = script("test.py", "--model_path", "imagenet.pt", *network.split())
    assert result.returncode == 0, result.stderr
    assert "on 4 images" in result.stdout


def test_a_published_state_dict_is_tested(script, tmp_path):
    shapes = original_darts.network_cifar(4, 10, 3, True, genotypes.DARTS_V2)
    torch.save({k: torch.ones(s) for k, s in shapes.items()}, tmp_path / "weights.pt")
    network = ["--init_channels", 4, "--layers", 3, "--auxiliary", "--dataset", "digits", "--subset", 20]
    result = script("test.py", "--model_path", "weights.pt", "--arch", "DARTS_V2", *network)
    assert result.returncode == 0, result.stderr
    assert "top-1" in result.stdout
    result = script("test.py", "--model_path", "weights.pt", "--arch", "DARTS_V1", *network)
    assert_one_clear_line(result, "not those of this network", "cells.0")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--arch", "DRATS"], "unknown genotype 'DRATS'; did you mean DARTS"),
        (["--arch", "Genotype(normal=[('none', 0)"], "malformed genotype"),
        (["--arch", "__import__('os').mkdir('executed')"], "must be Genotype(...)"),
        (["--arch", PRINTED_ARCH.replace("sep_invo_3x3', 1", "sep_invo_9x9', 1")], "unknown primitive 'sep_invo_9x9'"),
        (["--arch", PRINTED_ARCH.replace("sep_invo_3x3', 1", "sep_invo_3x3', 2")], "input node 2 does not exist yet"),
        (["--auxiliary"], "--auxiliary needs images of at least 29 pixels with --network cifar and --layers 2, got 8"),
        (
            ["--network", "imagenet"],
            "--network imagenet with --layers 2 reduces images by 32, which leaves nothing of 8",
        ),
        (["--image_size", 2], "--network cifar with --layers 2 reduces images by 4, which leaves nothing of 2"),
        (["--warmup_epochs", 2], "--warmup_epochs 2 must be less than --epochs 2"),
        (
            ["--first_image_size", 3],
            "--first_image_size 3 must be from 4, the least that this network takes, to the 8 pix",
        ),
        (["--first_image_size", 9], "--first_image_size 9 must be from 4"),
        (["--batch_size", 97], "--batch_size 97 is larger than the 96 training images"),
        (["--drop_path_prob", 1], "--drop_path_prob: must be a number at least 0 and below 1, got 1"),
        (["--resume", "."], "--resume .: no checkpoint.pt in it"),
        (["--dataset", "folder", "--data", "missing"], "--data missing: no such folder"),
    ],
)
def test_bad_input(script, tmp_path, arguments, says):
    assert_one_clear_line(script("train.py", *TINY, *arguments), says)
    assert not list(tmp_path.iterdir())


def test_empty_class_folder_and_broken_image(script, image_folder, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(image_folder, root)
    own = ["--dataset", "folder", "--data", "images", "--batch_size", 4, "--init_channels", 4, "--layers", 2]
    (root / "test" / "red" / "002.png").write_bytes(b"broken")
    assert_one_clear_line(script("train.py", *own), "broken image images/test/red/002.png")
    for path in (root / "train" / "blue").iterdir():
        path.unlink()
    assert_one_clear_line(script("train.py", *own), "images/train/blue holds no image file")
    assert not (tmp_path / "runs").exists()


def test_a_run_does_not_go_on_with_other_images(script, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    own = ["--dataset", "folder", "--data", "images", "--batch_size", 8, "--init_channels", 4, "--layers", 2]
    assert script("train.py", *own, "--epochs", 1, "--image_size", 8).returncode == 0
    folder = only_run(tmp_path, "train")
    assert "train: 24 of 24 images, 3 classes (images/train)" in (folder / "log.txt").read_text()
    assert script("train.py", "--resume", folder).returncode == 0
    for part in ("train", "test"):  # the order of the classes, hence their labels, would be another one
        (tmp_path / "images" / part / "red").rename(tmp_path / "images" / part / "azure")
    assert_one_clear_line(script("train.py", "--resume", folder), "the train images are not those", "'azure'")


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no such file"),
        (b"PK\x03\x04 truncated", "truncated, damaged"),
        (b"", "truncated, damaged"),
    ],
)
def test_bad_model_paths(script, tmp_path, content, says):
    if content is not None:
        (tmp_path / "weights.pt").write_bytes(content)
    assert_one_clear_line(script("test.py", "--model_path", "weights.pt"), "weights.pt", says)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(normalization=((float("nan"),) * 3,) * 2), "its normalization is ((nan, nan, nan)"),
        (dict(normalization=((0.0,) * 3, (0.0,) * 3)), "its normalization is"),
        (dict(classes=[3]), "its classes is [3]"),
        (dict(epoch="two"), "its epoch is 'two'"),
        (dict(layers=10**6), "layers is 1000000"),
        (dict(arch="zz"), "arch is 'zz'"),
        (dict(layers=None), "layers is None"),
    ],
)
def test_wrong_values_in_a_trained_network_are_named(uninterrupted, tmp_path, change, says):
    state = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    for name, value in change.items():
        (state["args"] if name in state["args"] else state)[name] = value
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError) as caught:
        test_script.load_run(test_script.build_parser(), ["--model_path", str(tmp_path / "checkpoint.pt")])
    assert says in str(caught.value)


def test_a_search_is_not_a_trained_network(script, tmp_path):
    torch.save({"model": {}, "arch_optimizer": {}}, tmp_path / "checkpoint.pt")
    assert_one_clear_line(script("test.py", "--model_path", "."), "is a search: train what it found")
