"""Threads of the scripts sleep while they wait, unless the user says otherwise; OpenMP itself is asked."""

import re

import pytest


@pytest.fixture
def spins(script, monkeypatch):
    """A function: how often a script's threads spin before they sleep, as libgomp prints it."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")

    def call(name):
        found = re.search("GOMP_SPINCOUNT = '([0-9]+)'", script(name, "--help").stderr)
        return int(found[1]) if found else pytest.skip("the OpenMP of this PyTorch is not libgomp")

    return call


@pytest.mark.parametrize("name", ["train_search.py", "train.py", "test.py"])
def test_threads_of_a_script_sleep_at_once(spins, name):
    assert spins(name) == 0


@pytest.mark.parametrize("policy", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "500")])
def test_the_policy_of_the_user_stays(spins, monkeypatch, policy):
    monkeypatch.setenv(*policy)
    assert spins("train.py") >= 500
