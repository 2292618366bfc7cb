"""The threads that a round of pre-copy tells of are hostile until checked."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from checkpoint.files.table import TreeFiles
from checkpoint.memory.layout import Mapping, MemoryFields, MemoryLayout
from checkpoint.records import LiveProcess, LiveTree
from checkpoint.state.birth import THREADS_MAX
from checkpoint.state.clocks import Clocks
from checkpoint.state.keyring import SessionKeyring
from checkpoint.state.large_registers import LargeRegisters
from checkpoint.state.membarrier import Membarrier
from checkpoint.tree import Task
from tcpstate import codec
from tcpstate.errors import BadRecord

PAGE = 4096
FIRST = (Membarrier(registered=0), LargeRegisters(granted=0), SessionKeyring())
TASK = Task(pid=7, ppid=1, pgid=7, sid=7)
LAYOUT = MemoryLayout(
    pid=7,
    mappings=(Mapping(start=PAGE, end=3 * PAGE, prot=3),),
    fields=MemoryFields(**dict.fromkeys(MemoryFields.__slots__, 0)),
    auxv=bytes(16),
    exe="/exe",
    exe_file=0,
    vdso=b"",
)


def plain(**changes: Any) -> dict[str, Any]:
    one = LiveProcess(task=TASK, exit_signal=17, layout=LAYOUT, threads=(8, 9), first=FIRST)
    found: dict[str, Any] = codec.to_plain(one)
    return found | changes


def test_it_comes_back() -> None:
    one: LiveProcess = codec.from_plain(LiveProcess, plain())
    assert (one.threads, one.first) == ((8, 9), FIRST)


def test_who_does_not_know_them_tells_none() -> None:
    told = plain()
    del told["threads"], told["first"]
    assert codec.from_plain(LiveProcess, told).threads == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": [0]},
        {"threads": [-8]},
        {"threads": [1 << 22]},
        {"threads": [1 << 63]},
        {"threads": ["8"]},
        {"threads": [8, 8]},
        {"threads": [7]},
        {"threads": list(range(8, 9 + THREADS_MAX))},
        {"first": []},
        {"first": codec.to_plain(FIRST[:2])},
        {"first": codec.to_plain(FIRST[::-1])},
        {"first": codec.to_plain((*FIRST, FIRST[0]))},
        {"first": [{"kind": "membarrier", "registered": 1}, *codec.to_plain(FIRST[1:])]},
        {"layout": None, "task": codec.to_plain(dataclasses.replace(TASK, wait_code=0))},
    ],
)
def test_threads_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(BadRecord):
        codec.from_plain(LiveProcess, plain(**changes))


@pytest.mark.parametrize("threads", [(8,), (7,), (9, 8)])
def test_a_thread_of_two_processes(threads: tuple[int, ...]) -> None:
    layout = dataclasses.replace(LAYOUT, exe_file=0)
    other = dataclasses.replace(TASK, pid=6, ppid=7)
    processes = [
        LiveProcess(task=TASK, exit_signal=17, layout=layout, threads=(8, 10), first=FIRST),
        LiveProcess(
            task=other, exit_signal=17, layout=dataclasses.replace(layout, pid=6), threads=threads, first=FIRST
        ),
    ]
    with pytest.raises(ValueError, match="the same thread"):
        LiveTree(
            number=1,
            processes=tuple(processes),
            files=TreeFiles(files=[], contents=[], tables={}),
            clocks=Clocks(monotonic=1, boottime=2),
        )
