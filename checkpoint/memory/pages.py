"""Copying the pages of a process: out of a stopped one, into one that is being rebuilt.

The fast way is process_vm_readv/writev with buffers that stay in the cache; memory that it may not touch (PROT_NONE,
read-only private pages) goes through /proc/PID/mem, which may (FOLL_FORCE, as a debugger).
"""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from checkpoint.errors import BadLayout, MemoryUnreadable, MemoryUnwritable
from checkpoint.image.frames import DATA_MAX, PageRun, Space, aligned_buffer
from checkpoint.kernel import process_vm
from checkpoint.memory import scan
from checkpoint.memory.layout import MemoryLayout
from checkpoint.memory.vma import PAGE

if TYPE_CHECKING:
    from checkpoint.tracee import Process

__all__ = ["PageWriter", "chunks", "read", "read_live", "read_runs", "write"]

#: process_vm_* and /proc/PID/mem answer so for memory that they cannot reach
_UNREACHABLE = (errno.EFAULT, errno.EIO, errno.EPERM)


def read(process: Process, layout: MemoryLayout, *, buffers: int = 1) -> Iterator[PageRun]:
    """The pages of a stopped process that its layout alone does not bring back, in runs of at most 1 MiB, by address.

    buffers  so many buffers are used in turn: a run is overwritten when the ``buffers``-th one after it is asked for

    MemoryUnreadable if a page that is there cannot be read.
    """
    return read_runs(process, layout.pid, scan.private_pages(process.pagemap_fd, layout.mappings), buffers=buffers)


def read_runs(process: Process, pid: int, ranges: Iterable[tuple[int, int]], *, buffers: int = 1) -> Iterator[PageRun]:
    """As read(), for given ranges [(start, end)]; ``pid``: the process's number in the image."""
    spaces = [aligned_buffer(DATA_MAX) for _ in range(buffers)]
    turn = 0
    for runs in chunks(ranges):
        data = spaces[turn][: sum(length for _, length in runs)]
        turn = (turn + 1) % buffers
        _fetch(process, runs, data)
        yield PageRun(space=Space.MEMORY, id=pid, runs=runs, data=data)


def read_live(process: Process, pid: int, ranges: Iterable[tuple[int, int]], *, buffers: int = 1) -> Iterator[PageRun]:
    """As read_runs(), of a process that runs: pages that are gone meanwhile are left out."""
    spaces = [aligned_buffer(DATA_MAX) for _ in range(buffers)]
    turn = 0
    for runs in chunks(ranges):
        left, space = runs, spaces[turn]
        turn = (turn + 1) % buffers
        try:
            _fetch(process, runs, space[: sum(length for _, length in runs)])
        except MemoryUnreadable:
            left = _fetch_what_is_left(process, runs, space)
        if left:
            data = space[: sum(length for _, length in left)]
            yield PageRun(space=Space.MEMORY, id=pid, runs=left, data=data)


def _fetch_what_is_left(
    process: Process, runs: Sequence[tuple[int, int]], space: memoryview
) -> tuple[tuple[int, int], ...]:
    left: list[tuple[int, int]] = []
    done = 0
    for start, length in runs:
        for page in range(start, start + length, PAGE):
            try:
                _fetch(process, [(page, PAGE)], space[done : done + PAGE])
            except MemoryUnreadable:
                continue
            done += PAGE
            if left and sum(left[-1]) == page:
                left[-1] = left[-1][0], left[-1][1] + PAGE
            else:
                left.append((page, PAGE))
    return tuple(left)


def chunks(ranges: Iterable[tuple[int, int]], limit: int = DATA_MAX) -> Iterator[tuple[tuple[int, int], ...]]:
    """Ranges [(start, end)] as groups of runs (start, length) of ``limit`` bytes together; the last group has less."""
    group: list[tuple[int, int]] = []
    room = limit
    for start, end in ranges:
        while start < end:
            length = min(end - start, room)
            group.append((start, length))
            start += length
            room -= length
            if not room:
                yield tuple(group)
                group, room = [], limit
    if group:
        yield tuple(group)


def _fetch(process: Process, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
    with process_vm.address_of(data, writable=True) as local:
        _copy(process, runs, local, data, write=False)


def _copy(process: Process, runs: Sequence[tuple[int, int]], local: int, data: memoryview, *, write: bool) -> None:
    """All of ``runs``, by the fast way as far as it goes, by /proc/PID/mem over what stops it."""
    transfer = process_vm.writev if write else process_vm.readv
    left, done = list(runs), 0
    while left:
        try:
            count = transfer(process.pid, local + done, left[: process_vm.IOV_MAX])
        except OSError as error:
            if error.errno not in _UNREACHABLE:
                raise _failed(process, left[0][0], error, write=write) from error
            count = 0
        if not count:
            # the run that could not be begun goes the other way; the next is tried fast again
            start, length = left.pop(0)
            _by_mem(process, start, data[done : done + length], write=write)
            done += length
            continue
        done += count
        if done == len(data):
            return
        while left and count >= left[0][1]:
            count -= left.pop(0)[1]
        if count:
            start, length = left[0]
            left[0] = (start + count, length - count)


def _by_mem(process: Process, start: int, data: memoryview, *, write: bool) -> None:
    done = 0
    try:
        while done < len(data):
            rest = [data[done:]]
            at = start + done
            count = os.pwritev(process.mem_fd, rest, at) if write else os.preadv(process.mem_fd, rest, at)
            if not count:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += count
    except OSError as error:
        raise _failed(process, start + done, error, write=write) from error


def _failed(process: Process, address: int, error: OSError, *, write: bool) -> MemoryUnreadable | MemoryUnwritable:
    where = f"pid {process.pid} address {address:#x}"
    if write:
        return MemoryUnwritable(f"a page could not be written: {error.strerror}", object=where)
    return MemoryUnreadable(f"a page could not be read: {error.strerror}", object=where)


class PageWriter:
    """Puts page runs of an image into a process that has been given its layout.

    Runs are checked before they are written: an image may not reach memory that is not the rebuilt process's own.
    """

    def __init__(self, process: Process, layout: MemoryLayout) -> None:
        self._process = process
        self._pid = layout.pid
        self._starts: list[int] = []
        self._ends: list[int] = []
        for mapping in layout.mappings:
            if mapping.shared or mapping.special:
                continue
            if self._ends and self._ends[-1] == mapping.start:
                self._ends[-1] = mapping.end  # a run may span neighbours
            else:
                self._starts.append(mapping.start)
                self._ends.append(mapping.end)

    def write(self, run: PageRun) -> int:
        """Write one run; its bytes. BadLayout if it is not of this process's private memory, MemoryUnwritable."""
        self.check(run.space, run.id, run.runs)
        with process_vm.address_of(run.data) as local:
            _copy(self._process, run.runs, local, run.data, write=True)
        return len(run.data)

    def check(self, space: Space, id: int, runs: Iterable[tuple[int, int]]) -> None:
        """BadLayout unless the runs (start, length) are private memory of this process."""
        if space is not Space.MEMORY or id != self._pid:
            raise BadLayout(f"pages of {space} {id} are not for this process", object=f"pid {self._pid}")
        for start, length in runs:
            index = bisect.bisect_right(self._starts, start) - 1
            if index < 0 or start + length > self._ends[index]:
                raise BadLayout(f"pages at {start:#x}+{length:#x} are in no private mapping", object=f"pid {self._pid}")


def write(process: Process, layout: MemoryLayout, runs: Iterable[PageRun]) -> int:
    """Write all ``runs`` (see PageWriter); bytes written."""
    writer = PageWriter(process, layout)
    return sum(map(writer.write, runs))
