"""General registers of x86-64, and what becomes of a system call that a stop has interrupted.

Source: arch/x86/include/asm/user_64.h (struct user_regs_struct), arch/x86/kernel/signal.c (restarts), signal(7).
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import operator
import struct
from collections.abc import Callable, Iterable
from typing import Final, Self

from checkpoint.errors import ForeignMode
from tcpstate import trusted
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = [
    "AUDIT_ARCH",
    "CODE_BEFORE",
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

#: what seccomp filters know this machine as: AUDIT_ARCH_X86_64 of include/uapi/linux/audit.h
AUDIT_ARCH: Final = 0xC000003E

_REGISTERS = struct.Struct("<27Q")
_MASK = (1 << 64) - 1
_NO_CALL = _MASK  # orig_rax when the thread is not in a system call: nothing to be restarted
_USER_CS = 0x33  # __USER_CS of arch/x86/include/asm/segment.h; __USER32_CS is 0x23
_X32_BIT = 0x40000000  # __X32_SYSCALL_BIT
_SYSCALL_LENGTH = 2  # bytes of the instruction `syscall`
_TIMER_ABSTIME = 1
_TRAP_FLAG = 0x100  # X86_EFLAGS_TF of arch/x86/include/uapi/asm/processor-flags.h
_WORD = struct.Struct("<Q")
_CS_IN_FRAME = 16  # bytes from ip to cs in struct sigcontext (arch/x86/include/uapi/asm/sigcontext.h)


class Restart(enum.IntEnum):
    """Results that never reach a program: the kernel's notes on how to restart (include/linux/errno.h)."""

    SYS = -512  # ERESTARTSYS: restart, unless a handler without SA_RESTART runs
    NOINTR = -513  # ERESTARTNOINTR: restart always
    NOHAND = -514  # ERESTARTNOHAND: restart, unless a handler runs
    BLOCK = -516  # ERESTART_RESTARTBLOCK: like NOHAND, by restart_syscall with what the kernel has noted


# Calls that return EINTR when a thread is stopped and continued, where they should restart: signal(7), "Interruption of
# system calls and library functions by stop signals", and the calls on sockets with a time-out set by SO_RCVTIMEO or
# SO_SNDTIMEO (sock_intr_errno in include/net/sock.h).  Of all of them EINTR says that nothing was done.
_SPURIOUS = frozenset(
    {
        SYS.epoll_wait,
        SYS.epoll_pwait,
        SYS.epoll_pwait2,
        SYS.io_getevents,
        SYS.semop,
        SYS.semtimedop,
        SYS.rt_sigtimedwait,
        SYS.read,
        SYS.readv,
        SYS.write,
        SYS.writev,
        SYS.recvfrom,
        SYS.recvmsg,
        SYS.recvmmsg,
        SYS.sendto,
        SYS.sendmsg,
        SYS.sendmmsg,
        SYS.accept,
        SYS.accept4,
        SYS.connect,
        SYS.sendfile,
        SYS.splice,
    }
)


@dataclass(frozen=True, slots=True)
class Registers:
    """struct user_regs_struct."""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    def pack(self) -> bytes:
        """The structure's bytes."""
        return _REGISTERS.pack(*_values(self))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The structure from its bytes. ForeignMode if they are those of a 32-bit register set."""
        if len(data) != _REGISTERS.size:
            raise ForeignMode(f"a register set of {len(data)} bytes is not a 64-bit one")
        return cls(*_REGISTERS.unpack(data))

    @property
    def ip(self) -> int:
        """The instruction pointer."""
        return self.rip

    @property
    def sp(self) -> int:
        """The stack pointer."""
        return self.rsp

    @property
    def thread_pointer(self) -> int:
        """By what the C library finds the thread's own data: at the upper end of the stack that it has made."""
        return self.fs_base

    @property
    def call(self) -> int | None:
        """The number of the system call that the thread was stopped in; None if it was in none."""
        return None if self.orig_rax >> 63 else self.orig_rax

    @property
    def result(self) -> int:
        """What the system call has returned, negative: -errno or a :class:`Restart`."""
        return self.rax - (1 << 64) if self.rax >> 63 else self.rax

    @property
    def untold(self) -> bool:
        """Whether the kernel must be told how the call had ended once it has forgotten that: the set says it."""
        return False

    def in_set(self) -> bytes:
        """The bytes of the register set."""
        return self.pack()

    def moved(self, ip: int) -> Registers:
        """The same with another instruction pointer, and no system call to be restarted."""
        values = _values(self)
        return _made(*values[:_CALL_AT], _NO_CALL, ip, *values[_CALL_AT + 2 :])

    def walking(self, ip: int, table: tuple[int, int], undo: tuple[int, int]) -> Registers:
        """The same for a walk through tables of calls (checkpoint.arch.x86_64.engine)."""
        values = _values(self)
        return _made(*reversed(undo), *reversed(table), *values[4:_CALL_AT], _NO_CALL, ip, *values[_CALL_AT + 2 :])

    def not_stepping(self) -> Self:
        """The same without the trap flag. After a step over popf the kernel takes the flag for the program's own, and
        leaves it on for good (arch/x86/kernel/step.c, enable_single_step)."""
        return dataclasses.replace(self, eflags=self.eflags & ~_TRAP_FLAG)

    def returning(self, result: int) -> Self:
        """The same with another result of the system call."""
        return dataclasses.replace(self, rax=result & _MASK)


_NAMES = tuple(field.name for field in dataclasses.fields(Registers))
_CALL_AT = _NAMES.index("orig_rax")  # before rip
_values: Callable[[Registers], tuple[int, ...]] = operator.attrgetter(*_NAMES)
_made = trusted.maker(Registers, *_NAMES)


#: calls that return Restart.BLOCK (kernel: users of set_restart_fn)
_RESTARTED_BY_BLOCK = frozenset({SYS.poll, SYS.nanosleep, SYS.clock_nanosleep, SYS.futex})
_SYSCALL = b"\x0f\x05"
#: mov $number, %eax and %rax, up to the number
_MOVES = (b"\xb8", b"\x48\xc7\xc0")
#: bytes before the instruction pointer that restarted_call() looks at
CODE_BEFORE = 16


def require_native(registers: Registers, owner: str) -> None:
    """ForeignMode if the thread (``owner`` names it) runs 32-bit or x32 code."""
    if registers.cs != _USER_CS:
        raise ForeignMode("it runs 32-bit code", object=owner)
    if registers.call is not None and registers.call & _X32_BIT:
        raise ForeignMode("it makes x32 system calls", object=owner)


def hides_note(registers: Registers, read: Callable[[int, int], bytes]) -> int | None:
    """In which call a thread is of which the kernel has a note that nobody can see: none, for its result says it."""
    return None


def in_its_call(registers: Registers, tid: int, read: Callable[[int, int], bytes]) -> Registers:
    """A stopped thread's registers with what the stop has done to its call: the set says it."""
    return registers


def behind_call(code: bytes) -> int | None:
    """Where in a piece of code an instruction ends that makes a system call; None if there is none."""
    at = code.find(_SYSCALL)
    return at + _SYSCALL_LENGTH if at >= 0 else None


def told(registers: Registers) -> Registers:
    """The registers at the end of a call that tell the kernel how it ends, and what it is to do then."""
    return registers


def going_on(registers: Registers) -> Registers:
    """What a stopped thread goes on with: an EINTR that only our stop has made becomes a restart.

    With NOHAND the kernel decides when the thread runs on: EINTR if a handler runs then, a restart if none does. The
    kernel has the same choice for all other notes, and does right with them.
    """
    if registers.result == -errno.EINTR and registers.call in _SPURIOUS:
        return registers.returning(Restart.NOHAND)
    return registers


def by_hand(registers: Registers) -> Registers:
    """What a thread goes on with when the kernel cannot restart its system call, since other calls were made in
    between and nobody is there to put ``orig_rax`` back: the instruction is executed again.

    The restart block survives calls that do not sleep with a time-out, so ``restart_syscall`` finds it.
    """
    if registers.call is None:
        return registers
    if registers.result == Restart.BLOCK:
        number = int(SYS.restart_syscall)
    elif registers.result in (Restart.SYS, Restart.NOINTR, Restart.NOHAND):
        number = registers.call
    else:
        return dataclasses.replace(registers, orig_rax=_NO_CALL)
    return dataclasses.replace(registers, rax=number, rip=registers.rip - _SYSCALL_LENGTH, orig_rax=_NO_CALL)


def restarted_call(registers: Registers, code: bytes) -> int | None:
    """The number of the call that a thread was stopped in, also if it had been stopped in it before: then the kernel
    has only ``restart_syscall`` in its notes, and the number is read off the code. None if it cannot be told.

    code  what stands before the instruction pointer, CODE_BEFORE bytes
    """
    if registers.call != SYS.restart_syscall:
        return registers.call
    if code[-_SYSCALL_LENGTH:] != _SYSCALL:
        return None
    before = code[:-_SYSCALL_LENGTH]
    for move in _MOVES:
        if before[-len(move) - 4 : -4] == move:
            number = int.from_bytes(before[-4:], "little")
            return number if number in _RESTARTED_BY_BLOCK else None
    return None


def for_restore(registers: Registers, remaining_ns: int | None = None, call: int | None = None) -> Registers:
    """What a *rebuilt* thread gets: there the kernel knows of no restart block.

    The call is made again with the same arguments, but a relative sleep goes on with the remaining time that the
    kernel wrote when it was interrupted, and a poll with ``remaining_ns`` if that is known. Where neither is there
    (nanosleep without a second argument, a relative futex wait) the whole time passes once more.
    The kernel does the restart, so a pending signal with a handler ends the call with EINTR, as it must.

    call  which call it was, if the kernel only has ``restart_syscall`` in its notes (restarted_call); if nobody knows,
          it ends with EINTR, as it does where the kernel itself has no block
    """
    if registers.call is None or registers.result != Restart.BLOCK:
        return registers
    if registers.call == SYS.restart_syscall:
        if call is None:
            return dataclasses.replace(registers.returning(-errno.EINTR), orig_rax=_NO_CALL)
        registers = dataclasses.replace(registers, orig_rax=call)
    again = registers.returning(Restart.NOHAND)
    match registers.call:
        case SYS.nanosleep if registers.rsi:
            return dataclasses.replace(again, rdi=registers.rsi)
        case SYS.clock_nanosleep if registers.r10 and not registers.rsi & _TIMER_ABSTIME:
            return dataclasses.replace(again, rdx=registers.r10)
        case SYS.poll if remaining_ns is not None:
            return dataclasses.replace(again, rdx=-(-max(remaining_ns, 0) // 1_000_000))
    return again


def interrupted_in(stack: bytes, ranges: Iterable[tuple[int, int]]) -> bool:
    """Whether a stack (from the stack pointer upwards) holds a signal frame that returns into one of the ranges."""
    places = list(ranges)
    for at in range(0, len(stack) - _CS_IN_FRAME - _WORD.size + 1, _WORD.size):
        (word,) = _WORD.unpack_from(stack, at)
        if any(start <= word < end for start, end in places):
            (segments,) = _WORD.unpack_from(stack, at + _CS_IN_FRAME)
            if segments & 0xFFFF == _USER_CS:
                return True
    return False
