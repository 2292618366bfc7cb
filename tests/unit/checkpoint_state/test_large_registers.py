"""Permission for AMX: recorded answers, since this machine may have none of it."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import cast

import pytest

from checkpoint.state.base import TaskBuilder, TaskView
from checkpoint.state.large_registers import LargeRegisters
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS

TILES = 1 << 18
#: what a Sapphire Rapids answers before and after the request
BEFORE, AFTER = 0x206E7, 0x206E7 | TILES


def captured(mask: int, result: int) -> LargeRegisters:
    """What is captured where the kernel answers so."""
    calls = CallTable()
    going_on = LargeRegisters.capture(cast(TaskView, SimpleNamespace(calls=calls)))
    next(going_on)
    image = calls.image(0)
    struct.pack_into("<Q", image, 0, mask)
    struct.pack_into("<q", image, calls.entries(0)[0] + 56, result)
    calls.load(image, len(calls))
    with pytest.raises(StopIteration) as stop:
        next(going_on)
    return cast(LargeRegisters, stop.value.value)


@pytest.mark.parametrize(
    ("mask", "result", "granted"), [(BEFORE, 0, 0), (AFTER, 0, TILES), (0, -22, 0), (AFTER, -22, 0)]
)
def test_what_was_asked_for_is_seen(mask: int, result: int, granted: int) -> None:
    assert captured(mask, result) == LargeRegisters(granted=granted)


def requests(state: LargeRegisters) -> list[tuple[int, ...]]:
    task = TaskBuilder(pid=1, tid=1, warn=lambda text: None)
    state.rebuild(task)
    image = task.calls.image(0)
    first, end = task.calls.entries(0)
    return [struct.unpack_from("<3Q", image, at) for at in range(first, end, 80)]


def test_it_is_asked_for_again() -> None:
    assert requests(LargeRegisters(granted=TILES)) == [(SYS.arch_prctl, 0x1023, 18)]
    assert requests(LargeRegisters(granted=0)) == []


@pytest.mark.parametrize("granted", [1, 1 << 17, TILES | 1, 1 << 40, -1])
def test_other_components_need_no_permission(granted: int) -> None:
    with pytest.raises(ValueError, match="permission"):
        LargeRegisters(granted=granted)
