"""What pre-copy assumes of userfaultfd's asynchronous write protection and of PAGEMAP_SCAN: one assumption per test."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from checkpoint.kernel.pagemap import Category, scan
from checkpoint.kernel.userfaultfd import CREATE_FLAGS
from checkpoint.memory import tracking
from checkpoint.memory.tracking import Tracking, Untracked, available
from checkpoint.memory.vma import PAGE, read_smaps
from tcpstate.kernel.batch import libc, syscall
from tcpstate.kernel.machine import SYS

PAGES = 16
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
DONTNEED, FIXED = 4, 0x10
PRIVATE, ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS


class Memory:
    """Private memory of ours, that neighbours nothing, and its tracking."""

    def __init__(self) -> None:
        assert available() == ""
        whole = libc.mmap(None, (PAGES + 2) * PAGE, 0, PRIVATE | ANONYMOUS, -1, 0)
        self.whole = whole
        self.start = whole + PAGE
        self.end = self.start + PAGES * PAGE
        libc.mprotect(ctypes.c_void_p(self.start), PAGES * PAGE, 3)
        self.tracking = Tracking(os.getpid(), syscall(SYS.userfaultfd, CREATE_FLAGS))

    def at(self, page: int) -> int:
        return self.start + page * PAGE

    def write(self, page: int, byte: int = 1) -> None:
        ctypes.memset(self.at(page), byte, 1)

    def ranges(self, *pages: int) -> list[tuple[int, int]]:
        return [(self.at(page), self.at(page + 1)) for page in pages]

    def protect(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        found = self.tracking.protect(self.start, self.end, anonymous=True)
        return found.full, found.empty

    def written(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        found = self.tracking.written(self.start, self.end, anonymous=True)
        return found.full, found.empty


@pytest.fixture(params=["by one", "by two"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    if request.param == "by two":
        # as memory of a quarter of a gigabyte is looked at
        monkeypatch.setattr(tracking, "LARGE", PAGE)
        monkeypatch.setattr(tracking, "_HUGE", 2 * PAGE)
    made = Memory()
    yield made
    made.tracking.close()
    libc.munmap(ctypes.c_void_p(made.whole), ctypes.c_size_t((PAGES + 2) * PAGE))


@pytest.fixture
def tracked(memory: Memory) -> Memory:
    memory.write(2)
    assert memory.tracking.add(memory.start, memory.end)
    assert memory.protect()[0] == memory.ranges(2)
    return memory


def test_a_write_is_noticed_once(tracked: Memory) -> None:
    assert tracked.written()[0] == []
    tracked.write(2)
    assert tracked.written()[0] == tracked.ranges(2)
    assert tracked.protect()[0] == tracked.ranges(2)
    assert tracked.protect()[0] == []


def test_the_first_write_to_an_untouched_page_is_noticed(tracked: Memory) -> None:
    tracked.write(5)
    assert tracked.written()[0] == tracked.ranges(5)


def test_untouched_pages_are_not_told(tracked: Memory) -> None:
    assert tracked.written() == ([], [])
    # although their markers look like something
    runs = scan(os.open("/proc/self/pagemap", os.O_RDONLY), tracked.start, tracked.end, all_of=Category.SWAPPED)
    assert runs


def test_a_read_is_no_write(tracked: Memory) -> None:
    assert ctypes.string_at(tracked.at(7), 1) == b"\0"
    assert tracked.written()[0] == []


def test_a_write_by_the_kernel_is_noticed(tracked: Memory) -> None:
    read, write = os.pipe()
    os.write(write, b"x")
    libc.read(read, ctypes.c_void_p(tracked.at(4)), ctypes.c_size_t(1))
    os.close(read)
    os.close(write)
    assert tracked.written()[0] == tracked.ranges(4)


def test_memory_given_back_is_told_as_empty(tracked: Memory) -> None:
    libc.madvise(ctypes.c_void_p(tracked.at(2)), ctypes.c_size_t(PAGE), DONTNEED)
    full, empty = tracked.written()
    assert full == []
    assert tracked.ranges(2)[0] in empty


def test_memory_given_back_with_its_page_table_is_told_as_empty(tracked: Memory) -> None:
    """Where nothing of a page table is left the kernel tells of no write."""
    size = 8 << 20
    start = libc.mmap(None, size, 3, PRIVATE | ANONYMOUS | 0x4000, -1, 0)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), 15)  # small pages
    assert tracked.tracking.add(start, start + size)
    middle = (start + (4 << 20)) & ~((2 << 20) - 1)
    ctypes.memset(middle, 1, PAGE)
    assert tracked.tracking.protect(start, start + size, anonymous=True).full == [(middle, middle + PAGE)]
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), DONTNEED)
    found = tracked.tracking.written(start, start + size, anonymous=True)
    assert (found.full, found.empty) == ([], [(middle, middle + PAGE)])
    libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(size))


@pytest.mark.parametrize("gone", [True, False])
def test_memory_given_back_is_told_by_a_round_or_by_the_next_look_for_it(tracked: Memory, gone: bool) -> None:
    """As large memory is looked at, in which one look of two is left out."""
    tracked.write(7)
    tracked.protect()
    size = 8 << 20
    start = libc.mmap(None, size, 3, PRIVATE | ANONYMOUS | 0x4000, -1, 0)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), 15)  # small pages
    assert tracked.tracking.add(start, start + size)
    first, middle = (start, start + PAGE), (start + (4 << 20)) & ~((2 << 20) - 1)
    alone, beside = (middle, middle + PAGE), (middle + (2 << 20), middle + (2 << 20) + PAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "_HUGE", size)

        def protect() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
            found = tracked.tracking.protect(start, start + size, anonymous=True, gone=gone)
            return found.full, found.empty

        def left() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
            found = tracked.tracking.written(start, start + size, anonymous=True)
            return found.full, found.empty

        for page in (first, alone, beside):
            ctypes.memset(page[0], 1, PAGE)
        assert protect() == ([first, alone, beside], [])
        assert protect() == ([], [])
        # one page, of which the table stays: the kernel calls it written; and two with all around them
        libc.madvise(ctypes.c_void_p(first[0]), ctypes.c_size_t(PAGE), DONTNEED)
        libc.madvise(ctypes.c_void_p(middle), ctypes.c_size_t(4 << 20), DONTNEED)
        told = protect()
        assert told[0] == []
        assert first in told[1]
        assert left() == ([], sorted({alone, beside} - set(told[1])))
        # what comes again is told again
        ctypes.memset(alone[0], 2, PAGE)
        ctypes.memset(first[0], 2, PAGE)
        assert protect()[0] == [first, alone]
        assert left()[0] == []
        assert tracked.written() == ([], [])
    libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(size))


def test_memory_tracked_anew_is_told_whole(tracked: Memory) -> None:
    assert tracked.written()[0] == []
    assert tracked.tracking.add(tracked.start, tracked.end)
    assert tracked.protect()[0] == tracked.ranges(2)


def test_a_mapping_that_grows_together_with_a_moved_one_is_not_tracked_any_more(tracked: Memory) -> None:
    """And its pages keep their marks: without their removal a write to page 2 would not be told later."""
    libc.mremap.restype = ctypes.c_void_p
    libc.munmap(ctypes.c_void_p(tracked.at(8)), ctypes.c_size_t(PAGE))
    moved = libc.mremap(
        ctypes.c_void_p(tracked.at(12)), ctypes.c_size_t(PAGE), ctypes.c_size_t(PAGE), 3, ctypes.c_void_p(tracked.at(8))
    )
    assert moved == tracked.at(8)
    with pytest.raises(Untracked):
        tracked.written()
    tracked.write(2)
    for start, end in ((tracked.start, tracked.at(12)), (tracked.at(13), tracked.end)):
        assert tracked.tracking.add(start, end)
    found = tracked.tracking.protect(tracked.start, tracked.at(12), anonymous=True).full
    assert tracked.ranges(2)[0] in found
    tracked.write(2, 9)
    assert tracked.tracking.written(tracked.start, tracked.at(12), anonymous=True).full == tracked.ranges(2)


def test_memory_mapped_anew_is_not_tracked(tracked: Memory) -> None:
    libc.mmap(tracked.at(8), PAGE, 3, PRIVATE | ANONYMOUS | FIXED, -1, 0)
    with pytest.raises(Untracked):
        tracked.written()
    assert tracked.tracking.add(tracked.at(8), tracked.at(9))
    assert tracked.protect()[0] == []


def test_memory_that_was_moved_is_not_tracked(tracked: Memory) -> None:
    libc.mremap.restype = ctypes.c_void_p
    target = libc.mmap(None, PAGE, 3, PRIVATE | ANONYMOUS, -1, 0)
    moved = libc.mremap(
        ctypes.c_void_p(tracked.at(2)), ctypes.c_size_t(PAGE), ctypes.c_size_t(PAGE), 3, ctypes.c_void_p(target)
    )
    assert moved == target
    with pytest.raises(Untracked):
        tracked.tracking.written(moved, moved + PAGE, anonymous=True)
    libc.munmap(ctypes.c_void_p(moved), ctypes.c_size_t(PAGE))


def test_a_protection_changed_and_back_stays_tracked(tracked: Memory) -> None:
    libc.mprotect(ctypes.c_void_p(tracked.at(0)), PAGES * PAGE, 1)
    libc.mprotect(ctypes.c_void_p(tracked.at(0)), PAGES * PAGE, 3)
    assert tracked.written()[0] == []
    tracked.write(2)
    assert tracked.written()[0] == tracked.ranges(2)


def test_a_fork_leaves_the_parent_tracked(tracked: Memory) -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    tracked.write(2)  # copied on write: the page is another one
    assert tracked.written()[0] == tracked.ranges(2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_nothing_is_left_when_the_descriptor_is_closed(tracked: Memory) -> None:
    def flags() -> set[str]:
        return set().union(
            *(v.flags for v in read_smaps(os.getpid()) if v.start < tracked.end and v.end > tracked.start)
        )

    assert "uw" in flags()
    tracked.tracking.close()
    assert "uw" not in flags()
    runs = scan(os.open("/proc/self/pagemap", os.O_RDONLY), tracked.start, tracked.end, any_of=Category.SWAPPED)
    assert runs == []


def in_file(act: Callable[[int], None]) -> tuple[list[tuple[int, int]], list[tuple[int, int]], int]:
    """What is told of a private mapping of a file of four pages in which ``act(start)`` was done meanwhile."""
    fd = os.memfd_create("file")
    os.write(fd, b"f" * 4 * PAGE)
    start = libc.mmap(None, 4 * PAGE, 3, PRIVATE, fd, 0)
    os.close(fd)
    ctypes.memset(start, 1, 1)
    tracking = Tracking(os.getpid(), syscall(SYS.userfaultfd, CREATE_FLAGS))
    assert tracking.add(start, start + 4 * PAGE)
    first = tracking.protect(start, start + 4 * PAGE, anonymous=False)
    assert first.full == [(start, start + PAGE)]
    act(start)
    found = tracking.written(start, start + 4 * PAGE, anonymous=False)
    tracking.close()
    libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(4 * PAGE))
    return found.full, found.empty, start


def test_a_page_of_a_file_is_told_when_it_is_written() -> None:
    full, _, start = in_file(lambda at: ctypes.memset(at + PAGE, 1, 1) and None)
    assert full == [(start + PAGE, start + 2 * PAGE)]


def test_a_page_of_a_file_that_is_read_is_not_told() -> None:
    full, _, _ = in_file(lambda at: ctypes.string_at(at + PAGE, 1) and None)
    assert full == []


def test_a_copied_page_of_a_file_that_is_given_back_is_empty_once_it_is_read() -> None:
    def give_back(at: int) -> None:
        libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(PAGE), DONTNEED)
        ctypes.string_at(at, 1)  # and the file's own page is mapped again

    full, empty, start = in_file(give_back)
    assert full == []
    assert any(a <= start < b for a, b in empty)


def test_a_copied_page_of_a_file_that_is_given_back_is_looked_at_again() -> None:
    # the marker in its place cannot be told from a page that was swapped out
    full, _, start = in_file(lambda at: libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(PAGE), DONTNEED))
    assert full == [(start, start + PAGE)]


def test_the_heap_that_shrinks_and_grows_is_not_taken_for_tracked() -> None:
    """In a process of its own: glibc's heap is not to be shrunk here."""
    code = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from checkpoint.kernel.userfaultfd import CREATE_FLAGS
from checkpoint.memory.tracking import Tracking, Untracked
from tcpstate.kernel.batch import libc, syscall
from tcpstate.kernel.machine import SYS
top = syscall(SYS.brk, 0)
syscall(SYS.brk, top + 65536)
tracking = Tracking(os.getpid(), syscall(SYS.userfaultfd, CREATE_FLAGS))
heap = next(line.split()[0] for line in open("/proc/self/maps") if "[heap]" in line)
start, end = (int(n, 16) for n in heap.split("-"))
assert tracking.add(start, end)
tracking.protect(start, end, anonymous=True)
syscall(SYS.brk, top)
syscall(SYS.brk, top + 65536)
try:
    tracking.written(start, end, anonymous=True)
    print("tracked")
except Untracked:
    print("untracked")
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    said = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True).stdout
    assert said == "untracked\n"


def test_many_mappings_are_asked_for_at_once(tracked: Memory) -> None:
    """Every page of tracked memory says that it is, untouched ones too; nothing else does."""
    areas = [
        (tracked.at(0), tracked.at(4), True),
        (tracked.at(4), tracked.at(8), True),
        (tracked.at(8), tracked.end, True),
    ]
    tracked.write(2)
    tracked.write(9)
    libc.madvise(ctypes.c_void_p(tracked.at(2)), ctypes.c_size_t(PAGE), DONTNEED)
    found, untracked = tracked.tracking.written_in(areas)
    assert (found.full, found.empty, untracked) == (tracked.ranges(9), tracked.ranges(2), [])
    libc.mmap(tracked.at(5), PAGE, 3, PRIVATE | ANONYMOUS | FIXED, -1, 0)
    tracked.write(5)
    found, untracked = tracked.tracking.written_in(areas)
    assert (found.full, found.empty, untracked) == (tracked.ranges(9), tracked.ranges(2), [areas[1][:2]])
    # what was not asked for is not told, although it lies between
    found, untracked = tracked.tracking.written_in([areas[0], areas[2]])
    assert (found.full, found.empty, untracked) == (tracked.ranges(9), tracked.ranges(2), [])


def test_what_was_written_is_counted(tracked: Memory) -> None:
    """As much as is told, without telling what; of memory that is not tracked, all that is there."""
    areas = [(tracked.at(0), tracked.at(4), True), (tracked.at(4), tracked.end, True)]
    assert tracked.tracking.count(areas) == 0
    tracked.write(2)
    tracked.write(9)
    found, _ = tracked.tracking.written_in(areas)
    assert tracked.tracking.count(areas) == sum(end - start for start, end in found.full) == 2 * PAGE
    libc.mmap(tracked.at(5), PAGE, 3, PRIVATE | ANONYMOUS | FIXED, -1, 0)
    assert tracked.tracking.count(areas) == 2 * PAGE
    tracked.write(5)
    assert tracked.tracking.count(areas) == 3 * PAGE
