"""System V semaphores and message queues that cannot move: others use them, or their IDs are taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from state_moves import running

from checkpoint import preflight
from checkpoint.errors import IpcTaken
from checkpoint.ipc import table
from checkpoint.ipc.semaphores import SemaphoreSet
from checkpoint.kernel import sysvipc
from checkpoint.verdict import Status

USES = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
kind, number = sys.argv[1], int(sys.argv[2])
if kind == "set":
    assert libc.semctl(number, 0, 16, 3) == 0
else:
    assert libc.msgsnd(number, ctypes.create_string_buffer(b"\\1".ljust(8, b"\\0") + b"text", 12), 4, 0) == 0
"""
RECEIVES = """
assert libc.msgrcv(number, ctypes.create_string_buffer(99), 90, 0, 0) == 4
"""
WAIT = "\nos.write(1, b'ready\\n')\nwhile True: time.sleep(100)\n"


def user(kind: str, number: int, more: str = "") -> tuple[object, ...]:
    return (sys.executable, "-ISc", USES + more + WAIT, kind, number)


@pytest.fixture
def key() -> Iterator[int]:
    key = 0x7463_7069
    yield key
    for listed, remove in (
        (sysvipc.list_sets, sysvipc.remove_set),
        (sysvipc.list_queues, sysvipc.remove_queue),
    ):
        for one in listed():
            if one.key == key:
                remove(one.number)


def judged(pid: int) -> list[tuple[str, Status, str]]:
    return [(v.code, v.status, v.text) for v in preflight.check([pid]) if v.kind in ("semaphore set", "message queue")]


def made(key: int, number: int, kind: str) -> int:
    made = sysvipc.create_set(number, key, 2, 0o600) if kind == "set" else sysvipc.create_queue(number, key, 0o600)
    assert made
    return number


def test_a_set_of_the_tree_alone_moves_and_one_of_two_trees_does_not(key: int) -> None:
    number = made(key, 5 << 15 | 20001, "set")
    with running(*user("set", number)) as pid:
        assert judged(pid) == [("", Status.OK, "2 semaphores")]
        sysvipc.set_values(number, (1, 1))  # by us, who live
        assert judged(pid) == []
        with running(*user("set", number)) as other:
            assert [one[:2] for one in judged(other)] == [("TM-0560", Status.REFUSE)]


def test_a_queue_of_two_trees(key: int) -> None:
    number = made(key, 5 << 15 | 20002, "queue")
    with running(*user("queue", number)) as sender:
        assert judged(sender) == [("", Status.OK, "1 messages")]
        with running(*user("queue", number, RECEIVES)) as receiver, running(*user("queue", number)) as last:
            ((code, _, text),) = judged(last)
            assert code == "TM-0560"
            assert f"pid {receiver}" in text
            assert judged(sender) == []


def test_an_id_or_a_key_that_is_taken(key: int) -> None:
    number = made(key, 5 << 15 | 20003, "set")
    record = SemaphoreSet(number=number, key=0, mode=0o600, uid=0, gid=0, values=(1,), last=(0,))
    with pytest.raises(IpcTaken, match="its ID"):
        table.check([record])
    with pytest.raises(IpcTaken, match="its ID"):
        table.make([record], None, lambda _: None)
    # other tests make sets in this namespace as well
    there = {one.number for one in sysvipc.list_sets()}
    free = next(other for other in range(number + 1, number + 10_000) if other not in there)
    record = SemaphoreSet(number=free, key=key, mode=0o600, uid=0, gid=0, values=(1,), last=(0,))
    with pytest.raises(IpcTaken, match="its key"):
        table.check([record])
    with pytest.raises(IpcTaken, match="its key"):
        table.make([record], None, lambda _: None)
    assert [one.number for one in sysvipc.list_sets() if one.key == key] == [number]
