"""General registers of aarch64, and what becomes of a system call that a stop has interrupted.

When a thread is about to stop, the kernel has already undone a call that is to be made again: the first argument is
back in x0, and the program counter at the ``svc``.  How the call had ended, which decides what a signal's handler does
to it, is a local variable of the kernel.  So:

- a thread that stands before the ``svc`` of a call that can wait counts as stopped in that call, with the
  :class:`Restart` that such a call ends with.  If it had not begun it yet, that is the same as to be stopped at once;
- whether the kernel has a *note* of a sleep (a restart block) nobody can see.  A thread that may be in one is let into
  its call once more and stopped in it at once (:func:`hides_note`): if there is a note the kernel goes on with that, by
  ``restart_syscall``, and leaves the number of that call in x8;
- a call that answers EINTR to a stop by itself (epoll_pwait, see signal(7)) has lost its first argument but for the
  kernel, which is asked for it (:mod:`checkpoint.kernel.origx0`);
- when other calls were made in between, the kernel is told again how the call had ended, in the one stop where that is
  possible (:mod:`checkpoint.telling`).

Source: arch/arm64/kernel/signal.c (do_signal), arch/arm64/include/uapi/asm/ptrace.h (struct user_pt_regs), signal(7).
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import struct
from collections.abc import Callable, Iterable
from typing import Final, Self

from checkpoint.errors import ForeignMode
from checkpoint.kernel import origx0
from tcpstate.kernel.machine.aarch64 import SYS
from tcpstate.slotted import dataclass

__all__ = [
    "AUDIT_ARCH",
    "CODE_BEFORE",
    "SVC",
    "Registers",
    "Restart",
    "behind_call",
    "by_hand",
    "for_restore",
    "going_on",
    "hides_note",
    "in_its_call",
    "interrupted_in",
    "require_native",
    "restarted_call",
    "told",
]

#: what seccomp filters know this machine as: AUDIT_ARCH_AARCH64 of include/uapi/linux/audit.h
AUDIT_ARCH: Final = 0xC00000B7
#: bytes before the instruction pointer that restarted_call() looks at: it stands at the call's instruction
CODE_BEFORE: Final = 32
#: the instruction ``svc 0``
SVC: Final = bytes.fromhex("010000d4")

_MASK: Final = (1 << 64) - 1
_REGISTERS = struct.Struct("<34Q")
_WHOLE = struct.Struct("<34Qq")
_COUNT: Final = 31
_MODE: Final = 0x1F  # of pstate: PSR_MODE_MASK with PSR_MODE32_BIT; EL0, 64 bit, is 0
_BRANCH_TYPE: Final = 0xC00  # of pstate: PSR_BTYPE_MASK; after a jump only some instructions may come in a guarded page
_STEP: Final = 1 << 21  # of pstate: DBG_SPSR_SS
_NUMBER: Final = 8  # the register with the number of a call
_INSTRUCTION = struct.Struct("<I")
_TIMER_ABSTIME = 1
#: movz x8, number and movz w8, number: all but the number
_MOVES: Final = (0xD2800008, 0x52800008)
_MOVE_MASK: Final = 0xFFE0001F


class Restart(enum.IntEnum):
    """Results that never reach a program: the kernel's notes on how to restart (include/linux/errno.h)."""

    SYS = -512  # ERESTARTSYS: restart, unless a handler without SA_RESTART runs
    NOHAND = -514  # ERESTARTNOHAND: restart, unless a handler runs
    BLOCK = -516  # ERESTART_RESTARTBLOCK: like NOHAND, by restart_syscall with what the kernel has noted


_CODES: Final = frozenset(Restart)
# Calls that return EINTR when a thread is stopped and continued, where they should restart: signal(7), "Interruption of
# system calls and library functions by stop signals", and the calls on sockets with a time-out set by SO_RCVTIMEO or
# SO_SNDTIMEO (sock_intr_errno in include/net/sock.h).  Of all of them EINTR says that nothing was done.
_SPURIOUS: Final = frozenset(
    {
        *(SYS.epoll_pwait, SYS.epoll_pwait2, SYS.io_getevents, SYS.semop, SYS.semtimedop, SYS.rt_sigtimedwait),
        *(SYS.read, SYS.readv, SYS.write, SYS.writev, SYS.recvfrom, SYS.recvmsg, SYS.recvmmsg, SYS.sendto, SYS.sendmsg),
        *(SYS.sendmmsg, SYS.accept, SYS.accept4, SYS.connect, SYS.sendfile, SYS.splice),
    }
)
#: calls that a signal's handler may end with EINTR; with NOHAND whatever the handler's flags are
_NOHAND: Final = frozenset(
    {
        *(SYS.ppoll, SYS.pselect6, SYS.rt_sigsuspend, SYS.nanosleep, SYS.clock_nanosleep, SYS.msgsnd, SYS.msgrcv),
        *(SYS.epoll_pwait, SYS.epoll_pwait2, SYS.io_getevents, SYS.semop, SYS.semtimedop, SYS.rt_sigtimedwait),
    }
)
#: and those with SYS. All others run to their end, or begin again without anybody knowing
_WAITING: Final = frozenset(
    {
        *(SYS.read, SYS.readv, SYS.preadv, SYS.preadv2, SYS.write, SYS.writev, SYS.pwritev, SYS.pwritev2),
        *(SYS.openat, SYS.openat2, SYS.ioctl, SYS.fcntl, SYS.flock, SYS.wait4, SYS.waitid, SYS.futex, SYS.futex_waitv),
        *(SYS.accept, SYS.accept4, SYS.connect, SYS.sendto, SYS.sendmsg, SYS.sendmmsg, SYS.recvfrom, SYS.recvmsg),
        *(SYS.recvmmsg, SYS.sendfile, SYS.splice, SYS.tee, SYS.vmsplice, SYS.copy_file_range, SYS.getrandom),
    }
)
#: calls of which the kernel may have a note
_RESTARTED_BY_BLOCK: Final = frozenset({SYS.nanosleep, SYS.clock_nanosleep, SYS.futex})
_FUTEX_WAIT: Final = 0  # include/uapi/linux/futex.h; its time-out is relative, that of FUTEX_WAIT_BITSET is not
_FUTEX_WAITS: Final = frozenset({0, 9})  # FUTEX_WAIT, FUTEX_WAIT_BITSET; the others restart always, or do not wait
_FUTEX_COMMAND: Final = 0x7F  # without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME


@dataclass(frozen=True, slots=True)
class Registers:
    """struct user_pt_regs, and how the call that the thread stands before was ended by the stop.

    x      x0 to x30
    code   a :class:`Restart`; 0: it is in no call
    """

    x: tuple[int, ...]
    sp: int
    pc: int
    pstate: int
    code: int = 0

    def pack(self) -> bytes:
        """All of it."""
        return _WHOLE.pack(*self.x, self.sp, self.pc, self.pstate, self.code)

    def in_set(self) -> bytes:
        """The bytes of the register set."""
        return _REGISTERS.pack(*self.x, self.sp, self.pc, self.pstate)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From the bytes of :meth:`pack`, or of the register set. ForeignMode if they are neither."""
        if len(data) == _WHOLE.size:
            words = _WHOLE.unpack(data)
            if words[-1] in _CODES or words[-1] == 0:
                return cls(words[:_COUNT], *words[_COUNT:])
        if len(data) != _REGISTERS.size:
            raise ForeignMode(f"a register set of {len(data)} bytes is not a 64-bit one")
        words = _REGISTERS.unpack(data)
        return cls(words[:_COUNT], *words[_COUNT:])

    @property
    def ip(self) -> int:
        """The instruction pointer."""
        return self.pc

    @property
    def call(self) -> int | None:
        """The number of the system call that the thread was stopped in; None if it was in none."""
        return self.number if self.code else None

    @property
    def number(self) -> int:
        """The number of the call that is made, if one is made."""
        return self.x[_NUMBER] & 0xFFFFFFFF

    @property
    def result(self) -> int:
        """What the call has returned, negative: -errno or a :class:`Restart`."""
        if self.code:
            return self.code
        return self.x[0] - (1 << 64) if self.x[0] >> 63 else self.x[0]

    @property
    def untold(self) -> bool:
        """Whether the kernel, once it has forgotten how the call had ended, must be told."""
        return self.code in (Restart.SYS, Restart.NOHAND)

    def moved(self, ip: int) -> Self:
        """The same with another instruction pointer, and no system call to be restarted."""
        return dataclasses.replace(self, pc=ip, pstate=self.pstate & ~_BRANCH_TYPE, code=0)

    def with_x(self, values: dict[int, int]) -> Self:
        """The same with other values of x0 to x30, by their numbers."""
        return dataclasses.replace(self, x=tuple(values.get(number, old) for number, old in enumerate(self.x)))

    def ended(self, result: int) -> Self:
        """The same behind the call, which has returned ``result``."""
        return dataclasses.replace(self.with_x({0: result & _MASK}), pc=self.pc + len(SVC), code=0)

    def not_stepping(self) -> Self:
        """The same without the mark of a step."""
        return dataclasses.replace(self, pstate=self.pstate & ~_STEP)


def require_native(registers: Registers, owner: str) -> None:
    """ForeignMode if the thread (``owner`` names it) runs 32-bit code."""
    if registers.pstate & _MODE:
        raise ForeignMode("it runs 32-bit code", object=owner)


def hides_note(registers: Registers, read: Callable[[int, int], bytes]) -> int | None:
    """The number of the call that a thread stands before and of which the kernel may have a note that nobody can see;
    None if there is none.

    read  bytes of its memory, by address and length; OSError
    """
    number = registers.number
    if number not in _RESTARTED_BY_BLOCK or _sleeps_for(registers, number) is None:
        return None
    return number if _code(registers.pc, read) == SVC else None


def _sleeps_for(registers: Registers, number: int) -> int | None:
    """The number of the call if it is one for a relative time."""
    x = registers.x
    if number == SYS.nanosleep or (number == SYS.clock_nanosleep and not x[1] & _TIMER_ABSTIME):
        return number
    if number == SYS.futex and x[1] & 0xFFFFFFFF & ~0x80 == _FUTEX_WAIT and x[3]:
        return number
    return None


def _code(at: int, read: Callable[[int, int], bytes]) -> bytes:
    try:
        return read(at & _MASK, len(SVC))
    except (OSError, OverflowError):
        return b""  # nothing is mapped there


def in_its_call(registers: Registers, tid: int, read: Callable[[int, int], bytes]) -> Registers:
    """A stopped thread's registers with what the stop has done to its call.

    read  see :func:`hides_note`
    """
    if _code(registers.pc, read) == SVC:
        return dataclasses.replace(registers, code=_ends_with(registers))
    if (
        registers.result == -errno.EINTR
        and registers.number in _SPURIOUS
        and _code(registers.pc - len(SVC), read) == SVC
        and (first := origx0.first_argument(tid)) is not None
    ):
        again = dataclasses.replace(registers, pc=registers.pc - len(SVC), code=Restart.NOHAND)
        return again.with_x({0: first})
    return registers


def _ends_with(registers: Registers) -> int:
    """What the call that a thread stands before returns when it is interrupted; 0: it just begins again."""
    number = registers.number
    if number == SYS.restart_syscall:
        return Restart.BLOCK  # nobody else makes this call
    if number in _NOHAND:
        return Restart.NOHAND
    if number == SYS.futex and registers.x[1] & _FUTEX_COMMAND not in _FUTEX_WAITS:
        return 0
    return Restart.SYS if number in _WAITING else 0


def going_on(registers: Registers) -> Registers:
    """What a stopped thread goes on with: :func:`in_its_call` has seen to it."""
    return registers


def by_hand(registers: Registers, call: int | None = None) -> Registers:
    """What a thread goes on with when nobody is there to tell the kernel of its call: it is made again.

    A sleep of which the kernel had a note lasts its whole time once more, or what the kernel has written down of it:
    the way home forgets the note.

    call  which call it was, if the kernel only has ``restart_syscall`` in its notes
    """
    return dataclasses.replace(for_restore(registers, None, call), code=0)


def restarted_call(registers: Registers, code: bytes) -> int | None:
    """The number of the call that a thread was stopped in, also if it had been stopped in it before: then x8 has only
    ``restart_syscall``, and the number is read off the code. None if it cannot be told.

    code  what stands before the instruction pointer, CODE_BEFORE bytes
    """
    if registers.call != SYS.restart_syscall:
        return registers.call
    for at in range(len(code) - _INSTRUCTION.size, -1, -_INSTRUCTION.size):
        (word,) = _INSTRUCTION.unpack_from(code, at)
        if word & _MOVE_MASK in _MOVES:
            number = word >> 5 & 0xFFFF
            return number if number in _RESTARTED_BY_BLOCK else None
    return None


def for_restore(registers: Registers, remaining_ns: int | None = None, call: int | None = None) -> Registers:
    """What a *rebuilt* thread gets: there the kernel knows of no restart block.

    The call is made again with the same arguments, but a relative sleep goes on with the remaining time that the
    kernel wrote when it was interrupted. Where that is not there (no second argument, a relative futex wait) the whole
    time passes once more.  ``remaining_ns`` is not used: poll, which has its time in a register, does not exist here.

    call  which call it was, if the kernel only has ``restart_syscall`` in its notes (restarted_call); if nobody knows,
          it ends with EINTR, as it does where the kernel itself has no block
    """
    if registers.code != Restart.BLOCK:
        return registers
    if registers.number == SYS.restart_syscall:
        if call is None:
            return registers.ended(-errno.EINTR)
        registers = registers.with_x({_NUMBER: call})
    again = dataclasses.replace(registers, code=Restart.NOHAND)
    match registers.number:
        case SYS.nanosleep if registers.x[1]:
            return again.with_x({0: registers.x[1]})
        case SYS.clock_nanosleep if registers.x[3] and not registers.x[1] & _TIMER_ABSTIME:
            return again.with_x({2: registers.x[3]})
    return again


def behind_call(code: bytes) -> int | None:
    """Where in a piece of code an instruction ends that makes a system call; None if there is none."""
    for at in range(0, len(code) - len(SVC) + 1, len(SVC)):
        if code[at : at + len(SVC)] == SVC:
            return at + len(SVC)
    return None


def told(registers: Registers) -> Registers:
    """The registers at the end of a call that tell the kernel how it ends, and what it is to do then."""
    return dataclasses.replace(registers.ended(registers.code), pstate=registers.pstate)


def interrupted_in(stack: bytes, ranges: Iterable[tuple[int, int]]) -> bool:
    """Whether a stack (from the stack pointer upwards) holds a signal frame that returns into one of the ranges."""
    from checkpoint.arch.aarch64.extended import signal_frames

    places = list(ranges)
    return any(start <= frame.ip < end for frame in signal_frames(stack, 0) for start, end in places)
