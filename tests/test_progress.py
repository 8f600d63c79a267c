"""No long silence."""

import logging
import subprocess
import sys
import time

import pytest

from runtime import progress
from runtime.processes import ALONE
from scripts import ROOT


@pytest.fixture
def pulse(caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setitem(progress._state, "doing", "nothing yet")
    pulse = progress.Pulse(silence=0.2)
    logging.getLogger().addHandler(pulse)
    yield pulse
    logging.getLogger().removeHandler(pulse)
    pulse.close()


def wait_for(text, caplog):
    deadline = time.monotonic() + 60
    while text not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert text in caplog.text


class Batches(list):
    labels, team = range(12), ALONE


def test_a_silence_is_broken_by_what_is_being_done(pulse, caplog):
    wait_for("at work: nothing yet", caplog)
    batches = Batches([("images", range(8)), ("images", range(4))])
    for k, batch in enumerate(progress.counted(batches, "validation")):
        assert batch == batches[k]
        wait_for(f"at work: validation: {8 * k} of 12 images", caplog)


def test_scripts_have_a_pulse():
    program = """
import functools, time, utils
from runtime import progress
progress.Pulse = functools.partial(progress.Pulse, silence=0.1)
utils.run_script(lambda: time.sleep(1))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and "at work: starting" in result.stdout, result.stderr


def test_the_clock_starts_anew_with_every_line():
    pulse = progress.Pulse(silence=1000)
    pulse.last = 0
    pulse.handle(logging.makeLogRecord({}))
    assert pulse.last > 0
    pulse.close()


def test_a_closed_pulse_is_silent(pulse, caplog):
    pulse.close()
    time.sleep(0.5)
    count = caplog.text.count("at work")
    time.sleep(0.5)
    assert caplog.text.count("at work") == count
