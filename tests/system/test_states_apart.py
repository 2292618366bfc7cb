"""The states of a tree are told some processes at a time, when all of their memory has come: each is completed then.
What does not fit that order is refused, and leaves nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from checkpoint import procfs
from checkpoint.dump import Dump
from checkpoint.image.format import FrameReader, FrameWriter
from checkpoint.image.frames import Kind, PageRun, Runs, Space
from checkpoint.live import LiveCopy
from checkpoint.memory.vma import PAGE
from checkpoint.records import LiveTree, StatesRecord
from checkpoint.restore import Restore
from tcpstate.kernel.prctl import Pr
from tests.tscnet import libc, wait_until

#: six processes of three threads; each thread counts in a file of its own
PROGRAM = """
import os, sys, threading, time
folder, number = sys.argv[1], 5
for one in range(5):
    if os.fork() == 0:
        number = one
        break
def count(name):
    at = 0
    while True:
        at += 1
        with open(f"{folder}/{name}.new", "w") as file: file.write(f"{os.getpid()} {threading.get_native_id()} {at}")
        os.replace(f"{folder}/{name}.new", f"{folder}/{name}")
        time.sleep(0.005)
for one in range(2): threading.Thread(target=count, args=(f"{number}.{one}",), daemon=True).start()
count(f"{number}.first")
"""
NAMES = [f"{process}.{thread}" for process in range(6) for thread in ("0", "1", "first")]

Record = tuple[Kind, Any]


def counted(folder: Path) -> dict[str, list[int]]:
    """(pid, tid, count) of each thread."""
    return {name: list(map(int, (folder / name).read_text().split())) for name in NAMES}


def taken_apart(pid: int) -> list[Record]:
    """The records of a migration with one round; the processes have ended."""
    found: list[Record] = []

    def pages(runs: Iterator[PageRun]) -> None:
        found.extend((Kind.PAGES, dataclasses.replace(run, data=bytes(run.data))) for run in runs)

    dump = Dump([pid])
    dump.alike = dump.states_apart = True
    try:
        dump.prepare()
        told = dump.begin_live().round()
        found.append((Kind.LIVE, told.tree))
        found.extend((Kind.PAGES_DROP, drop) for drop in told.drops)
        pages(told.runs)
        dump.end_live()
        dump.find_listeners()
        dump.make_ready()
        dump.hold_off()
        dump.drain()
        dump.stop()
        found.extend(dump.skeleton())
        pages(dump.pages())
        found.extend((Kind.STATES, states) for states in dump.states)
        found.append((Kind.COPIED, {}))
        dump.secure()
        dump.freeze()
        found.append((Kind.FILES_DELTA, dump.delta()))
    except BaseException:
        dump.resume()
        raise
    dump.discard()
    wait_until(lambda: not any(procfs.exists(one) for one in dump.pids))
    return found


def put_together(records: Sequence[Record]) -> None:
    """They run, or nothing is left."""
    restore = Restore()
    writer, reader = FrameWriter(stream=True), FrameReader(stream=True)
    try:
        frames = reader.feed(b"".join(writer.begin()))
        for kind, record in records:
            made = writer.pages(record) if kind is Kind.PAGES else writer.frame(kind, record)
            frames += reader.feed(b"".join(bytes(piece) for piece in made))
            while frames:
                restore.apply(frames.pop(0))
        restore.end()
        assert restore.prepare() == []
        restore.survive()
        restore.release()
        restore.run()
    except BaseException:
        restore.abort()
        raise
    restore.close()


def forked(work: Callable[[], None]) -> str:
    """What went wrong in a child: it enters namespaces. It waits for what it had to end, so that their numbers are
    free."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            libc.prctl(Pr.SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                work()
            except BaseException:
                traceback.print_exc(file=said)
                said.flush()
                with contextlib.suppress(ChildProcessError):
                    while True:
                        os.wait()
            os._exit(0)
        os.waitpid(child, 0)
        said.seek(0)
        return said.read()


class Tree(NamedTuple):
    """Where its threads count; its processes, which have ended; its records."""

    folder: Path
    pids: list[int]
    records: list[Record]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    folder = tmp_path_factory.mktemp("counted")
    with subprocess.Popen([sys.executable, "-IS", "-c", PROGRAM, folder]) as root:
        wait_until(lambda: all((folder / name).exists() for name in NAMES))
        pids = procfs.tree(root.pid)
        try:
            return Tree(folder, pids, taken_apart(root.pid))
        except BaseException:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            raise


def places(records: Sequence[Record], kind: Kind) -> list[int]:
    return [at for at, (one, _) in enumerate(records) if one is kind]


def again(records: list[Record]) -> None:
    records.insert(places(records, Kind.COPIED)[0], records[places(records, Kind.STATES)[0]])


def memory_after_it(records: list[Record]) -> None:
    last = records.pop(places(records, Kind.PAGES)[-1])
    records.insert(places(records, Kind.STATES)[0] + 1, last)


def dropped_after_it(records: list[Record]) -> None:
    at = places(records, Kind.STATES)[0]
    mapping = records[places(records, Kind.MAPPINGS)[0]][1].mappings[0]
    pid = records[places(records, Kind.MAPPINGS)[0]][1].pid
    records.insert(at + 1, (Kind.PAGES_DROP, Runs(space=Space.MEMORY, id=pid, runs=((mapping.start, PAGE),))))


def not_all(records: list[Record]) -> None:
    del records[places(records, Kind.STATES)[-1]]


def too_early(records: list[Record]) -> None:
    states = records.pop(places(records, Kind.STATES)[0])
    records.insert(places(records, Kind.MAPPINGS)[0], states)


def all_at_once_after_some(records: list[Record]) -> None:
    at = places(records, Kind.STATES)[-1]
    told: StatesRecord = records[at][1]
    records[at] = Kind.STATES, dataclasses.replace(told, apart=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (again, "tells of a process again"),
        (memory_after_it, "came after the end of the copy"),
        (dropped_after_it, "were dropped after the end of the copy"),
        (not_all, "before the states of all processes"),
        (too_early, "came where it is not expected"),
        (all_at_once_after_some, "came where it is not expected"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    tree: Tree, change: Callable[[list[Record]], None], said: str
) -> None:
    records = list(tree.records)
    change(records)
    answer = forked(lambda: put_together(records))
    assert "ImageIncomplete" in answer, answer
    assert said in answer, answer
    assert not [pid for pid in tree.pids if procfs.exists(pid)]


def test_each_process_is_completed_when_its_state_has_come(tree: Tree) -> None:
    told = [record for kind, record in tree.records if kind is Kind.STATES]
    assert all(one.apart for one in told)
    assert [len(one.states) for one in told] == [4, 2]
    assert max(places(tree.records, Kind.PAGES)) < min(places(tree.records, Kind.STATES))
    before = counted(tree.folder)
    assert forked(lambda: put_together(tree.records)) == ""
    try:
        # the same threads, which all go on
        wait_until(lambda: all(now[2] > before[name][2] for name, now in counted(tree.folder).items()))
        assert {n: now[:2] for n, now in counted(tree.folder).items()} == {n: was[:2] for n, was in before.items()}
    finally:
        for pid in tree.pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(procfs.exists(pid) for pid in tree.pids))


def told(*processes: tuple[int, tuple[int, ...], int, int]) -> LiveTree:
    """(pid, threads, whose files, whose directories) of each."""
    found = [
        SimpleNamespace(task=SimpleNamespace(pid=pid, files=files, directories=directories), threads=threads)
        for pid, threads, files, directories in processes
    ]
    return cast(LiveTree, SimpleNamespace(processes=found))


@pytest.mark.parametrize(
    ("before", "now", "named", "separable"),
    [
        ([(10, (11, 12), 0, 0), (20, (21,), 0, 0)], {10: (11, 12), 20: (21,)}, (), True),
        ([(10, (11, 12), 0, 0), (20, (21,), 0, 0)], {10: (11,), 20: (22, 23)}, (), True),
        # thread 12 has ended, and another process has its number: the stub of the first must lose it first
        ([(10, (11, 12), 0, 0), (20, (21,), 0, 0)], {10: (11,), 20: (21, 12)}, (), False),
        ([(10, (), 0, 0), (20, (), 10, 0)], {10: (), 20: ()}, (), False),
        ([(10, (), 0, 0), (20, (), 0, 10)], {10: (), 20: ()}, (), False),
        ([(10, (), 0, 0)], {10: ()}, (10,), False),
    ],
)
def test_who_can_be_completed_before_others(
    before: list[tuple[int, tuple[int, ...], int, int]],
    now: dict[int, tuple[int, ...]],
    named: tuple[int, ...],
    separable: bool,
) -> None:
    copy = LiveCopy([10])
    copy._told = told(*before)
    tree: Any = SimpleNamespace(
        processes=[
            SimpleNamespace(pid=pid, threads=[SimpleNamespace(tid=tid) for tid in (pid, *tids)])
            for pid, tids in now.items()
        ]
    )
    files: Any = [SimpleNamespace(tids=()), SimpleNamespace(tids=named)]
    assert copy.separable(tree, files) is separable
