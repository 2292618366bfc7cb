"""ptrace(2): requests, options, events, structures, and the calls as functions that raise OSError.

All calls but :func:`seize` and :func:`interrupt` need the thread to be in a ptrace stop, and all of them must come from
the very thread of ours that seized it.  ESRCH means: not stopped (any more), not traced by us, or gone.

Source: include/uapi/linux/ptrace.h, kernel/ptrace.c; include/uapi/linux/elf.h for the register sets.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
from typing import Final, Self

from tcpstate.kernel.ptrace import (
    WALL,
    Event,
    Option,
    Request,
    call,
    cont,
    cont_to_call,
    detach,
    interrupt,
    seize,
    step,
)
from tcpstate.slotted import dataclass

__all__ = [
    "GENERAL_SET",
    "SIGINFO_SIZE",
    "WALL",
    "Event",
    "Option",
    "RseqConfig",
    "cont",
    "cont_to_call",
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


#: the register set of the general registers: NT_PRSTATUS of include/uapi/linux/elf.h
GENERAL_SET: Final = 1
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


#: what each thread of ours has for itself
_own = threading.local()


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def set_options(tid: int, options: Option) -> None:
    """Replace the options."""
    call(Request.SETOPTIONS, tid, 0, int(options))


def event_message(tid: int) -> int:
    """What an event stop has to tell: for FORK, VFORK and CLONE the new thread's ID in our PID namespace."""
    value = ctypes.create_string_buffer(ctypes.sizeof(ctypes.c_ulong))
    call(Request.GETEVENTMSG, tid, 0, value)
    return int.from_bytes(value.raw, "little")


def signal_info(tid: int) -> bytes:
    """The siginfo_t of the signal that caused the stop. EINVAL in a group stop."""
    info = ctypes.create_string_buffer(SIGINFO_SIZE)
    call(Request.GETSIGINFO, tid, 0, info)
    return info.raw


def _room() -> ctypes.Array[ctypes.c_char]:
    """Room for a register set: to make so much anew takes longer than the call."""
    room: ctypes.Array[ctypes.c_char] | None = getattr(_own, "room", None)
    if room is None:
        room = _own.room = ctypes.create_string_buffer(_REGISTER_SET_MAX)
    return room


def get_register_set(tid: int, which: int, size: int = _REGISTER_SET_MAX) -> bytes:
    """A register set's bytes, as many as the machine has."""
    buffer = _room()
    vector = _IoVec(ctypes.addressof(buffer), size)
    call(Request.GETREGSET, tid, which, ctypes.addressof(vector))
    return ctypes.string_at(buffer, vector.size)


def set_register_set(tid: int, which: int, data: bytes) -> None:
    """Replace a register set. EINVAL or EFAULT if the machine does not accept the size or the content."""
    buffer = ctypes.create_string_buffer(data, len(data))
    vector = _IoVec(ctypes.addressof(buffer), len(data))
    call(Request.SETREGSET, tid, which, ctypes.addressof(vector))


def get_signal_mask(tid: int) -> int:
    """The blocked signals, bit n-1 for signal n. Inside sigsuspend, ppoll etc.: the mask that they will put back."""
    mask = ctypes.create_string_buffer(_SIGNAL_SET_SIZE)
    call(Request.GETSIGMASK, tid, _SIGNAL_SET_SIZE, mask)
    return int.from_bytes(mask.raw, "little")


def set_signal_mask(tid: int, mask: int) -> None:
    """Replace the blocked signals. A temporary mask of sigsuspend, ppoll etc. is forgotten."""
    data = mask.to_bytes(_SIGNAL_SET_SIZE, "little")
    call(Request.SETSIGMASK, tid, _SIGNAL_SET_SIZE, ctypes.create_string_buffer(data, _SIGNAL_SET_SIZE))


def peek_signals(tid: int, *, shared: bool) -> list[bytes]:
    """The siginfo_t of each pending signal: the thread's own, or (``shared``) the process's."""
    found: list[bytes] = []
    while True:
        args = _PEEK_ARGS.pack(len(found), _PEEK_SHARED if shared else 0, _PEEK_COUNT)
        which = ctypes.create_string_buffer(args, len(args))
        infos = _room()
        count = call(Request.PEEKSIGINFO, tid, ctypes.addressof(which), infos)
        raw = ctypes.string_at(infos, SIGINFO_SIZE * count)
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
        call(Request.GET_RSEQ_CONFIGURATION, tid, _RSEQ.size, buffer)
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
        count = call(Request.SECCOMP_GET_FILTER, tid, index, 0)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    program = ctypes.create_string_buffer(count * _INSTRUCTION_SIZE)
    call(Request.SECCOMP_GET_FILTER, tid, index, program)
    return program.raw


def seccomp_flags(tid: int, index: int) -> int:
    """The SECCOMP_FILTER_FLAG_* (only LOG is told) that the filter was installed with."""
    buffer = ctypes.create_string_buffer(_METADATA.pack(index, 0), _METADATA.size)
    call(Request.SECCOMP_GET_METADATA, tid, _METADATA.size, buffer)
    flags: int = _METADATA.unpack(buffer.raw)[1]
    return flags


def syscall_dispatch_on(tid: int) -> bool:
    """Whether the thread has Syscall User Dispatch on. Kernels that cannot tell (EIO, before 6.4) count as no."""
    buffer = ctypes.create_string_buffer(_DISPATCH.size)
    try:
        call(Request.GET_SYSCALL_USER_DISPATCH_CONFIG, tid, _DISPATCH.size, buffer)
    except OSError as error:
        if error.errno == errno.EIO:
            return False
        raise
    mode: int = _DISPATCH.unpack(buffer.raw)[0]
    return mode != 0
