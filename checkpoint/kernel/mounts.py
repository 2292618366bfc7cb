"""mount(2) and umount2(2): flags, and calls for a table.

Source: include/uapi/linux/mount.h, include/linux/fs.h (MNT_DETACH).
"""

from __future__ import annotations

import enum
from typing import Final

from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS

__all__ = ["MNT_DETACH", "MountFlag", "mount"]

#: umount2: out of sight at once, gone when nobody uses it
MNT_DETACH: Final = 2


class MountFlag(enum.IntFlag):
    """MS_*."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    SYNCHRONOUS = 16
    REMOUNT = 32
    DIRSYNC = 128
    NOSYMFOLLOW = 256
    NOATIME = 1024
    NODIRATIME = 2048
    BIND = 4096
    MOVE = 8192
    REC = 16384
    SILENT = 32768
    PRIVATE = 1 << 18
    SLAVE = 1 << 19
    SHARED = 1 << 20
    RELATIME = 1 << 21
    STRICTATIME = 1 << 24


def mount(
    calls: CallTable,
    source: str,
    at: str,
    kind: str | None = None,
    flags: int = 0,
    data: str = "",
) -> None:
    """Queue one mount(2)."""
    calls.call(
        SYS.mount,
        calls.path(source),
        calls.path(at),
        0 if kind is None else calls.path(kind),
        flags,
        calls.path(data) if data else 0,
        label=f"mount {at}",
    )
