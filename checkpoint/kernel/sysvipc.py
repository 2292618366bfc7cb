"""System V semaphores and message queues: their calls, and what the kernel tells of them.

Source: include/uapi/linux/sem.h, msg.h, ipc.h, asm-generic/ipcbuf.h, msgbuf.h; ipc/sem.c, ipc/msg.c, ipc/util.c
(``*_next_id`` and MSG_COPY: CONFIG_CHECKPOINT_RESTORE).  x86-64 and aarch64 have the same layout of what is used here.
"""

from __future__ import annotations

import ctypes
import enum
import struct
from collections.abc import Sequence
from typing import Final

from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = [
    "SEMBUF",
    "Listed",
    "MsgFlag",
    "SemFlag",
    "change_queue",
    "change_set",
    "create_queue",
    "create_set",
    "last_users",
    "list_queues",
    "list_sets",
    "peek",
    "queue_room",
    "remove_queue",
    "remove_set",
    "send",
    "set_values",
    "values",
]

_SEM_LIST: Final = "/proc/sysvipc/sem"
_MSG_LIST: Final = "/proc/sysvipc/msg"
_SEM_NEXT: Final = "/proc/sys/kernel/sem_next_id"
_MSG_NEXT: Final = "/proc/sys/kernel/msg_next_id"
_IPC_CREAT, _IPC_EXCL, _IPC_NOWAIT = 0o1000, 0o2000, 0o4000
_RMID, _SET, _STAT = 0, 1, 2
_GETPID, _GETALL, _SETALL = 11, 13, 17
_PERM: Final = struct.Struct("<iIIIIIHH4x16x")  # struct ipc64_perm: key, uid, gid, cuid, cgid, mode, sequence, padding
_SEM_TIMES: Final = 64  # more than any machine's struct semid64_ds has behind the permissions
_MSG_TIMES: Final = struct.Struct("<QQQQQQII16x")  # sent, received, changed; bytes, messages, room; sender, receiver
_TYPE: Final = struct.Struct("<q")
_PERMISSIONS: Final = 0o777
#: struct sembuf: semaphore, operation, flags
SEMBUF: Final = struct.Struct("<Hhh")


class SemFlag(enum.IntFlag):
    """Flags of an operation of semop."""

    NOWAIT = 0o4000
    UNDO = 0x1000


class MsgFlag(enum.IntFlag):
    """Flags of msgsnd and msgrcv."""

    NOWAIT = 0o4000
    COPY = 0o40000  # the n-th message, which stays


@dataclass(frozen=True, slots=True)
class Listed:
    """One set or queue, as /proc/sysvipc lists it.

    count    semaphores of a set, messages in a queue
    bytes    of the messages
    users    queues: the processes that last sent and received, 0: none yet
    """

    number: int
    key: int
    mode: int
    uid: int
    gid: int
    count: int
    bytes: int = 0
    users: tuple[int, ...] = ()


def _rows(path: str) -> list[list[int]]:
    try:
        with open(path, encoding="ascii") as file:
            lines = file.readlines()[1:]
    except FileNotFoundError:
        return []  # a kernel without CONFIG_SYSVIPC
    # the permissions are octal
    return [[int(word, 8 if place == 2 else 10) for place, word in enumerate(line.split())] for line in lines]


def list_sets() -> list[Listed]:
    """The semaphore sets of this IPC namespace."""
    return [
        Listed(number, key, mode & _PERMISSIONS, uid, gid, count)
        for key, number, mode, count, uid, gid, *_ in _rows(_SEM_LIST)
    ]


def list_queues() -> list[Listed]:
    """The message queues of this IPC namespace."""
    return [
        Listed(number, key, mode & _PERMISSIONS, uid, gid, count, size, (sender, receiver))
        for key, number, mode, size, count, sender, receiver, uid, gid, *_ in _rows(_MSG_LIST)
    ]


def last_users(number: int, count: int) -> tuple[int, ...]:
    """The process that last changed each semaphore of a set, 0: none, or none that is left. OSError."""
    return tuple(syscall(SYS.semctl, number, place, _GETPID, 0) for place in range(count))


def values(number: int, count: int) -> tuple[int, ...]:
    """The value of each semaphore of a set. OSError."""
    room = ctypes.create_string_buffer(2 * count)
    syscall(SYS.semctl, number, 0, _GETALL, ctypes.addressof(room))
    return struct.unpack(f"<{count}H", room.raw)


def set_values(number: int, wanted: Sequence[int]) -> None:
    """Give every semaphore of a set its value; forgets who was to undo what. OSError."""
    data = struct.pack(f"<{len(wanted)}H", *wanted)
    room = ctypes.create_string_buffer(data, len(data))
    syscall(SYS.semctl, number, 0, _SETALL, ctypes.addressof(room))


def _with_number(path: str, number: int) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(str(number))


def create_set(number: int, key: int, count: int, mode: int) -> bool:
    """Make a set with this ID; False if the ID is taken. OSError (EEXIST: the key is)."""
    _with_number(_SEM_NEXT, number)
    made = syscall(SYS.semget, key & 0xFFFFFFFF, count, _IPC_CREAT | _IPC_EXCL | mode & _PERMISSIONS)
    if made != number:
        remove_set(made)
    return made == number


def create_queue(number: int, key: int, mode: int) -> bool:
    """Make a queue with this ID; False if the ID is taken. OSError (EEXIST: the key is)."""
    _with_number(_MSG_NEXT, number)
    made = syscall(SYS.msgget, key & 0xFFFFFFFF, _IPC_CREAT | _IPC_EXCL | mode & _PERMISSIONS)
    if made != number:
        remove_queue(made)
    return made == number


def change_set(number: int, uid: int, gid: int, mode: int) -> None:
    """Give a set its owner and permissions. OSError."""
    data = _PERM.pack(0, uid, gid, 0, 0, mode & _PERMISSIONS, 0, 0) + bytes(_SEM_TIMES)
    buffer = ctypes.create_string_buffer(data, len(data))
    syscall(SYS.semctl, number, 0, _SET, ctypes.addressof(buffer))


def change_queue(number: int, uid: int, gid: int, mode: int, room: int) -> None:
    """Give a queue its owner, its permissions, and how many bytes it may hold. OSError."""
    data = _PERM.pack(0, uid, gid, 0, 0, mode & _PERMISSIONS, 0, 0) + _MSG_TIMES.pack(0, 0, 0, 0, 0, room, 0, 0)
    buffer = ctypes.create_string_buffer(data, len(data))
    syscall(SYS.msgctl, number, _SET, ctypes.addressof(buffer))


def queue_room(number: int) -> int:
    """How many bytes a queue may hold. OSError."""
    buffer = ctypes.create_string_buffer(_PERM.size + _MSG_TIMES.size)
    syscall(SYS.msgctl, number, _STAT, ctypes.addressof(buffer))
    return int(_MSG_TIMES.unpack_from(buffer.raw, _PERM.size)[5])


def remove_set(number: int) -> None:
    """Remove a set. OSError."""
    syscall(SYS.semctl, number, 0, _RMID, 0)


def remove_queue(number: int) -> None:
    """Remove a queue. OSError."""
    syscall(SYS.msgctl, number, _RMID, 0)


def peek(number: int, place: int, size: int) -> tuple[int, bytes]:
    """(type, text) of the message in that place of a queue, at most so many bytes; it stays. OSError (ENOMSG)."""
    room = ctypes.create_string_buffer(_TYPE.size + size)
    flags = MsgFlag.COPY | MsgFlag.NOWAIT
    length = syscall(SYS.msgrcv, number, ctypes.addressof(room), size, place, flags)
    return int(_TYPE.unpack_from(room.raw)[0]), room.raw[_TYPE.size : _TYPE.size + length]


def send(number: int, type: int, text: bytes) -> None:
    """Put a message into a queue. OSError (EAGAIN: there is no room)."""
    data = _TYPE.pack(type) + text
    buffer = ctypes.create_string_buffer(data, len(data))
    syscall(SYS.msgsnd, number, ctypes.addressof(buffer), len(text), _IPC_NOWAIT)
