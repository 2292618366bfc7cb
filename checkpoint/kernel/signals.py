"""Signals: numbers that no Python module has; sigaction, stack_t and siginfo as the kernel lays them out.

Source: include/uapi/asm-generic/signal.h, siginfo.h, signal-defs.h.  The layouts are those of 64-bit machines; all of
them that this project knows have ``sa_restorer``.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, Self

from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = [
    "NSIG",
    "SIGACTION_SIZE",
    "SIGINFO_SIZE",
    "SIGSET_SIZE",
    "STACK_SIZE",
    "SiCode",
    "SigInfo",
    "Sigaction",
    "SsFlag",
    "StackT",
    "siginfo",
    "tgkill",
    "timer_siginfo",
    "without_kernel_fields",
]

#: signals are numbered 1 .. NSIG
NSIG: Final = 64
#: bytes of a signal set, the last argument of the rt_sig* calls
SIGSET_SIZE: Final = 8
#: bytes of a siginfo_t
SIGINFO_SIZE: Final = 128

_SIGACTION = struct.Struct("<QQQQ")
SIGACTION_SIZE: Final = _SIGACTION.size
_STACK = struct.Struct("<QiiQ")
STACK_SIZE: Final = _STACK.size
_INFO_HEAD = struct.Struct("<iii")
# si_tid, si_overrun, si_value, si_sys_private (only the kernel's own use) of a SI_TIMER record
_INFO_TIMER = struct.Struct("<iiQi")
_INFO_UNION_OFFSET = 16


class SiCode(enum.IntEnum):
    """Where a signal came from (``si_code``); negative: a process said so."""

    USER = 0
    KERNEL = 0x80
    QUEUE = -1
    TIMER = -2
    TKILL = -6


class SsFlag(enum.IntFlag):
    """Flags of an alternate signal stack."""

    ONSTACK = 1
    DISABLE = 2
    AUTODISARM = 1 << 31


@dataclass(frozen=True, slots=True)
class Sigaction:
    """struct kernel_sigaction: ``handler`` 0 is SIG_DFL, 1 is SIG_IGN."""

    handler: int
    flags: int
    restorer: int
    mask: int

    def pack(self) -> bytes:
        """The structure's bytes."""
        return _SIGACTION.pack(self.handler, self.flags, self.restorer, self.mask)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The structure in the first bytes of ``data``."""
        return cls(*_SIGACTION.unpack_from(data))


@dataclass(frozen=True, slots=True)
class StackT:
    """stack_t: an alternate signal stack."""

    base: int
    flags: int
    size: int

    def pack(self) -> bytes:
        """The structure's bytes."""
        flags = self.flags & 0xFFFFFFFF
        return _STACK.pack(self.base, flags - (1 << 32) if flags >> 31 else flags, 0, self.size)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The structure in the first bytes of ``data``; flags as an unsigned number."""
        base, flags, _, size = _STACK.unpack_from(data)
        return cls(base, flags & 0xFFFFFFFF, size)


@dataclass(frozen=True, slots=True)
class SigInfo:
    """The part of a siginfo_t that tells signals apart.

    timer   ID of the POSIX timer, for SI_TIMER
    sender  PID of the sender, for USER, QUEUE and TKILL
    """

    signal: int
    code: int
    timer: int | None = None
    sender: int | None = None

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Signal, origin, and timer or sender of a siginfo_t."""
        signal, _, code = _INFO_HEAD.unpack_from(data)
        # the union begins with si_tid or with si_pid
        first: int = _INFO_TIMER.unpack_from(data, _INFO_UNION_OFFSET)[0]
        if code == SiCode.TIMER:
            return cls(signal, code, timer=first)
        return cls(signal, code, sender=first if code in (SiCode.USER, SiCode.QUEUE, SiCode.TKILL) else None)


def siginfo(signal: int, code: int) -> bytes:
    """A siginfo_t with nothing but signal and origin: what the kernel makes up where it has lost the details."""
    return _INFO_HEAD.pack(signal, 0, code).ljust(SIGINFO_SIZE, b"\0")


def timer_siginfo(signal: int, timer: int, overrun: int, value: int) -> bytes:
    """The siginfo_t of an expired POSIX timer."""
    body = _INFO_TIMER.pack(timer, overrun, value, 0)
    return (_INFO_HEAD.pack(signal, 0, SiCode.TIMER).ljust(_INFO_UNION_OFFSET, b"\0") + body).ljust(SIGINFO_SIZE, b"\0")


def without_kernel_fields(info: bytes) -> bytes:
    """A siginfo_t as it may be queued again: what only the kernel sets (si_sys_private of a timer's) is cleared."""
    if SigInfo.unpack(info).code != SiCode.TIMER:
        return info
    timer, overrun, value, _ = _INFO_TIMER.unpack_from(info, _INFO_UNION_OFFSET)
    end = _INFO_UNION_OFFSET + _INFO_TIMER.size
    return info[:_INFO_UNION_OFFSET] + _INFO_TIMER.pack(timer, overrun, value, 0) + info[end:]


def tgkill(pid: int, tid: int, signal: int) -> None:
    """Send a signal to one thread. ProcessLookupError if it has gone."""
    syscall(SYS.tgkill, pid, tid, signal)
