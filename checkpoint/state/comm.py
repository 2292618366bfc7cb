"""The name of a thread, and of the process if the thread leads it: what ps and top show.

Source: Linux kernel/sys.c, PR_SET_NAME; 15 bytes of any value but zero.
"""

from __future__ import annotations

from typing import Final, Self

from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr
from tcpstate.slotted import dataclass

__all__ = ["Comm"]

#: TASK_COMM_LEN, include/linux/sched.h
COMM_SIZE: Final = 16


@register("comm")
@dataclass(frozen=True, slots=True, kw_only=True)
class Comm(State):
    """The name, without its closing zero byte."""

    name: bytes

    def __post_init__(self) -> None:
        if len(self.name) >= COMM_SIZE or b"\0" in self.name:
            raise ValueError("a thread's name is 0 to 15 bytes without a zero")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        # Not from /proc/PID/task/TID/comm: one call among many costs a thirtieth of a file.
        name = task.calls.room(COMM_SIZE)
        task.calls.call(SYS.prctl, Pr.GET_NAME, name, label="read the thread's name")
        yield
        return cls(name=name.bytes().split(b"\0", 1)[0])

    def rebuild(self, task: TaskBuilder) -> None:
        task.calls.call(SYS.prctl, Pr.SET_NAME, task.calls.put(self.name + b"\0"), label="set the thread's name")
