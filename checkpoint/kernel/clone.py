"""clone3(2) and execveat(2): flags and arguments.

Source: include/uapi/linux/sched.h, include/uapi/linux/fcntl.h.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

from tcpstate.slotted import dataclass

__all__ = ["AT_EMPTY_PATH", "CLONE_ARGS_SIZE", "SET_TID_OFFSET", "THREAD", "CloneArgs", "CloneFlag", "pack_tids"]


class CloneFlag(enum.IntFlag):
    """CLONE_* of clone3, unshare and setns."""

    NEWTIME = 0x00000080
    VM = 0x00000100
    FS = 0x00000200
    FILES = 0x00000400
    SIGHAND = 0x00000800
    VFORK = 0x00004000
    PARENT = 0x00008000
    THREAD = 0x00010000
    NEWNS = 0x00020000
    SYSVSEM = 0x00040000
    NEWCGROUP = 0x02000000
    NEWUTS = 0x04000000
    NEWIPC = 0x08000000
    NEWUSER = 0x10000000
    NEWPID = 0x20000000
    NEWNET = 0x40000000
    CLEAR_SIGHAND = 0x100000000  # 5.5


#: what pthread_create shares
THREAD: Final = CloneFlag.VM | CloneFlag.FS | CloneFlag.FILES | CloneFlag.SIGHAND | CloneFlag.THREAD | CloneFlag.SYSVSEM
#: execveat: the descriptor itself is meant
AT_EMPTY_PATH: Final = 0x1000

_CLONE_ARGS = struct.Struct("<11Q")
#: bytes of struct clone_args
CLONE_ARGS_SIZE: Final = _CLONE_ARGS.size
#: where in it the address of the wanted numbers stands
SET_TID_OFFSET: Final = 64


@dataclass(frozen=True, slots=True)
class CloneArgs:
    """struct clone_args, as far as it is used here.

    exit_signal   what the parent gets at the end; 0 with PARENT and THREAD
    set_tid       address of the wanted numbers (``pid_t[]``), the innermost PID namespace first; 0: any
    set_tid_size  how many
    """

    flags: int
    exit_signal: int = 0
    set_tid: int = 0
    set_tid_size: int = 0

    def pack(self) -> bytes:
        """The structure's bytes. No stack is given: the child begins on its creator's, or a copy of it."""
        return _CLONE_ARGS.pack(self.flags, 0, 0, 0, self.exit_signal, 0, 0, 0, self.set_tid, self.set_tid_size, 0)


def pack_tids(*tids: int) -> bytes:
    """The array that ``set_tid`` points to."""
    return struct.pack(f"<{len(tids)}i", *tids)
