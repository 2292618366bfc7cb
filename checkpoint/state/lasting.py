"""Two attributes that a change of credentials resets: they are rebuilt after it, in every thread.

Source: Linux kernel/cred.c, commit_creds: when an ID changes or capabilities shrink, the process becomes undumpable
(or as /proc/sys/fs/suid_dumpable says) and the thread forgets its parent-death signal.
"""

from __future__ import annotations

from typing import Final, Self

from checkpoint.kernel.signals import NSIG
from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, bounded, register
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr
from tcpstate.slotted import dataclass

__all__ = ["Dumpable", "ParentDeathSignal"]

# SUID_DUMP_ROOT, include/linux/sched/coredump.h: the kernel's own value, refused by PR_SET_DUMPABLE
_ROOT_ONLY: Final = 2


@register("dumpable")
@dataclass(frozen=True, slots=True, kw_only=True)
class Dumpable(State):
    """Whether the process may dump core and be traced by its own user.

    Belongs to the memory that all threads share, and yet each thread sets it after its own change of credentials: the
    last of them to do so leaves it right, in whatever order they run.

    value  0 no, 1 yes, 2 a core goes to root only (only the kernel sets that)
    """

    value: int

    def __post_init__(self) -> None:
        bounded("dumpable", self.value, 0, _ROOT_ONLY)

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        value = task.calls.call(SYS.prctl, Pr.GET_DUMPABLE, label="read the dumpable attribute")
        yield
        return cls(value=value.value)

    def rebuild(self, task: TaskBuilder) -> None:
        value = self.value
        if value == _ROOT_ONLY:
            value = 0
            if task.leader:
                task.warn(f"{task} could dump core for root only; it will not dump core (dumpable 0)")
        task.calls.call(SYS.prctl, Pr.SET_DUMPABLE, value, label="set the dumpable attribute")


@register("parent death signal")
@dataclass(frozen=True, slots=True, kw_only=True)
class ParentDeathSignal(State):
    """The signal that the thread gets when its parent (the thread that made it) ends; 0 for none."""

    signal: int

    def __post_init__(self) -> None:
        bounded("parent death signal", self.signal, 0, NSIG)

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        signal = task.calls.room(8)
        task.calls.call(SYS.prctl, Pr.GET_PDEATHSIG, signal, label="read the parent death signal")
        yield
        return cls(signal=signal.u32())

    def rebuild(self, task: TaskBuilder) -> None:
        signal = self.signal
        if signal and task.child_of_tool:
            # Its parent, here, is the tool, which ends as soon as its work is done; the new parent will be init.
            signal = 0
            task.warn(
                f"{task} wanted signal {self.signal} when its parent ends; the new parent is init, which does not"
            )
        task.calls.call(SYS.prctl, Pr.SET_PDEATHSIG, signal, label="set the parent death signal")
