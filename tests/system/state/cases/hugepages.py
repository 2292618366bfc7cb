"""Memory out of the pool of huge pages."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator

from tests.system.state.calls import anonymous, call, flags_of, told_of
from tests.system.state.case import Here, case

HUGE = 2 << 20
PRIVATE, SHARED, HUGETLB, NORESERVE, TWO_MIB = 0x22, 0x21, 0x40000, 0x4000, 21 << 26
IN_PAGES = HUGE // 4096


def page_size(address: int) -> int:
    """KernelPageSize of the mapping in which an address lies, in bytes."""
    return int(told_of(address, "KernelPageSize")[0]) << 10


@case("memory/ht", "memory/pages")
def private_huge_pages(here: Here) -> Iterator[None]:
    # one written at both ends, one never touched, one that may only be read
    area = anonymous(3 * IN_PAGES, flags=PRIVATE | HUGETLB | TWO_MIB)
    ctypes.memmove(area, b"begin", 5)
    ctypes.memmove(area + HUGE - 3, b"end", 3)
    ctypes.memmove(area + 2 * HUGE + 5000, b"read", 4)
    call(10, area + 2 * HUGE, HUGE, 1)
    yield
    assert "ht" in flags_of(area)
    assert [page_size(area + place * HUGE) for place in range(3)] == [HUGE] * 3
    assert ctypes.string_at(area, 6) == b"begin\0"
    assert ctypes.string_at(area + HUGE - 4, 4) == b"\0end"
    assert ctypes.string_at(area + HUGE, HUGE) == bytes(HUGE)
    assert ctypes.string_at(area + 2 * HUGE + 5000, 4) == b"read"
    call(10, area + 2 * HUGE, HUGE, 3)
    ctypes.memmove(area + 2 * HUGE, b"x", 1)
    call(11, area, 3 * HUGE)


@case("memory/ht")
def huge_pages_that_are_not_reserved(here: Here) -> Iterator[None]:
    area = anonymous(200 * IN_PAGES, flags=PRIVATE | HUGETLB | NORESERVE)
    ctypes.memmove(area + 150 * HUGE, b"far", 3)
    child = os.fork()
    if child == 0:
        # its own by now, as the parent's is
        ctypes.memmove(area + 150 * HUGE, b"own", 3)
        while True:
            call(34)
    yield
    assert {"nr", "ht"} <= set(flags_of(area))
    assert ctypes.string_at(area + 150 * HUGE, 3) == b"far"
    os.kill(child, 9)
    os.waitpid(child, 0)
    call(11, area, 200 * HUGE)


@case("files/shared-huge-pages")
def huge_pages_of_a_family(here: Here) -> Iterator[None]:
    area = anonymous(4 * IN_PAGES, flags=SHARED | HUGETLB)
    ctypes.memmove(area + HUGE + 4096, b"parent", 6)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)
        ctypes.memmove(area + 3 * HUGE, ctypes.string_at(area + HUGE + 4096, 6), 6)
        os._exit(0)
    yield
    assert page_size(area) == HUGE
    assert ctypes.string_at(area + HUGE + 4096, 6) == b"parent"
    ctypes.memmove(area + HUGE + 4096, b"family", 6)
    os.write(writing, b"x")
    os.waitpid(child, 0)
    assert ctypes.string_at(area + 3 * HUGE, 6) == b"family"
    call(11, area, 4 * HUGE)


@case("files/memfd")
def memfd_of_huge_pages(here: Here) -> Iterator[None]:
    fd = call(319, b"huge", 4 | 2 | TWO_MIB)  # MFD_HUGETLB, MFD_ALLOW_SEALING
    os.ftruncate(fd, 3 * HUGE)
    area = anonymous(3 * IN_PAGES, flags=1, fd=fd)
    ctypes.memmove(area + 2 * HUGE + 7, b"kept", 4)
    own = anonymous(IN_PAGES, flags=2, fd=fd, offset=2 * HUGE)
    ctypes.memmove(own, b"copied", 6)
    fcntl.fcntl(fd, 1033, 6)  # neither smaller nor larger
    yield
    assert os.fstat(fd).st_blksize == HUGE
    assert fcntl.fcntl(fd, 1034) == 6
    assert os.pread(fd, 4, 2 * HUGE + 7) == b"kept"
    assert ctypes.string_at(own, 11) == b"copied\0kept"
    assert ctypes.string_at(area + 2 * HUGE, 7) == bytes(7)
    ctypes.memmove(area + 5, b"on", 2)
    assert os.pread(fd, 2, 5) == b"on"
    call(11, area, 3 * HUGE)
    call(11, own, HUGE)
