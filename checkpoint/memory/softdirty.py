"""Which pages a running process has written: the soft-dirty bits of page tables, where userfaultfd cannot write-protect
asynchronously (Linux before 6.7).

The kernel sets the bit at the first write, also for whole mappings that are new, grew or were moved.  All bits of a
process are cleared at once, and a page written between the reading of its bit and the clearing would be lost: so for
each round the process stands still while :meth:`Tracking.look` reads and clears (3 ms per GB).  The same interface as
:mod:`checkpoint.memory.tracking`, and the same memory of what was told:

- a page that was given back (MADV_DONTNEED) has no bit any more, but was told: it holds nothing;
- the zero page that is read in its place is there, has no bit, and is no page of its own: it is known by its frame;
- a file's page that is read in the place of a page copied on write is marked as a file's.

Source: Documentation/admin-guide/mm/soft-dirty.rst, pagemap.rst; fs/proc/task_mmu.c (clear_refs_write).
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from checkpoint.kernel import pagemap
from checkpoint.kernel.pagemap import SOFT_DIRTY_BIT
from checkpoint.memory.ranges import Range, difference, intersection, joined, total
from checkpoint.memory.tracking import Area, Found
from checkpoint.memory.vma import PAGE, VSYSCALL, read_maps

__all__ = ["Tracking", "available"]

_CLEAR_SOFT_DIRTY = b"4"  # CLEAR_REFS_SOFT_DIRTY of fs/proc/task_mmu.c


class Tracking:
    """The tracking of one process. OSError if it is not ours to read."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        #: the pages that were told and hold something, as far as we know
        self._told: list[Range] = []
        #: those that were written before the last look, and not told yet
        self._due: list[Range] = []

    def close(self) -> None:
        """Stop tracking. May be repeated."""
        if self._pagemap >= 0:
            os.close(self._pagemap)
        self._pagemap = -1

    def look(self) -> None:
        """Note what was written, and let the kernel note anew. The process stands still."""
        areas = [(vma.start, vma.end) for vma in read_maps(self._pid) if not vma.special and vma.name != VSYSCALL]
        written = [run for start, end in areas for run in self._written(start, end)]
        self._due = joined([*self._due, *written])
        _clear(str(self._pid))

    def add(self, start: int, end: int) -> bool:
        """Track the mapping [start, end) from now on: all that it holds is to be told."""
        self._told = list(difference(self._told, [(start, end)]))
        self._due = joined([*self._due, *self._held(start, end)])
        return True

    def protect(self, start: int, end: int, *, anonymous: bool, gone: bool = True) -> Found:
        """What was written in [start, end) until the last look and not told before."""
        asked = [(start, end)]
        due = list(intersection(self._due, asked))
        held = self._held(start, end)
        found = self._found(asked, held, due)
        self._due = list(difference(self._due, asked))
        self._told = joined([*difference(self._told, found.empty), *found.full])
        return found

    def written(self, start: int, end: int, *, anonymous: bool) -> Found:
        """The same with what was written since; changes nothing."""
        return self.written_in([(start, end, anonymous)])[0]

    def written_in(self, mappings: Sequence[Area], beside: Iterable[Range] = ()) -> tuple[Found, list[Range]]:
        """The same of many mappings, given by address. All memory is tracked: the second is always empty."""
        asked = [(start, end) for start, end, _ in mappings]
        held = [run for start, end in asked for run in self._held(start, end)]
        since = [run for start, end in asked for run in self._written(start, end)]
        due = joined([*since, *intersection(self._due, joined(asked))])
        return self._found(asked, held, due), []

    def count(self, mappings: Sequence[Area], beside: Iterable[Range] = ()) -> int:
        """How many bytes were written."""
        return total(self.written_in(mappings)[0].full)

    def _found(self, asked: Sequence[Range], held: Sequence[Range], due: Sequence[Range]) -> Found:
        told = intersection(self._told, joined(asked))
        held = joined(held)
        return Found(list(intersection(held, due)), list(difference(told, held)))

    def _held(self, start: int, end: int) -> list[Range]:
        return list(pagemap.entries(self._pagemap, start, end, with_file=False))

    def _written(self, start: int, end: int) -> list[Range]:
        return list(pagemap.entries(self._pagemap, start, end, with_file=False, written=True))


def _clear(pid: str) -> None:
    with open(_clear_refs(pid), "wb", buffering=0) as file:
        file.write(_CLEAR_SOFT_DIRTY)


def _clear_refs(pid: str) -> Path:
    return Path(f"/proc/{pid}/clear_refs")


@functools.cache
def available() -> str:
    """Empty if this kernel has soft-dirty bits, else what it lacks. Tried on a page of our own."""
    if not pagemap.zero_pages_known():
        return "numbers of frames in /proc/PID/pagemap (CAP_SYS_ADMIN)"
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[0] = 1
        try:
            _clear("self")
        except OSError as error:
            return f"/proc/PID/clear_refs: {error.strerror}"
        before = pagemap.entry_of(memory) & SOFT_DIRTY_BIT
        memory[0] = 2
        after = pagemap.entry_of(memory) & SOFT_DIRTY_BIT
    return "" if after and not before else "soft-dirty bits"
