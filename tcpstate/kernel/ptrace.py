"""ptrace(2): how a thread is taken, held and let go. What is done with it meanwhile is the business of who takes it.

All calls but :func:`seize` and :func:`interrupt` need the thread to be in a ptrace stop, and all of them must come from
the very thread of ours that seized it.  ESRCH means: not stopped (any more), not traced by us, or gone.

Source: include/uapi/linux/ptrace.h, kernel/ptrace.c.
"""

from __future__ import annotations

import ctypes
import enum
import os
from typing import Final

__all__ = ["WALL", "Event", "Option", "Request", "call", "cont", "cont_to_call", "detach", "interrupt", "seize", "step"]


class Request(enum.IntEnum):
    """First argument of ptrace(2)."""

    CONT = 7
    SINGLESTEP = 9
    DETACH = 17
    SYSCALL = 24
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


#: waitpid option: children and tracees of any kind (include/uapi/linux/wait.h)
WALL: Final = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def call(request: Request, tid: int, address: int = 0, data: int | ctypes.Array[ctypes.c_char] = 0) -> int:
    """One request. OSError."""
    result: int = _ptrace(request, tid, address, data)
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"PTRACE_{request.name} of {tid}: {os.strerror(error)}")
    return result


def seize(tid: int, options: Option = Option(0)) -> None:  # noqa: B008 - an immutable flag
    """Become the thread's tracer without stopping it. EPERM: not allowed, traced already, or exiting."""
    call(Request.SEIZE, tid, 0, int(options))


def interrupt(tid: int) -> None:
    """Ask a seized thread to stop; the stop is reported to waitpid."""
    call(Request.INTERRUPT, tid)


def cont(tid: int, signal: int = 0) -> None:
    """Let a stopped thread run on, with ``signal`` delivered (only in a signal-delivery stop)."""
    call(Request.CONT, tid, 0, signal)


def cont_to_call(tid: int) -> None:
    """Let a stopped thread run on to its next system call; it then stops with SIGTRAP, before that."""
    call(Request.SYSCALL, tid)


def step(tid: int, signal: int = 0) -> None:
    """Let a stopped thread execute one instruction; it then stops with SIGTRAP."""
    call(Request.SINGLESTEP, tid, 0, signal)


def detach(tid: int, signal: int = 0) -> None:
    """Let a stopped thread run on without us."""
    call(Request.DETACH, tid, 0, signal)
