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
import enum
import errno
import fcntl
import functools
import os
import re
import struct
from collections.abc import Iterator

__all__ = ["Category", "ScanFlag", "entries", "guards_known", "scan"]


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
_ENTRY_SIZE = 8
_ENTRIES_AT_ONCE = 1 << 16
_PAGE = os.sysconf("SC_PAGE_SIZE")

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


def entries(fd: int, start: int, end: int, *, with_file: bool) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of pages in [start, end) that are present or swapped, without guards; the way of kernels
    before PAGEMAP_SCAN.

    with_file  also pages that belong to a file (or to shared memory)

    The zero page cannot be told from others; about 3 ms per GB.
    """
    wanted = bytearray(256)
    for byte in range(256):
        there = byte & (_ENTRY_PRESENT | _ENTRY_SWAPPED)
        wanted[byte] = bool(there and not byte & _ENTRY_GUARD and (with_file or not byte & _ENTRY_FILE))
    run_start = run_end = start
    for first in range(start, end, _ENTRIES_AT_ONCE * _PAGE):
        count = min(_ENTRIES_AT_ONCE, (end - first) // _PAGE)
        data = os.pread(fd, count * _ENTRY_SIZE, first // _PAGE * _ENTRY_SIZE)
        # the last byte of each entry has all the flags
        for match in re.finditer(rb"\x01+", data[_ENTRY_SIZE - 1 :: _ENTRY_SIZE].translate(wanted)):
            a, b = first + match.start() * _PAGE, first + match.end() * _PAGE
            if a != run_end or run_start == run_end:
                if run_start < run_end:
                    yield run_start, run_end
                run_start = a
            run_end = b
    if run_start < run_end:
        yield run_start, run_end


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
