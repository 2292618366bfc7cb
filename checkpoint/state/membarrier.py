"""Which kinds of membarrier(2) the process has registered for.

A program that registered once uses the barriers without looking at their result.  Kernels from 6.3 tell what was
registered; for a process from an older one everything is registered that this kernel has, which costs nothing but a
little time at each change of process.

Source: Linux kernel/sched/membarrier.c, include/uapi/linux/membarrier.h.
"""

from __future__ import annotations

import enum
from typing import Self

from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["Membarrier", "MembarrierCommand"]


class MembarrierCommand(enum.IntFlag):
    """The commands that register, and the one that tells them."""

    REGISTER_GLOBAL_EXPEDITED = 1 << 2
    REGISTER_PRIVATE_EXPEDITED = 1 << 4
    REGISTER_PRIVATE_EXPEDITED_SYNC_CORE = 1 << 6
    REGISTER_PRIVATE_EXPEDITED_RSEQ = 1 << 8
    GET_REGISTRATIONS = 1 << 9


_REGISTER = (
    MembarrierCommand.REGISTER_GLOBAL_EXPEDITED,
    MembarrierCommand.REGISTER_PRIVATE_EXPEDITED,
    MembarrierCommand.REGISTER_PRIVATE_EXPEDITED_SYNC_CORE,
    MembarrierCommand.REGISTER_PRIVATE_EXPEDITED_RSEQ,
)


@register("membarrier")
@dataclass(frozen=True, slots=True, kw_only=True)
class Membarrier(State):
    """``registered``: bits of MembarrierCommand; None if the kernel could not tell."""

    registered: int | None

    def __post_init__(self) -> None:
        if self.registered is not None and self.registered & ~sum(_REGISTER):
            raise ValueError(f"unknown membarrier registrations {self.registered:#x}")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        known = task.calls.call(SYS.membarrier, MembarrierCommand.GET_REGISTRATIONS, 0, 0, ignore=True)
        yield
        return cls(registered=known.value & sum(_REGISTER) if known.ok else None)

    def rebuild(self, task: TaskBuilder) -> None:
        for command in _REGISTER:
            if self.registered is None or self.registered & command:
                label = f"register membarrier {command.name}"
                task.calls.call(SYS.membarrier, command, 0, 0, ignore=self.registered is None, label=label)
