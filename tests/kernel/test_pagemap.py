"""PAGEMAP_SCAN and /proc/PID/pagemap: one assumption per test, on our own memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.kernel import pagemap
from checkpoint.kernel.mman import Advice
from checkpoint.kernel.pagemap import Category
from checkpoint.memory import scan
from checkpoint.memory.vma import PAGE, Vma, read_smaps

PAGES = 64
SIZE = PAGES * PAGE


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    yield fd
    os.close(fd)


def address(area: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


def touch(area: mmap.mmap, *pages: int) -> None:
    for page in pages:
        area[page * PAGE] = 1


def private() -> tuple[mmap.mmap, Vma]:
    # a neighbour of the same kind would be merged with it: no matter, only [start, end) is looked at
    area = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    start = address(area)
    return area, Vma(start, start + SIZE, 3, False, 0, 0, 0, "")


def found(fd: int, vma: Vma) -> list[tuple[int, int]]:
    return [((a - vma.start) // PAGE, (b - vma.start) // PAGE) for a, b in scan.private_pages(fd, [vma])]


def test_written_pages_are_found_and_untouched_ones_are_not(fd: int) -> None:
    area, vma = private()
    touch(area, 0, 1, 7, 63)
    assert found(fd, vma) == [(0, 2), (7, 8), (63, 64)]
    assert [
        ((a - vma.start) // PAGE, (b - vma.start) // PAGE)
        for a, b in pagemap.entries(fd, vma.start, vma.end, with_file=False)
    ] == [(0, 2), (7, 8), (63, 64)]


def test_kernels_without_the_scan_are_not_asked_for_what_lies_between_mappings(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # from the heap to the stacks of threads there may be 40 TB of nothing
    def absent(*_: object) -> list[tuple[int, int]]:
        raise OSError(errno.ENOTTY, "no such request")

    asked = []
    entries = pagemap.entries

    def looked(fd: int, start: int, end: int, *, with_file: bool) -> Iterator[tuple[int, int]]:
        asked.append((start, end))
        return entries(fd, start, end, with_file=with_file)

    monkeypatch.setattr(scan, "_by_scan", absent)
    monkeypatch.setattr(pagemap, "entries", looked)
    area, vma = private()
    touch(area, 5, 30, 60)
    parts = [(vma.start, vma.start + 8 * PAGE), (vma.end - 8 * PAGE, vma.end)]
    told = list(scan.private_pages(fd, [vma._replace(start=start, end=end) for start, end in parts]))
    assert told == [(vma.start + n * PAGE, vma.start + (n + 1) * PAGE) for n in (5, 60)]
    assert asked == parts


def test_pages_that_were_only_read_are_the_zero_page_and_not_found(fd: int) -> None:
    area, vma = private()
    touch(area, 3)
    assert sum(area[i * PAGE] for i in range(PAGES)) == 1
    assert found(fd, vma) == [(3, 4)]


def test_dropped_pages_are_not_found(fd: int) -> None:
    area, vma = private()
    touch(area, *range(8))
    area.madvise(mmap.MADV_DONTNEED, 2 * PAGE, 2 * PAGE)
    assert found(fd, vma) == [(0, 2), (4, 8)]


def test_more_runs_than_one_call_returns_come_once_each(fd: int) -> None:
    pages = 40000
    area = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    start = address(area)
    touch(area, *range(0, pages, 2))
    vma = Vma(start, start + pages * PAGE, 3, False, 0, 0, 0, "")
    runs = list(scan.private_pages(fd, [vma]))
    assert runs == [(start + i * PAGE, start + (i + 1) * PAGE) for i in range(0, pages, 2)]
    assert runs == list(pagemap.entries(fd, vma.start, vma.end, with_file=False))


def test_of_a_private_file_mapping_only_pages_copied_on_write_are_found(fd: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * SIZE)
    with path.open("r+b") as file:
        area = mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE)
    start = address(area)
    vma = next(v for v in read_smaps(os.getpid()) if v.start == start)
    assert not vma.anonymous
    assert sum(area[i * PAGE] for i in range(PAGES)) == PAGES * ord("x")
    touch(area, 5, 6)
    assert found(fd, vma) == [(5, 7)]
    assert list(pagemap.entries(fd, vma.start, vma.end, with_file=False)) == list(scan.private_pages(fd, [vma]))


def test_guard_regions_are_told_and_are_no_pages(fd: int) -> None:
    assert pagemap.guards_known()
    area, vma = private()
    touch(area, *range(8))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.madvise(ctypes.c_void_p(vma.start + 2 * PAGE), ctypes.c_size_t(3 * PAGE), Advice.GUARD_INSTALL) == 0
    assert list(scan.guards(fd, [vma])) == [(vma.start + 2 * PAGE, vma.start + 5 * PAGE)]
    assert found(fd, vma) == [(0, 2), (5, 8)]


def test_a_guard_shows_as_swapped_to_who_does_not_ask_for_guards(fd: int) -> None:
    area, vma = private()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.madvise(ctypes.c_void_p(vma.start), ctypes.c_size_t(PAGE), Advice.GUARD_INSTALL) == 0
    assert pagemap.scan(fd, vma.start, vma.end, any_of=Category.SWAPPED) == [(vma.start, vma.start + PAGE, 0)]
    assert area.closed is False


def test_without_the_ioctl_the_entries_are_read(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    area, vma = private()
    touch(area, 1, 2)

    def missing(*_: object, **__: object) -> None:
        raise OSError(25, "Inappropriate ioctl for device")

    monkeypatch.setattr(pagemap, "scan", missing)
    pagemap.guards_known.cache_clear()
    try:
        assert found(fd, vma) == [(1, 3)]
        assert list(scan.guards(fd, [vma])) == []
    finally:
        pagemap.guards_known.cache_clear()


def test_an_entry_run_goes_on_over_the_border_of_two_reads(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "_ENTRIES_AT_ONCE", 4)
    area, vma = private()
    touch(area, 2, 3, 4, 5, 9, 12)
    assert [
        ((a - vma.start) // PAGE, (b - vma.start) // PAGE)
        for a, b in pagemap.entries(fd, vma.start, vma.end, with_file=False)
    ] == [(2, 6), (9, 10), (12, 13)]


def test_the_entries_leave_out_the_zero_page_and_the_huge_one(fd: int) -> None:
    huge = 512 * PAGE
    with mmap.mmap(-1, 8 * huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        start = -(-address(area) // huge) * huge
        at = start - address(area)
        assert area[at] == area[at + huge] == 0  # huge zero pages, where huge pages are in use
        area[at + 2 * huge] = 1
        area.madvise(mmap.MADV_NOHUGEPAGE, at + 3 * huge, huge)
        assert area[at + 3 * huge] == 0
        area[at + 3 * huge + PAGE] = 1
        scanned = pagemap.scan(fd, start, start + 4 * huge, none_of=Category.PFNZERO, any_of=Category.PRESENT)
        entries = list(pagemap.entries(fd, start, start + 4 * huge, with_file=False))
        assert entries == [run[:2] for run in scanned]
        assert entries[-1] == (start + 3 * huge + PAGE, start + 3 * huge + 2 * PAGE)


def test_a_page_of_our_own_has_a_frame_of_its_own() -> None:
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        assert area[0] == 0
        read = pagemap.entry_of(area)
        area[0] = 1
        assert pagemap.entry_of(area) & (1 << 55) - 1 not in (0, read & (1 << 55) - 1)
    assert pagemap.zero_pages_known()
