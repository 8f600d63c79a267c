"""Memory that a run on a CPU has freed stays with its process: the system is asked how many pages it has handed out.

Gradients stay where they are, and steps are those of gradients that are made anew.
"""

import ctypes
import subprocess
import sys

import pytest
import torch

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


def test_gradients_stay_where_they_are():
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    places = set()
    for net, clear in zip(nets, (memory.clear_gradients, torch.optim.SGD.zero_grad), strict=True):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        for _ in range(3):
            clear(optimizer)
            if clear is memory.clear_gradients:
                assert not any(w.grad.any() for w in net.parameters())
                places.add(tuple(w.grad.data_ptr() for w in net.parameters()))
            net(torch.randn(4, 3, 8, 8)).square().sum().backward()
            optimizer.step()
    assert len(places) == 1
    assert all(map(torch.equal, nets[0].state_dict().values(), nets[1].state_dict().values()))
