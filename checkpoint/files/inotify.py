"""inotify: watches on files and directories.

Source: fs/notify/fdinfo.c; fdinfo lines ``inotify wd:N ino:I sdev:D mask:M ignored_mask:.. fhandle-bytes:..
fhandle-type:T f_handle:H`` (hexadecimal but for the fhandle-bytes). The handle leads back to the file
(open_by_handle_at), and so to a path. Watch numbers are reached by adding and removing watches until the kernel gives
the wanted one.

Unread events cannot be put into a queue.  They become the one event that says that some were lost (IN_Q_OVERFLOW),
after which a program looks for itself, as inotify(7) tells it to.  It comes about as it does always: by more events
than the queue takes, of a file of ours, which are then read away.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final, Self

from checkpoint.errors import FileCaptureFailed, FileMissing, FileRebuildFailed, UnsupportedFile
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.handles import path_of
from checkpoint.namespaces.ways import way_of
from tcpstate.kernel import batch
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import Ioctl, ioctl_int
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Inotify", "Watch"]

_LINE: Final = re.compile(
    r"inotify wd:([0-9a-f]+) ino:([0-9a-f]+) sdev:([0-9a-f]+) mask:([0-9a-f]+) ignored_mask:[0-9a-f]+"
    r" fhandle-bytes:([0-9a-f]+) fhandle-type:([0-9a-f]+) f_handle:([0-9a-f]+)"
)
_IN_NONBLOCK_CLOEXEC: Final = os.O_NONBLOCK | os.O_CLOEXEC
#: what a caller of inotify_add_watch can ask for (linux/inotify.h, IN_ALL_EVENTS, IN_EXCL_UNLINK, IN_ONESHOT)
_MASK: Final = 0x84000FFF
_LARGEST_SKIP: Final = 100_000
_LIMIT: Final = "/proc/sys/fs/inotify/max_queued_events"
_ACCESS, _MODIFY = 0x1, 0x2
#: bytes of a struct inotify_event without a name
_EVENT_SIZE: Final = 16


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
    """One inotify instance. ``unread``: events wait to be read."""

    watches: tuple[Watch, ...]
    unread: bool = False

    @classmethod
    def examine(cls, view: FdView) -> str:
        _watches(view)
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        unread = bool(ioctl_int(view.dup, Ioctl.SIOCINQ))
        return cls(watches=tuple(_watches(view)), unread=unread, **view.common())

    def check(self, host: Rebuilder) -> str:
        for watch in self.watches:
            if not host.path.carried(watch.path) and not os.path.lexists(host.path(watch.path)):
                raise FileMissing("a file watched by inotify is not here", object=host.path(watch.path))
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        fd = batch.syscall(SYS.inotify_init1, _IN_NONBLOCK_CLOEXEC)
        for watch in sorted(self.watches, key=lambda watch: watch.number):
            _add(fd, host.place(watch.path), watch)
        if self.unread:
            _lose_some(fd)
            host.warn("unread inotify events have become one that says that some were lost (IN_Q_OVERFLOW)")
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


def _lose_some(fd: int) -> None:
    """Let the queue hold nothing but the event that says that events were lost. OSError."""
    with open(_LIMIT, encoding="ascii") as file:
        limit = int(file.read())
    memory = os.memfd_create("tcpmig-events", os.MFD_CLOEXEC)
    # the kernel tells nobody of what happens through a descriptor that memfd_create has made
    ours = os.open(f"/proc/self/fd/{memory}", os.O_RDWR | os.O_CLOEXEC)
    try:
        calls = CallTable()
        path, byte = calls.path(f"/proc/self/fd/{memory}"), calls.put(b"x")
        watch = calls.call(SYS.inotify_add_watch, fd, path, _ACCESS | _MODIFY, label="inotify_add_watch")
        # the one after the other: two equal ones would become one
        for _ in range(limit // 2 + 1):
            calls.call(SYS.pwrite64, ours, byte, 1, 0, label="pwrite")
            calls.call(SYS.pread64, ours, byte, 1, 0, label="pread")
        # the queue is full: that the watch is gone is not told any more
        calls.call(SYS.inotify_rm_watch, fd, watch, label="inotify_rm_watch")
        batch.run(calls)
    finally:
        os.close(ours)
        os.close(memory)
    left = ioctl_int(fd, Ioctl.SIOCINQ) - _EVENT_SIZE
    while left > 0:
        left -= len(os.read(fd, min(left, 1 << 20)))


def _watches(view: FdView) -> list[Watch]:
    found = []
    for line in view.lines:
        if not line.startswith("inotify "):
            continue
        parts = _LINE.match(line)
        if parts is None:
            raise FileCaptureFailed(f"watch not understood: {line}", object=view.object)
        handle = bytes.fromhex(parts[7])
        path = path_of(int(parts[2], 16), int(parts[3], 16), int(parts[6], 16), handle, way_of(view.pid))
        if path is None:
            raise UnsupportedFile("inotify watches a file whose path cannot be found", object=view.object)
        found.append(Watch(number=int(parts[1], 16), path=path, mask=int(parts[4], 16) & _MASK))
    return found
