"""Portions: worked through in order or by two threads, put together in order, none begun after a failure."""

import threading

import pytest

from tcpstate.kernel import lanes
from tcpstate.kernel.lanes import both, in_portions


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(lanes, "PORTION", 10)
    monkeypatch.setattr(lanes, "WIDE", 100)
    monkeypatch.setattr(lanes, "processors", lambda: 2)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 99, 100, 101, 1000])
def test_every_portion_is_worked_through_once_and_they_are_put_together_in_order(small, count):
    seen = []

    def work(part):
        seen.append(part)
        return range(part.start, part.stop)

    assert in_portions(count, work) == list(range(count))
    assert len(seen) == max(1, -(-count // 10))
    assert all(part.stop - part.start <= 10 for part in seen)


def test_two_threads_work_where_there_are_many(small):
    met = threading.Barrier(2, timeout=30)

    def work(part):
        if part.start < 20:
            # each of the first two portions waits for the other to be begun
            met.wait()
        return [threading.get_ident()] * (part.stop - part.start)

    assert len(set(in_portions(100, work))) == 2


@pytest.mark.parametrize(("count", "processors"), [(99, 2), (100, 1)])
def test_one_thread_works_where_there_are_few_or_one_processor(small, monkeypatch, count, processors):
    monkeypatch.setattr(lanes, "processors", lambda: processors)
    ran = in_portions(count, lambda part: [threading.get_ident()] * (part.stop - part.start))
    assert set(ran) == {threading.get_ident()}


@pytest.mark.parametrize("count", [50, 1000])
def test_the_first_failure_is_raised_and_no_portion_is_begun_after_it(small, count):
    seen = []

    def work(part):
        seen.append(part.start)
        if part.start >= 30:
            raise ValueError(part.start)
        return [0] * (part.stop - part.start)

    with pytest.raises(ValueError, match=r"^30$"):
        in_portions(count, work)
    # of two threads the other may have begun one more
    assert max(seen) in (30, 40)


def test_without_room_for_a_thread_all_is_done_by_one(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    ran = []
    both(ran.append)
    assert sorted(ran) == [0, 1]
