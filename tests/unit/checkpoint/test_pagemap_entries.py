"""Entries of /proc/PID/pagemap, made up, in a file; and the tracking of writes by their soft-dirty bits."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.kernel import pagemap
from checkpoint.memory import softdirty
from checkpoint.memory.vma import PAGE, Vma

PRESENT, SWAPPED, FILE, GUARD, DIRTY = 1 << 63, 1 << 62, 1 << 61, 1 << 58, 1 << 55
ZERO = 0x3B34


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    monkeypatch.setattr(pagemap, "_zero_pages", lambda: pagemap._ZeroPages(ZERO))
    made = Table(tmp_path / "pagemap")
    yield made
    os.close(made.fd)


class Table:
    """A pagemap of our making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set()
        self.fd = os.open(path, os.O_RDONLY)

    def set(self, *entries: int) -> None:
        self.path.write_bytes(struct.pack(f"<{len(entries)}Q", *entries))

    def found(self, *, with_file: bool = False, written: bool = False, count: int = 0) -> list[tuple[int, int]]:
        count = count or self.path.stat().st_size // 8
        runs = pagemap.entries(self.fd, 0, count * PAGE, with_file=with_file, written=written)
        return [(a // PAGE, b // PAGE) for a, b in runs]


def test_what_counts(table: Table) -> None:
    table.set(0, PRESENT | 5, SWAPPED | 6, 0, PRESENT | FILE | 7, SWAPPED | GUARD, PRESENT | DIRTY | 8)
    assert table.found() == [(1, 3), (6, 7)]
    assert table.found(with_file=True) == [(1, 3), (4, 5), (6, 7)]


def test_only_what_was_written(table: Table) -> None:
    table.set(PRESENT | 5, PRESENT | DIRTY | 6, SWAPPED | DIRTY | 7, DIRTY, PRESENT | FILE | DIRTY | 9, PRESENT)
    assert table.found(written=True) == [(1, 3)]


def test_the_zero_page_does_not_count(table: Table) -> None:
    table.set(PRESENT | ZERO, PRESENT | 5, PRESENT | ZERO | DIRTY, PRESENT | ZERO, PRESENT | ZERO + 1)
    assert table.found() == [(1, 2), (4, 5)]


def test_bytes_across_two_entries_are_not_the_zero_page(table: Table) -> None:
    # the zero page's entry, four bytes off its place
    word = PRESENT | ZERO
    table.set(PRESENT | (word & 0xFFFFFFFF) << 32 & ~(0xFF << 56), PRESENT | word >> 32)
    assert table.found() == [(0, 2)]


def test_nothing_is_left_out_where_frames_are_hidden(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "_zero_pages", lambda: pagemap._ZeroPages(0))
    table.set(PRESENT, PRESENT | DIRTY, 0)
    assert table.found() == [(0, 2)]


class Process:
    """A tracking of a made-up process with pages 0 to 7 in one mapping."""

    def __init__(self, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries = [0] * 8
        self.table = table
        maps = [Vma(0, 8 * PAGE, 3, False, 0, 0, 0, "")]
        monkeypatch.setattr(softdirty, "read_maps", lambda _: maps)
        clear = tmp_path / "clear_refs"
        clear.touch()
        monkeypatch.setattr(softdirty, "_clear_refs", lambda _: clear)
        self.clear = clear
        self.track = softdirty.Tracking.__new__(softdirty.Tracking)
        self.track._pid, self.track._pagemap, self.track._told, self.track._due = 1, table.fd, [], []

    def write(self, *pages: int) -> None:
        for page in pages:
            self.entries[page] = PRESENT | DIRTY | 100 + page
        self.table.set(*self.entries)

    def give_back(self, *pages: int) -> None:
        for page in pages:
            self.entries[page] = 0
        self.table.set(*self.entries)

    def look(self) -> None:
        self.track.look()
        assert self.clear.read_bytes() == b"4"
        self.entries = [entry & ~DIRTY for entry in self.entries]
        self.table.set(*self.entries)

    def protect(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        found = self.track.protect(0, 8 * PAGE, anonymous=True)
        return pages(found.full), pages(found.empty)

    def written(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        found, untracked = self.track.written_in([(0, 8 * PAGE, True)])
        assert untracked == []
        return pages(found.full), pages(found.empty)


def pages(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(a // PAGE, b // PAGE) for a, b in runs]


@pytest.fixture
def process(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Process:
    return Process(table, tmp_path, monkeypatch)


def test_rounds_tell_what_was_written_since(process: Process) -> None:
    process.write(1, 2)
    process.look()
    assert process.track.add(0, 8 * PAGE)
    assert process.protect() == ([(1, 3)], [])
    process.look()
    assert process.protect() == ([], [])
    process.write(2, 5)
    assert process.written() == ([(2, 3), (5, 6)], [])
    process.look()
    process.write(7)
    assert process.protect() == ([(2, 3), (5, 6)], [])
    assert process.written() == ([(7, 8)], [])


def test_what_was_given_back_is_told_once(process: Process) -> None:
    process.write(1, 2)
    process.look()
    process.track.add(0, 8 * PAGE)
    process.protect()
    process.give_back(1)
    assert process.written() == ([], [(1, 2)])
    process.look()
    assert process.protect() == ([], [(1, 2)])
    assert process.protect() == ([], [])


def test_a_zero_page_in_the_place_of_one_that_was_told_is_nothing(process: Process) -> None:
    process.write(3)
    process.look()
    process.track.add(0, 8 * PAGE)
    process.protect()
    process.entries[3] = PRESENT | ZERO
    process.table.set(*process.entries)
    assert process.written() == ([], [(3, 4)])


def test_memory_that_was_made_anew_is_told_whole(process: Process) -> None:
    process.write(1)
    process.look()
    process.track.add(0, 8 * PAGE)
    process.protect()
    process.track.add(0, 4 * PAGE)
    assert process.protect() == ([(1, 2)], [])
