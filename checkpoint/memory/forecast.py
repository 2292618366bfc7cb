"""How much memory of running processes a copy has to carry, and how fast they write it: told by looking only.

Pages are picked at random and read several times: those whose bytes have changed were written meanwhile.  A page that
was written with the bytes that it had is not seen.  Nothing is stopped, tracked or changed; pages that were swapped out
come back.
"""

from __future__ import annotations

import os
import random
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Final

from checkpoint.errors import NoSuchProcess
from checkpoint.kernel import process_vm
from checkpoint.memory import scan
from checkpoint.memory.ranges import Range
from checkpoint.memory.vma import PAGE, VSYSCALL, Vma, read_maps
from tcpstate.slotted import dataclass

__all__ = ["Observed", "observe"]

#: pages of each process that are looked at
_PAGES: Final = 2048
#: when, in seconds after the first look
_LOOKS: Final = (0.05, 0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One process.

    bytes   of its private pages: what rounds carry
    still   of shared memory, which is copied while it stands still; counted once for all processes
    writes  (seconds, bytes) by ascending time: so much of ``bytes`` was written so long after a look
    """

    pid: int
    bytes: int
    still: int = 0
    writes: tuple[tuple[float, int], ...] = ()

    def written(self, seconds: float) -> int:
        """About how much of it is written in that time: as seen, and as straight lines between and after that."""
        points = [(0.0, 0), *self.writes]
        if len(points) == 1:
            return 0
        at = next((i for i, (when, _) in enumerate(points) if when >= seconds), len(points) - 1)
        (t0, b0), (t1, b1) = points[max(at, 1) - 1], points[max(at, 1)]
        slope = max(b1 - b0, 0) / (t1 - t0) if t1 > t0 else 0.0
        return min(self.bytes, max(0, round(b0 + slope * (seconds - t0))))


class _Sample:
    """Pages of one process, and what was in them."""

    def __init__(self, pid: int, ranges: Sequence[Range], chance: random.Random) -> None:
        self.pid = pid
        self.total = sum(end - start for start, end in ranges) // PAGE
        numbers = sorted(chance.sample(range(self.total), min(_PAGES, self.total)))
        self._pages = list(_pages(ranges, numbers))
        self._before = self._read()
        self._since = time.monotonic()
        self.writes: list[tuple[float, int]] = []

    def look(self) -> None:
        """What has changed since the beginning."""
        now = self._read()
        after = time.monotonic() - self._since
        known = [page for page in now if page in self._before]
        changed = sum(now[page] != self._before[page] for page in known)
        if known:
            self.writes.append((after, round(changed / len(known) * self.total) * PAGE))

    def _read(self) -> dict[int, int]:
        """Checksums of the pages that can be read, by address."""
        buffer = bytearray(len(self._pages) * PAGE)
        found: dict[int, int] = {}
        left = self._pages
        view = memoryview(buffer)
        with process_vm.address_of(buffer, writable=True) as address:
            while left:
                part = left[: process_vm.IOV_MAX]
                try:
                    count = process_vm.readv(self.pid, address, [(page, PAGE) for page in part]) // PAGE
                except ProcessLookupError:
                    break
                except OSError:
                    # the first of them cannot be read, or has gone
                    count = 0
                found |= {page: zlib.crc32(view[i * PAGE : (i + 1) * PAGE]) for i, page in enumerate(part[:count])}
                left = left[count + (count < len(part)) :]
        return found


def _pages(ranges: Sequence[Range], numbers: Iterable[int]) -> Iterable[int]:
    """The addresses of pages, counted through all ranges."""
    at, first = 0, 0
    for number in numbers:
        while number - first >= (ranges[at][1] - ranges[at][0]) // PAGE:
            first += (ranges[at][1] - ranges[at][0]) // PAGE
            at += 1
        yield ranges[at][0] + (number - first) * PAGE


def observe(pids: Iterable[int], seed: int | None = None) -> list[Observed]:
    """What these processes have and write; it takes a quarter of a second. Those that end meanwhile are left out."""
    chance = random.Random(seed)
    samples: list[_Sample] = []
    still: dict[int, int] = {}
    seen: set[tuple[int, int]] = set()
    for pid in pids:
        try:
            vmas = [vma for vma in read_maps(pid) if vma.name != VSYSCALL]
            fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except (NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
        try:
            ranges = list(scan.private_pages(fd, vmas))
        finally:
            os.close(fd)
        samples.append(_Sample(pid, ranges, chance))
        still[pid] = sum(_unnamed(pid, vma, seen) for vma in vmas if vma.shared and not vma.special)
    began = time.monotonic()
    for when in _LOOKS:
        time.sleep(max(0.0, began + when - time.monotonic()))
        for sample in samples:
            sample.look()
    return [Observed(pid=s.pid, bytes=s.total * PAGE, still=still[s.pid], writes=tuple(s.writes)) for s in samples]


def _unnamed(pid: int, vma: Vma, seen: set[tuple[int, int]]) -> int:
    """Bytes of shared memory that no other host can open by a name; 0 if they were counted already."""
    if not vma.inode or not vma.name.endswith(" (deleted)"):
        return 0
    try:
        found = os.stat(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}")
    except OSError:
        # unmapped meanwhile
        return 0
    if (found.st_dev, found.st_ino) in seen:
        return 0
    seen.add((found.st_dev, found.st_ino))
    return found.st_blocks * 512
