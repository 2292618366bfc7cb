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

    Anonymous memory: what was written (a page that was only read is the kernel's zero page). Files: pages copied on
    write. Swapped pages count. The shared and the special are left out.
    """
    scan = _by_scan
    for area in areas:
        if area.shared or area.special:
            continue
        try:
            yield from scan(pagemap_fd, area)
        except OSError as error:
            if scan is _by_entries or error.errno != errno.ENOTTY:
                raise
            scan = _by_entries  # Linux before 6.7
            yield from scan(pagemap_fd, area)


def _by_scan(fd: int, area: Area) -> list[tuple[int, int]]:
    none_of = Category.PFNZERO
    if not area.anonymous:
        none_of |= Category.FILE
    if pagemap.guards_known():
        none_of |= Category.GUARD
    # nothing is to be told: so pages that are present and pages that are swapped out are one run
    return [run[:2] for run in pagemap.scan(fd, area.start, area.end, none_of=none_of, any_of=_THERE)]


def _by_entries(fd: int, area: Area) -> list[tuple[int, int]]:
    return list(pagemap.entries(fd, area.start, area.end, with_file=False))


def guards(pagemap_fd: int, areas: Iterable[Area]) -> Iterator[tuple[int, int]]:
    """[(start, end)]: guard regions (MADV_GUARD_INSTALL), by address. None on a kernel that cannot tell them."""
    if not pagemap.guards_known():
        return
    for area in areas:
        if not area.special:
            for start, end, _ in pagemap.scan(pagemap_fd, area.start, area.end, all_of=Category.GUARD):
                yield start, end
