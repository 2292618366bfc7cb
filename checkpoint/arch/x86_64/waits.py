"""System calls that wait for a relative time and of which the kernel keeps no note when they are interrupted: they are
begun again with what was left of it, in another argument.

That needs a register that the program does not look at any more (:mod:`checkpoint.arch.x86_64.liveness`): it does not
get it back.  A time that the argument points to is put where no program has anything, beyond the red zone of its stack,
and read by the kernel as soon as the thread goes on.

Source: fs/eventpoll.c, kernel/signal.c (do_sigtimedwait), ipc/sem.c, fs/aio.c.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Final

from checkpoint.arch.x86_64.liveness import unused
from checkpoint.arch.x86_64.registers import Registers, Restart
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["KERNEL_STACK_POINTER", "WAITS", "Wait", "may_change_time", "wait_of"]

#: where struct task_struct has the stack pointer of a thread that the kernel has switched away from
KERNEL_STACK_POINTER: Final = "thread.sp"

_RED_ZONE: Final = 128  # System V ABI AMD64, 3.2.2
_TIMESPEC: Final = struct.Struct("<qq")
_SECOND: Final = 1_000_000_000
_MILLISECOND: Final = 1_000_000
_LONGEST: Final = (1 << 31) - 1  # the milliseconds are an int
_INT: Final = (1 << 32) - 1
_NUMBERS: Final = {"rdx": 2, "r8": 8, "r10": 10}
_IN_MILLISECONDS: Final = frozenset({SYS.epoll_wait, SYS.epoll_pwait})
#: the same call with the time as a number
_PLAINER: Final = {int(SYS.epoll_pwait2): int(SYS.epoll_pwait)}
_TIMES: Final = {
    int(SYS.epoll_wait): "r10",
    int(SYS.epoll_pwait): "r10",
    int(SYS.epoll_pwait2): "r10",
    int(SYS.rt_sigtimedwait): "rdx",
    int(SYS.semtimedop): "r10",
    int(SYS.io_getevents): "r8",
}
#: the calls, by number
WAITS: Final = frozenset(_TIMES)


@dataclass(frozen=True, slots=True)
class Wait:
    """A call that waits for a time and was interrupted.

    number    of the call
    register  which one tells the time
    longest   nanoseconds that it asked for, if the register says it itself
    """

    number: int
    register: str
    longest: int | None

    def begun(self, registers: Registers, nanoseconds: int) -> tuple[Registers, int, bytes]:
        """(registers with which it waits so long, not less; an address, and what must lie there: maybe nothing)."""
        if self.number in _IN_MILLISECONDS or self.number in _PLAINER:
            time, data = min(-(-nanoseconds // _MILLISECOND), _LONGEST), b""
        else:
            time = registers.sp - _RED_ZONE - _TIMESPEC.size & ~(_TIMESPEC.size - 1)
            data = _TIMESPEC.pack(*divmod(nanoseconds, _SECOND))
        call = _PLAINER.get(self.number, self.number)
        return dataclasses.replace(registers, orig_rax=call, **{self.register: time}), time if data else 0, data


def may_change_time(read: Callable[[int, int], bytes], number: int, ip: int) -> bool:
    """Whether a program that is in one of WAITS does not look again at the register that tells the time.

    read    of its memory (address, size)
    number  of the call, and the instruction after it
    """
    return unused(read, ip, _NUMBERS[_TIMES[number]])


def wait_of(registers: Registers) -> Wait | None:
    """The wait that a stopped thread is in (``registers``: what it goes on with); None if in none, or in one without an
    end."""
    number = registers.call
    if registers.result != Restart.NOHAND or number not in _TIMES:
        return None
    register = _TIMES[number]
    time: int = getattr(registers, register)
    if number not in _IN_MILLISECONDS:
        return Wait(number, register, None) if time else None
    time &= _INT
    return Wait(number, register, time * _MILLISECOND) if 0 < time <= _LONGEST else None
