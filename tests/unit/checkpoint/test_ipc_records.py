"""Records of System V semaphores and message queues: written and read, and what may not stand in them."""

from __future__ import annotations

from typing import Any

import pytest

from checkpoint.ipc.base import SystemV
from checkpoint.ipc.queues import MessageQueue, QueuedMessage
from checkpoint.ipc.semaphores import SemaphoreSet, Undo, _kept, _touched
from checkpoint.ipc.table import remove_noted
from checkpoint.kernel.sysvipc import SEMBUF, SemFlag
from tcpstate.codec import pack, unpack

COMMON: dict[str, Any] = {"number": 7, "key": -5, "mode": 0o640, "uid": 1, "gid": 2}
SET = SemaphoreSet(**COMMON, values=(1, 32767), last=(0, 9), undo=(Undo(pid=9, place=1, add=-3),))
MESSAGES = (QueuedMessage(type=1 << 62, text=b"a"), QueuedMessage(type=1, text=b""))
QUEUE = MessageQueue(**COMMON, room=16384, messages=MESSAGES, sender=9, receiver=0)


@pytest.mark.parametrize("record", [SET, QUEUE])
def test_written_and_read(record: SystemV) -> None:
    assert unpack(SystemV, pack(record)) == record


@pytest.mark.parametrize(
    "change",
    [{"number": -1}, {"key": 1 << 31}, {"mode": 0o1000}, {"uid": 1 << 32}, {"values": ()}, {"values": (1,)},
     {"values": (1, 32768)}, {"last": (0, -1)}, {"undo": (Undo(pid=9, place=2, add=1),)}],
)  # fmt: skip
def test_impossible_sets(change: dict[str, Any]) -> None:
    known = {**COMMON, "values": SET.values, "last": SET.last, "undo": SET.undo}
    with pytest.raises(ValueError, match="out of range"):
        SemaphoreSet(**(known | change))


def test_impossible_queues() -> None:
    for change in ({"room": 1 << 31}, {"sender": -1}, {"receiver": -1}):
        with pytest.raises(ValueError, match="out of range"):
            MessageQueue(**(COMMON | {"room": 1, "messages": (), "sender": 0, "receiver": 0} | change))
    with pytest.raises(ValueError, match="out of range"):
        QueuedMessage(type=0, text=b"")
    for bad in ({"pid": 0}, {"place": -1}, {"add": 0}, {"add": 32768}):
        with pytest.raises(ValueError, match="out of range"):
            Undo(**({"pid": 1, "place": 0, "add": 1} | bad))


def walk(value: int, operations: bytes) -> tuple[int, int, int]:
    """(value, least, undone) after these operations."""
    least, undone = value, 0
    for _, step, flags in SEMBUF.iter_unpack(operations):
        value += step
        least = min(least, value)
        undone -= step if flags & SemFlag.UNDO else 0
    return value, least, undone


@pytest.mark.parametrize("add", [1, -1, 5, -7])
def test_what_is_to_be_undone_changes_no_value(add: int) -> None:
    assert walk(0, _kept(0, add)) == (0, 0, add)


@pytest.mark.parametrize("value", [0, 1, 32766, 32767])
def test_a_touch_stays_in_range(value: int) -> None:
    values = [value]
    for _, step, _ in SEMBUF.iter_unpack(_touched(0, value)):
        values.append(values[-1] + step)
    assert values[-1] == value
    assert 0 <= min(values) <= max(values) <= 32767


def test_notes_of_other_things_are_left_alone() -> None:
    assert remove_noted("/proc/sysvipc/shm/3") is None
    assert remove_noted("/tmp/file") is None
