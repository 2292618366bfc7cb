"""Is the memory of two processes equal, byte for byte and attribute for attribute? For tests, and for nothing faster.

The kernel splits and merges neighbouring mappings as it likes, so neighbours that differ in nothing count as one.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable

from checkpoint.memory import scan
from checkpoint.memory.huge import is_private_huge
from checkpoint.memory.layout import KEPT_FLAGS
from checkpoint.memory.vma import PAGE, VSYSCALL, Vma, read_smaps
from tcpstate.slotted import dataclass

__all__ = ["Region", "differences", "snapshot"]

_CHUNK = 1 << 20
_ZEROS = bytes(PAGE)
#: shows changing times: of these only the place is compared
_LIVE = frozenset({"[vvar]", "[vvar_vclock]"})
_UNREADABLE = (errno.EIO, errno.EFAULT)


@dataclass(frozen=True, slots=True)
class Region:
    """Neighbouring mappings that differ in nothing, and the digest of their bytes.

    offset  in the file, 0 for anonymous memory
    flags   those that a rebuilt mapping must have
    digest  BLAKE2b of every byte; pages that are not there and pages of zeros are the same in anonymous memory
    """

    start: int
    end: int
    permissions: str
    offset: int
    name: str
    flags: frozenset[str]
    pkey: int
    digest: str

    @property
    def attributes(self) -> tuple[object, ...]:
        """All but place and bytes."""
        return self.permissions, self.name, self.flags, self.pkey


def snapshot(pid: int, *, skip: Iterable[tuple[int, int]] = (), whole: bool = True) -> list[Region]:
    """The memory of a process that rests, by address.

    skip   (start, end) of ranges whose bytes are taken for zeros: memory that the kernel itself writes (rseq areas)
    whole  False: of private mappings of files only those pages that are the process's own; the rest is the file's
    """
    skipped = sorted(skip)
    mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return [
                _region(mem, pagemap, group, skipped, whole)
                for group in _merged(vma for vma in read_smaps(pid) if vma.name != VSYSCALL)
            ]
        finally:
            os.close(pagemap)
    finally:
        os.close(mem)


def differences(before: list[Region], after: list[Region], *, limit: int = 20) -> list[str]:
    """What is not the same, in words; empty if everything is."""
    old, new = {r.start: r for r in before}, {r.start: r for r in after}
    found = []
    for start in sorted(old.keys() | new.keys()):
        a, b = old.get(start), new.get(start)
        if a is None or b is None:
            found.append(f"{'only after' if a is None else 'only before'}: {b if a is None else a}")
        elif a != b:
            found += [
                f"{a.start:x}-{a.end:x} {a.name}: {name} {getattr(a, name)} became {getattr(b, name)}"
                for name in Region.__slots__
                if getattr(a, name) != getattr(b, name)
            ]
    return found[:limit]


def _merged(vmas: Iterable[Vma]) -> list[list[Vma]]:
    groups: list[list[Vma]] = []
    for vma in vmas:
        last = groups[-1][-1] if groups else None
        if last is not None and last.end == vma.start and _alike(last, vma):
            groups[-1].append(vma)
        else:
            groups.append([vma])
    return groups


def _alike(a: Vma, b: Vma) -> bool:
    same = (a.permissions, a.name, a.inode, a.dev, _flags(a), a.pkey) == (
        *(b.permissions, b.name, b.inode, b.dev, _flags(b), b.pkey),
    )
    return same and (a.anonymous or a.offset + a.size == b.offset)


def _flags(vma: Vma) -> frozenset[str]:
    return frozenset() if vma.special else vma.flags & KEPT_FLAGS


def _region(mem: int, pagemap: int, group: list[Vma], skip: list[tuple[int, int]], whole: bool) -> Region:
    first = group[0]
    state = hashlib.blake2b(digest_size=16)
    if first.name not in _LIVE:
        own = first.anonymous or not (whole or first.shared or first.special)
        ranges = scan.private_pages(pagemap, group) if own else [(first.start, group[-1].end)]
        for start, end in ranges:
            for at in range(start, end, _CHUNK):
                _digest(state, mem, at, min(_CHUNK, end - at), skip, sparse=first.anonymous)
    return Region(
        start=first.start,
        end=group[-1].end,
        permissions=first.permissions,
        offset=0 if first.anonymous or is_private_huge(first) else first.offset,
        name=first.name,
        flags=_flags(first),
        pkey=first.pkey,
        digest=state.hexdigest(),
    )


def _digest(state: hashlib.blake2b, mem: int, at: int, size: int, skip: list[tuple[int, int]], *, sparse: bool) -> None:
    data = bytearray(_read(mem, at, size))
    for low, high in skip:
        a, b = max(low, at), min(high, at + size)
        if a < b:
            data[a - at : b - at] = bytes(b - a)
    view = memoryview(data)
    for offset in range(0, size, PAGE):
        page = view[offset : offset + PAGE]
        if not (sparse and page == _ZEROS):
            state.update((at + offset).to_bytes(8, "little"))
            state.update(page)


def _read(mem: int, at: int, size: int) -> bytes:
    """The bytes; pages that nobody can read (behind the end of a file) are named instead."""
    try:
        data = os.pread(mem, size, at)
        if len(data) == size:
            return data
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
    if size == PAGE:
        return b"unreadable".ljust(PAGE, b"\0")
    return b"".join(_read(mem, at + offset, PAGE) for offset in range(0, size, PAGE))
