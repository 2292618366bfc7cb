"""inotify: watches on files and directories.

Source: fs/notify/fdinfo.c; fdinfo lines ``inotify wd:N ino:I sdev:D mask:M ignored_mask:.. fhandle-bytes:..
fhandle-type:T f_handle:H`` (hexadecimal but for the fhandle-bytes). The handle leads back to the file
(open_by_handle_at), and so to a path. Watch numbers are reached by adding and removing watches until the kernel gives
the wanted one. Unread events are not kept: a record is refused while there are some.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from checkpoint.errors import FileCaptureFailed, FileMissing, FileRebuildFailed, UnsupportedFile
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from tcpstate.kernel import batch
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import Ioctl, ioctl_int

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Inotify", "Watch"]

_LINE: Final = re.compile(
    r"inotify wd:([0-9a-f]+) ino:([0-9a-f]+) sdev:([0-9a-f]+) mask:([0-9a-f]+) ignored_mask:[0-9a-f]+"
    r" fhandle-bytes:([0-9a-f]+) fhandle-type:([0-9a-f]+) f_handle:([0-9a-f]+)"
)
_MINOR_BITS: Final = 20
_HANDLE: Final = struct.Struct("<Ii")  # struct file_handle, its fixed part
_IN_NONBLOCK_CLOEXEC: Final = os.O_NONBLOCK | os.O_CLOEXEC
#: what a caller of inotify_add_watch can ask for (linux/inotify.h, IN_ALL_EVENTS, IN_EXCL_UNLINK, IN_ONESHOT)
_MASK: Final = 0x84000FFF
_LARGEST_SKIP: Final = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """One watch.

    number  what events name it by
    path    of the file
    mask    events that are told
    """

    number: int
    path: str
    mask: int

    def __post_init__(self) -> None:
        if not 0 < self.number < 1 << 31 or not 0 <= self.mask < 1 << 32 or not self.path.startswith("/"):
            raise ValueError("number, mask or path of a watch out of range")


@register("inotify", link=r"anon_inode:inotify|anon_inode:\[inotify\]")
@dataclass(frozen=True, slots=True, kw_only=True)
class Inotify(OpenFile):
    """One inotify instance."""

    watches: tuple[Watch, ...]

    @classmethod
    def examine(cls, view: FdView) -> str:
        _watches(view)
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        if ioctl_int(view.dup, Ioctl.SIOCINQ):
            raise UnsupportedFile("inotify events wait to be read", object=view.object)
        return cls(watches=tuple(_watches(view)), **view.common())

    def check(self, host: Rebuilder) -> str:
        for watch in self.watches:
            if not os.path.lexists(host.path(watch.path)):
                raise FileMissing("a file watched by inotify is not here", object=host.path(watch.path))
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        fd = batch.syscall(SYS.inotify_init1, _IN_NONBLOCK_CLOEXEC)
        for watch in sorted(self.watches, key=lambda watch: watch.number):
            _add(fd, host.path(watch.path), watch)
        set_flags(fd, self.flags)
        return fd


def _add(fd: int, path: str, watch: Watch) -> None:
    """Add a watch until it has its number; the numbers only grow."""
    import ctypes

    text = ctypes.create_string_buffer(os.fsencode(path))
    try:
        for _ in range(_LARGEST_SKIP):
            number = batch.syscall(SYS.inotify_add_watch, fd, ctypes.addressof(text), watch.mask)
            if number == watch.number:
                return
            if number > watch.number:
                break
            batch.syscall(SYS.inotify_rm_watch, fd, number)
            os.read(fd, 4096)  # IN_IGNORED of the one that was removed
    except OSError as error:
        raise FileRebuildFailed(f"inotify watch: {error.strerror}", object=path) from error
    raise FileRebuildFailed(f"inotify watch number {watch.number} cannot be reached", object=path)


def _watches(view: FdView) -> list[Watch]:
    found = []
    for line in view.lines:
        if not line.startswith("inotify "):
            continue
        parts = _LINE.match(line)
        if parts is None:
            raise FileCaptureFailed(f"watch not understood: {line}", object=view.object)
        path = _path(int(parts[2], 16), int(parts[3], 16), int(parts[6], 16), bytes.fromhex(parts[7]))
        if path is None:
            raise UnsupportedFile("inotify watches a file whose path cannot be found", object=view.object)
        found.append(Watch(number=int(parts[1], 16), path=path, mask=int(parts[4], 16) & _MASK))
    return found


def _path(inode: int, sdev: int, handle_type: int, handle: bytes) -> str | None:
    import ctypes

    device = os.makedev(sdev >> _MINOR_BITS, sdev & ((1 << _MINOR_BITS) - 1))
    data = ctypes.create_string_buffer(_HANDLE.pack(len(handle), handle_type) + handle)
    for mount in _mounts(device):
        try:
            fd = batch.syscall(SYS.open_by_handle_at, mount, ctypes.addressof(data), os.O_PATH | os.O_CLOEXEC)
        except OSError:
            # stale there, or a file system that cannot; another mount of it may
            continue
        path = os.readlink(f"/proc/self/fd/{fd}")
        os.close(fd)
        try:
            if os.stat(path).st_ino == inode:
                return path
        except OSError:
            continue
    return None


def _mounts(device: int) -> Iterator[int]:
    """A descriptor of each mount point that shows the device."""
    seen = set()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[4]) for line in file]
    for point in points:
        if point in seen:
            continue
        seen.add(point)
        try:
            fd = os.open(point, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            if os.fstat(fd).st_dev == device:
                yield fd
        finally:
            os.close(fd)
