"""Which pages of a process must be carried: the private ones that differ from what a fresh mapping would show."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import Protocol

from checkpoint.kernel import pagemap
from checkpoint.kernel.pagemap import Category

__all__ = ["Area", "guards", "private_pages"]

_THERE = Category.PRESENT | Category.SWAPPED


class Area(Protocol):
    """A mapping, of a process or of a layout."""

    @property
    def start(self) -> int:
        """First address."""
        ...

    @property
    def end(self) -> int:
        """First address behind it."""
        ...

    @property
    def shared(self) -> bool:
        """Whether changes are seen by others."""
        ...

    @property
    def special(self) -> bool:
        """Whether it is one of the kernel's own."""
        ...

    @property
    def anonymous(self) -> bool:
        """Whether no file is behind it."""
        ...


def private_pages(pagemap_fd: int, areas: Iterable[Area]) -> Iterator[tuple[int, int]]:
    """[(start, end)]: pages of private mappings that hold something of their own, by address.

    areas  all mappings, by address

    Anonymous memory: what was written (a page that was only read is the kernel's zero page). Files: pages copied on
    write. Swapped pages count. The shared and the special are left out. A run may span neighbouring mappings.
    """
    find = _by_scan
    for ranges, anonymous in _spans(areas):
        try:
            found = find(pagemap_fd, ranges, anonymous)
        except OSError as error:
            if find is _by_entries or error.errno != errno.ENOTTY:
                raise
            find = _by_entries  # Linux before 6.7
            found = find(pagemap_fd, ranges, anonymous)
        yield from _clipped(found, ranges)


def guards(pagemap_fd: int, areas: Iterable[Area]) -> Iterator[tuple[int, int]]:
    """[(start, end)]: guard regions (MADV_GUARD_INSTALL), by address. None on a kernel that cannot tell them."""
    if not pagemap.guards_known():
        return
    for ranges, _ in _spans(areas, apart=False):
        found = pagemap.scan(pagemap_fd, ranges[0][0], ranges[-1][1], all_of=Category.GUARD)
        yield from _clipped((run[:2] for run in found), ranges)


_Range = tuple[int, int]


def _spans(areas: Iterable[Area], *, apart: bool = True) -> Iterator[tuple[list[_Range], bool]]:
    """(ranges, anonymous): private mappings of one sort without one of another sort between them, neighbours joined. A
    process may have thousands of mappings; one call for each would be the longer part of the scan.

    apart  anonymous memory and files are two sorts
    """
    ranges: list[_Range] = []
    sort = False
    for area in areas:
        private = not area.shared and not area.special
        if ranges and not (private and (area.anonymous == sort or not apart)):
            yield ranges, sort
            ranges = []
        if not private:
            continue
        if ranges and ranges[-1][1] == area.start:
            ranges[-1] = ranges[-1][0], area.end
        else:
            ranges.append((area.start, area.end))
        sort = area.anonymous
    if ranges:
        yield ranges, sort


def _clipped(runs: Iterable[_Range], ranges: list[_Range]) -> Iterator[_Range]:
    """The parts of ``runs`` that lie in ``ranges``: between them may be memory that is not to be told of."""
    at = 0
    for start, end in runs:
        while at < len(ranges) and ranges[at][1] <= start:
            at += 1
        while at < len(ranges) and ranges[at][0] < end:
            yield max(start, ranges[at][0]), min(end, ranges[at][1])
            if ranges[at][1] > end:
                break  # the next run may begin in this range
            at += 1


def _by_scan(fd: int, ranges: list[_Range], anonymous: bool) -> list[_Range]:
    start, end = ranges[0][0], ranges[-1][1]
    none_of = Category.PFNZERO
    if not anonymous:
        none_of |= Category.FILE
    if pagemap.guards_known():
        none_of |= Category.GUARD
    # nothing is to be told: so pages that are present and pages that are swapped out are one run
    return [run[:2] for run in pagemap.scan(fd, start, end, none_of=none_of, any_of=_THERE)]


def _by_entries(fd: int, ranges: list[_Range], anonymous: bool) -> list[_Range]:
    # one by one: unlike the kernel we do not skip what lies between, and from the heap to the stacks that is 40 TB
    return [run for start, end in ranges for run in pagemap.entries(fd, start, end, with_file=False)]
