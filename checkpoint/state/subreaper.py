"""Whether orphans among a process's descendants become its children.

Source: Linux kernel/sys.c, PR_SET_CHILD_SUBREAPER.
"""

from __future__ import annotations

from typing import Self

from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr
from tcpstate.slotted import dataclass

__all__ = ["ChildSubreaper"]


@register("child subreaper")
@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSubreaper(State):
    """The attribute of the process; descendants do not inherit it, but remember that they have such an ancestor."""

    enabled: bool

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        flag = task.calls.room(8)
        task.calls.call(SYS.prctl, Pr.GET_CHILD_SUBREAPER, flag, label="read the subreaper attribute")
        yield
        return cls(enabled=flag.u32() != 0)

    def rebuild(self, task: TaskBuilder) -> None:
        task.calls.call(SYS.prctl, Pr.SET_CHILD_SUBREAPER, int(self.enabled), label="set the subreaper attribute")
