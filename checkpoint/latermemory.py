"""Memory that is built without its pages: which of them are left for later, while an image is being read.

:class:`LaterMemory` decides from the layouts, and from an index of the image or what the source tells; when the memory
of all processes is laid out and everything else has been written, :meth:`LaterMemory.arm` makes it wait, and whoever
brings the pages (:class:`checkpoint.pageserver.PageServer`, in another process) is given what that takes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from checkpoint.errors import BadLayout
from checkpoint.image.frames import PageRun, Runs, Space
from checkpoint.image.lazypages import FileIndex, ImagePages
from checkpoint.live import Remaining
from checkpoint.memory import lazy, scan
from checkpoint.memory.layout import MemoryLayout
from checkpoint.memory.ranges import Range, difference, intersection, joined, total
from checkpoint.spawn import Stub
from checkpoint.tracee import Process
from tcpstate.slotted import dataclass

__all__ = ["Armed", "LaterMemory", "PageBringer", "divided", "leave", "left"]

#: runs in one record
_RUNS = 2048


@dataclass(frozen=True, slots=True)
class Armed:
    """The memory of one process that waits.

    pid      its number in the image
    here     its number
    fd       the userfaultfd, ours
    pagemap  an open /proc/PID/pagemap, ours
    missing  (start, end), by address
    """

    pid: int
    here: int
    fd: int
    pagemap: int
    missing: Sequence[Range]

    def close(self) -> None:
        """Our descriptors."""
        os.close(self.fd)
        os.close(self.pagemap)


class PageBringer(Protocol):
    """Who is given the memories that wait."""

    def begin(self, armed: Sequence[Armed], index: FileIndex) -> None:
        """Bring what is missing from now on. The descriptors stay the caller's."""
        ...


def divided(process: Process, layout: MemoryLayout, ranges: Iterable[Range] | None) -> tuple[list[Range], list[Range]]:
    """What of the pages of a process that stands still may come later, and what may not.

    ranges  those that have to be sent; None: all that the process has of its own
    """
    if ranges is None:
        ranges = scan.private_pages(process.pagemap_fd, layout.mappings)
    wanted = list(ranges)
    wait = lazy.areas(layout)
    return list(intersection(wanted, wait)), list(difference(wanted, wait))


def left(pid: int, ranges: Sequence[Range]) -> Iterator[Runs]:
    """The records that tell of pages of a process that come later."""
    for at in range(0, len(ranges), _RUNS):
        runs = tuple((start, end - start) for start, end in ranges[at : at + _RUNS])
        yield Runs(space=Space.MEMORY, id=pid, runs=runs)


def leave(
    processes: Iterable[Process], layouts: Mapping[int, MemoryLayout], remaining: dict[int, Remaining]
) -> Iterator[Runs]:
    """Leave what can be left of processes that stand still: told here, and no longer in ``remaining``."""
    for process in processes:
        known = remaining.get(process.pid)
        later, now = divided(process, layouts[process.pid], None if known is None else known.ranges)
        remaining[process.pid] = Remaining([], [], now)
        yield from left(process.pid, later)


class LaterMemory:
    """See the module's docstring. Without :meth:`reads` the pages come from where the processes were, which told of
    them."""

    def __init__(self) -> None:
        self._source: ImagePages | None = None
        self._layouts: dict[int, MemoryLayout] = {}
        self._areas: dict[int, list[Range]] = {}
        self._missing: dict[int, list[Range]] = {}

    def reads(self, source: ImagePages) -> None:
        """The image file that has the pages. Before the first frame."""
        self._source = source

    def laid_out(self, layouts: Mapping[int, MemoryLayout]) -> None:
        """The memory of all processes will be laid out so, for good. ImageError."""
        self._layouts = dict(layouts)
        self._areas = {pid: lazy.areas(layout) for pid, layout in layouts.items()}
        if self._source is None:
            return
        there = dict(self._source.index.ranges())
        soon = lazy.soon(layouts.values(), there)
        for pid, ranges in there.items():
            waiting = list(difference(self._areas.get(pid, ()), soon.get(pid, ())))
            later = list(intersection(ranges, waiting))
            if later:
                self._missing[pid] = later
            self._source.read_ahead(pid, list(difference(ranges, waiting)))

    def at_once(self) -> Iterator[PageRun]:
        """When all memory stands: what of the image's pages has to be written now, verified; all else is left for
        later. The bytes are valid until the next is asked for. ImageError."""
        if self._source is not None:
            yield from self._source.runs()

    def told(self, runs: Runs) -> None:
        """Pages that will be brought from where the processes were. BadLayout if their memory cannot wait."""
        wanted = [(start, start + length) for start, length in runs.runs]
        for start, _ in difference(wanted, self._areas.get(runs.id, ())):
            raise BadLayout(f"pages at {start:#x} cannot come later", object=f"pid {runs.id}")
        self._missing.setdefault(runs.id, []).extend((start, start + length) for start, length in runs.runs)

    @property
    def bytes(self) -> int:
        """How many are left for later."""
        return sum(total(joined(ranges)) for ranges in self._missing.values())

    def arm(self, stubs: Mapping[int, Stub], bringer: PageBringer) -> None:
        """Make the memory wait, and have its pages brought. While calls can be injected. LazyImpossible, ..."""
        armed: list[Armed] = []
        try:
            for pid, ranges in self._missing.items():
                missing = joined(ranges)
                pagemap = os.open(f"/proc/{stubs[pid].pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fd = lazy.arm(stubs[pid], self._layouts[pid], missing)
                except BaseException:
                    os.close(pagemap)
                    raise
                armed.append(Armed(pid, stubs[pid].pid, fd, pagemap, missing))
            if armed:
                bringer.begin(armed, FileIndex() if self._source is None else self._source.index)
        finally:
            for one in armed:
                one.close()
