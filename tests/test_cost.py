"""What a run will cost and has cost."""

import mmap
from pathlib import Path

import pytest

from watch import cost


@pytest.fixture
def clock(monkeypatch):
    """The time, in seconds; a test moves it."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def steps(pace, clock, *seconds):
    for each in seconds:
        clock[0] += each
        pace.step()


def test_an_estimate_leaves_the_first_step_out_and_has_the_validation_in(clock):
    pace = cost.Pace()
    pace.after = lambda epoch: 2.5
    pace.begin_epoch(0, 10, done=0)
    steps(pace, clock, 60)
    assert pace.seconds(0) == pytest.approx(12.5 * 60) and not pace.is_news
    steps(pace, clock, 1, 3, 2, 2)
    assert pace.is_news and not pace.validation_is_known
    assert pace.seconds(0) == pytest.approx(12.5 * 2)
    assert pace.remaining(5, epochs=4) == pytest.approx(7.5 * 2 + 3 * 12.5 * 2)


def test_a_measured_validation_takes_the_place_of_the_estimate(clock):
    pace = cost.Pace()
    pace.after = lambda epoch: 100
    pace.begin_epoch(0, 3, done=0)
    steps(pace, clock, 1, 1, 1)
    assert pace.is_news  # no epoch has more
    clock[0] += 7
    pace.begin_epoch(1, 3, done=0)
    steps(pace, clock, 1)
    assert pace.validation_is_known and not pace.is_news
    assert pace.seconds(1) == pytest.approx(10)


def test_what_comes_after_some_epochs_alone_is_counted_where_it_comes(clock):
    """An eigenvalue after every second epoch, which takes as long as three validations."""
    pace = cost.Pace()
    pace.after = lambda epoch: 2 + 6 * (epoch % 2)
    pace.begin_epoch(0, 3, done=0)
    steps(pace, clock, 1, 1, 1)
    assert pace.remaining(3, epochs=4) == pytest.approx(2 + 11 + 5 + 11)
    clock[0] += 4  # twice as long as was thought
    pace.begin_epoch(1, 3, done=0)
    steps(pace, clock, 1)
    assert pace.remaining(1, epochs=4) == pytest.approx(2 + 16 + 3 + 4 + 3 + 16)


def test_an_estimate_goes_by_the_work_of_each_epoch(clock):
    pace = cost.Pace()
    pace.work = lambda epoch: (0.25, 0.5, 1.0)[epoch]
    pace.begin_epoch(0, 10, done=0)
    steps(pace, clock, 60, 1, 1, 1, 1)
    assert [pace.seconds(epoch) for epoch in range(3)] == pytest.approx([10, 20, 40])
    assert pace.remaining(5, epochs=3) == pytest.approx(5 + 20 + 40)


def test_hours_are_those_of_work(clock):
    one = cost.Cost("python train.py")
    clock[0] += 1000  # reading images
    one.begin()
    clock[0] += 5400
    one.count(64)
    state = one.state_dict()
    clock[0] += 777  # lost to a kill
    two = cost.Cost("python train.py --resume runs/x")
    two.load_state_dict(state)
    two.begin()
    clock[0] += 1800
    two.count(64)
    two.state_dict()
    summary = two.summary(ended=True)
    assert (summary["hours"], summary["sessions"], summary["images"]) == (2.0, 2, 128)
    assert summary["command"] == "python train.py" and summary["images_per_second"] == pytest.approx(
        128 / 7200, abs=1e-2
    )
    assert "2 h 00 min in 2 sessions for 128 training images" in str(two)


def test_processor_hours_are_those_of_all_threads(clock, monkeypatch):
    spent = [500.0]
    monkeypatch.setattr(cost.time, "process_time", lambda: spent[0])
    one = cost.Cost("x")
    one.begin()
    spent[0] += 5400
    state = one.state_dict()
    two = cost.Cost("x")
    two.load_state_dict(state)
    two.begin()
    spent[0] += 1800
    two.state_dict()
    assert two.summary(ended=True)["processor_hours"] == 2.0
    del state["processor"]  # as in a checkpoint from before it was counted
    two.load_state_dict(state)
    assert two.summary(ended=True)["processor_hours"] is None


def test_nothing_is_counted_before_the_first_step(clock):
    fresh = cost.Cost("x")
    clock[0] += 50
    fresh.state_dict()
    summary = fresh.summary(ended=False)
    assert (summary["hours"], summary["sessions"], summary["images_per_second"], summary["ended"]) == (0, 0, None, None)


@pytest.mark.parametrize("name, value", [("images", -1), ("images", 1.0), ("started", 3), ("seconds", float("nan"))])
def test_wrong_values_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        cost.Cost("x").load_state_dict(cost.Cost("x").state_dict() | {name: value})


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_the_peak_of_memory_is_that_of_the_process():
    pages = int(Path("/proc/self/statm").read_text().split()[1])  # now resident
    assert 0.99 * pages * mmap.PAGESIZE / 1e9 <= cost.peak_memory()[0] < 100


def test_memory_in_words():
    assert cost.in_words(1.25, 0) == "at most 1.25 GB of memory"
    assert cost.in_words(1.25, 10.5) == "at most 1.25 GB of memory and 10.50 GB on the GPU"
    assert cost.in_words(0, 0) == "memory unknown"
