"""train.py and test.py as people run them: retraining, evaluation, exact resume, bad input."""

import csv
import shutil
import signal
import subprocess
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

import genotypes
import original_darts
import test as test_script
from conftest import assert_one_clear_line, only_run, start_script
from model import NetworkCIFAR
from processes import ALONE
from train import parse_args, train
from utils import UserError

TINY = "--dataset digits --subset 96 --batch_size 16 --init_channels 4 --layers 2 --epochs 2 --report_freq 1".split()
PRINTED_ARCH = """Genotype(normal=[('sep_invo_3x3', 1), ('sep_invo_3x3', 0), ('sep_invo_3x3', 2), ('dil_invo_3x3', 1),
        ('skip_connect', 0), ('skip_connect', 2), ('skip_connect', 2), ('skip_connect', 3)],
        normal_concat=range(2,6), reduce=[('avg_pool_3x3', 0), ('sep_invo_5x5', 1), ('sep_invo_5x5', 2),                   ('skip_connect', 0),('avg_pool_3x3', 0), ('dil_invo_5x5', 3), ('skip_connect', 4), ('sep_invo_5x5', 0)],            reduce_concat=range(2,6))"""  # noqa: E501  the runs of spaces are the point


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a training with drop-path that nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = start_script(folder, "train.py", *TINY, "--drop_path_prob", 0.5, run=subprocess.run)
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


def test_a_killed_training_resumes_exactly(uninterrupted, tmp_path):
    process = start_script(tmp_path, "train.py", *TINY, "--drop_path_prob", 0.5)
    for printed in process.stdout:
        if "epoch 2/2 step 2/6" in printed:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=120)
    folder = only_run(tmp_path, "train")
    result = start_script(tmp_path, "train.py", "--resume", folder, run=subprocess.run)
    assert result.returncode == 0, result.stderr
    assert (folder / "metrics.csv").read_bytes() == (uninterrupted / "metrics.csv").read_bytes()
    states = [torch.load(f / "checkpoint.pt", weights_only=True)["model"] for f in (folder, uninterrupted)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_a_random_genotype_is_kept_as_itself():
    args = parse_args(["--arch", "random", "--search_space", "darts", "--seed", "3"])
    assert genotypes.parse(args.arch) == genotypes.sample(genotypes.SEARCH_SPACES["darts"], 3)


@pytest.mark.parametrize("flag", ["amp", "compile"])
def test_amp_and_compile_resume_exactly(flag, tmp_path, monkeypatch):
    """A cell of one involution: compiling takes long."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes for a single network
    edges = "[('sep_invo_3x3', 0), ('skip_connect', 1)]"
    cell = f"Genotype(normal={edges}, normal_concat=[2], reduce={edges}, reduce_concat=[2])"
    small = [*TINY, "--layers", 1, "--arch", cell, "--drop_path_prob", 0.5, f"--{flag}"]
    result = start_script(tmp_path, "train.py", *small, "--save", "whole", run=subprocess.run)
    assert result.returncode == 0, result.stderr
    process = start_script(tmp_path, "train.py", *small, "--save", "killed")
    for printed in process.stdout:
        if "epoch 2/2 step 2/6" in printed:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=120)
    whole, killed = (next((tmp_path / "runs").glob(f"train-{name}-*")) for name in ("whole", "killed"))
    assert f'"{flag}": true' in (killed / "config.json").read_text()
    result = start_script(tmp_path, "train.py", "--resume", killed, run=subprocess.run)
    assert result.returncode == 0, result.stderr
    assert (killed / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (killed, whole)]
    assert states[0]["args"][flag] is True
    assert set(states[0]["model"]) == set(NetworkCIFAR(4, 10, 1, False, genotypes.parse(whole)).state_dict())
    assert all(torch.equal(states[0]["model"][name], value) for name, value in states[1]["model"].items())


def test_amp_is_in_bfloat16_but_for_the_losses():
    net, seen = NetworkCIFAR(4, 10, 1, True, genotypes.DARTS_L20), []
    net.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    keep = lambda loss, logits, target: seen.append(logits.dtype)  # noqa: E731
    run = SimpleNamespace(steps=lambda batches: batches, record=keep, team=ALONE)
    batch = torch.randn(4, 3, 29, 29), torch.arange(4)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for amp in (False, True):
        args = Namespace(amp=amp, auxiliary=True, auxiliary_weight=0.4, grad_clip=5.0)
        train(run, [batch], net, net, torch.nn.functional.cross_entropy, optimizer, args)
    assert seen == [torch.float32, torch.float32, torch.bfloat16, torch.float32]


def test_without_a_compiler_for_compile(script, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = script("train.py", *TINY, "--layers", 1, "--arch", "DARTS_L20", "--compile")
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
        assert expected in script("test.py", "--model_path", folder).stdout
        assert expected not in script("test.py", "--model_path", folder, "--kernel_norm", "soft_rms").stdout


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


def test_settings_given_to_test_win(script, uninterrupted):
    assert "on 50 images" in script("test.py", "--model_path", uninterrupted, "--subset", 50).stdout


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
        (["--auxiliary"], "--auxiliary needs images of at least 29 pixels with --layers 2, got 8"),
        (["--batch_size", 97], "--batch_size 97 is larger than the 96 training images"),
        (["--drop_path_prob", 1], "--drop_path_prob: must be a number at least 0 and below 1, got 1"),
        (["--resume", "."], "--resume .: no checkpoint.pt in it"),
        (["--dataset", "folder", "--data", "missing"], "--data missing: no such folder"),
    ],
)
def test_bad_input(script, tmp_path, arguments, says):
    assert_one_clear_line(script("train.py", *TINY, *arguments), says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers, smallest", [(1, 15), (2, 29), (3, 29), (20, 29)])
def test_the_auxiliary_head_takes_images_of_the_size_that_the_message_names(layers, smallest):
    from train import smallest_image

    assert smallest_image(layers) == smallest
    net = NetworkCIFAR(4, 10, layers, True, genotypes.DARTS_V2)
    net(torch.randn(2, 3, smallest, smallest))
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 3, smallest - 1, smallest - 1))


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
