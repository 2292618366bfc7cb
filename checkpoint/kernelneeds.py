"""What processes use of their kernel that an older one does not have, and that cannot be made there of anything else.

The source tells the names before the stop, the target looks whether it has what they stand for: tried, never derived
from a version.  What an older kernel can be given in another way (numbers of POSIX timers, droppable memory, tracking
of writes) is no need.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from typing import Final

from checkpoint import procfs
from checkpoint.errors import KernelLacks, NoSuchProcess
from checkpoint.kernel.mman import Advice
from checkpoint.memory import scan, vma
from checkpoint.verdict import Verdict

__all__ = ["GUARDS", "judge", "needed"]

#: regions that fault without a mapping of their own
GUARDS: Final = "guard regions"
_KIND: Final = "kernel feature"


def needed(pids: Iterable[int]) -> frozenset[str]:
    """What these processes use; disturbs nothing."""
    found = set()
    for pid in pids:
        try:
            if not procfs.read_stat(pid).zombie and _has_guards(pid):
                found.add(GUARDS)
        except (NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return frozenset(found)


def judge(names: Iterable[str]) -> list[Verdict]:
    """A refusal for each of them that this kernel lacks."""
    found = []
    for name in sorted(names):
        probe = _HERE.get(name)
        if probe is None or not probe[0]():
            since = f" (from Linux {probe[1]} on)" if probe else ", and this tcpmig does not know what it is"
            lacks = KernelLacks(f"the processes use {name}, which this kernel does not have{since}", object=name)
            found.append(Verdict.refuse(lacks, _KIND))
    return found


def _has_guards(pid: int) -> bool:
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        areas = [one for one in vma.read_maps(pid) if one.name != vma.VSYSCALL]
        return any(True for _ in scan.guards(fd, areas))
    finally:
        os.close(fd)


def _makes_guards() -> bool:
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            memory.madvise(Advice.GUARD_INSTALL)
        except OSError:
            return False
        return True


#: name: whether this kernel has it, the first that does
_HERE: Final[dict[str, tuple[Callable[[], bool], str]]] = {GUARDS: (_makes_guards, "6.13")}
