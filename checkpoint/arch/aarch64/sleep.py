"""System calls that sleep for a relative time, and how one is begun again with what is left of that time.

As on x86-64, but that there is no poll: ppoll writes down what is left of its time, and begins again with that.

Source: include/linux/restart_block.h; kernel/time/hrtimer.c, kernel/futex/waitwake.c, fs/select.c (ppoll).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from checkpoint.arch.aarch64.engine import ENGINE
from checkpoint.arch.aarch64.registers import SVC, Registers, Restart
from checkpoint.arch.sleeps import FUTEX_PRIVATE, FUTEX_WAIT, TIMER_ABSTIME, Note, Sleep
from tcpstate.kernel.machine.aarch64 import SYS

__all__ = [
    "BLOCK",
    "CALL_AT",
    "asleep",
    "beginning",
    "begun",
    "entering",
    "known_again",
    "sleep_of",
]

#: what an interrupted call returns of which the kernel has a note
BLOCK: Final = int(Restart.BLOCK)
#: where in an engine there is an instruction that makes a system call
CALL_AT: Final = ENGINE.index(SVC)


def sleep_of(registers: Registers, call: int | None) -> Sleep | None:
    """The sleep that a stopped thread is in; None if it is in none, or in one without an end or until a fixed time.

    call  which system call it was stopped in
    """
    if registers.code != Restart.BLOCK:
        return None
    args = registers.x[:6]
    match call:
        case SYS.nanosleep:
            return Sleep(Note.NANOSLEEP, call, args, 0)
        case SYS.clock_nanosleep if not args[1] & TIMER_ABSTIME:
            return Sleep(Note.NANOSLEEP, call, args, 2)
        case SYS.futex if args[1] & ~FUTEX_PRIVATE == FUTEX_WAIT and args[3]:
            return Sleep(Note.FUTEX, call, args, 3)
    return None


def known_again(registers: Registers, noted: Mapping[str, int]) -> int | None:
    """Which call a thread is in that was stopped in it before, so that x8 has only ``restart_syscall``: the one whose
    arguments, which are still in the registers, the kernel has in its note. None if it cannot be told.

    noted  members of struct restart_block, by name
    """
    if registers.call != SYS.restart_syscall or not noted:
        return None
    x, word = registers.x, (1 << 32) - 1
    found = []
    if x[1] & ~FUTEX_PRIVATE == FUTEX_WAIT and (x[0], x[2] & word) == (noted["uaddr"], noted["val"]):
        found.append(SYS.futex)
    if x[1] and x[1] == noted["rmtp"]:
        found.append(SYS.nanosleep)
    if x[3] and x[3] == noted["rmtp"] and not x[1] & TIMER_ABSTIME:
        found.append(SYS.clock_nanosleep)
    return int(found[0]) if len(found) == 1 else None


def beginning(registers: Registers, at: int, number: int, args: tuple[int, ...]) -> Registers:
    """Registers with which a thread makes a call by the instruction at ``at``."""
    return registers.moved(at).with_x({8: number, **dict(enumerate(args))})


def entering(registers: Registers) -> int:
    """The number of the call that a thread is about to make, of the registers at the stop before it."""
    return registers.number


def begun(registers: Registers, at: int) -> int:
    """What a call by the instruction at ``at`` has returned that was interrupted at once: BLOCK if the kernel has a
    note of it."""
    return BLOCK if registers.pc == at else registers.result


def asleep(registers: Registers, call: int, result: int) -> Registers:
    """What a thread goes on with after the ``call`` was begun again: asleep, or with what it has returned.

    registers  as they were when the original was stopped in it
    """
    if result == Restart.BLOCK:
        # a handler that runs first makes the kernel forget its note, and restart_syscall then answers EINTR: as it must
        return dataclasses.replace(registers.with_x({8: int(SYS.restart_syscall)}), code=Restart.BLOCK)
    return registers.ended(result)
