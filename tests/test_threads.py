"""How threads of the scripts wait, by load, unless the user says otherwise; OpenMP itself is asked."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch

import utils
from runtime import threads
from scripts import ROOT


@pytest.fixture
def spins(monkeypatch):
    """A function: how often a script's threads spin before they sleep, as libgomp prints it."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")

    def call(name):
        command = [sys.executable, ROOT / name, "--help"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as started:
            for line in started.stderr:
                if found := re.search("GOMP_SPINCOUNT = '([0-9]+)'", line):
                    started.kill()  # what it would import after OpenMP takes seconds
                    return int(found[1])
        pytest.skip("the OpenMP of this PyTorch is not libgomp")

    return call


@pytest.mark.parametrize("name", ["train_search.py", "train.py", "test.py"])
def test_threads_of_a_script_spin_briefly_at_most(spins, name):
    assert spins(name) in (0, 10_000)  # by what else this machine does


def check_choice(monkeypatch, busy):
    monkeypatch.setattr(os, "environ", {})
    threads.choose_waiting()
    assert threads.are_asleep() == busy
    assert os.environ == (threads.ASLEEP if busy else threads.BRIEF)


@pytest.mark.parametrize("idle, busy", [(11, False), (9, True)])
def test_a_machine_is_busy_that_has_work_for_half_of_its_cores(monkeypatch, idle, busy):
    """Now: the load of the last minute is high too after a run of ours has ended."""
    ticks = iter([(1000, 5000), (1000 + idle, 5020)])
    monkeypatch.setattr(threads, "_ticks", lambda: next(ticks))
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 0.0, 0.0))
    check_choice(monkeypatch, busy)


@pytest.mark.parametrize("load, busy", [(0.9, False), (1.1, True)])
def test_where_nothing_tells_what_the_cores_do_it_is_the_load(monkeypatch, load, busy):
    monkeypatch.setattr(threads, "_ticks", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    check_choice(monkeypatch, busy)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is of Linux")
def test_ticks_go_on():
    idle, all_ = threads._ticks()
    time.sleep(0.05)
    later = threads._ticks()
    assert idle <= later[0] and all_ < later[1] and later[0] - idle <= later[1] - all_


@pytest.mark.parametrize("how", [threads.ASLEEP, threads.BRIEF], ids=["asleep", "brief"])
def test_the_log_says_that_threads_sleep(monkeypatch, caplog, how):
    monkeypatch.setattr(os, "environ", how)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with caplog.at_level("INFO"):
        utils.log_device(torch.device("cpu"))
    assert ("CPU threads: 2, which sleep while they wait" in caplog.text) == (how is threads.ASLEEP)


@pytest.mark.parametrize("policy", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "500")])
def test_the_policy_of_the_user_stays(spins, monkeypatch, policy):
    monkeypatch.setenv(*policy)
    assert spins("train.py") == 500 or policy[1] == "ACTIVE" and spins("train.py") > 10_000
