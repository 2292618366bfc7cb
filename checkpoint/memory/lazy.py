"""Memory whose pages come later: which of it can, how it is made so, and how pages are brought.

A userfaultfd is made inside the stub (it belongs to the memory of who makes it) and taken out; mappings are put under
it from outside.  From then on whoever touches a missing page, the kernel on behalf of the process too, waits until the
page was brought.  The last descriptor that is closed lets all of them go on with pages of zeros: so it is never closed
before the last page has come.

Only private anonymous memory can be had so, and not all of it:

- what is locked is filled at once;
- what a child is to find empty (MADV_WIPEONFORK) the child would ask for;
- a guard region is overwritten by a page that is brought (tests/kernel/test_lazy_memory.py): the kernel tells nobody
  that one was installed, so what is brought ahead of need is looked at first;
- small mappings cost more to watch than to copy, and stacks of processes are touched at once.

Of an image file the smallest areas that could wait are read all the same (:func:`soon`): every program goes through
them before its first answer, and a page that is asked for costs up to as much as the MiB that it is verified with.

Source: Documentation/admin-guide/mm/userfaultfd.rst; mm/userfaultfd.c, fs/userfaultfd.c.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import functools
import logging
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Final

from checkpoint.arch import USER_END
from checkpoint.errors import LazyImpossible
from checkpoint.kernel import pagemap, process_vm, userfaultfd
from checkpoint.kernel.pagemap import Category
from checkpoint.kernel.userfaultfd import CREATE_SERVED, Event, Feature, Message, Mode
from checkpoint.memory.layout import Mapping as Mapped
from checkpoint.memory.layout import MemoryLayout
from checkpoint.memory.missing import Missing, Piece
from checkpoint.memory.ranges import Range, difference, intersection, joined
from checkpoint.memory.vma import PAGE
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.calls import CallError, CallTable
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import pidfd_getfd
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.spawn import Stub

__all__ = ["Changing", "Gone", "LazySpace", "areas", "arm", "available", "soon"]

_log = logging.getLogger(__name__)

_EVENTS: Final = Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
#: bytes from which on a mapping is worth it
_LEAST: Final = 1 << 20
#: bytes of a tree's pages that could wait and do better at once: they are read and verified while it is built
_SOON: Final = 8 << 20
#: no mapping that waits for pages is below (vm.mmap_min_addr)
_LOWEST: Final = 1 << 16
_NOT_LAZY: Final = frozenset({"lo", "lf", "wf", "dp", "gd"})


class Changing(Exception):
    """The mappings have just changed, and the messages about it must be read before a page can be brought."""


class Gone(Exception):
    """The memory is gone: its process has ended, or runs another program."""


def areas(layout: MemoryLayout) -> list[Range]:
    """The parts of a process's memory whose pages may come later, by address."""
    found = joined((one.start, one.end) for one in layout.mappings if _can_wait(one))
    return list(difference(found, layout.guards))


def soon(layouts: Iterable[MemoryLayout], pages: Mapping[int, Sequence[Range]]) -> dict[int, list[Range]]:
    """Of the :func:`areas` of processes those that do better at once: the ones with the fewest ``pages``, so many as
    are read while the processes are built. By address."""
    found: dict[int, list[Range]] = {}
    sizes: list[tuple[int, int, Range]] = []
    for layout in layouts:
        found[layout.pid] = []
        mine = areas(layout)
        held = dict.fromkeys(mine, 0)
        for start, end in intersection(pages.get(layout.pid, ()), mine):
            held[mine[bisect.bisect_right(mine, start, key=lambda one: one[0]) - 1]] += end - start
        sizes += [(size, layout.pid, area) for area, size in held.items()]
    left = _SOON
    for size, pid, area in sorted(sizes):
        left -= size
        if left < 0:
            break
        found[pid].append(area)
    return {pid: sorted(chosen) for pid, chosen in found.items()}


def _can_wait(mapping: Mapped) -> bool:
    return (
        mapping.anonymous
        and not mapping.shared
        and not mapping.special
        and not mapping.huge
        and mapping.size >= _LEAST
        and mapping.start > _LOWEST + PAGE
        and mapping.name != "[stack]"
        and _NOT_LAZY.isdisjoint(mapping.flags)
    )


@functools.cache
def available() -> str:
    """Empty if pages can come later on this host, else what is lacking. Tried on a page of our own."""
    try:
        fd = syscall(SYS.userfaultfd, CREATE_SERVED)
    except OSError as error:
        return f"userfaultfd(2): {error.strerror}"
    try:
        userfaultfd.enable(fd, _EVENTS)
        with contextlib.closing(mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as memory:
            with process_vm.address_of(memoryview(memory)) as start:
                userfaultfd.register(fd, start, start + PAGE, Mode.MISSING)
                userfaultfd.unregister(fd, start, start + PAGE)
    except OSError as error:
        return f"userfaultfd with events: {error.strerror}"
    finally:
        os.close(fd)
    return ""


def arm(stub: Stub, layout: MemoryLayout, missing: Iterable[Range]) -> int:
    """Make the mappings of ``layout`` that have ``missing`` pages wait for them; the descriptor that brings them, ours.

    While calls can be injected into the stub. LazyImpossible.
    """
    calls = CallTable()
    made = calls.call(SYS.userfaultfd, CREATE_SERVED, label="userfaultfd")
    try:
        stub.run(calls)
        fd = pidfd_getfd(stub.pidfd, made.value)
        calls = CallTable()
        calls.call(SYS.close, made.value, label="closing it")
        stub.run(calls)
    except CallError as error:
        raise LazyImpossible(f"{error.strerror}", object=f"pid {layout.pid}") from error
    try:
        userfaultfd.enable(fd, _EVENTS)
        wanted = iter(sorted(missing))
        at = next(wanted, None)
        for mapping in layout.mappings:
            while at is not None and at[1] <= mapping.start:
                at = next(wanted, None)
            if at is None:
                break
            if at[0] < mapping.end:
                userfaultfd.register(fd, mapping.start, mapping.end, Mode.MISSING)
    except OSError as error:
        os.close(fd)
        raise LazyImpossible(f"its memory: {error.strerror}", object=f"pid {layout.pid}") from error
    return fd


@dataclass(slots=True)
class LazySpace:
    """One memory that waits for its pages, seen by who brings them.

    pid      whose memory it is, by the number in the image: a child that was forked meanwhile has its parent's
    fd       the userfaultfd
    missing  what has not come
    pagemap  an open /proc/PID/pagemap, to see guard regions; -1: none
    """

    pid: int
    fd: int
    missing: Missing
    pagemap: int = -1
    #: where its pages are brought next, if nobody asks
    cursor: int = field(default=0)

    def changed(self, message: Message) -> LazySpace | None:
        """Take a change of its mappings in; the child's memory, if it has forked."""
        match message.event:
            case Event.REMOVE | Event.UNMAP:
                self.missing.take(message.first, message.second)
            case Event.REMAP:
                self.missing.move(message.first, message.second, message.third)
            case Event.FORK:
                return LazySpace(self.pid, message.descriptor, self.missing.copy(), cursor=self.cursor)
        return None

    def put(self, piece: Piece, address: int) -> None:
        """Bring the pages of a piece, which are at ``address`` of our memory. Changing, Gone, OSError (ENOMEM)."""
        for start, end in self._open(piece):
            at = start
            while at < end:
                at += self._bring(at, address + at - piece.start, end - at)

    def _open(self, piece: Piece) -> list[Range]:
        """The piece, without what has become a guard region."""
        whole = [(piece.start, piece.end)]
        if self.pagemap < 0 or not pagemap.guards_known():
            return whole
        guards = [run[:2] for run in pagemap.scan(self.pagemap, piece.start, piece.end, all_of=Category.GUARD)]
        for start, end in guards:
            self.missing.take(start, end)
        return list(difference(whole, guards))

    def _bring(self, to: int, source: int, length: int) -> int:
        """The bytes that are there now, brought by us or not."""
        while True:
            try:
                done = userfaultfd.copy(self.fd, to, source, length)
            except OSError as error:
                match error.errno:
                    case errno.EAGAIN:
                        raise Changing from None
                    case errno.ESRCH:
                        raise Gone from None
                    case errno.ENOENT if length > PAGE:
                        # of several mappings: what was one has been split
                        length = max(PAGE, length // 2 & -PAGE)
                        continue
                    case errno.EEXIST:
                        done = self._there(to, to + length)
                    case errno.ENOENT:
                        done = PAGE  # unmapped, and the message about it is read by now
                    case _:
                        raise
            self.missing.take(to, to + done)
            return done

    def _there(self, start: int, end: int) -> int:
        """How many bytes from ``start`` on are there: a page at least."""
        if self.pagemap >= 0:
            with contextlib.suppress(OSError):  # a kernel without the ioctl
                for run in pagemap.scan(self.pagemap, start, end, any_of=Category.PRESENT | Category.SWAPPED):
                    if run[0] == start:
                        return run[1] - start
        return PAGE

    def clear(self, page: int) -> None:
        """Somebody waits for a page that no image has: it is one of zeros. Changing, Gone."""
        try:
            userfaultfd.zero(self.fd, page, PAGE)
        except OSError as error:
            match error.errno:
                case errno.EAGAIN:
                    raise Changing from None
                case errno.ESRCH:
                    raise Gone from None
                case errno.ENOENT | errno.EEXIST:
                    self.wake(page, page + PAGE)
                case _:
                    raise

    def wake(self, start: int, end: int) -> None:
        """Who waits there looks again, and asks again for what is still missing."""
        userfaultfd.wake(self.fd, start, end)

    def wake_all(self) -> None:
        """The same of all."""
        self.wake(_LOWEST, USER_END)

    @property
    def alive(self) -> bool:
        """Whether anybody has that memory still."""
        try:
            # no mapping of ours is there: it only shows whether the memory exists
            userfaultfd.zero(self.fd, _LOWEST, PAGE)
        except OSError as error:
            return error.errno != errno.ESRCH
        return True

    def close(self) -> None:
        """No page is missing any more, or nobody is there to miss it."""
        for fd in (self.fd, self.pagemap):
            if fd >= 0:
                os.close(fd)
        self.fd = self.pagemap = -1
