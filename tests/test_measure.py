"""What genotypes cost, counted: parameters as published, multiply-adds by hand, what is refused."""

import csv
import os
from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import genotypes
import measure
import utils
from involution import Involution2d, involution2d


def flags(**own):
    small = dict(image_size=8, network="cifar", init_channels=4, layers=3, auxiliary=False, kernel_norm="soft_rms")
    return Namespace(**small | own)


def test_the_published_cell_of_darts_has_its_published_size():
    """3.3 M parameters: arXiv 1806.09055, table 1."""
    cost = measure.count(genotypes.DARTS_V2, flags(init_channels=36, layers=20, auxiliary=True, image_size=32))
    assert cost.parameters == 3_349_342 and round(cost.multiply_adds / 1e6) == 528


def test_the_published_cell_of_darts_for_large_images_has_its_published_size():
    """4.7 M parameters: arXiv 1806.09055, table 3."""
    with torch.device("meta"):
        large = flags(network="imagenet", init_channels=48, layers=14, auxiliary=True, image_size=224)
        assert utils.count_parameters(measure.build(genotypes.DARTS_V2, large, 1000)) == 4_718_752


@pytest.mark.parametrize("network", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", ["DARTS", "NASNet", "AmoebaNet", "random"])
def test_parameters_are_a_sum_over_edges(name, network):
    mixed = genotypes.SEARCH_SPACES["mixed"]
    genotype = genotypes.sample(mixed, 3) if name == "random" else genotypes.NAMED[name]
    args = flags(network=network, image_size=64)
    assert measure.parameters(genotype, args) == measure.count(genotype, args).parameters


def test_multiply_adds_of_an_involution_by_hand():
    """C = 16, r = 4, one group, 5x5 taps, stride 2 on 6x6 pixels: 3x3 kernels."""
    layer, pixels = Involution2d(16, 5, stride=2).eval(), 3 * 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, 16, 6, 6))
    by_hand = pixels * (16 * 4 + 4 * 25 + 16 * 25)  # conv1, conv2, the involution
    assert counter.get_total_flops() == 2 * by_hand


def test_multiply_adds_of_an_involution_are_those_of_the_reference_as_products():
    """The textbook's formulation: every unfolded patch times its kernel, as batched products of matrices."""
    input, weight = torch.randn(2, 8, 5, 5), torch.randn(2, 2, 9, 5, 5)
    with FlopCounterMode(display=False) as ours:
        output = involution2d(input, weight)
    with FlopCounterMode(display=False) as reference:
        patches = torch.nn.functional.unfold(input, 3, padding=1).view(2, 2, 4, 9, 25)
        expected = torch.einsum("ngckp,ngkp->ngcp", patches, weight.flatten(3)).reshape(2, 8, 5, 5)
    torch.testing.assert_close(output, expected)
    assert ours.get_total_flops() == reference.get_total_flops() == 2 * 2 * 8 * 9 * 25


def test_activations_are_what_layers_put_out():
    """One cell of one node: stem, two 1x1 convolutions, an involution's two, itself, the 1x1 after it, classifier."""
    edges = [("sep_invo_3x3", 0), ("skip_connect", 1)]
    genotype = genotypes.Genotype(edges, [2], edges, [2])
    args, pixels = flags(layers=1), 4 * 4  # the only cell reduces 8x8 images
    # before the reduction: the stem's 3 C and the preprocessed inputs of 2 C each, at 8x8
    at_full_size = 64 * (12 + 8 + 8)
    # after it: hidden features C / r, the involution, the 1x1 convolution; the two halves of the skip connection
    at_half_size = pixels * (2 + 8 + 8 + 8)
    assert measure.count(genotype, args).activations == at_full_size + at_half_size + 10


def run(monkeypatch, tmp_path, *arguments):
    monkeypatch.chdir(tmp_path)
    small = "--init_channels 4 --layers 3 --image_size 8 --batch_size 2 --repeats 3".split()
    monkeypatch.setattr("sys.argv", ["measure.py", *small, *map(str, arguments)])
    measure.main()


def test_genotypes_side_by_side(monkeypatch, tmp_path, capsys):
    cell = genotypes.format(genotypes.Genotype([("skip_connect", 0)] * 2, [2], [("skip_connect", 0)] * 2, [2]))
    monkeypatch.setattr(measure, "peak_memory", lambda genotype, args: 7 * 10**6 if "invo" in str(genotype) else None)
    run(monkeypatch, tmp_path, "DARTS_L20", cell, "DARTS_L20", "--csv", "cost.csv")
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert "memory, batch 2 (MB)" in head
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[0] for row in cells] == ["DARTS_L20", "genotype 2", "DARTS_L20 (3)"]
    assert [row[4] for row in cells] == ["7", "–", "7"]
    with open("cost.csv") as file:
        rows = list(csv.DictReader(file))
    cost = measure.count(genotypes.DARTS_L20, flags())
    assert [int(rows[0][name]) for name in cost._fields] == list(cost)
    for images in (1, 64):
        low, median, high = (float(rows[1][f"latency_{images}_{what}_seconds"]) for what in ("min", "median", "max"))
        assert 0 < low <= median <= high


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_a_peak_of_before_is_forgotten():
    bytearray(10**8)
    measure._forget_peak()
    assert measure._resident("VmHWM") - measure._resident("VmRSS") < 10**7


def test_the_memory_of_a_training_step():
    """The stem's output and its batch norm's have 12 values of 4 bytes for each pixel of 100 images of 32x32."""
    peak = measure.peak_memory(
        genotypes.DARTS_L20, flags(device="cpu", gpu=None, image_size=32, classes=10, batch_size=100)
    )
    if peak is None:
        pytest.skip("this system does not tell what a process holds")
    assert 2 * 100 * 32 * 32 * 12 * 4 < peak < 10**9


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["DRATS"], "unknown genotype 'DRATS'; did you mean DARTS"),
        (["DARTS", "--layers", 0], "--layers: must be an integer at least 1"),
        (["DARTS", "--auxiliary"], "--auxiliary needs images of at least 29 pixels"),
        (["DARTS", "--network", "imagenet"], "which leaves nothing of 8 pixels"),
        (["DARTS", "--csv", "missing/cost.csv"], "--csv missing/cost.csv: there is no folder missing"),
        ([], "the following arguments are required: ARCH"),
    ],
)
def test_bad_input(monkeypatch, tmp_path, capsys, arguments, says):
    with pytest.raises((SystemExit, utils.UserError)) as caught:
        run(monkeypatch, tmp_path, *arguments)
    message = capsys.readouterr().err or str(caught.value)
    assert says in message and message.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())
