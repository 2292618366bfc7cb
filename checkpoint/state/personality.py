"""The execution domain of a thread: ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC and other bits that change the kernel's ways.

Source: Linux kernel/exec_domain.c.  Rebuilt when the memory stands: READ_IMPLIES_EXEC changes what mmap does.
"""

from __future__ import annotations

from typing import Final, Self

from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register, unsigned
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["Personality"]

# the argument that makes personality(2) only answer
_QUERY: Final = 0xFFFFFFFF


@register("personality")
@dataclass(frozen=True, slots=True, kw_only=True)
class Personality(State):
    """The bits of <linux/personality.h>; 0 for nearly every process."""

    bits: int

    def __post_init__(self) -> None:
        unsigned("personality", self.bits, 32)
        if self.bits == _QUERY:
            raise ValueError("a personality of all ones cannot be set")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        bits = task.calls.call(SYS.personality, _QUERY, label="read the personality")
        yield
        return cls(bits=bits.value & _QUERY)

    def rebuild(self, task: TaskBuilder) -> None:
        task.calls.call(SYS.personality, self.bits, label="set the personality")
