"""Scripts as processes that are forked from one that has imported PyTorch: three seconds less for each.

A script still has a process, a working folder, an environment and pipes of its own, and is killed as any other; what
it does not have is a start of its own, for which `subprocess` is there.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace

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
]

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(_PRELOADED)


class Script:
    """A script at work: what tests use of `subprocess.Popen` with text pipes."""

    def __init__(self, folder, name, *arguments):
        read, write = os.pipe()
        self.stdout, self._errors, self.returncode = open(read), tempfile.TemporaryFile("w+"), None
        line = [str(ROOT / name), *(str(argument) for argument in arguments)]
        pipes = DupFd(write), DupFd(self._errors.fileno())
        self._process = server.Process(target=_run, args=(line, str(folder), dict(os.environ), *pipes))
        self._process.start()
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


def run(folder, name, *arguments):
    """Call a script (a path, or one below the root) to its end; has what a `subprocess.CompletedProcess` has."""
    script = Script(folder, name, *arguments)
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


def _run(line, folder, environment, *pipes):
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
    try:
        runpy.run_path(line[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
