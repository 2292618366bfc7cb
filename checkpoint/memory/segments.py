"""System V shared memory among the mappings of a process: attached, not mapped; whole, or not at all.

Source: ipc/shm.c: the inode number of such a mapping is the ID of the segment.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from checkpoint.errors import NoSuchProcess, Refused, SysvSharedMemory
from checkpoint.kernel import sysv
from checkpoint.kernel.mman import Prot
from checkpoint.kernel.sysv import At
from checkpoint.memory.vma import PAGE, Vma, read_maps
from checkpoint.verdict import Verdict
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS

if TYPE_CHECKING:
    from checkpoint.memory.layout import Mapping

__all__ = ["PREFIX", "attach", "require_alone", "verdicts"]

#: how the maps call a segment; then the key in hexadecimal
PREFIX: Final = "/SYSV"


def attach(calls: CallTable, mappings: Sequence[Mapping], fd: int) -> bool:
    """Queue the attaching of a segment; False if the mappings are of something else.

    fd  ours, of the segment's file, open as it was attached
    """
    if not mappings[0].name.startswith(PREFIX):
        return False
    writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    for mapping in mappings:
        how = (At(0) if writable else At.RDONLY) | (At.EXEC if mapping.prot & Prot.EXEC else At(0))
        calls.call(SYS.shmat, os.fstat(fd).st_ino, mapping.start, how, label=f"shmat {mapping}")
        # the same again in most cases
        calls.call(SYS.mprotect, mapping.start, mapping.size, mapping.prot, label=f"mprotect {mapping}")
    return True


def _segments(pid: int) -> list[Vma]:
    """The attachments of a process; none of one that has just ended."""
    try:
        return [vma for vma in read_maps(pid) if vma.name.startswith(PREFIX)]
    except NoSuchProcess:
        return []


def require_alone(number: int, pids: Iterable[int]) -> sysv.Segment:
    """The segment, if only these processes have it attached, and whole. SysvSharedMemory."""
    found = sysv.look(number)
    if found is None:
        raise SysvSharedMemory("it is of another IPC namespace", object=f"segment {number}")
    inside = 0
    for pid in pids:
        for vma in _segments(pid):
            if vma.inode == number:
                inside += 1
                if vma.offset or vma.size != found.size + -found.size % PAGE:
                    where = f"pid {pid} map {vma.start:x}-{vma.end:x}"
                    raise SysvSharedMemory(f"the segment {number} is mapped in parts", object=where)
    if found.attached > inside:
        counts = f"{found.attached} times, {inside} times by the tree"
        raise SysvSharedMemory(f"it is attached {counts}", object=f"segment {number}")
    return found


def verdicts(pids: Sequence[int]) -> list[Verdict]:
    """One refusal for each segment that cannot be moved."""
    numbers = {vma.inode for pid in pids for vma in _segments(pid)}
    found = []
    for number in sorted(numbers):
        try:
            require_alone(number, pids)
        except Refused as error:
            found.append(Verdict.refuse(error, "shared memory segment"))
    return found
