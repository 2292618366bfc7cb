"""ptrace(2): requests, options, events, structures, and the calls as functions that raise OSError.

All calls but :func:`seize` and :func:`interrupt` need the thread to be in a ptrace stop, and all of them must come from
the very thread of ours that seized it.  ESRCH means: not stopped (any more), not traced by us, or gone.

Source: include/uapi/linux/ptrace.h, kernel/ptrace.c; include/uapi/linux/elf.h for the register sets.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import struct
from dataclasses import dataclass
from typing import Final, Self

__all__ = [
    "GENERAL_SET",
    "SIGINFO_SIZE",
    "WALL",
    "Event",
    "Option",
    "RseqConfig",
    "cont",
    "detach",
    "event_message",
    "get_register_set",
    "get_rseq",
    "get_signal_mask",
    "interrupt",
    "peek_signals",
    "seccomp_filter",
    "seccomp_flags",
    "seize",
    "set_options",
    "set_register_set",
    "set_signal_mask",
    "signal_info",
    "step",
    "syscall_dispatch_on",
]


class Request(enum.IntEnum):
    """First argument of ptrace(2)."""

    CONT = 7
    SINGLESTEP = 9
    DETACH = 17
    SETOPTIONS = 0x4200
    GETEVENTMSG = 0x4201
    GETSIGINFO = 0x4202
    GETREGSET = 0x4204
    SETREGSET = 0x4205
    SEIZE = 0x4206
    INTERRUPT = 0x4207
    PEEKSIGINFO = 0x4209
    GETSIGMASK = 0x420A
    SETSIGMASK = 0x420B
    SECCOMP_GET_FILTER = 0x420C
    SECCOMP_GET_METADATA = 0x420D  # 4.16
    GET_RSEQ_CONFIGURATION = 0x420F  # 5.13
    GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211  # 6.4


class Option(enum.IntFlag):
    """PTRACE_O_*. A child that is attached by an event has its parent's options."""

    TRACEFORK = 1 << 1
    TRACEVFORK = 1 << 2
    TRACECLONE = 1 << 3
    EXITKILL = 1 << 20  # the tracee is killed when its tracer ends
    SUSPEND_SECCOMP = 1 << 21  # needs CAP_SYS_ADMIN and CONFIG_CHECKPOINT_RESTORE; ends with the tracer


class Event(enum.IntEnum):
    """PTRACE_EVENT_*: the third byte of a wait status; 0: a signal is about to be delivered."""

    SIGNAL = 0
    FORK = 1
    VFORK = 2
    CLONE = 3
    EXEC = 4
    VFORK_DONE = 5
    EXIT = 6
    SECCOMP = 7
    STOP = 128  # by PTRACE_INTERRUPT, a group stop, or a new tracee's first


#: the register set of the general registers: NT_PRSTATUS of include/uapi/linux/elf.h
GENERAL_SET: Final = 1
#: waitpid option: children and tracees of any kind (include/uapi/linux/wait.h)
WALL: Final = 0x40000000
#: bytes of a siginfo_t
SIGINFO_SIZE: Final = 128
#: room for any register set: AMX makes an XSAVE area of 11 KB
_REGISTER_SET_MAX = 64 * 1024
_SIGNAL_SET_SIZE = 8
_PEEK_SHARED = 1
_PEEK_COUNT = 32
_PEEK_ARGS = struct.Struct("<QIi")
_RSEQ = struct.Struct("<QIIII")
_DISPATCH = struct.Struct("<QQQQ")
_METADATA = struct.Struct("<QQ")
_INSTRUCTION_SIZE = 8

_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _call(request: Request, tid: int, address: int = 0, data: int | ctypes.Array[ctypes.c_char] = 0) -> int:
    result: int = _ptrace(request, tid, address, data)
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"PTRACE_{request.name} of {tid}: {os.strerror(error)}")
    return result


def seize(tid: int, options: Option = Option(0)) -> None:  # noqa: B008 - an immutable flag
    """Become the thread's tracer without stopping it. EPERM: not allowed, traced already, or exiting."""
    _call(Request.SEIZE, tid, 0, int(options))


def interrupt(tid: int) -> None:
    """Ask a seized thread to stop; the stop is reported to waitpid."""
    _call(Request.INTERRUPT, tid)


def cont(tid: int, signal: int = 0) -> None:
    """Let a stopped thread run on, with ``signal`` delivered (only in a signal-delivery stop)."""
    _call(Request.CONT, tid, 0, signal)


def step(tid: int, signal: int = 0) -> None:
    """Let a stopped thread execute one instruction; it then stops with SIGTRAP."""
    _call(Request.SINGLESTEP, tid, 0, signal)


def detach(tid: int, signal: int = 0) -> None:
    """Let a stopped thread run on without us."""
    _call(Request.DETACH, tid, 0, signal)


def set_options(tid: int, options: Option) -> None:
    """Replace the options."""
    _call(Request.SETOPTIONS, tid, 0, int(options))


def event_message(tid: int) -> int:
    """What an event stop has to tell: for FORK, VFORK and CLONE the new thread's ID in our PID namespace."""
    value = ctypes.create_string_buffer(ctypes.sizeof(ctypes.c_ulong))
    _call(Request.GETEVENTMSG, tid, 0, value)
    return int.from_bytes(value.raw, "little")


def signal_info(tid: int) -> bytes:
    """The siginfo_t of the signal that caused the stop. EINVAL in a group stop."""
    info = ctypes.create_string_buffer(SIGINFO_SIZE)
    _call(Request.GETSIGINFO, tid, 0, info)
    return info.raw


def get_register_set(tid: int, which: int, size: int = _REGISTER_SET_MAX) -> bytes:
    """A register set's bytes, as many as the machine has."""
    buffer = ctypes.create_string_buffer(size)
    vector = _IoVec(ctypes.addressof(buffer), size)
    _call(Request.GETREGSET, tid, which, ctypes.addressof(vector))
    return ctypes.string_at(buffer, vector.size)


def set_register_set(tid: int, which: int, data: bytes) -> None:
    """Replace a register set. EINVAL or EFAULT if the machine does not accept the size or the content."""
    buffer = ctypes.create_string_buffer(data, len(data))
    vector = _IoVec(ctypes.addressof(buffer), len(data))
    _call(Request.SETREGSET, tid, which, ctypes.addressof(vector))


def get_signal_mask(tid: int) -> int:
    """The blocked signals, bit n-1 for signal n. Inside sigsuspend, ppoll etc.: the mask that they will put back."""
    mask = ctypes.create_string_buffer(_SIGNAL_SET_SIZE)
    _call(Request.GETSIGMASK, tid, _SIGNAL_SET_SIZE, mask)
    return int.from_bytes(mask.raw, "little")


def set_signal_mask(tid: int, mask: int) -> None:
    """Replace the blocked signals. A temporary mask of sigsuspend, ppoll etc. is forgotten."""
    data = mask.to_bytes(_SIGNAL_SET_SIZE, "little")
    _call(Request.SETSIGMASK, tid, _SIGNAL_SET_SIZE, ctypes.create_string_buffer(data, _SIGNAL_SET_SIZE))


def peek_signals(tid: int, *, shared: bool) -> list[bytes]:
    """The siginfo_t of each pending signal: the thread's own, or (``shared``) the process's."""
    found: list[bytes] = []
    while True:
        args = _PEEK_ARGS.pack(len(found), _PEEK_SHARED if shared else 0, _PEEK_COUNT)
        which = ctypes.create_string_buffer(args, len(args))
        infos = ctypes.create_string_buffer(SIGINFO_SIZE * _PEEK_COUNT)
        count = _call(Request.PEEKSIGINFO, tid, ctypes.addressof(which), infos)
        raw = infos.raw
        found += [raw[i * SIGINFO_SIZE : (i + 1) * SIGINFO_SIZE] for i in range(count)]
        if count < _PEEK_COUNT:
            return found


@dataclass(frozen=True, slots=True)
class RseqConfig:
    """struct ptrace_rseq_configuration: where a thread has its restartable-sequences area.

    address    of its struct rseq, 0 if none is registered
    size       of it, as registered
    signature  that stands before every abort handler
    """

    address: int
    size: int
    signature: int
    flags: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The structure from its bytes."""
        address, size, signature, flags, _ = _RSEQ.unpack_from(data)
        return cls(address, size, signature, flags)


def get_rseq(tid: int) -> RseqConfig | None:
    """The thread's rseq area; None if it has none, or the kernel has no rseq (EIO, since then nobody can have one)."""
    buffer = ctypes.create_string_buffer(_RSEQ.size)
    try:
        _call(Request.GET_RSEQ_CONFIGURATION, tid, _RSEQ.size, buffer)
    except OSError as error:
        if error.errno == errno.EIO:
            return None
        raise
    config = RseqConfig.unpack(buffer.raw)
    return config if config.address else None


def seccomp_filter(tid: int, index: int) -> bytes | None:
    """The classic BPF program of a thread's filter, oldest first (index 0); None behind the last.

    Needs CAP_SYS_ADMIN, and ourselves without a filter; a thread with no filter at all gives EINVAL.
    """
    try:
        count = _call(Request.SECCOMP_GET_FILTER, tid, index, 0)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    program = ctypes.create_string_buffer(count * _INSTRUCTION_SIZE)
    _call(Request.SECCOMP_GET_FILTER, tid, index, program)
    return program.raw


def seccomp_flags(tid: int, index: int) -> int:
    """The SECCOMP_FILTER_FLAG_* (only LOG is told) that the filter was installed with."""
    buffer = ctypes.create_string_buffer(_METADATA.pack(index, 0), _METADATA.size)
    _call(Request.SECCOMP_GET_METADATA, tid, _METADATA.size, buffer)
    flags: int = _METADATA.unpack(buffer.raw)[1]
    return flags


def syscall_dispatch_on(tid: int) -> bool:
    """Whether the thread has Syscall User Dispatch on. Kernels that cannot tell (EIO, before 6.4) count as no."""
    buffer = ctypes.create_string_buffer(_DISPATCH.size)
    try:
        _call(Request.GET_SYSCALL_USER_DISPATCH_CONFIG, tid, _DISPATCH.size, buffer)
    except OSError as error:
        if error.errno == errno.EIO:
            return False
        raise
    mode: int = _DISPATCH.unpack(buffer.raw)[0]
    return mode != 0
