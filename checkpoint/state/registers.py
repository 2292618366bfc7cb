"""The registers of a thread, and the signals that it blocks: set by ptrace as the last thing before it runs.

A system call that the stop interrupted is made again: ``arch.for_restore`` has adjusted the registers for a thread that
the kernel knows no restart block of.  A sleep for a relative time is begun again with the time that was left of it, and
interrupted at once: then the kernel has its restart block again.  Of other calls it keeps no note; those begin anew
with what was left, which was looked at before the stop (:mod:`checkpoint.waiting`).  Only where the source's kernel did
not tell that time does a sleep of which nobody wrote it down (nanosleep without a second argument, a futex wait with a
time-out) last its whole time once more.

Source: PTRACE_GETREGSET; Linux arch/*/kernel/ptrace.c.
"""

from __future__ import annotations

import functools
import os
import time
from typing import TYPE_CHECKING, Final, Self

from checkpoint import arch
from checkpoint.errors import ExtendedStateForeign, MachineForeign
from checkpoint.kernel import restart_block
from checkpoint.state.base import State, TaskBuilder, TaskView, bounded, register, unsigned
from checkpoint.telling import call_in_vdso, tell
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint import tracee
    from checkpoint.spawn import Stub

__all__ = ["Registers", "fall_asleep", "install"]

#: a struct pollfd with the descriptor -1, which is left out
_NOTHING: Final = 0xFFFFFFFF
#: no process has more: fs.nr_open's largest useful value
_MOST_DESCRIPTORS: Final = 1 << 20
#: nanoseconds that a sleep lasts at least when it is begun again
_SHORTEST: Final = 1_000_000


@functools.cache
def _machine() -> str:
    """As uname(2) names it."""
    return os.uname().machine


@register("registers")
@dataclass(frozen=True, slots=True, kw_only=True)
class Registers(State):
    """All that the CPU holds of a thread.

    machine   whose registers they are, as uname(2) names it
    general   the general registers, as ``arch.Registers`` packs them
    extended  floating point and vector registers, as ptrace shows them
    layout    where ``extended`` has which component, on the CPU that it comes from
    blocked   signals, bit n-1 for signal n
    call      the system call with a relative time-out that it was stopped in; None: it was in none, or nobody knows
    left      nanoseconds that were left of it
    asleep    the general registers as they were in it
    """

    machine: str
    general: bytes
    extended: bytes
    layout: tuple[arch.Component, ...]
    blocked: int
    call: int | None = None
    left: int = 0
    asleep: bytes = b""

    def __post_init__(self) -> None:
        unsigned("blocked signals", self.blocked)
        bounded("left", self.left, 0, (1 << 63) - 1)
        if self.call is not None:
            bounded("call", self.call, 0, (1 << 31) - 1)

    @classmethod
    def capture(cls, task: TaskView) -> Self:
        registers, call = task.thread.registers, task.thread.call
        if call is None and registers.call is not None:
            call = arch.known_again(registers, restart_block.noted(task.tid))
        sleep = arch.sleep_of(registers, call)
        left = None if sleep is None else restart_block.left(task.tid, sleep.note)
        if sleep is None and task.thread.until is not None:
            left = task.thread.until - time.monotonic_ns()
        known = left is not None
        return cls(
            machine=_machine(),
            general=arch.for_restore(registers, left, call).pack(),
            extended=task.thread.get_xstate(),
            layout=arch.xstate_layout(),
            blocked=task.thread.sigmask,
            call=call if known else None,
            left=0 if left is None else max(left, 0),
            asleep=registers.pack() if known else b"",
        )

    def interrupted(self) -> arch.Sleep | None:
        """The sleep that is to be begun again. ForeignMode if the registers are not this machine's."""
        return None if self.call is None else arch.sleep_of(arch.Registers.unpack(self.asleep), self.call)

    def rebuild(self, task: TaskBuilder) -> None:
        """Only checks: :func:`install` sets them when nothing is to run in the thread any more."""
        if self.machine != _machine():
            raise MachineForeign(f"the registers are those of {self.machine}", object=str(task))


def fall_asleep(stub: Stub, thread: tracee.Thread, state: Registers, elapsed: int) -> None:
    """Begin the sleep again that the original was stopped in, so that the kernel has a note of it; :func:`install`
    makes the thread go on in it.

    The last that is done in the thread before the stub is left; its memory and files are there.

    elapsed  nanoseconds since the capture
    """
    sleep = state.interrupted()
    if sleep is None:
        if state.call is not None:
            thread.until = time.monotonic_ns() + max(state.left - elapsed, 0)
        return
    # not none at all: that would be another call to poll, and no sleep to nobody
    args, data = sleep.with_time(max(state.left - elapsed, _SHORTEST), stub.spare)
    stub.write(stub.spare, data)
    address, count = sleep.descriptors
    if count > _MOST_DESCRIPTORS:
        return
    looked_at = stub.read(address, count * arch.POLLFD_SIZE) if count else b""
    if looked_at:
        # What it would find now is not what it will find: connections are not there yet.  So it looks at nothing; when
        # it goes on, the kernel reads again what to look at.
        stub.write(address, _NOTHING.to_bytes(arch.POLLFD_SIZE, "little") * count)
    rest, size = sleep.rest
    written = stub.read(rest, size)
    try:
        result = stub.interrupted(thread, sleep.number, args)
    finally:
        if looked_at:
            stub.write(address, looked_at)
        if written:
            stub.write(rest, written)
    if result == arch.BLOCK or not looked_at:
        thread.slept = result


def install(thread: tracee.Thread, state: Registers, own: bytes) -> None:
    """Give a stopped thread its registers and its mask. Nothing may be run inside it afterwards.

    own  the extended registers of some thread here, for their layout

    ExtendedStateForeign if this CPU lacks what ``extended`` holds, or it holds what no CPU would.
    """
    try:
        thread.set_xstate(arch.convert_xstate(state.extended, state.layout, own))
    except OSError as error:
        raise ExtendedStateForeign(
            f"the kernel refuses the extended registers: {error.strerror}", object=thread.name
        ) from error
    if thread.slept is not None and state.call is not None:
        thread.set_registers(arch.asleep(arch.Registers.unpack(state.asleep), state.call, thread.slept))
    else:
        registers = arch.Registers.unpack(state.general)
        if registers.untold:
            tell(thread, registers, call_in_vdso(thread.pid), state.blocked)
            return
        thread.set_registers(registers)
    thread.set_sigmask(state.blocked)
