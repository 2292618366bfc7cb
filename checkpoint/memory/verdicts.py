"""Which mappings cannot be moved, told before anything is stopped.

Only what shows in the mappings themselves; whether the file behind a mapping can be had again is the file table's
verdict (``files.table.verdicts``).

Source: Linux fs/proc/task_mmu.c (show_smap_vma_flags), include/linux/mm.h for what each flag stands for.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable
from typing import NamedTuple

from checkpoint.errors import (
    DeviceMapping,
    HugePageMapping,
    Refused,
    SealedMapping,
    SecretMemory,
    StillLazy,
    UnsupportedMemory,
    UserfaultMapping,
)
from checkpoint.kernel import protkeys
from checkpoint.kernel.mman import Prot
from checkpoint.memory import aio
from checkpoint.memory.vma import REMEMBERED, VSYSCALL, Vma, read_smaps
from checkpoint.verdict import Verdict

__all__ = ["check", "escaped", "unmapped_exe", "verdicts"]


class _Rule(NamedTuple):
    error: type[Refused]
    what: str
    flags: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()


#: the first that fits is told
_RULES = (
    _Rule(SecretMemory, "secret memory", names=("/secretmem",)),
    _Rule(UnsupportedMemory, "probes", names=("[uprobes]",)),
    _Rule(UnsupportedMemory, "memory of a kernel facility", names=("anon_inode:",)),
    _Rule(UnsupportedMemory, "the ring of a socket", names=("socket:",)),
    _Rule(HugePageMapping, "huge pages", flags=frozenset({"ht"})),
    _Rule(UserfaultMapping, "memory registered with userfaultfd", flags=frozenset({"um", "uw", "ui"})),
    _Rule(DeviceMapping, "memory of a device", flags=frozenset({"io", "pf", "mm", "sf"})),
    _Rule(UnsupportedMemory, "a shadow stack", flags=frozenset({"ss"})),
    _Rule(UnsupportedMemory, "memory with tags (MTE)", flags=frozenset({"mt"})),
)
_SEALED = "sl"
_WAITS = "um"
_HUGE = frozenset({"ht"})
#: huge pages that are no file's of hugetlbfs, nor a System V segment's
_KEPT_HUGE = ("/anon_hugepage", "/memfd:")
#: most mappings have none of these
_NAMES = tuple(name for rule in _RULES for name in rule.names)
_FLAGS = frozenset[str]().union(*(rule.flags for rule in _RULES))


@functools.lru_cache(REMEMBERED)
def _harmless(vma: Vma) -> bool:
    """Whether nothing has to be asked. A process may have thousands of mappings, which are mostly what they were when
    they were looked at before the stop."""
    suspect = vma.flags & _FLAGS or vma.name.startswith(_NAMES)
    return not (suspect or _SEALED in vma.flags or _WAITS in vma.flags or vma.pkey)


def check(pid: int, vma: Vma) -> None:
    """Raise what refuses the mapping (one with flags, from smaps), if anything does."""
    if _harmless(vma) or vma.name == VSYSCALL:
        return
    where = f"pid {pid} map {vma.start:x}-{vma.end:x}"
    if _SEALED in vma.flags:
        raise SealedMapping(f"a sealed mapping {vma.name}".rstrip(), object=where)
    if vma.special:
        return
    if vma.name.startswith(_KEPT_HUGE):
        vma = vma._replace(flags=vma.flags - _HUGE)
    if _WAITS in vma.flags and not _has_userfaultfd(pid):
        raise StillLazy("some of its memory has not come yet", object=where)
    for rule in _RULES:
        if vma.name.startswith(rule.names) or vma.flags & rule.flags:
            raise rule.error(f"{rule.what}: {vma.name or vma.permissions}", object=where)
    # memory that may only be executed has a key of the kernel's choice, and gets one again
    if vma.pkey and vma.prot != Prot.EXEC:
        raise UnsupportedMemory(f"memory with protection key {vma.pkey}", object=where)


def _has_userfaultfd(pid: int) -> bool:
    """Whether it serves its own faults. If not, somebody else does: we, as long as pages are missing."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == "anon_inode:[userfaultfd]":
                    return True
    return False


def unmapped_exe(pid: int, exe: str) -> UnsupportedMemory:
    """The refusal of a process that has unmapped its own program: the rebuilt one could not be given its exe link."""
    return UnsupportedMemory(f"the program's own file is not mapped: {exe}", object=f"pid {pid}")


def escaped(path: str) -> str:
    """A path as maps writes it."""
    return path.replace("\n", "\\012")


def verdicts(pid: int, smaps: Iterable[Vma] | None = None) -> list[Verdict]:
    """One refusal for each mapping that cannot be moved, and one verdict for all the others.

    smaps  what vma.read_smaps() gave, if it has been read already
    """
    vmas = list(read_smaps(pid) if smaps is None else smaps)
    found = []
    for vma in vmas:
        try:
            check(pid, vma)
        except Refused as error:
            found.append(Verdict.refuse(error, "mapping"))
    try:
        aio.examine(pid, vmas)
    except Refused as error:
        found.append(Verdict.refuse(error, "mapping"))
    keys = protkeys.allocated(pid)
    if keys:
        text = f"protection keys are allocated: {', '.join(map(str, sorted(keys)))}"
        found.append(Verdict.refuse(UnsupportedMemory(text, object=f"pid {pid}"), "mapping"))
    exe = escaped(os.readlink(f"/proc/{pid}/exe"))
    if not any(vma.name == exe for vma in vmas):
        found.append(Verdict.refuse(unmapped_exe(pid, exe), "mapping"))
    if not found:
        found.append(Verdict(subject=f"pid {pid}", kind="memory", text=f"{len(vmas)} mappings"))
    return found
