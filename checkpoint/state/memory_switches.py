"""Switches of a process's memory as a whole: no huge pages, identical pages merged, new memory locked, no new
executable code.

Source: Linux kernel/sys.c; mm/huge_memory.c, mm/ksm.c; Documentation/userspace-api/prctl.
"""

from __future__ import annotations

from typing import Final, Self

from checkpoint.kernel.mman import LockAll
from checkpoint.memory.vma import read_smaps
from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register, unsigned
from tcpstate.kernel.calls import Result
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import MdweFlag, Pr
from tcpstate.slotted import dataclass

__all__ = ["MemoryDenyWriteExecute", "MemorySwitches"]

_ON: Final = 1


def _answer(result: Result) -> int:
    """What a query says; 0 where the kernel does not know the option."""
    return result.value if result.ok else 0


@register("memory switches")
@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySwitches(State):
    """Switches that say how the kernel manages the pages.

    thp_disable  PR_GET_THP_DISABLE: 0 or 1, with flags above bit 0 from 6.18
    merge        PR_GET_MEMORY_MERGE: all anonymous memory may be merged by KSM
    lock_future  what mlockall was told of memory that is yet to be mapped: MCL_FUTURE, MCL_ONFAULT; 0: nothing
    """

    thp_disable: int
    merge: bool
    lock_future: int = 0

    def __post_init__(self) -> None:
        unsigned("thp_disable", self.thp_disable, 32)
        if self.lock_future not in (0, LockAll.FUTURE, LockAll.FUTURE | LockAll.ONFAULT):
            raise ValueError(f"mlockall is not told {self.lock_future:#x}")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        thp = task.calls.call(SYS.prctl, Pr.GET_THP_DISABLE, ignore=True)
        merge = task.calls.call(SYS.prctl, Pr.GET_MEMORY_MERGE, ignore=True)
        yield
        return cls(thp_disable=_answer(thp), merge=_answer(merge) != 0, lock_future=_lock_future(task))

    def rebuild(self, task: TaskBuilder) -> None:
        if self.thp_disable:
            flags = self.thp_disable & ~_ON
            result = task.calls.call(SYS.prctl, Pr.SET_THP_DISABLE, _ON, flags, ignore=True)
            task.warn_unless(result, "had transparent huge pages disabled and has them here")
        if self.merge:
            result = task.calls.call(SYS.prctl, Pr.SET_MEMORY_MERGE, _ON, ignore=True)
            task.warn_unless(result, "had its identical pages merged and has not here")
        if self.lock_future:
            # all memory is mapped by now, and locked where it was
            result = task.calls.call(SYS.mlockall, self.lock_future, ignore=True)
            task.warn_unless(result, "had all new memory locked and has not here")


def _lock_future(task: TaskView) -> int:
    """The kernel does not tell, but it shows: in the memory that was just mapped for our calls."""
    if task.status.get("VmLck", "0 kB") == "0 kB":
        return 0
    ours = [start for start, _ in task.view.scratch]
    flags = frozenset[str]().union(*(vma.flags for vma in read_smaps(task.pid) if vma.start in ours))
    if "lo" not in flags:
        return 0
    return LockAll.FUTURE | (LockAll.ONFAULT if "lf" in flags else 0)


@register("memory-deny-write-execute")
@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryDenyWriteExecute(State):
    """Whether memory that can be written may never become executable (PR_SET_MDWE).

    Irrevocable, so rebuilt when no executable memory has to be made any more.
    """

    flags: MdweFlag

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        flags = task.calls.call(SYS.prctl, Pr.GET_MDWE, ignore=True)
        yield
        return cls(flags=MdweFlag(_answer(flags)))

    def rebuild(self, task: TaskBuilder) -> None:
        if self.flags:
            task.calls.call(SYS.prctl, Pr.SET_MDWE, self.flags, label="deny memory both writable and executable")
