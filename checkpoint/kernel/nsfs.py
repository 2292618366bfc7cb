"""ioctls on the files of /proc/PID/ns: how namespaces belong together.

Source: include/uapi/linux/nsfs.h (4.9, NS_GET_OWNER_UID since 4.11); ioctl_nsfs(2).
"""

from __future__ import annotations

import enum
import fcntl
import os
import struct
from typing import Final

__all__ = ["NsGet", "opened", "owner_uid", "owning", "parent"]

_UID: Final = struct.Struct("<I")


class NsGet(enum.IntEnum):
    """_IO(0xb7, N)."""

    USERNS = 0xB701
    PARENT = 0xB702
    OWNER_UID = 0xB704


def opened(pid: int | str, kind: str) -> int:
    """A descriptor of a namespace of a process (``thread-self``: ours). OSError."""
    return os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def owning(space: int) -> int:
    """A descriptor of the user namespace that a namespace belongs to. PermissionError: it is none of ours or below."""
    return fcntl.ioctl(space, NsGet.USERNS)


def parent(space: int) -> int:
    """A descriptor of the user or PID namespace above one. PermissionError: it is none of ours or below."""
    return fcntl.ioctl(space, NsGet.PARENT)


def owner_uid(space: int) -> int:
    """Who made a user namespace, as a user ID of the caller's."""
    return int(_UID.unpack(fcntl.ioctl(space, NsGet.OWNER_UID, bytes(_UID.size)))[0])
