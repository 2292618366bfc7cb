"""How a thread competes for CPU and disk: policy, niceness, CPUs, I/O priority, timer slack.

Read inside (a call each), set from outside by thread ID when everything else is done: the rebuilding itself then runs
at the tool's priority, and the tool's capabilities count, not those of the rebuilt process.

Source: Linux kernel/sched/syscalls.c, block/ioprio.c, include/uapi/linux/sched/types.h.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final, Self

from checkpoint.kernel.sched import (
    CPU_SET_SIZE,
    NICE_OFFSET,
    SCHED_ATTR_SIZE,
    IoprioWho,
    Policy,
    SchedAttr,
    SchedFlag,
    default_slice,
    get_attributes,
    get_io_priority,
    online_cpus,
    set_attributes,
    set_io_priority,
)
from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, bounded, register, unsigned
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr
from tcpstate.slotted import dataclass

__all__ = ["CpuAffinity", "IoPriority", "Scheduling", "TimerSlack"]

_NICE_LOWEST: Final = -20
_NICE_HIGHEST: Final = 19
_PRIORITY_MAX: Final = 99
#: bits of an I/O priority: class, hint, level
_IOPRIO_BITS: Final = 16
_FAIR: Final = (Policy.OTHER, Policy.BATCH, Policy.IDLE)
_FLAGS: Final = SchedFlag.RESET_ON_FORK | SchedFlag.RECLAIM | SchedFlag.DL_OVERRUN


@register("scheduling")
@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling(State):
    """Policy and parameters.

    nice                       also kept under a policy that does not use it
    priority                   of FIFO and RR, 1 .. 99
    runtime, deadline, period  of DEADLINE, nanoseconds; ``runtime`` is also the slice of OTHER, BATCH and IDLE (0: the
                               host's default)
    flags                      SCHED_FLAG_*
    """

    policy: Policy
    nice: int
    priority: int
    runtime: int
    deadline: int
    period: int
    flags: int

    def __post_init__(self) -> None:
        bounded("nice", self.nice, _NICE_LOWEST, _NICE_HIGHEST)
        bounded("priority", self.priority, 0, _PRIORITY_MAX)
        for name in ("runtime", "deadline", "period", "flags"):
            unsigned(name, getattr(self, name))

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        room = task.calls.room(SCHED_ATTR_SIZE)
        task.calls.call(SYS.sched_getattr, 0, room, SCHED_ATTR_SIZE, 0, label="read the scheduling policy")
        nice = task.calls.call(SYS.getpriority, os.PRIO_PROCESS, 0, label="read the niceness")
        yield
        attr = SchedAttr.unpack(room.bytes())
        # The kernel shows a slice also where it is only this host's default, which our own thread has as well.
        own_slice = attr.policy in _FAIR and attr.runtime != default_slice()
        return cls(
            policy=Policy(attr.policy),
            nice=NICE_OFFSET - nice.value,
            priority=attr.priority,
            runtime=attr.runtime if own_slice or attr.policy not in _FAIR else 0,
            deadline=attr.deadline,
            period=attr.period,
            flags=attr.flags & _FLAGS,
        )

    def stands(self, task: TaskBuilder) -> bool:
        try:
            found = get_attributes(task.tid)
            nice = os.getpriority(os.PRIO_PROCESS, task.tid)
        except OSError:
            return False
        same = (found.policy, nice, found.priority, found.flags & _FLAGS)
        plain = self.runtime == 0 and found.runtime in (0, default_slice())
        return self.policy in _FAIR and plain and same == (self.policy, self.nice, self.priority, self.flags)

    def rebuild(self, task: TaskBuilder) -> None:
        task.outside.append(lambda: self._set(task))

    def _set(self, task: TaskBuilder) -> None:
        attr = SchedAttr(self.policy, self.flags, self.nice, self.priority, self.runtime, self.deadline, self.period)
        try:
            os.setpriority(os.PRIO_PROCESS, task.tid, self.nice)
            set_attributes(task.tid, attr)
        except OSError as error:
            # Admission control, no such policy in this kernel, no CAP_SYS_NICE: it runs, but not as promptly.
            task.warn(f"{task} cannot be given its scheduling policy {self.policy.name}, nice {self.nice}: {error}")


@register("cpu affinity")
@dataclass(frozen=True, slots=True, kw_only=True)
class CpuAffinity(State):
    """The CPUs that the thread may run on, if it was bound to fewer than its host had; else empty."""

    cpus: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(not 0 <= cpu < CPU_SET_SIZE * 8 for cpu in self.cpus):
            raise ValueError("there is no such CPU number")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        room = task.calls.room(CPU_SET_SIZE)
        task.calls.call(SYS.sched_getaffinity, 0, CPU_SET_SIZE, room, label="read the CPU affinity")
        yield
        mask = int.from_bytes(room.bytes(), "little")
        cpus = tuple(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)
        return cls(cpus=() if task.view.online <= set(cpus) else cpus)

    def stands(self, task: TaskBuilder) -> bool:
        try:
            return not self.cpus and os.sched_getaffinity(task.tid) == online_cpus()
        except OSError:
            return False

    def rebuild(self, task: TaskBuilder) -> None:
        task.outside.append(lambda: self._set(task))

    def _set(self, task: TaskBuilder) -> None:
        here = online_cpus()
        possible = here.intersection(self.cpus)
        if len(possible) < len(self.cpus):
            kept = f"the CPUs {_ranges(possible)}" if possible else "any CPU"
            task.warn(f"{task} was bound to the CPUs {_ranges(self.cpus)}; here it may use {kept}")
        try:
            os.sched_setaffinity(task.tid, possible or here)
        except OSError as error:
            task.warn(f"{task} cannot be bound to the CPUs {_ranges(possible or here)}: {error}")


def _ranges(cpus: Iterable[int]) -> str:
    return ",".join(str(cpu) for cpu in sorted(cpus))


@register("io priority")
@dataclass(frozen=True, slots=True, kw_only=True)
class IoPriority(State):
    """Class, hint and level as ioprio_get returns them; 0: follows the niceness."""

    value: int

    def __post_init__(self) -> None:
        unsigned("io priority", self.value, _IOPRIO_BITS)

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        value = task.calls.call(SYS.ioprio_get, IoprioWho.PROCESS, 0, label="read the I/O priority")
        yield
        return cls(value=value.value)

    def stands(self, task: TaskBuilder) -> bool:
        try:
            return get_io_priority(task.tid) == self.value
        except OSError:
            return False

    def rebuild(self, task: TaskBuilder) -> None:
        task.outside.append(lambda: self._set(task))

    def _set(self, task: TaskBuilder) -> None:
        try:
            set_io_priority(task.tid, self.value)
        except OSError as error:
            task.warn(f"{task} cannot be given its I/O priority {self.value:#x}: {error}")


@register("timer slack")
@dataclass(frozen=True, slots=True, kw_only=True)
class TimerSlack(State):
    """By how many nanoseconds the kernel may delay the thread's sleeps, to wake several at once."""

    nanoseconds: int

    def __post_init__(self) -> None:
        bounded("timer slack", self.nanoseconds, 0, (1 << 63) - 1)

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        value = task.calls.call(SYS.prctl, Pr.GET_TIMERSLACK, label="read the timer slack")
        yield
        return cls(nanoseconds=value.value)

    def rebuild(self, task: TaskBuilder) -> None:
        # 0 is what a real-time thread shows, and would mean "back to the default" here.
        if self.nanoseconds:
            task.calls.call(SYS.prctl, Pr.SET_TIMERSLACK, self.nanoseconds, label="set the timer slack")
