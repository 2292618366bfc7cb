"""What a round of pre-copy tells is hostile until checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from checkpoint.files.regular import RegularFile
from checkpoint.files.table import TreeFiles
from checkpoint.image.frames import PageRun, Space
from checkpoint.live import Round
from checkpoint.memory.layout import Mapping, MemoryFields, MemoryLayout
from checkpoint.namespaces.spaces import NO_SPACES, Spaces
from checkpoint.records import LiveProcess, LiveTree, MapsDelta, fits
from checkpoint.spool import Spool
from checkpoint.state.clocks import Clocks
from checkpoint.tree import Task
from tcpstate import codec

PAGE = 4096
FIELDS = MemoryFields(**dict.fromkeys(MemoryFields.__slots__, 0))
LAYOUT = MemoryLayout(
    pid=7,
    mappings=(Mapping(start=PAGE, end=3 * PAGE, prot=3),),
    fields=FIELDS,
    auxv=bytes(16),
    exe="/exe",
    exe_file=0,
    vdso=b"",
)
TASK = Task(pid=7, ppid=1, pgid=7, sid=7)
NO_FILES = TreeFiles(files=[], contents=[], tables={})


def tree(**changes: Any) -> LiveTree:
    given: dict[str, Any] = {
        "number": 1,
        "processes": (LiveProcess(task=TASK, exit_signal=17, layout=LAYOUT),),
        "files": NO_FILES,
        "clocks": Clocks(monotonic=1, boottime=2),
    }
    return LiveTree(**{**given, **changes})


def test_a_file_that_was_not_told() -> None:
    with pytest.raises(ValueError, match="maps file 0 of 0"):
        tree()


def test_a_time_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="clock"):
        tree(at=-1)


def test_a_process_twice() -> None:
    dead = LiveProcess(task=dataclasses.replace(TASK, wait_code=0), exit_signal=17)
    with pytest.raises(ValueError, match="twice"):
        tree(processes=(dead, dead))


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": None},
        {"task": dataclasses.replace(TASK, wait_code=1)},
        {"task": dataclasses.replace(TASK, pid=8)},
        {"exit_signal": 65},
        {"stale": ((PAGE, PAGE),)},
        {"stale": ((2 * PAGE, 3 * PAGE), (PAGE, 2 * PAGE))},
        {"stale": ((PAGE, 1 << 63),)},
    ],
)
def test_a_process_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        LiveProcess(**{"task": TASK, "exit_signal": 17, "layout": LAYOUT, **changes})


def test_memory_made_anew_is_in_order() -> None:
    with pytest.raises(ValueError, match="order"):
        MapsDelta(pid=7, stale=((PAGE, 3 * PAGE), (2 * PAGE, 4 * PAGE)))


def test_records_come_back() -> None:
    one = LiveProcess(task=TASK, exit_signal=17, layout=LAYOUT, stale=((PAGE, 2 * PAGE),))
    assert codec.unpack(LiveProcess, codec.pack(one)) == one
    made = MapsDelta(pid=7, stale=((PAGE, 2 * PAGE),))
    assert codec.unpack(MapsDelta, codec.pack(made)) == made


def test_only_the_same_processes_with_the_same_programs_go_on() -> None:
    dead = LiveProcess(task=dataclasses.replace(TASK, pid=9, wait_code=0), exit_signal=17)
    # without its layout a tree of zombies alone has no files to be told
    told = tree(processes=(dead,))
    assert fits(told, [dead.task], {}, NO_SPACES)
    assert not fits(told, [dead.task, TASK], {7: LAYOUT}, NO_SPACES)
    assert not fits(told, [dead.task], {}, Spaces(pids=True))
    assert not fits(told, [dataclasses.replace(dead.task, ppid=2)], {}, NO_SPACES)


@pytest.mark.parametrize("spaces", [NO_SPACES, Spaces(pids=True)])
def test_pages_of_all_rounds_are_kept(tmp_path: Path, spaces: Spaces) -> None:
    """Of a tree with namespaces of its own, too: what came in the first round is not sent again."""
    exe = RegularFile(flags=0, path="/exe", size=1, mtime_ns=1, inode=1, volatile=False)
    spool = Spool(str(tmp_path))
    for number in (1, 2):
        told = tree(number=number, files=TreeFiles(files=[exe], contents=[], tables={}), spaces=spaces)
        data = memoryview(bytes([number]) * PAGE)
        runs = iter([PageRun(space=Space.MEMORY, id=7, runs=((number * PAGE, PAGE),), data=data)])
        assert spool.take(Round(told, 0, [], runs, iter(()))) == PAGE
    assert [(one.start, one.end) for one in spool.pieces()[7]] == [(PAGE, 3 * PAGE)]
    spool.close()
