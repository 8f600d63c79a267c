"""Scripts as subprocesses, several processes as one, and small sets of images."""

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scripts
from involution import Involution2d
from runtime.processes import Processes

# tests are small: threads would spend their time waiting for each other, above all on a busy machine
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


# the files that take longest are begun first, so that no process of `make test` is left alone with one at the end
LONGEST = "train train_search fast_cell involution_triton involution processes benchmarks model run_folder experiment"
LONGEST = [f"test_{name}" for name in LONGEST.split()]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers():
    """One process more than there are cores: a test that waits for a script leaves its core to another test."""
    return os.cpu_count() + 1


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def script(tmp_path):
    """Call a script in an empty folder: `script("train.py", "--layers", 3)` -> what `scripts.run` returns."""
    return lambda *command, **how: scripts.run(tmp_path, *command, **how)


@contextlib.contextmanager
def start_processes(count, folder, function, *arguments, **environment):
    """Processes, as torchrun would start them, that each call `function(rank, *arguments)` in a folder.

    What one prints is in the folder, in `printed-RANK`. They are killed when the context ends.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun has one
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    started = []
    for rank in range(count):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        own = {name: str(value) for name, value in (place | numbers | environment).items()}
        started.append(scripts.start(_as_started, own, folder, rank, function, arguments))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def _as_started(environment, folder, rank, function, arguments):
    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(folder)
    print_into(f"printed-{rank}")
    scripts.leave_pictures_empty()
    function(rank, *arguments)


def print_into(name):
    """Send what this process prints to the end of a file."""
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))


def in_processes(count, folder, function, *arguments):
    """What `function(team, *arguments)` returns in each of `count` processes that have met: tensors or plain values."""
    with start_processes(count, folder, meet_and_call, function, arguments) as started:
        for process in started:
            process.join(120)
        assert [process.exitcode for process in started] == count * [0], printed(folder)
    return [torch.load(Path(folder) / f"result-{rank}") for rank in range(count)]


def meet_and_call(rank, function, arguments):
    team = Processes.start()
    team.join(torch.device("cpu"), timeout=60)
    torch.save(function(team, *arguments), f"result-{rank}")
    team.leave()


def printed(folder):
    """What processes have printed, one after the other."""
    return "".join(path.read_text() for path in sorted(Path(folder).glob("printed-*")))


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


def assert_one_clear_line(result, *says, code=2):
    """This exit code and a single line on stderr that says everything in `says`."""
    assert result.returncode == code, result.stdout + result.stderr
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
