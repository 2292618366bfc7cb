"""Mappings as /proc tells them.

``maps`` is cheap; ``smaps`` adds the flags and the protection key, and walks every page for it: 11-20 ms per GB of
small pages.  Where the kernel lends us a quicker way (:mod:`checkpoint.memory.vmflags`), smaps is read once; where not,
before a process is stopped, and in the stop :func:`read_maps` takes over what it told of every mapping whose line is
still the same, which saves parsing as well.

Source: Linux fs/proc/task_mmu.c (show_map_vma, show_smap_vma_flags), Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from checkpoint.errors import NoSuchProcess

__all__ = [
    "PAGE",
    "REMEMBERED",
    "SPECIAL_NAMES",
    "TRACKING_FLAGS",
    "VDSO",
    "VSYSCALL",
    "Vma",
    "find_named",
    "foresee",
    "lines",
    "parse_maps",
    "parse_smaps",
    "read_maps",
    "read_smaps",
    "with_flags",
    "without",
]

#: bytes of a page
PAGE = os.sysconf("SC_PAGE_SIZE")
#: mappings of which it is remembered what was found, from one look to the next
REMEMBERED = 1 << 14
#: the code that the kernel gives to every process
VDSO = "[vdso]"
#: mappings that the kernel makes at exec and that hold its own pages
SPECIAL_NAMES = frozenset({VDSO, "[vvar]", "[vvar_vclock]"})
#: shown in every process, and in none's memory
VSYSCALL = "[vsyscall]"

#: what our own tracking of writes adds to a mapping's flags
TRACKING_FLAGS = frozenset({"uw"})

_NO_FLAGS: frozenset[str] = frozenset()


class Vma(NamedTuple):
    """One mapping. A NamedTuple and not a dataclass, because a stop may have to make thousands.

    start, end  addresses, end exclusive
    prot        PROT_READ | PROT_WRITE | PROT_EXEC as mmap(2) takes it
    shared      may be shared (VM_MAYSHARE), else copied on write
    offset      of the first byte in the file
    dev         device number of the file's super block; not always what stat(2) gives as st_dev (btrfs, overlay)
    inode       0 for anonymous memory
    name        path, ``path (deleted)``, ``[heap]``, ``[anon:NAME]``, or empty. A newline in a path reads ``\\012``
    flags       two-letter names of VmFlags; empty if read from maps
    pkey        protection key; 0 if read from maps
    """

    start: int
    end: int
    prot: int
    shared: bool
    offset: int
    dev: int
    inode: int
    name: str
    flags: frozenset[str] = _NO_FLAGS
    pkey: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def special(self) -> bool:
        """Whether it is one of the kernel's own: vdso and its data."""
        return self.name in SPECIAL_NAMES

    @property
    def anonymous(self) -> bool:
        """Whether no file is behind it. Shared anonymous memory has one: the kernel makes it."""
        return self.inode == 0 and not self.name.startswith("/")

    @property
    def permissions(self) -> str:
        """As in maps: ``rw-p``."""
        letters = "".join(c if self.prot & bit else "-" for c, bit in zip("rwx", (1, 2, 4), strict=True))
        return letters + ("s" if self.shared else "p")

    @property
    def key(self) -> tuple[object, ...]:
        """All that maps tells: without flags and pkey."""
        return self[:8]

    def __str__(self) -> str:
        return f"{self.start:x}-{self.end:x} {self.permissions} {self.name}".rstrip()


_PROT = {(r + w + x).encode(): (r == "r") | (w == "w") << 1 | (x == "x") << 2 for r in "r-" for w in "w-" for x in "x-"}
# The first line of a mapping in either file. Anchored: other lines of smaps begin with a word and a colon.
_LINE = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-])([sp]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$", re.MULTILINE
)
_FLAGS = re.compile(rb"^VmFlags:(.*)$", re.MULTILINE)
_PKEY = re.compile(rb"^ProtectionKey: +(\d+)$", re.MULTILINE)


def parse_maps(data: bytes) -> list[Vma]:
    """The mappings in the text of /proc/PID/maps (or smaps, without flags), by address."""
    return [
        Vma(
            int(start, 16),
            int(end, 16),
            _PROT[prot],
            kind == b"s",
            int(offset, 16),
            os.makedev(int(major, 16), int(minor, 16)),
            int(inode),
            os.fsdecode(name),
        )
        for start, end, prot, kind, offset, major, minor, inode, name in _LINE.findall(data)
    ]


def parse_smaps(data: bytes) -> list[Vma]:
    """The mappings in the text of /proc/PID/smaps, with flags and protection keys. ValueError if it is no such text."""
    vmas, flags, pkeys = parse_maps(data), _FLAGS.findall(data), _PKEY.findall(data)
    if not pkeys:  # a kernel or machine without them
        pkeys = [b"0"] * len(vmas)
    # one line of each per mapping; a kernel without CONFIG_PROC_PAGE_MONITOR has no smaps at all
    sets: dict[bytes, frozenset[str]] = {text: frozenset(text.decode("ascii").split()) for text in set(flags)}
    return [vma._replace(flags=sets[text], pkey=int(pkey)) for vma, text, pkey in zip(vmas, flags, pkeys, strict=True)]


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess("the process does not exist, or has just ended", object=f"pid {pid}") from error


def lines(pid: int) -> list[bytes]:
    """The lines of maps; none of a zombie. NoSuchProcess."""
    text = _read(pid, "maps").rstrip(b"\n")
    return text.split(b"\n") if text else []


def read_maps(pid: int, known: Mapping[bytes, Vma] | None = None) -> list[Vma]:
    """The mappings of a process. One consistent picture only while it is stopped. NoSuchProcess.

    known  what foresee() gave a moment ago: mappings that it tells of have flags, others have none
    """
    if not known:
        return parse_maps(_read(pid, "maps"))
    found: list[Vma] = []
    for line in lines(pid):
        vma = known.get(line)
        if vma is None:
            found += parse_maps(line)
        else:
            found.append(vma)
    return found


def find_named(pid: int, name: str) -> Vma | None:
    """The first mapping with that name (``[vdso]``), without flags: faster than all of them. NoSuchProcess."""
    ending = b" " + os.fsencode(name)
    for line in _read(pid, "maps").split(b"\n"):
        if line.endswith(ending) and (found := parse_maps(line)) and found[0].name == name:
            return found[0]
    return None


def read_smaps(pid: int) -> list[Vma]:
    """The mappings of a process with flags and protection keys. Slow: see the module's docstring. NoSuchProcess."""
    return parse_smaps(_read(pid, "smaps"))


def foresee(pid: int) -> dict[bytes, Vma]:
    """The same by the line in maps, for read_maps() to find in the stop. Slow, too. NoSuchProcess."""
    text = _read(pid, "smaps")
    lines = (match[0] for match in _LINE.finditer(text))
    return dict(zip(lines, parse_smaps(text), strict=True))


def with_flags(pid: int, maps: Sequence[Vma], before: Iterable[Vma] = ()) -> Sequence[Vma]:
    """``maps`` of a stopped process with flags: as they are if all have some, from ``before``, read by read_smaps() a
    moment ago, if it tells of the same mappings, else read now.

    An madvise(2) or mlock(2) between that reading and the stop that splits no mapping is not noticed.
    """
    if all(vma.flags for vma in maps):
        return maps
    known = list(before)
    if len(known) == len(maps) and all(a.key == b.key for a, b in zip(known, maps, strict=True)):
        return known
    return read_smaps(pid)


def without(vmas: list[Vma], ranges: list[tuple[int, int]]) -> list[Vma]:
    """``vmas`` without the memory in ``ranges``; it may have been merged with a neighbour of the same sort."""
    for low, high in ranges:
        found: list[Vma] = []
        for vma in vmas:
            if vma.end <= low or vma.start >= high:
                found.append(vma)
                continue
            found += [vma._replace(end=low)] if vma.start < low else []
            found += [vma._replace(start=high)] if vma.end > high else []
        vmas = found
    return vmas
