"""Scripts as subprocesses, and small sets of images."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scripts
from involution import Involution2d

# tests are small: threads would spend their time waiting for each other, above all on a busy machine
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def script(tmp_path):
    """Call a script in an empty folder: `script("train.py", "--layers", 3)` -> what `scripts.run` returns."""
    return lambda *command: scripts.run(tmp_path, *command)


def vary_kernels(network):
    """Give the involutions of a network kernels that differ from pixel to pixel, as after some training."""
    for module in network.modules():
        if isinstance(module, Involution2d):
            torch.nn.init.normal_(module.conv2.conv.weight, std=0.3)
    return network


def logits_of_scaled_images(network, size=16):
    """The largest |logit| of images times 1, 10, 100 and 1,000, after a few steps that batch norms have followed."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    logits = lambda input: output[0] if isinstance(output := network(input), tuple) else output  # noqa: E731
    for norm in norms:
        norm.momentum = 0.5  # so that their running statistics are those of the batches after these steps
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits(torch.randn(8, 3, size, size)), torch.arange(8))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
    for norm in norms:
        norm.momentum = 0.1
    network.eval()
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        return [logits(images * scale).abs().max().item() for scale in (1, 10, 100, 1000)]


def assert_one_clear_line(result, *says):
    """Exit code 2 and a single line on stderr that says everything in `says`."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for text in says:
        assert text in lines[0]


def only_run(folder, kind):
    """The one run folder of a kind below a working folder."""
    (run,) = Path(folder).glob(f"runs/{kind}-*")
    return run


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """24 training and 12 test images of three colours, 12x10 pixels, as `--dataset folder` wants them."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(("red", "green", "blue")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 60, (12, 10, 3))
                pixels[..., label] += 190
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k:03d}.png")
    return root


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """What a folder of one's own looks like: 60 training and 15 test images of many sizes, formats and modes."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned clockwise
    kinds = (  # mode, extension, how it is saved
        ("RGB", "jpg", dict(quality=90)),
        ("RGB", "JPEG", dict(exif=turned)),
        ("RGBA", "png", {}),
        ("CMYK", "jpg", {}),
        ("P", "gif", {}),
        ("L", "webp", {}),
        ("I;16", "png", {}),
        ("LA", "png", {}),
        ("1", "bmp", {}),
        ("RGB", "tiff", {}),
    )
    for part, count in (("train", 20), ("test", 5)):
        for hue, name in enumerate(("dawn", "noon", "dusk")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                mode, extension, options = kinds[k % len(kinds)]
                width, height = rng.integers(9, 70, 2)
                scene = rng.integers(0, 256, (3, 4, 3)) // 2 + 127 * (np.arange(3) == hue)
                scene = Image.fromarray(scene.astype(np.uint8)).resize((int(width), int(height)), Image.BICUBIC)
                if mode == "I;16":
                    scene = Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257)
                (scene if mode == "I;16" else scene.convert(mode)).save(folder / f"{k:03d}.{extension}", **options)
    return root


def read_curves(folder):
    """TensorBoard's scalars and histograms of a run folder: (writer, tag) -> [(step, value), …], but for speeds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = {}
    for name in ("steps", "epochs"):
        events = EventAccumulator(str(folder / "events" / name), size_guidance=dict(scalars=0, histograms=0, images=0))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            curves[name, tag] = [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["histograms"]:
            curves[name, tag] = [(event.step, event.histogram_value) for event in events.Histograms(tag)]
        for tag in events.Tags()["images"]:
            curves[name, tag] = [event.step for event in events.Images(tag)]
    curves.pop(("steps", "images_per_second"), None)
    return curves


def assert_same_curves(folder, expected):
    """But for the heat map, which is drawn now and then."""
    curves, as_expected = read_curves(folder), read_curves(expected)
    for each in (curves, as_expected):
        each.pop(("epochs", "alphas/heat_map"), None)
    assert curves == as_expected
