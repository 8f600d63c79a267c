"""Scripts as subprocesses, several processes as one, and small sets of images."""

import contextlib
import functools
import multiprocessing.forkserver
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from involution import Involution2d
from processes import Processes

ROOT = Path(__file__).parent.parent

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
    """Call a script in an empty folder: `script("train.py", "--layers", 3)` -> CompletedProcess."""
    return lambda *command: start_script(tmp_path, *command, run=subprocess.run)


def start_script(folder, name, *arguments, run=subprocess.Popen):
    command = [sys.executable, str(ROOT / name), *(str(argument) for argument in arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return run(command, cwd=folder, **pipes)


@functools.cache
def _forkserver():
    """A process that has imported what runs need, and done nothing else: its forks start in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_processes", "train", "train_search", "torch._dynamo", "sklearn.model_selection"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def start_processes(count, folder, function, *arguments, **environment):
    """Processes, as torchrun would start them, that each call `function(rank, *arguments)` in a folder.

    What one prints is in the folder, in `printed-RANK`. They are killed when the context ends.
    """
    context = _forkserver()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun has one
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    started = []
    for rank in range(count):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        own = {name: str(value) for name, value in (place | numbers | environment).items()}
        started.append(context.Process(target=_as_started, args=(own, folder, rank, function, arguments)))
        started[-1].start()
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
