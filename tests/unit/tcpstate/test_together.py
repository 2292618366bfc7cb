"""Work that is begun by another thread, and joined: all of it is done once, and a failure is told."""

import threading

import pytest

from tcpstate.kernel.beside import Beside
from tcpstate.kernel.lanes import PORTION, WIDE, Together


@pytest.mark.parametrize("count", [0, 1, PORTION, PORTION + 1, WIDE, 5 * WIDE + 3])
def test_each_is_done_once(count):
    done, lock = [], threading.Lock()

    def work(part):
        with lock:
            done.extend(range(part.start, part.stop))

    together = Together(count, work)
    together.finish()
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize("count", [PORTION, 4 * WIDE])
def test_the_first_failure_is_told_and_nothing_is_begun_after_it(count):
    begun = []

    def work(part):
        begun.append(part.start)
        raise ValueError(part.start)

    together = Together(count, work)
    with pytest.raises(ValueError, match="0"):
        together.finish()
    assert len(begun) <= 2


def test_what_is_done_beside_tells_what_came_of_it():
    go_on = threading.Event()
    beside = Beside(lambda: go_on.wait(60) and threading.get_ident())
    go_on.set()
    assert beside.result() not in (0, threading.get_ident())
    beside.wait()
    failing = Beside(lambda: 1 // 0)
    failing.wait()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing.result()


def test_without_room_for_a_thread_it_is_done_at_once(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", refuse)
    assert Beside(threading.get_ident).result() == threading.get_ident()
