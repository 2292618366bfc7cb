"""System V semaphores and message queues: what moving them takes for granted."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

import pytest

from checkpoint.kernel import sem_undo, sysvipc
from checkpoint.kernel.sysvipc import SEMBUF, SemFlag
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS


def free_number(listed: list[sysvipc.Listed]) -> int:
    """An ID that nobody has: the lower 15 bits are the place, the others count how often it was used."""
    used = {one.number & 0x7FFF for one in listed}
    return (os.getpid() & 0xFFF) << 15 | next(place for place in range(20000, 30000) if place not in used)


@pytest.fixture
def semaphores() -> Iterator[int]:
    number = free_number(sysvipc.list_sets())
    assert sysvipc.create_set(number, 0, 3, 0o600)
    yield number
    with contextlib.suppress(OSError):
        sysvipc.remove_set(number)


@pytest.fixture
def queue() -> Iterator[int]:
    number = free_number(sysvipc.list_queues())
    assert sysvipc.create_queue(number, 0, 0o600)
    yield number
    with contextlib.suppress(OSError):
        sysvipc.remove_queue(number)


def operate(number: int, *operations: tuple[int, int, int]) -> None:
    data = b"".join(SEMBUF.pack(*each) for each in operations)
    room = ctypes.create_string_buffer(data, len(data))
    syscall(SYS.semop, number, ctypes.addressof(room), len(operations))


def test_an_id_that_is_taken_is_not_given_twice(semaphores: int, queue: int) -> None:
    before = len(sysvipc.list_sets()), len(sysvipc.list_queues())
    assert not sysvipc.create_set(semaphores, 0, 1, 0o600)
    assert not sysvipc.create_queue(queue, 0, 0o600)
    assert (len(sysvipc.list_sets()), len(sysvipc.list_queues())) == before


def test_values_and_last_users(semaphores: int) -> None:
    sysvipc.set_values(semaphores, (1, 2, 32767))
    assert sysvipc.values(semaphores, 3) == (1, 2, 32767)
    assert sysvipc.last_users(semaphores, 3) == (os.getpid(),) * 3
    child = os.fork()
    if child == 0:
        operate(semaphores, (1, 1, SemFlag.NOWAIT), (1, -1, SemFlag.NOWAIT))
        os._exit(0)
    os.waitpid(child, 0)
    # an operation and its contrary: the value stays, and who made them was the last
    assert sysvipc.values(semaphores, 3)[1] == 2
    assert sysvipc.last_users(semaphores, 3)[1] == child


def test_what_is_undone_is_told(semaphores: int) -> None:
    said, says = os.pipe()
    child = os.fork()
    if child == 0:
        operate(semaphores, (0, 5, SemFlag.UNDO), (0, -5, SemFlag.NOWAIT))
        operate(semaphores, (2, 3, SemFlag.NOWAIT), (2, -3, SemFlag.UNDO | SemFlag.NOWAIT))
        os.write(says, b"x")
        while True:
            signal.pause()
    os.read(said, 1)
    try:
        told = dict(sem_undo.adjustments(child))
        assert told[semaphores][:3] == (-5, 0, 3)
        assert sysvipc.values(semaphores, 3) == (0, 0, 0)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    # below zero it does not go
    assert sysvipc.values(semaphores, 3) == (0, 0, 3)


def test_messages_are_read_and_stay(queue: int) -> None:
    sysvipc.send(queue, 7, b"text")
    sysvipc.send(queue, 1, b"")
    for _ in range(2):
        assert [sysvipc.peek(queue, place, 100) for place in (0, 1)] == [(7, b"text"), (1, b"")]
    with pytest.raises(OSError, match="No message"):
        sysvipc.peek(queue, 2, 100)
    (one,) = [each for each in sysvipc.list_queues() if each.number == queue]
    assert (one.count, one.bytes, one.users) == (2, 4, (os.getpid(), 0))
