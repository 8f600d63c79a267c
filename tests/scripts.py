"""Scripts as processes that are forked from one that has imported PyTorch and our modules: seconds less for each.

A script still has a process, a working folder, an environment and pipes of its own, and is killed as any other; what
it does not have is a start of its own, for which `subprocess` is there. Nor are its pictures drawn, which takes as long
as the rest of a tiny run, unless it is asked for: the tests of watch/ look at them.
"""

import atexit
import multiprocessing
import os
import pkgutil
import runpy
import sys
import tempfile
import threading
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).parent.parent
_PRELOADED = [
    "torchvision",
    "torch._dynamo",
    "sklearn.datasets",
    "matplotlib.figure",
    "graphviz",
    "tqdm",
    "scipy",
    "torch.utils.tensorboard",
    "train",
    "train_search",
    "experiment",
]
_PICTURES = {
    "watch.alphas": ["plot_weights", "plot_heat_map"],
    "watch.curves": ["make_figure", "make_eigenvalue_figure"],
    "watch.evaluation_figures": ["draw_classes", "draw_confusion", "draw_calibration", "draw_mistakes"],
}

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(_PRELOADED)


def start(function, *arguments):
    """Call a function in a process of its own, which is returned."""
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # of the server, which is started by the first call
        forkserver.ensure_running()
    process = _server.Process(target=function, args=arguments)
    process.start()
    return process


class Script:
    """A script at work: what tests use of `subprocess.Popen` with text pipes."""

    def __init__(self, folder, name, *arguments, drawn=False):
        read, write = os.pipe()
        self.stdout, self._errors, self.returncode = open(read), tempfile.TemporaryFile("w+"), None
        line = [str(ROOT / name), *(str(argument) for argument in arguments)]
        pipes = DupFd(write), DupFd(self._errors.fileno())
        self._process = start(_run, line, str(folder), dict(os.environ), drawn, *pipes)
        os.close(write)
        self.pid = self._process.pid

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """What is left of both streams. A script that is still there after `timeout` seconds is killed."""
        timer = threading.Timer(timeout or 600, self._process.kill)
        timer.start()
        with self.stdout, self._errors:
            out = self.stdout.read()
            self._process.join()
            timer.cancel()
            self.returncode = self._process.exitcode
            self._errors.seek(0)
            return out, self._errors.read()


def run(folder, name, *arguments, drawn=False):
    """Call a script (a path, or one below the root) to its end; has what a `subprocess.CompletedProcess` has."""
    script = Script(folder, name, *arguments, drawn=drawn)
    out, err = script.communicate()
    return SimpleNamespace(stdout=out, stderr=err, returncode=script.returncode)


def stop_at(text, number, folder, name, *arguments):
    """Call a script, which gets a signal as soon as it has printed a text; its exit code."""
    script = Script(folder, name, *arguments)
    for printed in script.stdout:
        if text in printed:
            script.send_signal(number)
            break
    script.communicate(timeout=120)
    return script.returncode


def leave_pictures_empty():
    """Have this process write pictures with nothing in them."""
    from matplotlib.figure import Figure

    for module, names in _PICTURES.items():
        for name in names:
            setattr(pkgutil.resolve_name(module), name, lambda *_: Figure(figsize=(1, 1)))


def _run(line, folder, environment, drawn, *pipes):
    """In the new process: become the script."""
    for number, pipe in enumerate(pipes, start=1):
        os.dup2(pipe.detach(), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    multiprocessing.set_start_method(None, force=True)  # as in a process of its own
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.path[:0] = line, [str(Path(line[0]).parent), str(ROOT)]
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not drawn:
        leave_pictures_empty()
    try:
        runpy.run_path(line[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
