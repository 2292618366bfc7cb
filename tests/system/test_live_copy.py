"""Rounds of pre-copy into a model of the target, while a program changes its memory in every way; then the program
stands still, and every page that the model has is compared with the program's.

The same as a migration does, without the other host: so it can be done often.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.files.table import FileTable, TreeFiles
from checkpoint.inject import Injection
from checkpoint.live import LiveCopy
from checkpoint.memory import layout, pages
from checkpoint.memory.delta import delta, without
from checkpoint.memory.layout import MemoryLayout
from checkpoint.memory.vma import PAGE
from checkpoint.records import same_file
from checkpoint.tracee import Process, Tree
from tcpstate.kernel.calls import CallTable
from tests.tscnet import wait_until

ROOT = Path(__file__).parent.parent.parent
BLANK = bytes(PAGE)


@pytest.fixture
def program(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    seed = request.param
    argv = [sys.executable, "-m", "tests.workloads.churn_server", "0", "127.0.0.1", str(seed), "8", str(tmp_path)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: (tmp_path / "churned").exists())
        time.sleep(0.1)
        yield process.pid
        process.kill()


class Model:
    """What the target has of one process: a layout, and the bytes of pages that are not as in a fresh mapping."""

    def __init__(self) -> None:
        self.layout: MemoryLayout | None = None
        self.files = TreeFiles(files=[], contents=[], tables={})
        self.pages: dict[int, bytes] = {}

    def become(self, now: MemoryLayout, files: TreeFiles, stale: list[tuple[int, int]]) -> None:
        if self.layout is None:
            kept = []
        else:
            old = self.files.files
            before = without(self.layout, stale)
            kept = list(delta(before, now, lambda a, b: same_file(old[a], files.files[b])).kept)
        stays = {at for m in kept for at in range(m.start, m.end, PAGE)}
        self.pages = {at: data for at, data in self.pages.items() if at in stays}
        self.layout, self.files = now, files

    def take(self, drops, runs) -> None:  # type: ignore[no-untyped-def]
        for drop in drops:
            for start, length in drop.runs:
                for at in range(start, start + length, PAGE):
                    self.pages.pop(at, None)
        for run in runs:
            done = 0
            for start, length in run.runs:
                for at in range(start, start + length, PAGE):
                    self.pages[at] = bytes(run.data[done : done + PAGE])
                    done += PAGE


def read_all(process: Process, one: MemoryLayout) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for run in pages.read(process, one):
        done = 0
        for start, length in run.runs:
            for at in range(start, start + length, PAGE):
                found[at] = bytes(run.data[done : done + PAGE])
                done += PAGE
    return found


def fresh_page(at: int, one: MemoryLayout, files: TreeFiles) -> bytes:
    """What a fresh mapping would show at an address."""
    mapping = next(m for m in one.mappings if m.start <= at < m.end)
    if mapping.file is None:
        return BLANK
    path = getattr(files.files[mapping.file], "path", None)
    assert path is not None, mapping
    with open(path, "rb") as file:
        file.seek(mapping.offset + at - mapping.start)
        return file.read(PAGE).ljust(PAGE, b"\0")


def compare(process: Process, model: Model, one: MemoryLayout) -> list[str]:
    """Where the model differs from the process."""
    wrong = []
    real = read_all(process, one)
    for at in sorted(model.pages.keys() | real.keys()):
        have, want = (told.get(at) or fresh_page(at, one, model.files) for told in (model.pages, real))
        if have != want:
            wrong.append(f"{at:#x} is {have[:8].hex()}, should be {want[:8].hex()}")
    return wrong


@pytest.mark.parametrize("program", [1, pytest.param(2, marks=pytest.mark.long)], indirect=True)
def test_nothing_is_missed(program: int, request: pytest.FixtureRequest) -> None:
    seed = request.node.callspec.params["program"]
    cycles = 15
    chance = random.Random(seed)
    for cycle in range(cycles):
        live, model = LiveCopy([program]), Model()
        live.begin()
        try:
            for _ in range(chance.randint(1, 5)):
                told = live.round()
                (one,) = told.tree.processes
                assert one.layout is not None
                model.become(one.layout, told.tree.files, list(one.stale))
                time.sleep(chance.uniform(0, 0.01))  # between the look and the reading
                model.take(told.drops, told.runs)
                time.sleep(chance.uniform(0, 0.02))
            tree = Tree.stop([program])
            try:
                (process,) = tree.processes
                process.tracked = True
                with Injection(process) as injection:
                    calls = CallTable()
                    brk = layout.query_brk(calls)
                    injection.run({process.leader.tid: calls})
                process.forget_maps()
                with FileTable() as files:
                    now = layout.capture(process, files, brk=brk.value)
                    records = files.records()
                left = live.finish(process, now, records)
                model.become(now, records, left.stale)
                model.take(left.drops, pages.read_runs(process, program, left.ranges))
                assert compare(process, model, now) == [], f"seed {seed}, cycle {cycle}"
            finally:
                tree.resume()
        finally:
            live.close()
