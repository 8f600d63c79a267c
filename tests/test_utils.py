"""Command lines, meters, and files that are replaced whole."""

import argparse

import pytest
import torch

import utils


def test_accuracy_counts_the_targets_among_the_largest_logits():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [1, 3, 2], [9, 0, 0]])
    target = torch.tensor([0, 1, 0, 2])
    assert utils.accuracy(logits, target, topk=(1, 2, 5)) == [25.0, 50.0, 100.0]


def test_meter_averages_over_images():
    meter = utils.AverageMeter()
    meter.update(1.0, torch.tensor([[1.0, 0]] * 3), torch.tensor([0, 0, 1]))
    meter.update(3.0, torch.tensor([[1.0, 0]]), torch.tensor([0]))
    assert meter.loss == 1.5 and meter.top1 == pytest.approx(75) and meter.top5 == pytest.approx(100)
    assert utils.AverageMeter(meter.sums).loss == 1.5


def evaluation(logits, batch=3):
    meter, logits = utils.Evaluation(), torch.tensor(logits)
    for part in logits.split(batch):
        meter.add(part, torch.zeros(len(part), dtype=torch.long))
    return meter


def test_an_evaluation_is_the_mean_cross_entropy():
    torch.manual_seed(0)
    logits = torch.randn(10, 4)
    meter = evaluation(logits.tolist())
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(10, dtype=torch.long))
    assert meter.loss == pytest.approx(expected.item()) and meter.images == len(meter.losses) == 10


@pytest.mark.parametrize(
    "logits, extreme",
    [
        ([[0.0, 1.0], [1.0, 0.0]] * 5, []),
        ([[9.0, 0.0]] * 20 + [[0.0, 6.0]], []),  # one miss of a well-trained network makes the loss, but is none
        ([[0.0, 1.0]] * 8 + [[0.0, 50.0], [0.0, 7e5]], [9]),
        ([[0.0, 1.0]] * 7 + [[0.0, float("inf")], [0.0, 9e4], [0.0, 7e5]], [9, 8]),
        ([[0.0, 1e6]] * 3 + [[0.0, 2e6]], [3, 0, 1, 2]),  # all of them: a network that has exploded
        ([[0.0, 5.0]] * 9, []),  # one that is wrong
        ([[float("nan")] * 2] * 3, []),
    ],
)
def test_images_that_make_the_loss_are_found(logits, extreme):
    meter = evaluation(logits)
    assert meter.extreme()[: len(extreme) or None] == extreme
    assert bool(meter.explosion("test")) == bool(extreme)


def test_logits_that_are_not_finite_are_misses():
    logits = torch.tensor([[float("nan")] * 3, [9.0, 0, float("inf")], [9.0, 0, 0]])
    target = torch.tensor([0, 0, 0])
    assert utils.accuracy(logits, target)[0] == pytest.approx(100 / 3)
    meter = utils.AverageMeter()
    meter.update(float("nan"), logits, target)
    assert (meter.images, meter.finite_images) == (3, 1)


def test_a_folder_that_stays_empty_is_removed_again(tmp_path):
    for name, writes in (("new", False), ("old", False), ("kept", True)):
        folder = tmp_path / name
        if name == "old":
            folder.mkdir()
        with pytest.raises(OSError), utils.filling(folder):
            if writes:
                (folder / "table.csv").touch()
            raise OSError("No space left on device")
    assert {path.name for path in tmp_path.iterdir()} == {"old", "kept"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), utils.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    utils.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "convert, good, bad, says",
    [
        (utils.number(int, low=1), "3", "0", "must be an integer at least 1, got 0"),
        (utils.number(int, low=1), "3", "2.5", "must be an integer at least 1, got '2.5'"),
        (utils.number(float, above=0, below=1), "0.5", "1", "must be a number above 0 and below 1, got 1"),
        (utils.number(float, low=0), "0", "nan", "must be a number at least 0, got nan"),
        (utils.number(float), "-1e3", "inf", "must be a number at most 1e+30, got inf"),
        (utils.number(float, above=0), "1e30", "3e38", "must be a number at most 1e+30 and above 0, got 3e38"),
        (
            utils.number(int, low=0, high=2**63 - 1),
            "1" + 12 * "0",
            str(2**63),
            f"must be an integer at least 0 and at most {2**63 - 1}, got {2**63}",
        ),
        (utils.number(int, high=9), "9", "1" + 400 * "0", f"must be an integer at most 9, got 1{39 * '0'}"),
    ],
)
def test_numbers(convert, good, bad, says):
    assert convert(good) == float(good)
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        convert(bad)
    assert str(caught.value) == says


def test_given_arguments_are_those_of_the_command_line():
    parser = utils.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--cutout", action="store_true")
    assert parser.given(["--epochs", "5"]) == {"epochs": 5}
    assert parser.given(["--cutout"]) == {"cutout": True}


def arguments(**kwargs):
    return argparse.Namespace(**(dict(device="auto", gpu=None) | kwargs))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda(caplog):
    assert utils.pick_device(arguments(gpu=0)) == torch.device("cpu")
    assert [r.getMessage() for r in caplog.records] == ["--gpu 0: no CUDA device here, going on with the CPU"]
    with pytest.raises(utils.UserError, match="--device cpu"):
        utils.pick_device(arguments(device="cuda"))


@pytest.mark.parametrize(
    "seconds, words", [(0.4, "0 s"), (119, "119 s"), (150, "2 min"), (3700, "1 h 02 min"), (200_000, "2 d 7 h")]
)
def test_duration(seconds, words):
    assert utils.duration(seconds) == words
