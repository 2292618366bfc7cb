"""The memory layout of one process: which mappings it has, with all their attributes, and what the kernel knows of the
memory as a whole. Bytes of pages travel apart (``pages``); files behind mappings are entries of the tree's file table.

``capture`` reads a stopped process.  ``rebuild`` queues, into a table that a stub then runs, everything that makes the
stub's memory look like that: nothing but empty pages is left to fill.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from checkpoint.arch import USER_END
from checkpoint.errors import BadLayout
from checkpoint.inject import Injection
from checkpoint.kernel.mman import (
    MM_MAP,
    MM_MAP_AUXV,
    MM_MAP_EXE_FD,
    MM_MAP_SAME_EXE,
    Advice,
    Lock,
    Map,
    Prot,
    PrSetMm,
    PrSetVma,
    droppable_known,
)
from checkpoint.memory import aio, scan, segments, special, vdso, verdicts
from checkpoint.memory.aio import Ring
from checkpoint.memory.fields import MemoryFields
from checkpoint.memory.huge import map_flags, page_shift
from checkpoint.memory.vma import (
    PAGE,
    REMEMBERED,
    SPECIAL_NAMES,
    TRACKING_FLAGS,
    VDSO,
    VSYSCALL,
    Vma,
    with_flags,
    without,
)
from tcpstate.kernel.calls import CallError, CallTable, Result
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.spawn import Stub
    from checkpoint.tracee import Process

__all__ = [
    "Descriptors",
    "MappedFiles",
    "Mapping",
    "MemoryFields",
    "MemoryLayout",
    "brk_of",
    "build",
    "capture",
    "change",
    "of_all",
    "query_brk",
    "rebuild",
]

#: flags of smaps that a rebuilt mapping is given again
KEPT_FLAGS = frozenset({"ac", "nr", "gd", "dp", "dc", "dd", "wf", "hg", "nh", "mg", "sr", "rr", "lo", "lf", "ht"})
#: flags that are made by madvise, and whether the kernel may do without (what it cannot follow changes no result)
_ADVICE = {
    "dc": (Advice.DONTFORK, False),
    "wf": (Advice.WIPEONFORK, False),
    "dd": (Advice.DONTDUMP, True),
    "hg": (Advice.HUGEPAGE, True),
    "nh": (Advice.NOHUGEPAGE, True),
    "mg": (Advice.MERGEABLE, True),
    "sr": (Advice.SEQUENTIAL, True),
    "rr": (Advice.RANDOM, True),
}
#: a droppable mapping (MAP_DROPPABLE) has these by itself; where there are none it is a private one with these
_DROPPABLE_HAS = frozenset({"nr", "wf", "dd"})
_ANY_PROT = int(Prot.READ | Prot.WRITE | Prot.EXEC)
_ANON_NAMES = ("[anon:", "[anon_shmem:")
_ANON_NAME_MAX = 80  # kernel: ANON_VMA_NAME_MAX_LEN, with the zero byte
#: the kernel keeps no more of the auxiliary vector (mm->saved_auxv)
_AUXV_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """One mapping.

    start, end  addresses, of whole pages
    prot        PROT_* bits
    shared      changes are seen by others who map the same
    file        index in FILES, or None for private anonymous memory and the kernel's own mappings
    offset      in the file
    name        as maps tells it: for people, and for ``[anon:..]`` names and the kernel's own mappings
    flags       those of KEPT_FLAGS that it has, sorted
    huge        private anonymous memory of huge pages: the logarithm of their size, else 0
    """

    start: int
    end: int
    prot: int
    shared: bool = False
    file: int | None = None
    offset: int = 0
    name: str = ""
    flags: tuple[str, ...] = ()
    huge: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.start < self.end <= USER_END or (self.start | self.end | self.offset) % PAGE:
            raise ValueError(f"a mapping cannot be at {self.start:#x}-{self.end:#x}, offset {self.offset:#x}")
        if not 0 <= self.prot <= _ANY_PROT or not 0 <= self.offset < 1 << 63:
            raise ValueError(f"{self.start:#x}: protection {self.prot}, offset {self.offset:#x}")
        if self.flags and not KEPT_FLAGS.issuperset(self.flags):
            raise ValueError(f"{self.start:#x}: flags {self.flags}")
        if (self.file is None and self.shared) or (self.file is not None and (self.file < 0 or self.special)):
            raise ValueError(f"{self.start:#x}: file {self.file}")
        if self.huge and (
            self.file is not None or not 12 < self.huge < 32 or (self.start | self.end) % (1 << self.huge)
        ):
            raise ValueError(f"{self.start:#x}: pages of 2**{self.huge} bytes")

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def special(self) -> bool:
        """Whether it is one of the kernel's own."""
        return self.name in SPECIAL_NAMES

    @property
    def anonymous(self) -> bool:
        """Whether no file is behind it."""
        return self.file is None

    def of_file(self, index: int) -> Mapping:
        """The same, of a file with another number."""
        return dataclasses.replace(self, file=index)

    def __str__(self) -> str:
        return f"mapping {self.start:x}-{self.end:x} {self.name}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLayout:
    """The record of one process's memory.

    pid       as in TREE
    mappings  by address, not overlapping
    guards    (start, end) of guard regions in them
    rings     of asynchronous I/O contexts, which lie between the mappings
    fields    addresses that the kernel keeps
    auxv      the auxiliary vector
    exe       path of the program
    exe_file  its index in FILES
    vdso      its code, empty if the process has none
    """

    pid: int
    mappings: tuple[Mapping, ...]
    guards: tuple[tuple[int, int], ...] = ()
    fields: MemoryFields
    auxv: bytes
    exe: str
    exe_file: int
    vdso: bytes
    rings: tuple[Ring, ...] = ()

    def __post_init__(self) -> None:
        end = 0
        for mapping in self.mappings:
            if mapping.start < end:
                raise ValueError(f"{mapping} overlaps the one before it")
            end = mapping.end
        aio.require_apart(self.rings, self.areas)
        special = [mapping.name for mapping in self.mappings if mapping.special]
        if len(special) != len(set(special)):
            raise ValueError(f"mappings of the kernel's own come twice: {special}")
        # a region that is in no mapping fails when it is made: it cannot reach further than madvise
        for start, stop in self.guards:
            if (start | stop) % PAGE or not 0 < start < stop <= USER_END:
                raise ValueError(f"a guard region cannot be at {start:#x}-{stop:#x}")
        if not 0 < len(self.auxv) <= _AUXV_MAX or self.pid <= 0:
            raise ValueError("auxiliary vector or pid out of range")
        if self.exe_file < 0:
            raise ValueError(f"exe_file cannot be {self.exe_file}")

    @property
    def areas(self) -> list[tuple[int, int]]:
        """(start, end) of all that the process has in its memory."""
        mapped = [(mapping.start, mapping.end) for mapping in self.mappings]
        return mapped + [(ring.start, ring.end) for ring in self.rings]

    @property
    def files(self) -> set[int]:
        """The indexes in FILES that it needs."""
        return {self.exe_file} | {mapping.file for mapping in self.mappings if mapping.file is not None}


class MappedFiles(Protocol):
    """What a layout wants of the file table (``files.table.FileTable``)."""

    def add_mapped(self, process: Process, vma: Vma) -> int:
        """The index of the file behind a mapping."""


#: index in FILES -> a descriptor, in our process, of that file
Descriptors = Callable[[int], int]


def query_brk(calls: CallTable) -> Result:
    """Queue the question where the heap ends."""
    return calls.call(SYS.brk, 0, label="brk")


def brk_of(process: Process) -> int:
    """Where the heap of a stopped process ends: as the kernel told with the mappings, or as the process itself says.
    InjectionRefused, ..."""
    if process.brk is not None:
        return process.brk
    with Injection(process, [process.leader]) as injection:
        calls = CallTable()
        brk = query_brk(calls)
        injection.run({process.leader.tid: calls})
    return brk.value


def capture(
    process: Process,
    files: MappedFiles,
    *,
    brk: int,
    pid: int | None = None,
    before: Iterable[Vma] = (),
    ours: Iterable[tuple[int, int]] = (),
    rings: bool = True,
) -> MemoryLayout:
    """The layout of a stopped process.

    files   takes the files behind mappings
    brk     where its heap ends: brk_of()
    pid     its number in the image, if another
    before  what vma.read_smaps() gave shortly before the stop: saves reading it in the stop
    ours    (start, end) of memory that the engine has put there: left out
    rings   take the rings of asynchronous I/O contexts as well: not while it runs

    Refused for a mapping that cannot be moved.
    """
    ranges = sorted(ours)
    maps = without([vma for vma in process.maps if vma.name != VSYSCALL], ranges)
    known = [vma for vma in before if vma.name != VSYSCALL]
    vmas = with_flags(process.pid, maps, known)
    if vmas is not maps:
        vmas = without([vma for vma in vmas if vma.name != VSYSCALL], ranges)
    if process.tracked and any(not vma.flags.isdisjoint(TRACKING_FLAGS) for vma in vmas):
        vmas = [vma._replace(flags=vma.flags - TRACKING_FLAGS) for vma in vmas]
    for vma in vmas:
        verdicts.check(process.pid, vma)
    contexts, vmas = aio.apart(vmas)
    exe = os.readlink(f"/proc/{process.pid}/exe")
    mappings, exe_file = [], None
    for vma in vmas:
        shift = page_shift(process.pid, vma) if "ht" in vma.flags else 0
        file = None if vma.anonymous or shift else files.add_mapped(process, vma)
        if exe_file is None and vma.name == verdicts.escaped(exe):
            exe_file = file
        mappings.append(_mapping(vma, file, shift))
    if exe_file is None:
        raise verdicts.unmapped_exe(process.pid, exe)
    code = next((process.read(vma.start, vma.size) for vma in vmas if vma.name == VDSO), b"")
    with open(f"/proc/{process.pid}/auxv", "rb") as file_:
        auxv = file_.read()
    return MemoryLayout(
        pid=process.pid if pid is None else pid,
        mappings=tuple(mappings),
        guards=tuple(scan.guards(process.pagemap_fd, mappings)),
        fields=MemoryFields.of(process.stat, brk),
        auxv=auxv,
        exe=exe,
        exe_file=exe_file,
        vdso=vdso.code(code) if code else b"",
        rings=aio.capture(process, contexts) if rings else (),
    )


@functools.lru_cache(REMEMBERED)
def _mapping(vma: Vma, file: int | None, huge: int) -> Mapping:
    """Most are what they were in the round before, and of a forked process what they are in its parent."""
    return Mapping(
        start=vma.start,
        end=vma.end,
        prot=vma.prot,
        shared=vma.shared,
        file=file,
        offset=0 if file is None else vma.offset,
        name=vma.name,
        flags=() if vma.special else _kept(vma.flags, bool(vma.prot & Prot.WRITE)),
        huge=huge,
    )


@functools.cache
def _kept(flags: frozenset[str], writable: bool) -> tuple[str, ...]:
    """Those that a rebuilt mapping is given again. A process has few sets of flags, and many mappings.

    That its memory is accounted for, one that may be written has by itself.
    """
    return tuple(sorted(flags & KEPT_FLAGS - {"ac"} if writable else flags & KEPT_FLAGS))


def build(layout: MemoryLayout, stub: Stub, descriptor_of: Descriptors) -> None:
    """rebuild(), and run it. OtherVdso, AddressGapMissing, BadLayout."""
    calls = CallTable()
    rebuild(layout, stub, calls, descriptor_of)
    _run(layout, stub, calls)
    special.lead_on(layout, stub)
    aio.rebuild(layout.rings, stub)


def _run(layout: MemoryLayout, stub: Stub, calls: CallTable) -> None:
    try:
        stub.run(calls)
    except CallError as error:
        raise BadLayout(f"the kernel refused {error.strerror}", object=f"pid {layout.pid}") from error
    stub.forget_maps()


def rebuild(layout: MemoryLayout, stub: Stub, calls: CallTable, descriptor_of: Descriptors) -> None:
    """Queue, for ``stub``, everything that gives it this layout. Run the table, then ``stub.forget_maps()``.

    The stub keeps its window, but for its program; of the rest only the kernel's own mappings survive, moved to where
    they were, or, if they are another kernel's, aside. The descriptors of ``descriptor_of`` must stay open until the
    table has run.

    OtherVdso, AddressGapMissing; BadLayout if the layout reaches into the stub's window.
    """
    _check_window(layout, stub)
    special.clear(layout, stub, calls)
    _place(layout, stub, calls, descriptor_of)
    _memory_fields(layout, stub, calls, descriptor_of(layout.exe_file))


def change(
    layout: MemoryLayout,
    stub: Stub,
    gone: Iterable[tuple[int, int]],
    fresh: Iterable[Mapping],
    guards: Iterable[tuple[int, int]],
    descriptor_of: Descriptors,
) -> None:
    """Give a stub that has an earlier layout of the same process this one: what is ``gone`` is unmapped, what is
    ``fresh`` mapped (see ``memory.delta``), with the guard regions in it. BadLayout."""
    calls = CallTable()
    part = dataclasses.replace(layout, mappings=tuple(fresh), guards=tuple(guards))
    _check_window(part, stub)
    for start, end in gone:
        calls.call(SYS.munmap, start, end - start, label=f"munmap {start:x}-{end:x}")
    _place(part, stub, calls, descriptor_of)
    # the program's file stays what it is
    _memory_fields(layout, stub, calls, None)
    _run(layout, stub, calls)
    aio.rebuild(layout.rings, stub)


def of_all(layout: MemoryLayout) -> tuple[object, ...]:
    """What :func:`change` sets, besides mappings."""
    return layout.fields, layout.auxv, layout.rings


def _check_window(layout: MemoryLayout, stub: Stub) -> None:
    low, high = stub.window
    for start, end in layout.areas:
        if start < high and end > low:
            raise BadLayout(f"{start:x}-{end:x} lies where the stub works", object=f"pid {layout.pid}")


def _place(layout: MemoryLayout, stub: Stub, calls: CallTable, descriptor_of: Descriptors) -> None:
    """The mappings that are not the kernel's own, with their attributes and guard regions."""
    _map_files(layout, stub, calls, descriptor_of)
    for mapping in layout.mappings:
        if mapping.special:
            continue
        if mapping.anonymous:
            _map(calls, mapping, -1)
        _attributes(calls, mapping)
    for start, end in layout.guards:
        calls.call(SYS.madvise, start, end - start, Advice.GUARD_INSTALL, label=f"guard region at {start:x}")
    for mapping in layout.mappings:
        # last, because it fills the pages
        if "lo" in mapping.flags:
            how = Lock.ONFAULT if "lf" in mapping.flags else 0
            calls.call(SYS.mlock2, mapping.start, mapping.size, how, label=f"mlock2 {mapping}")


def _map_files(layout: MemoryLayout, stub: Stub, calls: CallTable, descriptor_of: Descriptors) -> None:
    """Mappings of one file after the other: each file is fetched once."""
    by_file: dict[int, list[Mapping]] = {}
    for mapping in layout.mappings:
        if mapping.file is not None:
            by_file.setdefault(mapping.file, []).append(mapping)
    for index, mappings in by_file.items():
        label = f"file {mappings[0].name}"
        if segments.attach(calls, mappings, descriptor_of(index)):
            continue
        fd = calls.call(SYS.pidfd_getfd, stub.tool_pidfd, descriptor_of(index), 0, label=label)
        for mapping in mappings:
            _map(calls, mapping, fd)
        calls.call(SYS.close, fd, label=f"close {label}")


def _map(calls: CallTable, mapping: Mapping, fd: int | Result) -> None:
    flags = map_flags(mapping.huge) | Map.FIXED_NOREPLACE | (Map.SHARED if mapping.shared else Map.PRIVATE)
    if mapping.anonymous:
        flags |= Map.ANONYMOUS
    if "dp" in mapping.flags and droppable_known():
        flags = flags & ~Map.PRIVATE | Map.DROPPABLE
    if "nr" in mapping.flags:
        flags |= Map.NORESERVE
    if "gd" in mapping.flags:
        flags |= Map.GROWSDOWN
    # It was writable once. Only so, should it be again, can the kernel join it with its neighbours: mremap refuses what
    # lies in two mappings (mm/vma.c, is_mergeable_vma).
    accounted = "ac" in mapping.flags and not mapping.shared
    prot = Prot.READ | Prot.WRITE if accounted else mapping.prot
    calls.call(SYS.mmap, mapping.start, mapping.size, prot, flags, fd, mapping.offset, label=f"mmap {mapping}")
    if accounted and mapping.anonymous:
        # of memory that nothing was ever written to the kernel forgets it (mm/mprotect.c); what is written goes again
        label = f"first page of {mapping}"
        calls.call(SYS.madvise, mapping.start, PAGE, Advice.POPULATE_WRITE, label=label)
        calls.call(SYS.madvise, mapping.start, mapping.size, Advice.DONTNEED, label=label)
    if accounted:
        calls.call(SYS.mprotect, mapping.start, mapping.size, mapping.prot, label=f"mprotect {mapping}")


def _attributes(calls: CallTable, mapping: Mapping) -> None:
    for flag in mapping.flags:
        if flag in _ADVICE and not ("dp" in mapping.flags and flag in _DROPPABLE_HAS and droppable_known()):
            advice, may_fail = _ADVICE[flag]
            label = f"madvise {advice.name} {mapping}"
            calls.call(SYS.madvise, mapping.start, mapping.size, advice, ignore=may_fail, label=label)
    for prefix in _ANON_NAMES:
        if mapping.name.startswith(prefix):
            name = calls.path(mapping.name[len(prefix) : -1][: _ANON_NAME_MAX - 1])
            # a name is for people, and a kernel may be built without them
            arguments = (PrSetVma.OPTION, PrSetVma.ANON_NAME, mapping.start, mapping.size, name)
            calls.call(SYS.prctl, *arguments, ignore=True, label=f"name {mapping}")


def _memory_fields(layout: MemoryLayout, stub: Stub, calls: CallTable, exe: int | None) -> None:
    """PR_SET_MM_MAP. It changes the exe link too, which is refused (EBUSY) while pages of the old one are mapped.

    exe  our descriptor of the program's file; None: the link stays what it is
    """
    auxv = calls.put(layout.auxv)
    # eight bytes more: the descriptor is written as a whole register
    fields = calls.put(MM_MAP.pack(*layout.fields.words(), 0, len(layout.auxv), MM_MAP_SAME_EXE) + bytes(4))
    calls.pointer(fields + MM_MAP_AUXV, auxv)
    label = f"exe {layout.exe}"
    fd = None
    if exe is not None:
        fd = calls.call(SYS.pidfd_getfd, stub.tool_pidfd, exe, 0, out=fields + MM_MAP_EXE_FD, label=label)
    calls.call(SYS.prctl, PrSetMm.OPTION, PrSetMm.MAP, fields, MM_MAP.size, 0, label=f"PR_SET_MM_MAP {layout.exe}")
    if fd is not None:
        calls.call(SYS.close, fd, label=f"close {label}")
