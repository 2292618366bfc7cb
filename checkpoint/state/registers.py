"""The registers of a thread, and the signals that it blocks: set by ptrace as the last thing before it runs.

A system call that the stop interrupted is made again: ``arch.for_restore`` has adjusted the registers for a thread that
the kernel knows no restart block of.  What is approximate there: a relative sleep whose remaining time nobody wrote
down (nanosleep without a second argument, a futex wait with a time-out) sleeps its whole time once more.

Source: PTRACE_GETREGSET; Linux arch/*/kernel/ptrace.c.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from checkpoint import arch
from checkpoint.errors import ExtendedStateForeign, MachineForeign
from checkpoint.state.base import State, TaskBuilder, TaskView, register, unsigned

if TYPE_CHECKING:
    from checkpoint import tracee

__all__ = ["Registers", "install"]


@register("registers")
@dataclass(frozen=True, slots=True, kw_only=True)
class Registers(State):
    """All that the CPU holds of a thread.

    machine   whose registers they are, as uname(2) names it
    general   the general registers, as ``arch.Registers`` packs them
    extended  floating point and vector registers, as ptrace shows them
    layout    where ``extended`` has which component, on the CPU that it comes from
    blocked   signals, bit n-1 for signal n
    """

    machine: str
    general: bytes
    extended: bytes
    layout: tuple[arch.Component, ...]
    blocked: int

    def __post_init__(self) -> None:
        unsigned("blocked signals", self.blocked)

    @classmethod
    def capture(cls, task: TaskView) -> Self:
        return cls(
            machine=os.uname().machine,
            general=arch.for_restore(task.thread.registers, call=task.thread.call).pack(),
            extended=task.thread.get_xstate(),
            layout=arch.xstate_layout(),
            blocked=task.thread.sigmask,
        )

    def rebuild(self, task: TaskBuilder) -> None:
        """Only checks: :func:`install` sets them when nothing is to run in the thread any more."""
        if self.machine != os.uname().machine:
            raise MachineForeign(f"the registers are those of {self.machine}", object=str(task))


def install(thread: tracee.Thread, state: Registers) -> None:
    """Give a stopped thread its registers and its mask. Nothing may be run inside it afterwards.

    ExtendedStateForeign if this CPU lacks what ``extended`` holds, or it holds what no CPU would.
    """
    own = thread.get_xstate()
    try:
        thread.set_xstate(arch.convert_xstate(state.extended, state.layout, own))
    except OSError as error:
        raise ExtendedStateForeign(
            f"the kernel refuses the extended registers: {error.strerror}", object=thread.name
        ) from error
    thread.set_registers(arch.Registers.unpack(state.general))
    thread.set_sigmask(state.blocked)
