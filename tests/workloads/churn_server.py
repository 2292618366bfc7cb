"""Memory that changes all the time in every way that a program can change it, and is known byte by byte.

python -m tests.workloads.churn_server PORT ADDRESS SEED MEGABYTES FOLDER

Areas are mapped, filled, rewritten, given back, protected, grown, moved and unmapped at random; what each page must
hold is known, and some page is checked after every step.  A connection that sends a byte gets "ok STEPS BYTES" when
every page is as it must be, else what is wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import random
import socket
import sys
from pathlib import Path

PAGE = mmap.PAGESIZE
PRIVATE, SHARED, ANONYMOUS, NORESERVE = 0x02, 0x01, 0x20, 0x4000
MAYMOVE, DONTNEED, WRITE, READ = 1, 4, 3, 1
LARGEST = 256  # pages of an area
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def pattern(number: int) -> bytes:
    """What a page holds that was written with this number: it is all over the page."""
    return number.to_bytes(8, "little") * (PAGE // 8)


class Area:
    """One mapping. ``pages``: the number that each page was written with; -1: as it was when it was mapped."""

    def __init__(self, pages: int, file: Path | None) -> None:
        self.pages = [-1] * pages
        self.blank = [bytes(PAGE)] * pages
        self.growable = file is None
        fd, flags = -1, PRIVATE | ANONYMOUS
        if file is not None:
            fd, flags = os.open(file, os.O_RDONLY), PRIVATE
            data = file.read_bytes()
            self.blank = [data[at * PAGE : (at + 1) * PAGE] for at in range(pages)]
        self.start = libc.mmap(None, pages * PAGE, WRITE, flags, fd, 0)
        if fd >= 0:
            os.close(fd)
        if self.start in (None, 2**64 - 1):
            raise MemoryError

    @property
    def size(self) -> int:
        return len(self.pages) * PAGE

    def wanted(self, page: int) -> bytes:
        number = self.pages[page]
        return self.blank[page] if number < 0 else pattern(number)

    def check(self, page: int) -> None:
        found = ctypes.string_at(self.start + page * PAGE, PAGE)
        if found != self.wanted(page):
            told = int.from_bytes(found[:8], "little")
            raise ValueError(
                f"page {page} of {len(self.pages)} at {self.start:#x} (file: {not self.growable}): "
                f"{told} instead of {self.pages[page]}, all alike: {found == pattern(told)}"
            )

    def fill(self, page: int, number: int) -> None:
        ctypes.memmove(self.start + page * PAGE, pattern(number), PAGE)
        self.pages[page] = number

    def give_back(self, first: int, count: int) -> None:
        libc.madvise(ctypes.c_void_p(self.start + first * PAGE), ctypes.c_size_t(count * PAGE), DONTNEED)
        self.pages[first : first + count] = [-1] * count

    def protect(self, first: int, count: int, prot: int) -> None:
        libc.mprotect(ctypes.c_void_p(self.start + first * PAGE), ctypes.c_size_t(count * PAGE), prot)

    def resize(self, pages: int) -> None:
        moved = libc.mremap(
            ctypes.c_void_p(self.start), ctypes.c_size_t(self.size), ctypes.c_size_t(pages * PAGE), MAYMOVE
        )
        if moved in (None, 2**64 - 1):
            return  # its parts were protected differently, and have not grown together again
        self.start = moved
        self.blank = (self.blank + [bytes(PAGE)] * pages)[:pages]
        self.pages = (self.pages + [-1] * pages)[:pages]

    def unmap(self) -> None:
        libc.munmap(ctypes.c_void_p(self.start), ctypes.c_size_t(self.size))


class Churn:
    """The areas, and one step after the other."""

    def __init__(self, seed: int, megabytes: int, folder: Path) -> None:
        self._chance = random.Random(seed)
        self._most = megabytes * (1 << 20) // PAGE
        self._numbers = itertools.count(1)
        self._areas: list[Area] = []
        self._file = folder / "churned"
        self._file.write_bytes(b"".join(pattern(1 << 40 | at) for at in range(LARGEST)))
        self.steps = 0

    @property
    def _mapped(self) -> int:
        return sum(len(area.pages) for area in self._areas)

    def step(self) -> None:
        """One change, and one look."""
        self.steps += 1
        chance = self._chance
        if self._mapped < self._most and (len(self._areas) < 4 or chance.random() < 0.05):
            area = Area(chance.randint(1, LARGEST), self._file if chance.random() < 0.3 else None)
            self._areas.append(area)
            for page in range(len(area.pages)):
                if chance.random() < 0.7:
                    area.fill(page, next(self._numbers))
            return
        area = chance.choice(self._areas)
        first = chance.randrange(len(area.pages))
        count = chance.randint(1, len(area.pages) - first)
        what = chance.random()
        if what < 0.8:
            for page in range(first, min(first + 4, first + count)):
                area.fill(page, next(self._numbers))
        elif what < 0.85:
            area.give_back(first, count)
        elif what < 0.88:
            area.protect(first, count, READ)
            area.check(first)
            area.protect(first, count, WRITE)
        elif what < 0.91 and area.growable:
            area.resize(max(1, min(LARGEST, len(area.pages) + chance.randint(-8, 8))))
        elif what < 0.93 or self._mapped > self._most:
            self._areas.remove(area)
            area.unmap()
            return
        area.check(chance.randrange(len(area.pages)))

    def check(self) -> str:
        """Every page."""
        for area in self._areas:
            for page in range(len(area.pages)):
                area.check(page)
        return f"ok {self.steps} {self._mapped * PAGE}"


def main(port: int, address: str, seed: int, megabytes: int, folder: str) -> None:
    """For ever; a wrong page is told to all who ask."""
    churn = Churn(seed, megabytes, Path(folder))
    listener = socket.create_server((address, port))
    listener.setblocking(False)
    peers: list[socket.socket] = []
    wrong = ""
    while True:
        try:
            for _ in range(200):
                if not wrong:
                    churn.step()
        except ValueError as error:
            wrong = f"step {churn.steps}: {error}"
        with contextlib.suppress(BlockingIOError):
            peers.append(listener.accept()[0])
            peers[-1].setblocking(False)
        for peer in list(peers):
            with contextlib.suppress(BlockingIOError):
                if not peer.recv(100):
                    peers.remove(peer)
                    peer.close()
                    continue
                try:
                    said = wrong or churn.check()
                except ValueError as error:
                    said = wrong = str(error)
                peer.setblocking(True)
                peer.sendall(said.encode() + b"\n")
                peer.setblocking(False)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
