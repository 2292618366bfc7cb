"""Addresses that a thread has given to the kernel, for it to write to or read from on its own.

Source: Linux kernel/futex/syscalls.c (robust list), kernel/fork.c (clear_child_tid), kernel/rseq.c.
"""

from __future__ import annotations

from typing import Self

from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register, unsigned
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr
from tcpstate.slotted import dataclass

__all__ = ["ClearChildTid", "RestartableSequences", "RobustList"]


@register("robust list")
@dataclass(frozen=True, slots=True, kw_only=True)
class RobustList(State):
    """The list of robust futexes that the kernel releases when the thread dies; head 0: none.

    length  bytes of its head, as the C library told the kernel
    """

    head: int
    length: int

    def __post_init__(self) -> None:
        unsigned("robust list", self.head)
        unsigned("length of the robust list's head", self.length)

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        room = task.calls.room(16)
        task.calls.call(SYS.get_robust_list, 0, room, room + 8, label="read the robust list")
        yield
        return cls(head=room.u64(), length=room.u64(8))

    def rebuild(self, task: TaskBuilder) -> None:
        if self.head:
            task.calls.call(SYS.set_robust_list, self.head, self.length, label="set the robust list")


@register("clear child tid")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClearChildTid(State):
    """Where the kernel writes zero, and wakes a futex, when the thread ends: what pthread_join waits for."""

    address: int

    def __post_init__(self) -> None:
        unsigned("clear_child_tid", self.address)

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        room = task.calls.room(8)
        task.calls.call(SYS.prctl, Pr.GET_TID_ADDRESS, room, label="read clear_child_tid")
        yield
        return cls(address=room.u64())

    def rebuild(self, task: TaskBuilder) -> None:
        task.calls.call(SYS.set_tid_address, self.address, label="set clear_child_tid")


@register("restartable sequences")
@dataclass(frozen=True, slots=True, kw_only=True)
class RestartableSequences(State):
    """The thread's struct rseq, which the kernel tells its CPU; address 0: none registered.

    The memory must be mapped when this is rebuilt.  A thread stopped inside a critical section has been sent to the
    section's abort handler by :mod:`checkpoint.tracee`.

    size       bytes, as registered
    signature  that stands before each abort handler
    """

    address: int
    size: int
    signature: int

    def __post_init__(self) -> None:
        unsigned("rseq address", self.address)
        unsigned("rseq size", self.size, 32)
        unsigned("rseq signature", self.signature, 32)

    @classmethod
    def capture(cls, task: TaskView) -> Self:
        config = task.thread.rseq
        if config is None:
            return cls(address=0, size=0, signature=0)
        return cls(address=config.address, size=config.size, signature=config.signature)

    def rebuild(self, task: TaskBuilder) -> None:
        if self.address:
            task.calls.call(SYS.rseq, self.address, self.size, 0, self.signature, label="register the rseq area")
