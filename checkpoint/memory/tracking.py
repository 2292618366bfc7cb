"""Which pages a running process has written: userfaultfd's asynchronous write protection, read by PAGEMAP_SCAN.

The descriptor is made inside the process (it belongs to the memory of who makes it) and taken out; everything else is
done from outside while the process runs.  Nobody serves it: the kernel lifts a page's protection at the first write and
remembers.  When the descriptor is closed, also by our death, nothing of it is left.

Rules, each found by running it (PROCESS.md 3, tests/kernel/test_write_tracking.py):

- memory that was unmapped and mapped again, moved or made since is not tracked, and says so (:class:`Untracked`): it is
  looked at whole;
- an untouched page that was protected has a marker, which shows as SWAPPED, and not as WRITTEN;
- a page that was given back (MADV_DONTNEED, a heap that shrinks) shows as WRITTEN, and as neither PRESENT nor SWAPPED;
  where its page table went with it, not even as WRITTEN;
- in a private mapping of a file a marker stays in its place, which looks like a page that was swapped out, and the
  file's own page, read later, is not WRITTEN;
- to protect where there is no page table yet is not safe: a page that comes into being between the kernel's look and
  its protecting would be protected and not told.  So only what is WRITTEN is protected;
- memory that is no longer tracked may keep the marks of pages, and when it is tracked again such a page can be written
  without being told: marks are removed first, by ending the registration.

So what was told is remembered, and compared with what is there.

Source: Documentation/admin-guide/mm/pagemap.rst, userfaultfd.rst; fs/proc/task_mmu.c. Linux 6.7.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Sequence

from checkpoint.kernel import pagemap, userfaultfd
from checkpoint.kernel.pagemap import Category, ScanFlag
from checkpoint.kernel.userfaultfd import CREATE_FLAGS, Feature, Mode
from checkpoint.memory.ranges import Range, difference, intersection, joined, total
from checkpoint.memory.vma import PAGE
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.beside import Beside
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["LARGE", "Area", "Found", "Tracking", "Untracked", "available"]

_log = logging.getLogger(__name__)

_FEATURES = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED | Feature.WP_ASYNC
_THERE = Category.PRESENT | Category.SWAPPED
_NOTHING = Category(0)
_NOTHING_OF_ITS_OWN = Category.PFNZERO | Category.FILE | Category.GUARD
# plain numbers for the loop over all runs: to combine members of an enumeration takes longer than all else in it
_IS_THERE, _IS_NOT_ITS_OWN = int(_THERE), int(_NOTHING_OF_ITS_OWN)
_IS_PRESENT, _WAS_WRITTEN, _TRACKED = int(Category.PRESENT), int(Category.WRITTEN), int(Category.WPALLOWED)
#: bytes from which on an anonymous mapping is looked at by itself: whether pages are a file's is costly to ask
LARGE = 1 << 20
#: bytes of which a scan takes milliseconds: worth a second thread
_HUGE = 256 << 20
#: what the kernel answers for memory that is not there (any more), or not of a kind that can be tracked
_NOT_TRACKABLE = (errno.EINVAL, errno.ENOMEM, errno.EBUSY, errno.ESRCH, errno.EPERM)


#: start, end, whether no file is behind it
Area = tuple[int, int, bool]
#: start, end, categories
_Run = tuple[int, int, int]


class Untracked(Exception):
    """The memory is not tracked: nothing can be said of it but what is there now."""


@dataclass(frozen=True, slots=True)
class Found:
    """Pages written since they were protected last, by address.

    full   (start, end) of those that hold something now
    empty  of those that are again as in a fresh mapping
    """

    full: list[Range]
    empty: list[Range]


class _Look:
    """Pages, by address, neighbours put together. Of ``runs``, which are by address as well: a program that writes here
    and there has thousands of them, in the stop too, so they are gone through once.

    tracked   of memory that is tracked, if the runs tell; whether all of it is: ``all_tracked``
    full      that hold something of the process's own and were written
    held      that hold something
    doubtful  of which only a marker is there, or which were swapped out
    blank     that hold nothing
    """

    def __init__(self, runs: Iterable[_Run]) -> None:
        self.tracked, self.all_tracked = list[Range](), True
        self.full: list[Range] = []
        self.held: list[Range] = []
        self.doubtful: list[Range] = []
        self.blank: list[Range] = []
        known: dict[int, tuple[int, bool, list[Range] | None]] = {}
        tracked_from = tracked_to = held_from = held_to = 0
        for first, last, sort in runs:
            kind = known.get(sort)
            if kind is None:
                kind = known[sort] = self._kind(sort)
            tracked, held, others = kind
            if tracked:
                if first != tracked_to:
                    self.tracked.append((tracked_from, tracked_to))
                    tracked_from = first
                tracked_to = last
            if held:
                if first != held_to:
                    self.held.append((held_from, held_to))
                    held_from = first
                held_to = last
            if others is not None:
                if others and others[-1][1] == first:
                    others[-1] = others[-1][0], last
                else:
                    others.append((first, last))
        self.tracked = [*self.tracked[1:], (tracked_from, tracked_to)] if tracked_to else []
        self.held = [*self.held[1:], (held_from, held_to)] if held_to else []

    def _kind(self, sort: int) -> tuple[int, bool, list[Range] | None]:
        """What pages of some categories are: tracked, held, and to be found where besides."""
        tracked = sort & _TRACKED
        self.all_tracked &= bool(tracked)
        if not sort & _IS_THERE or sort & _IS_NOT_ITS_OWN:
            return tracked, False, self.blank
        if sort & _WAS_WRITTEN:
            return tracked, True, self.full
        return tracked, True, None if sort & _IS_PRESENT else self.doubtful


class Tracking:
    """The tracking of one process. ``uffd``: a descriptor of ours, made inside it; closed by :meth:`close`.

    OSError if the kernel cannot track: see available().
    """

    def __init__(self, pid: int, uffd: int) -> None:
        self._uffd = uffd
        self._pagemap = -1
        #: the pages that were told and hold something, as far as we know
        self._told: list[Range] = []
        try:
            userfaultfd.enable(uffd, _FEATURES)
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop tracking. May be repeated."""
        for fd in (self._uffd, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._pagemap = -1

    def add(self, start: int, end: int) -> bool:
        """Track the mapping [start, end) from the next :meth:`protect` on; False if it cannot be, or is gone."""
        try:
            userfaultfd.register(self._uffd, start, end, Mode.WP)
            userfaultfd.unregister(self._uffd, start, end)
            userfaultfd.register(self._uffd, start, end, Mode.WP)
        except OSError as error:
            if error.errno not in _NOT_TRACKABLE:
                raise
            return False
        self._told = list(difference(self._told, [(start, end)]))
        return True

    def protect(self, start: int, end: int, *, anonymous: bool, gone: bool = True) -> Found:
        """What was written in [start, end) since the last time (the first time: all), protected again. Untracked.

        anonymous  no file is behind it
        gone       look for pages that were given back with their page table, too, even if that takes milliseconds;
                   what is not found now is found by the next look for it
        """
        again = ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC
        # what is told here as holding nothing has a marker now, and could not be told from what was swapped out
        first = _Look(self._scan(start, end, anonymous, again, Category.WRITTEN))
        if not gone and end - start >= _HUGE:
            empty = list(intersection(self._told, first.blank))
            if empty or any(difference(first.full, self._told)):
                self._told = joined([*difference(self._told, empty), *first.full])
            return Found(first.full, empty)
        now = _Look(self._scan(start, end, anonymous, ScanFlag.CHECK_WPASYNC))
        told = list(intersection(self._told, [(start, end)]))
        # the marks that were just made are not doubtful
        full = _both(first.full, intersection(told, difference(now.doubtful, first.blank)))
        empty = list(difference(difference(told, difference(now.held, first.blank)), full))
        # mostly nothing is new, and there are thousands of ranges
        if empty or any(difference(full, told)):
            self._told = joined([*difference(self._told, empty), *full])
        return Found(full, empty)

    def written(self, start: int, end: int, *, anonymous: bool) -> Found:
        """The same, changing nothing. Untracked."""
        found, untracked = self.written_in([(start, end, anonymous)])
        if untracked:
            raise Untracked
        return found

    def written_in(self, mappings: Sequence[Area], beside: Iterable[Range] = ()) -> tuple[Found, list[Range]]:
        """The same of many mappings, given by address, in few calls: a call takes longer than a small mapping's pages.
        And (start, end) of those mappings that are not tracked.

        beside  memory that is not asked for, and may be large
        """
        runs: list[_Run] = []
        for start, end, anonymous in _spans(mappings, list(beside)):
            runs += self._scan(start, end, anonymous, ScanFlag(0), more=Category.WPALLOWED)
        now = _Look(runs)
        asked = [(start, end) for start, end, _ in mappings]
        # every page of what is tracked says so, also one that was never touched
        whole = dict.fromkeys(intersection(asked, now.tracked))
        untracked = [one for one in asked if one not in whole]
        wanted = joined(one for one in asked if one in whole)
        told = list(intersection(self._told, wanted))
        # mostly all that was seen is wanted
        seen = now.full if now.tracked == wanted and now.all_tracked else intersection(now.full, wanted)
        full = _both(seen, intersection(told, now.doubtful))
        return Found(full, list(difference(told, now.held))), untracked

    def count(self, mappings: Sequence[Area], beside: Iterable[Range] = ()) -> int:
        """How many bytes were written, about: of what is not tracked, all that is there. In a fraction of the time of
        :meth:`written_in`."""
        return sum(
            total(_Look(self._scan(start, end, anonymous, ScanFlag(0), Category.WRITTEN)).full)
            for start, end, anonymous in _spans(mappings, list(beside))
        )

    def _scan(
        self,
        start: int,
        end: int,
        anonymous: bool,
        flags: ScanFlag,
        all_of: Category = _NOTHING,
        more: Category = _NOTHING,
    ) -> list[_Run]:
        tell = _THERE | Category.PFNZERO | Category.WRITTEN | more
        if not anonymous:
            tell |= Category.FILE  # costly: the kernel looks at every page's descriptor
        if pagemap.guards_known():
            tell |= Category.GUARD

        def scan(first: int, last: int) -> list[_Run]:
            return pagemap.scan(self._pagemap, first, last, all_of=all_of, tell=tell, flags=flags)

        try:
            return _by_two(scan, start, end) if anonymous and end - start >= _HUGE else scan(start, end)
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
            raise Untracked from None


def _by_two(scan: Callable[[int, int], list[_Run]], start: int, end: int) -> list[_Run]:
    """Half of it by another thread: each takes the kernel's lock for reading, and in the stop the other processors have
    nothing to do."""
    middle = (start + end) // 2 // PAGE * PAGE
    later = Beside(lambda: scan(middle, end))
    try:
        return scan(start, middle) + later.result()
    finally:
        # not to be left at work on a descriptor that may be closed
        later.wait()


def _both(ranges: Iterable[Range], more: Iterable[Range]) -> list[Range]:
    """The union of ascending ``ranges`` with what there is mostly nothing of."""
    found, others = list(ranges), list(more)
    return joined([*found, *others]) if others else found


def _spans(mappings: Sequence[Area], beside: Sequence[Range]) -> list[Area]:
    """The mappings, those put together that can be looked at in one call: nothing else lies between them."""
    found: list[Area] = []
    at = 0
    for start, end, anonymous in mappings:
        alone = anonymous and end - start >= LARGE
        if found and not alone and not found[-1][2]:
            last = found[-1][1]
            while at < len(beside) and beside[at][1] <= last:
                at += 1
            if at == len(beside) or beside[at][0] >= start:
                found[-1] = (found[-1][0], end, False)
                continue
        found.append((start, end, alone))
    return found


@functools.cache
def available() -> str:
    """Empty if this kernel can track writes, else what it lacks. Tried on a page of our own."""
    try:
        uffd = syscall(SYS.userfaultfd, CREATE_FLAGS)
    except OSError as error:
        return f"userfaultfd(2): {error.strerror}"
    with contextlib.closing(mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as memory:
        byte = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(byte)
        memory[0] = 1
        try:
            with contextlib.closing(Tracking(os.getpid(), uffd)) as tracking:
                if not tracking.add(start, start + PAGE):
                    return "write protection by userfaultfd"
                tracking.protect(start, start + PAGE, anonymous=True)
                before = tracking.written(start, start + PAGE, anonymous=True)
                memory[0] = 2
                after = tracking.written(start, start + PAGE, anonymous=True)
        except (OSError, Untracked) as error:
            return f"asynchronous write protection, or PAGEMAP_SCAN: {error}"
        finally:
            del byte
        if before.full or after.full != [(start, start + PAGE)]:
            return "write protection that notices writes"
    return ""
