"""Memory that a run on a CPU has freed stays with its process: the system is asked how many pages it has handed out."""

import ctypes
import subprocess
import sys

import pytest

from runtime import memory
from scripts import ROOT

COUNT = """
import argparse, resource, torch, utils

def use():
    return [torch.ones(2**22) for _ in range(12)]  # of 16 MB each: in all more than what glibc keeps by itself

def faults(uses_before):
    for _ in range(uses_before): use()
    before = resource.getrusage(resource.RUSAGE_SELF)
    use()
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(after.ru_minflt - before.ru_minflt, after.ru_maxrss - before.ru_maxrss)

faults(1)
utils.pick_device(argparse.Namespace(device="cpu", gpu=None))
faults(8)  # small objects between the blocks leave holes that are a little too small: it settles within a few uses
"""


@pytest.mark.skipif(not memory.keep_freed(), reason="the C library is not glibc")
def test_a_run_on_a_cpu_keeps_what_it_frees():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True, cwd=ROOT)
    before, _, after, growth = map(int, done.stdout.split())
    assert before > 10_000  # pages: importing alone changes nothing, that is the user's to decide
    assert after < 1_000 and growth < 4_000  # kB


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError], ids=["musl, macOS", "no library", "Windows"])
def test_without_glibc_nothing_is_done(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert memory.keep_freed() is False
