"""fanotify: marks on files, mounts and file systems.

Source: fs/notify/fdinfo.c, fs/notify/fanotify/fanotify_user.c.  fdinfo lines: ``fanotify flags:F event-flags:E`` of the
group, then one for each mark, hexadecimal: ``fanotify ino:I sdev:D mflags:M mask:K ignored_mask:G fhandle-bytes:..``,
``fanotify mnt_id:N mflags:..``, ``fanotify sdev:D mflags:..``.

Only groups that are told afterwards (FAN_CLASS_NOTIF): one that is asked for permission may have been asked, and others
wait for its answer.  Unread events are not kept: a record is refused while there are some.
"""

from __future__ import annotations

import ctypes
import enum
import os
import re
import time
from typing import TYPE_CHECKING, Final, Self

from checkpoint.errors import FileCaptureFailed, FileMissing, FileRebuildFailed, UnsupportedFile
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.handles import device_of, mount_points, path_of
from checkpoint.namespaces.ways import way_of
from tcpstate.kernel import batch
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import Ioctl, ioctl_int
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Fanotify", "Mark", "Of"]

_GROUP: Final = re.compile(r"fanotify flags:([0-9a-f]+) event-flags:([0-9a-f]+)")
_MASKS: Final = r" mflags:([0-9a-f]+) mask:([0-9a-f]+) ignored_mask:([0-9a-f]+)"
_FILE: Final = re.compile(
    r"fanotify ino:([0-9a-f]+) sdev:([0-9a-f]+)" + _MASKS + r" fhandle-bytes:[0-9a-f]+ fhandle-type:([0-9a-f]+)"
    r" f_handle:([0-9a-f]+)"
)
_MOUNT: Final = re.compile(r"fanotify mnt_id:([0-9a-f]+)" + _MASKS)
_FILESYSTEM: Final = re.compile(r"fanotify sdev:([0-9a-f]+)" + _MASKS)

#: linux/fanotify.h: flags of fanotify_init that say who is asked for permission
_CLASSES = 0xC
#: flags of fanotify_mark
_ADD, _IGNORED_MASK, _IGNORE, _DONT_FOLLOW = 0x1, 0x20, 0x400, 0x4
_SURVIVES_MODIFY, _EVICTABLE = 0x40, 0x200
_KEPT_FLAGS: Final = _IGNORE | _SURVIVES_MODIFY | _EVICTABLE
#: events of directories, and of what is in them, of which the older ignored masks know nothing
_OF_DIRECTORIES: Final = 0x48000000


class Of(enum.IntEnum):
    """What a mark is on: the flag of fanotify_mark that says so."""

    FILE = 0
    MOUNT = 0x10
    FILESYSTEM = 0x100


_UNREAD: Final = "fanotify events wait to be read"
#: seconds that the check gives a program for a moment without any
_PATIENCE: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One mark.

    of       what it is on
    path     of the file, or a mount point
    flags    FAN_MARK_* that stay with it
    mask     events that are told
    ignored  events that are not
    """

    of: Of
    path: str
    flags: int
    mask: int
    ignored: int

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or "\0" in self.path or self.flags & ~_KEPT_FLAGS:
            raise ValueError("path or flags of a mark out of range")
        if not 0 <= self.mask < 1 << 32 or not 0 <= self.ignored < 1 << 32:
            raise ValueError("mask of a mark out of range")


@register("fanotify", link=r"anon_inode:\[?fanotify\]?")
@dataclass(frozen=True, slots=True, kw_only=True)
class Fanotify(OpenFile):
    """One fanotify group.

    group   flags of fanotify_init
    events  flags of the files that events bring
    """

    group: int
    events: int
    marks: tuple[Mark, ...]

    def validate(self) -> None:
        if not 0 <= self.group < 1 << 31 or self.group & _CLASSES or not 0 <= self.events < 1 << 31:
            raise ValueError("flags of a fanotify group out of range")

    @classmethod
    def examine(cls, view: FdView) -> str:
        if _group(view)[0] & _CLASSES:
            raise UnsupportedFile("fanotify that is asked for permission", object=view.object)
        _marks(view)
        # a program that reads them has read those of one moment soon, though others may have come
        deadline = time.monotonic() + _PATIENCE
        while _waits(view):
            if time.monotonic() > deadline:
                raise UnsupportedFile(_UNREAD, object=view.object)
            time.sleep(_PATIENCE / 50)
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        if _waits(view):
            raise UnsupportedFile(_UNREAD, object=view.object)
        group, events = _group(view)
        return cls(group=group, events=events, marks=tuple(_marks(view)), **view.common())

    def check(self, host: Rebuilder) -> str:
        for mark in self.marks:
            if not host.path.carried(mark.path) and not os.path.lexists(host.path(mark.path)):
                raise FileMissing("a file watched by fanotify is not here", object=host.path(mark.path))
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        fd = batch.syscall(SYS.fanotify_init, self.group, self.events)
        os.set_inheritable(fd, False)  # whether the group was made so (FAN_CLOEXEC) shows in fdinfo for ever
        for mark in reversed(self.marks):  # the last is listed first
            _add(fd, host.place(mark.path), mark)
        set_flags(fd, self.flags)
        return fd


def _waits(view: FdView) -> bool:
    return ioctl_int(view.dup, Ioctl.SIOCINQ) > 0


def _add(fd: int, path: str, mark: Mark) -> None:
    text = ctypes.create_string_buffer(os.fsencode(path))
    how = _ADD | _DONT_FOLLOW | mark.of | mark.flags & _EVICTABLE
    ignored = mark.ignored if mark.flags & _IGNORE else mark.ignored & ~_OF_DIRECTORIES
    kind = mark.flags & (_IGNORE | _SURVIVES_MODIFY) if mark.flags & _IGNORE else mark.flags | _IGNORED_MASK
    try:
        if mark.mask:
            batch.syscall(SYS.fanotify_mark, fd, how, mark.mask, -1, ctypes.addressof(text))
        if ignored:
            batch.syscall(SYS.fanotify_mark, fd, how | kind, ignored, -1, ctypes.addressof(text))
    except OSError as error:
        raise FileRebuildFailed(f"fanotify mark: {error.strerror}", object=path) from error


def _group(view: FdView) -> tuple[int, int]:
    for line in view.lines:
        parts = _GROUP.match(line)
        if parts is not None:
            return int(parts[1], 16), int(parts[2], 16)
    raise FileCaptureFailed(f"fanotify group not understood: {view.lines}", object=view.object)


def _marks(view: FdView) -> list[Mark]:
    return [_mark(view, line) for line in view.lines if line.startswith("fanotify ") and not _GROUP.match(line)]


def _mark(view: FdView, line: str) -> Mark:
    way = way_of(view.pid)
    if parts := _FILE.fullmatch(line):
        of, masks = Of.FILE, parts.groups()[2:5]
        path = path_of(int(parts[1], 16), int(parts[2], 16), int(parts[6], 16), bytes.fromhex(parts[7]), way)
    elif parts := _MOUNT.fullmatch(line):
        of, masks, number = Of.MOUNT, parts.groups()[1:], int(parts[1], 16)
        path = next((point for mount, point in mount_points(way) if mount == number), None)
    elif parts := _FILESYSTEM.fullmatch(line):
        of, masks, device = Of.FILESYSTEM, parts.groups()[1:], device_of(int(parts[1], 16))
        path = next((point for _, point in mount_points(way) if _device(way + point) == device), None)
    else:
        raise FileCaptureFailed(f"mark not understood: {line}", object=view.object)
    if path is None:
        raise UnsupportedFile("fanotify watches what no path of ours leads to", object=view.object)
    flags, mask, ignored = (int(text, 16) for text in masks)
    return Mark(of=of, path=path, flags=flags & _KEPT_FLAGS, mask=mask, ignored=ignored)


def _device(path: str) -> int:
    try:
        return os.lstat(path).st_dev
    except OSError:
        return -1
