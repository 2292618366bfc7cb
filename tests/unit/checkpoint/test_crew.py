"""Threads that copy pages: all is done, nothing is overwritten while it is in use, and what fails is told."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoint.memory.crew import Crew, fetched_ahead


def test_all_is_done_when_the_wait_is_over() -> None:
    done: list[int] = []
    with contextlib.closing(Crew()) as crew:
        for number in range(100):
            crew.do(lambda number=number: done.append(number))  # type: ignore[misc]
        crew.wait()
        assert sorted(done) == list(range(100))


def test_work_is_done_by_more_than_one_thread_and_not_by_ours() -> None:
    # each waits for the other: one thread alone would never get past it
    both = threading.Barrier(2, timeout=20)
    names: list[str] = []

    def work() -> None:
        both.wait()
        names.append(threading.current_thread().name)

    with contextlib.closing(Crew()) as crew:
        crew.do(work)
        crew.do(work)
        crew.wait()
    assert len(set(names)) == 2
    assert threading.current_thread().name not in names


def test_no_more_is_under_way_than_there_are_buffers() -> None:
    gate, began = threading.Semaphore(0), threading.Semaphore(0)
    given = 0

    def work() -> None:
        began.release()
        gate.acquire()

    def give() -> None:
        nonlocal given
        for _ in range(20):
            crew.do(work)
            given += 1

    with contextlib.closing(Crew()) as crew:
        giver = threading.Thread(target=give)
        giver.start()
        began.acquire()
        began.acquire()
        for _ in range(20):
            assert given <= 20
            gate.release()
        giver.join()
        crew.wait()
    assert given == 20


def test_a_failure_is_raised_by_a_later_call_and_not_by_the_close() -> None:
    def fail() -> None:
        raise ValueError("no such page")

    def give(crew: Crew, times: int) -> None:
        for _ in range(times):
            crew.do(fail)
        crew.wait()

    with contextlib.closing(Crew()) as crew:
        for times in (1, 100):
            with pytest.raises(ValueError, match="no such page"):
                give(crew, times)
    gate = threading.Event()

    def fail_late() -> None:
        gate.wait()
        fail()

    crew = Crew()
    crew.do(fail_late)
    gate.set()
    crew.close()
    crew.close()


def test_two_buffers_are_enough_to_fetch_ahead() -> None:
    buffers = bytearray(1), bytearray(1)

    def items():  # type: ignore[no-untyped-def]
        for number in range(200):
            buffers[number % 2][0] = number
            yield buffers[number % 2]

    with ThreadPoolExecutor(1) as executor:
        assert [item[0] for item in fetched_ahead(items(), executor)] == list(range(200))


def test_what_fails_while_it_is_fetched_comes_in_its_place() -> None:
    def items():  # type: ignore[no-untyped-def]
        yield 1
        yield 2
        raise OSError("gone")

    with ThreadPoolExecutor(1) as executor:
        ahead = fetched_ahead(items(), executor)
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(OSError, match="gone"):
            next(ahead)
        assert list(fetched_ahead(iter(()), executor)) == []


def test_nobody_is_at_work_when_the_consumer_has_gone() -> None:
    inside = 0

    def items():  # type: ignore[no-untyped-def]
        nonlocal inside
        while True:
            inside += 1
            inside -= 1
            yield inside

    with ThreadPoolExecutor(1) as executor:
        source = items()
        ahead = fetched_ahead(source, executor)
        assert next(ahead) == 0
        ahead.close()  # type: ignore[attr-defined]
        # a generator at work cannot be closed: ValueError
        source.close()
