"""System V shared memory: its calls, and what the kernel tells of a segment.

Source: include/uapi/linux/shm.h, ipc.h, asm-generic/shmbuf.h (struct shmid64_ds), ipcbuf.h; ipc/shm.c.  x86-64 and
aarch64 have the same layout.
"""

from __future__ import annotations

import ctypes
import enum
import struct
from typing import Final

from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["At", "Mode", "Segment", "change_owner", "create", "lock", "look", "remove"]

_NEXT_ID: Final = "/proc/sys/kernel/shm_next_id"  # CONFIG_CHECKPOINT_RESTORE
_IPC_CREAT, _IPC_EXCL = 0o1000, 0o2000
_RMID, _SET, _STAT, _LOCK = 0, 1, 2, 11
_PERM: Final = struct.Struct("<iIIIIIHH4x16x")  # key, uid, gid, cuid, cgid, mode, sequence, padding
_TIMES: Final = struct.Struct("<QqqqiiQ16x")  # size; attached, detached, changed; creator, last user; attachments
_PERMISSIONS: Final = 0o777


class At(enum.IntFlag):
    """Flags of shmat."""

    RDONLY = 0o10000
    EXEC = 0o100000


class Mode(enum.IntFlag):
    """What a segment's mode has besides permissions."""

    DEST = 0o1000  # removed at the last detachment
    LOCKED = 0o2000


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment, as IPC_STAT tells it. ``attached``: by how many mappings, of all processes; ``size`` in bytes."""

    key: int
    uid: int
    gid: int
    mode: int
    size: int
    attached: int


def look(number: int) -> Segment | None:
    """The segment with this ID; None if there is none. OSError."""
    room = ctypes.create_string_buffer(_PERM.size + _TIMES.size)
    try:
        syscall(SYS.shmctl, number, _STAT, ctypes.addressof(room))
    except OSError:
        return None
    key, uid, gid, _, _, mode, _, _ = _PERM.unpack_from(room.raw)
    size, *_, attached = _TIMES.unpack_from(room.raw, _PERM.size)
    return Segment(key, uid, gid, mode, size, attached)


def create(number: int, key: int, size: int, mode: int) -> bool:
    """Make a segment with this ID; False if the ID is taken. OSError (EEXIST: the key is)."""
    with open(_NEXT_ID, "w", encoding="ascii") as file:
        file.write(str(number))
    made = syscall(SYS.shmget, key & 0xFFFFFFFF, size, _IPC_CREAT | _IPC_EXCL | mode & _PERMISSIONS)
    if made != number:
        remove(made)
    return made == number


def change_owner(number: int, uid: int, gid: int, mode: int) -> None:
    """Give a segment its owner and permissions. OSError."""
    data = _PERM.pack(0, uid, gid, 0, 0, mode & _PERMISSIONS, 0, 0) + bytes(_TIMES.size)
    buffer = ctypes.create_string_buffer(data, len(data))
    syscall(SYS.shmctl, number, _SET, ctypes.addressof(buffer))


def lock(number: int) -> None:
    """Keep a segment in memory. OSError."""
    syscall(SYS.shmctl, number, _LOCK, 0)


def remove(number: int) -> None:
    """Remove a segment, at once or at its last detachment. OSError."""
    syscall(SYS.shmctl, number, _RMID, 0)
