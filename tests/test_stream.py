"""Work that processes do ahead: the right results in the right order, after jumps too, and clear ends."""

import os
import signal
import threading

import numpy as np
import pytest
import torch

from images import stream


def tens(items):
    """Ten times every item; 7 fails."""
    if 7 in items:
        return stream.Failure("item 7 is broken")
    return torch.tensor(items) * 10


def listed(items):
    return [int(item) * 10 for item in items]


def counting(place):
    """Places (k,) of the items 2k and 2k + 1, for ever."""
    for k in range(place[0], 50):
        yield (k,), [2 * k, 2 * k + 1]


@pytest.fixture
def reader():
    return stream.Reader(tens, np.arange(100), counting, workers=2)


def test_results_in_order_and_after_jumps(reader):
    for k in (0, 1, 2, 20, 21, 5, 6, 6):
        assert reader.read((k,)).tolist() == [20 * k, 20 * k + 10]


def test_the_random_state_stays(reader):
    before = torch.get_rng_state()
    reader.read((0,))
    reader.read((9,))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failure_arrives_where_its_result_is_due_and_the_next_may_go_on(reader):
    reader.read((2,))
    for _ in range(2):
        with pytest.raises(stream.ReadError, match="item 7 is broken"):
            reader.read((3,))
    assert reader.read((4,)).tolist() == [80, 90]


def test_a_killed_process_is_noticed_when_its_result_is_due(reader):
    reader.read((0,))
    for process in reader._results._workers:
        os.kill(process.pid, signal.SIGKILL)
        process.join()  # and nothing is raised here
    with pytest.raises(stream.ReadError, match="a process that reads images was killed"):
        for k in range(1, 50):
            reader.read((k,))


def test_interrupts_of_the_terminal_do_not_end_the_processes(reader):
    reader.read((4,))
    for process in reader._results._workers:
        os.kill(process.pid, signal.SIGINT)
    for k in range(4, 20):
        assert len(reader.read((k,))) == 2


def test_a_thread_computes_the_next_result_meanwhile():
    """Once each, in order, with the errors where they are due; what is not asked for any more is left alone."""
    computed, released = [], threading.Event()

    def tenfold(place):
        released.wait(60)
        computed.append(place)
        return 10 // (place != 3) * place

    ahead = stream.Ahead()
    threading.Timer(0.1, released.set).start()
    assert ahead.get(tenfold, 1, 2) == 10 and ahead.waited >= 0.09
    assert (ahead.get(tenfold, 2, 3), ahead.get(tenfold, 7, 3)) == (20, 70)  # a jump
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            ahead.get(tenfold, 3, 4)
    assert ahead.get(tenfold, 4, None) == 40
    assert computed == [1, 2, 3, 7, 3, 3, 4]


@pytest.mark.parametrize("count", [0, 3, stream._ENOUGH + 3])
def test_each_is_in_order(count):
    assert list(stream.each(listed, np.arange(count), 2, "counting")) == [10 * k for k in range(count)]
