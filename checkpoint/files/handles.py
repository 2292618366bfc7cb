"""Files that fdinfo names by their handles, as it does the watched ones of inotify and fanotify: back to a path.

Source: fs/notify/fdinfo.c, fs/fhandle.c (open_by_handle_at).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from typing import Final

from tcpstate.kernel import batch
from tcpstate.kernel.machine import SYS

__all__ = ["device_of", "mount_points", "path_of"]

_MINOR_BITS: Final = 20
_HANDLE: Final = struct.Struct("<Ii")  # struct file_handle, its fixed part


def device_of(sdev: int) -> int:
    """A device number as fdinfo has it (the kernel's own form), as stat(2) gives it."""
    return os.makedev(sdev >> _MINOR_BITS, sdev & ((1 << _MINOR_BITS) - 1))


def path_of(inode: int, sdev: int, handle_type: int, handle: bytes, way: str = "") -> str | None:
    """A path of the file that fdinfo names by inode, device and handle; None if none is found. ``way``: of the mount
    namespace that it is looked for in (namespaces.ways)."""
    import ctypes

    device = device_of(sdev)
    data = ctypes.create_string_buffer(_HANDLE.pack(len(handle), handle_type) + handle)
    for mount in _mounts(device, way):
        try:
            fd = batch.syscall(SYS.open_by_handle_at, mount, ctypes.addressof(data), os.O_PATH | os.O_CLOEXEC)
        except OSError:
            # stale there, or a file system that cannot; another mount of it may
            continue
        path = os.readlink(f"/proc/self/fd/{fd}")
        os.close(fd)
        try:
            if os.stat(way + path).st_ino == inode:
                return path
        except OSError:
            continue
    return None


def _mounts(device: int, way: str) -> Iterator[int]:
    """A descriptor of each mount point that shows the device."""
    seen = set()
    for _, point in mount_points(way):
        if point in seen:
            continue
        seen.add(point)
        try:
            fd = os.open(way + point, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            if os.fstat(fd).st_dev == device:
                yield fd
        finally:
            os.close(fd)


def mount_points(way: str = "") -> Iterator[tuple[int, str]]:
    """(ID, path) of every mount that we see, or that is below the root of another namespace."""
    with open(f"{os.path.dirname(way) or '/proc/self'}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            words = line.split()
            yield int(words[0]), re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), words[4])
