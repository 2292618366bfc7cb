"""Memory that is built without its pages: which of them are left for later, while an image is being read.

:class:`LaterMemory` decides page by page, from the layouts; when the memory of all processes is laid out and everything
else has been written, :meth:`LaterMemory.arm` makes it wait, and whoever brings the pages
(:class:`checkpoint.pageserver.PageServer`, in another process) is given what that takes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from checkpoint.errors import BadLayout
from checkpoint.image.frames import Frame, PageRun, Runs, Space
from checkpoint.image.lazypages import FileIndex, IndexMaker
from checkpoint.live import Remaining
from checkpoint.memory import lazy, scan
from checkpoint.memory.layout import MemoryLayout
from checkpoint.memory.ranges import Range, difference, intersection, joined, total
from checkpoint.spawn import Stub
from checkpoint.tracee import Process

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
    """See the module's docstring. ``from_file``: else they come from where the processes were, which told them."""

    def __init__(self, *, from_file: bool = True) -> None:
        self._from_file = from_file
        self._layouts: dict[int, MemoryLayout] = {}
        self._areas: dict[int, list[Range]] = {}
        self._missing: dict[int, list[Range]] = {}
        self._index = IndexMaker()
        self._indexed = False

    def laid_out(self, layout: MemoryLayout) -> None:
        """The memory of a process is laid out so, for good."""
        self._layouts[layout.pid] = layout
        self._areas[layout.pid] = lazy.areas(layout)

    def take(self, frame: Frame) -> PageRun | None:
        """What of a frame has to be written now. ImageError."""
        return self.withhold(frame) if self._from_file else frame.pages()

    def withhold(self, frame: Frame) -> PageRun | None:
        """Leave for later what can be left of a frame of a file; what has to be written now, verified. ImageError."""
        run = frame.pages()
        if run.space is not Space.MEMORY or not frame.own:
            return run
        whole = [(start, start + length) for start, length in run.runs]
        later = list(intersection(whole, self._areas.get(run.id, ())))
        if not later:
            frame.verify()
            return run
        self._indexed = True
        self._index.add(frame, run)
        self._missing.setdefault(run.id, []).extend(later)
        now = list(difference(whole, later))
        if not now:
            return None
        frame.verify()
        places, at = {}, 0
        for start, length in run.runs:
            places[start] = at
            at += length
        pieces = []
        for start, end in now:
            first = max(place for place in places if place <= start)
            offset = places[first] + start - first
            pieces.append(run.data[offset : offset + end - start])
        runs = tuple((start, end - start) for start, end in now)
        return PageRun(space=run.space, id=run.id, runs=runs, data=memoryview(b"".join(pieces)))

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
                bringer.begin(armed, self._index.made() if self._indexed else FileIndex())
        finally:
            for one in armed:
                one.close()
