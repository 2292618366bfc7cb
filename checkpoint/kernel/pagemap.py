"""Which pages of a process are there, and of what sort: the ioctl PAGEMAP_SCAN (Linux 6.7), else /proc/PID/pagemap.

Traps of the ioctl, each found by running it (6.18):

- ``walk_end`` may lie before runs that were returned: going on from there gives them twice;
- asking for FILE makes the kernel look at every page's descriptor, 13-16 ms per GB instead of 1: only where the mapping
  has a file;
- an entry that marks something and holds no page (a guard, a write-protect marker) shows as SWAPPED.

Source: include/uapi/linux/fs.h, fs/proc/task_mmu.c, Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import enum
import errno
import fcntl
import functools
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator

__all__ = [
    "SOFT_DIRTY_BIT",
    "Category",
    "ScanFlag",
    "entries",
    "entry_of",
    "guards_known",
    "scan",
    "zero_pages_known",
]


class Category(enum.IntFlag):
    """What a page can be (PAGE_IS_*)."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8  # 6.15


class ScanFlag(enum.IntFlag):
    """PM_SCAN_*."""

    WP_MATCHING = 1 << 0
    CHECK_WPASYNC = 1 << 1


PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_ARGUMENT = struct.Struct("<12Q")  # struct pm_scan_arg
_WALK_END = 4
_RUNS = 8192
_WORDS_PER_RUN = 3  # struct page_region: start, end, categories

#: bits of the last byte of an entry of /proc/PID/pagemap: 63, 62, 61 (file page or shared), 58
_ENTRY_PRESENT, _ENTRY_SWAPPED, _ENTRY_FILE, _ENTRY_GUARD = 0x80, 0x40, 0x20, 0x04
#: the byte before: 55
_ENTRY_SOFT_DIRTY = 0x80
#: bits of a whole entry: the number of the frame
_FRAME = (1 << 55) - 1
SOFT_DIRTY_BIT = 1 << 55
_ENTRY_SIZE = 8
_ENTRIES_AT_ONCE = 1 << 16
_PAGE = os.sysconf("SC_PAGE_SIZE")
#: pages of a huge page, a table's worth of entries
_HUGE = _PAGE // 8
#: bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h): KPF_THP, KPF_ZERO_PAGE
_KPF_ZERO_HUGE = 1 << 22 | 1 << 24

_Run = tuple[int, int, int]


def scan(
    fd: int,
    start: int,
    end: int,
    *,
    all_of: Category = Category(0),  # noqa: B008 - an immutable flag
    none_of: Category = Category(0),  # noqa: B008
    any_of: Category = Category(0),  # noqa: B008
    tell: Category = Category(0),  # noqa: B008
    flags: ScanFlag = ScanFlag(0),  # noqa: B008
) -> list[_Run]:
    """[(start, end, categories)]: runs of pages in [start, end) that match, by address.

    fd       an open /proc/PID/pagemap
    all_of   all of these
    none_of  and none of these
    any_of   and, unless empty, at least one of these
    tell     the categories to be told; pages that differ in them are different runs

    OSError: ENOTTY if the kernel has no such ioctl, EINVAL for a category that it does not know, EPERM with
    CHECK_WPASYNC where a mapping is not tracked.
    """
    if start >= end:
        return []
    room = min(_RUNS, (end - start) // _PAGE + 1)
    vector = array.array("Q", bytes(8 * _WORDS_PER_RUN * room))
    where = vector.buffer_info()[0]
    mask = all_of | none_of
    found: list[_Run] = []
    while True:
        argument = bytearray(
            _ARGUMENT.pack(_ARGUMENT.size, flags, start, end, 0, where, room, 0, none_of, mask, any_of, tell)
        )
        count = fcntl.ioctl(fd, PAGEMAP_SCAN, argument)
        words = vector[: _WORDS_PER_RUN * count]
        found += zip(words[0::3], words[1::3], words[2::3], strict=True)
        walked: int = _ARGUMENT.unpack(argument)[_WALK_END]
        if count < room or walked >= end:
            return found
        start = max(walked, found[-1][1])
        if start >= end:
            return found


def entries(fd: int, start: int, end: int, *, with_file: bool, written: bool = False) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of pages in [start, end) that are present or swapped, without guards; the way of kernels
    before PAGEMAP_SCAN.

    with_file  also pages that belong to a file (or to shared memory)
    written    only those whose soft-dirty bit is set

    The zero page is left out if we may see the numbers of frames (CAP_SYS_ADMIN). About 3 ms per GB.
    """
    wanted = _WITH_FILE if with_file else _WITHOUT_FILE
    zero = _zero_pages()
    run_start = run_end = start
    for first in range(start, end, _ENTRIES_AT_ONCE * _PAGE):
        count = min(_ENTRIES_AT_ONCE, (end - first) // _PAGE)
        data = os.pread(fd, count * _ENTRY_SIZE, first // _PAGE * _ENTRY_SIZE)
        # the last byte of each entry has all the flags but one
        found = bytearray(data[_ENTRY_SIZE - 1 :: _ENTRY_SIZE].translate(wanted))
        if written:
            found = _both(found, data[_ENTRY_SIZE - 2 :: _ENTRY_SIZE].translate(_SOFT_DIRTY))
        for at, stop in zero.runs(data, first):
            found[at:stop] = bytes(stop - at)
        for match in re.finditer(rb"\x01+", found):
            a, b = first + match.start() * _PAGE, first + match.end() * _PAGE
            if a != run_end or run_start == run_end:
                if run_start < run_end:
                    yield run_start, run_end
                run_start = a
            run_end = b
    if run_start < run_end:
        yield run_start, run_end


def _both(one: bytes | bytearray, other: bytes) -> bytearray:
    """Where both are 1."""
    number = int.from_bytes(one, "little") & int.from_bytes(other, "little")
    return bytearray(number.to_bytes(len(one), "little"))


def _table(chosen: Callable[[int], object]) -> bytes:
    return bytes(bool(chosen(byte)) for byte in range(256))


def _there(byte: int) -> bool:
    return bool(byte & (_ENTRY_PRESENT | _ENTRY_SWAPPED) and not byte & _ENTRY_GUARD)


_WITH_FILE = _table(_there)
_WITHOUT_FILE = _table(lambda byte: _there(byte) and not byte & _ENTRY_FILE)
_SOFT_DIRTY = _table(lambda byte: byte & _ENTRY_SOFT_DIRTY)


class _ZeroPages:
    """What memory shows that was read and never written: the zero page, and, where huge pages are in use, the huge one.

    frame  the number of the first; 0: we are not shown numbers
    """

    def __init__(self, frame: int) -> None:
        self.frame = frame
        low = frame.to_bytes(_ENTRY_SIZE, "little")[: _ENTRY_SIZE - 2]
        self._entries = re.compile(b"(?:" + re.escape(low) + rb"[\x00\x80].)+", re.DOTALL)
        self._flags = -1
        if frame:
            with contextlib.suppress(OSError):  # a kernel without it has no huge zero page that we could tell
                self._flags = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)

    def runs(self, data: bytes, first: int) -> Iterator[tuple[int, int]]:
        """[start, end) of entries in ``data`` that show one; the first entry is that of the address ``first``."""
        if not self.frame:
            return
        for match in self._entries.finditer(data):
            # the bytes may also come across two entries
            at = -(-match.start() // _ENTRY_SIZE)
            if match.start() % _ENTRY_SIZE == 0:
                yield at, match.end() // _ENTRY_SIZE
        count = len(data) // _ENTRY_SIZE
        for at in range(-(first // _PAGE) % _HUGE, count - _HUGE + 1, _HUGE):
            if self._is_huge(int.from_bytes(data[at * _ENTRY_SIZE : (at + 1) * _ENTRY_SIZE], "little")):
                yield at, at + _HUGE

    def _is_huge(self, entry: int) -> bool:
        frame = entry & _FRAME
        if self._flags < 0 or not entry >> 63 or frame % _HUGE or frame == self.frame:
            return False
        flags = int.from_bytes(os.pread(self._flags, _ENTRY_SIZE, frame * _ENTRY_SIZE), "little")
        return flags & _KPF_ZERO_HUGE == _KPF_ZERO_HUGE


@functools.cache
def _zero_pages() -> _ZeroPages:
    with mmap.mmap(-1, _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        frame = 0 if memory[0] else entry_of(memory) & _FRAME
    return _ZeroPages(frame)


def zero_pages_known() -> bool:
    """Whether :func:`entries` leaves out the zero page."""
    return _zero_pages().frame != 0


def entry_of(memory: mmap.mmap) -> int:
    """The entry of the first page of memory of our own."""
    byte = ctypes.c_char.from_buffer(memory)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(ctypes.addressof(byte) // _PAGE * _ENTRY_SIZE)
        return int.from_bytes(file.read(_ENTRY_SIZE), "little")


@functools.cache
def guards_known() -> bool:
    """Whether this kernel tells guard regions by PAGEMAP_SCAN (6.15). Probed on our own memory."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        scan(fd, _PAGE, 2 * _PAGE, all_of=Category.GUARD)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTTY):
            raise
        return False
    finally:
        os.close(fd)
    return True
