"""System calls that sleep for a relative time, and how one is begun again with what is left of that time.

The kernel remembers of such a call, when it is interrupted, when it would have ended (a *restart block*, one for each
thread); all that the registers say is that there is one.  In a rebuilt thread the same call is begun with the time that
is left and interrupted at once: then the kernel has such a note there, too, and goes on with it as if nothing had been.

Source: include/linux/restart_block.h; kernel/time/hrtimer.c, kernel/futex/waitwake.c, fs/select.c.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from checkpoint.arch.sleeps import FUTEX_PRIVATE, FUTEX_WAIT, TIMER_ABSTIME, Note, Sleep
from checkpoint.arch.x86_64.engine import ENGINE
from checkpoint.arch.x86_64.registers import Registers, Restart
from tcpstate.kernel.machine import SYS

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
CALL_AT: Final = ENGINE.index(b"\x0f\x05")

_NO_CALL: Final = (1 << 64) - 1


def sleep_of(registers: Registers, call: int | None) -> Sleep | None:
    """The sleep that a stopped thread is in; None if it is in none, or in one without an end or until a fixed time.

    call  which system call it was stopped in
    """
    if registers.result != Restart.BLOCK or registers.call is None:
        return None
    args = (registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9)
    match call:
        case SYS.nanosleep:
            return Sleep(Note.NANOSLEEP, call, args, 0)
        case SYS.clock_nanosleep if not registers.rsi & TIMER_ABSTIME:
            return Sleep(Note.NANOSLEEP, call, args, 2)
        case SYS.poll:
            return Sleep(Note.POLL, call, args, 2)
        case SYS.futex if registers.rsi & ~FUTEX_PRIVATE == FUTEX_WAIT and registers.r10:
            return Sleep(Note.FUTEX, call, args, 3)
    return None


def known_again(registers: Registers, noted: Mapping[str, int]) -> int | None:
    """Which call a thread is in that was stopped in it before, so that the kernel has only ``restart_syscall``: the one
    whose arguments, which are still in the registers, the kernel has in its note. None if it cannot be told.

    noted  members of struct restart_block, by name
    """
    if registers.call != SYS.restart_syscall or registers.result != Restart.BLOCK or not noted:
        return None
    word = (1 << 32) - 1
    found = []
    plain_wait = registers.rsi & ~FUTEX_PRIVATE == FUTEX_WAIT
    if plain_wait and (registers.rdi, registers.rdx & word) == (noted["uaddr"], noted["val"]):
        found.append(SYS.futex)
    if (registers.rdi, registers.rsi & word) == (noted["ufds"], noted["nfds"] & word):
        found.append(SYS.poll)
    if registers.rsi and registers.rsi == noted["rmtp"]:
        found.append(SYS.nanosleep)
    if registers.r10 and registers.r10 == noted["rmtp"] and not registers.rsi & TIMER_ABSTIME:
        found.append(SYS.clock_nanosleep)
    return int(found[0]) if len(found) == 1 else None


def beginning(registers: Registers, at: int, number: int, args: tuple[int, ...]) -> Registers:
    """Registers with which a thread makes a call by the instruction at ``at``."""
    rdi, rsi, rdx, r10, r8, r9 = args
    return dataclasses.replace(registers.moved(at), rax=number, rdi=rdi, rsi=rsi, rdx=rdx, r10=r10, r8=r8, r9=r9)


def entering(registers: Registers) -> int | None:
    """The number of the call that a thread is about to make, of the registers at the stop before it."""
    return registers.call


def begun(registers: Registers, at: int) -> int:
    """What a call by the instruction at ``at`` has returned that was interrupted at once: BLOCK if the kernel has a
    note of it."""
    return registers.result


def asleep(registers: Registers, call: int, result: int) -> Registers:
    """What a thread goes on with after the ``call`` was begun again: asleep, or with what it has returned.

    registers  as they were when the original was stopped in it
    """
    if result == Restart.BLOCK:
        return dataclasses.replace(registers, orig_rax=call).returning(result)
    return dataclasses.replace(registers, orig_rax=_NO_CALL).returning(result)
