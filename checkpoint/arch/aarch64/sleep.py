"""System calls that sleep for a relative time, and how one is begun again with what is left of that time.

As on x86-64, but that there is no poll: ppoll writes down what is left of its time, and begins again with that.

Source: include/linux/restart_block.h; kernel/time/hrtimer.c, kernel/futex/waitwake.c, fs/select.c (ppoll).
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from checkpoint.arch.aarch64.engine import ENGINE
from checkpoint.arch.aarch64.registers import SVC, Registers, Restart
from tcpstate.kernel.machine.aarch64 import SYS

__all__ = [
    "BLOCK",
    "CALL_AT",
    "POLLFD_SIZE",
    "Note",
    "Sleep",
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
#: bytes of a struct pollfd; the descriptor is its first four
POLLFD_SIZE: Final = 8

_TIMER_ABSTIME: Final = 1
_FUTEX_WAIT: Final = 0  # include/uapi/linux/futex.h; its time-out is relative, that of FUTEX_WAIT_BITSET is not
_FUTEX_PRIVATE: Final = 0x80
_SECOND: Final = 1_000_000_000
_TIMESPEC: Final = struct.Struct("<qq")


class Note(enum.Enum):
    """Which part of struct restart_block the kernel has used."""

    NANOSLEEP = "nanosleep"
    POLL = "poll"  # on other machines
    FUTEX = "futex"


@dataclass(frozen=True, slots=True)
class Sleep:
    """A call that was interrupted.

    note    where its end stands
    number  of the call, and its six ``args``
    time    which argument says how long: the address of a struct timespec
    """

    note: Note
    number: int
    args: tuple[int, ...]
    time: int

    @property
    def descriptors(self) -> tuple[int, int]:
        """(address, number) of the struct pollfd that it looks at: none."""
        return (0, 0)

    @property
    def rest(self) -> tuple[int, int]:
        """(address, bytes) of where the kernel writes, each time it is interrupted, how much is left."""
        address = self.args[self.time + 1] if self.note is Note.NANOSLEEP else 0
        return (address, _TIMESPEC.size) if address else (0, 0)

    def with_time(self, nanoseconds: int, timespec_at: int) -> tuple[tuple[int, ...], bytes]:
        """The arguments with another time, and the bytes that must lie at ``timespec_at``."""
        data = _TIMESPEC.pack(*divmod(nanoseconds, _SECOND))
        return (*self.args[: self.time], timespec_at, *self.args[self.time + 1 :]), data


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
        case SYS.clock_nanosleep if not args[1] & _TIMER_ABSTIME:
            return Sleep(Note.NANOSLEEP, call, args, 2)
        case SYS.futex if args[1] & ~_FUTEX_PRIVATE == _FUTEX_WAIT and args[3]:
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
    if x[1] & ~_FUTEX_PRIVATE == _FUTEX_WAIT and (x[0], x[2] & word) == (noted["uaddr"], noted["val"]):
        found.append(SYS.futex)
    if x[1] and x[1] == noted["rmtp"]:
        found.append(SYS.nanosleep)
    if x[3] and x[3] == noted["rmtp"] and not x[1] & _TIMER_ABSTIME:
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
