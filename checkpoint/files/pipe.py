"""Pipes: two kinds of ends, one queue.

Source: fs/pipe.c. Every end may have several descriptions (made by opening /proc/PID/fd/N). The queue belongs to the
pipe: the record of one read end carries it. It is copied by tee(2), which leaves it in place. In packet mode (O_DIRECT)
every write is a packet, and so every read of the copy is.

A pipe whose other end nobody has is *half-closed*: readers see the end of the file, writers EPIPE. poll(2) tells that
apart from an other end outside of the tree: POLLHUP at a read end, POLLERR at a write end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import struct
from typing import TYPE_CHECKING, Final, Self

from checkpoint.errors import BadFileRecord, FileCaptureFailed, FileRebuildFailed, PeerOutsideTree
from checkpoint.files.abi import AccessMode, Fcntl, FileFlag, Ioctl, tee
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.outside import holders_text
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Pipe", "PipeQueue", "ends_in_tree", "other_end_outside", "read_queue", "write_queue"]

_INT: Final = struct.Struct("<i")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeQueue:
    """What was written and not yet read.

    packets  each chunk is one packet (O_DIRECT); else chunk borders mean nothing
    """

    chunks: tuple[bytes, ...]
    packets: bool


def ends_in_tree(view: FdView) -> tuple[list[FdView], list[FdView]]:
    """(read ends, write ends) that the tree has of the pipe; an O_RDWR description is both."""
    same = view.table.same_file(view)
    return [v for v in same if v.access.reads], [v for v in same if v.access.writes]


def other_end_outside(view: FdView) -> str:
    """Which end (``reader``, ``writer``) somebody outside of the tree has while the tree has none; else empty."""
    readers, writers = ends_in_tree(view)
    if not (readers and writers) and view.table.live and not view.table.outside.holders(view.link):
        # nobody has it: it is closed, or in flight in a message, which only shows in the stop
        return ""
    poll = select.poll()
    poll.register(view.dup, select.POLLIN)
    ((_, events),) = poll.poll(0) or [(0, 0)]
    if not writers and not events & select.POLLHUP:
        return "writer"
    if not readers and not events & select.POLLERR:
        return "reader"
    return ""


def read_queue(fd: int, packets: bool, object: str) -> PipeQueue:
    """A copy of the unread bytes of a pipe, by a read end of it. The pipe keeps them."""
    (count,) = _INT.unpack(fcntl.ioctl(fd, Ioctl.FIONREAD, bytes(_INT.size)))
    chunks: list[bytes] = []
    # an empty packet mode pipe may hold packets of no bytes: they are nothing that a reader could see
    if count:
        copy_out, copy_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # as many slots as the original: tee copies slot by slot
            fcntl.fcntl(copy_in, Fcntl.SETPIPE_SZ, fcntl.fcntl(fd, Fcntl.GETPIPE_SZ))
            copied = tee(fd, copy_in, count)
            if copied != count:
                raise FileCaptureFailed(f"{copied} of {count} bytes of a pipe could be copied", object=object)
            with contextlib.suppress(BlockingIOError):
                while True:
                    chunks.append(os.read(copy_out, count))
        except OSError as error:
            raise FileCaptureFailed(f"copy of a pipe's queue: {error}", object=object) from error
        finally:
            os.close(copy_out)
            os.close(copy_in)
    return PipeQueue(chunks=tuple(chunks), packets=packets)


def write_queue(write_end: int, queue: PipeQueue, size: int, object: str) -> None:
    """Give a new pipe its size and its unread bytes. The end must be non-blocking."""
    try:
        if fcntl.fcntl(write_end, Fcntl.GETPIPE_SZ) != size:
            fcntl.fcntl(write_end, Fcntl.SETPIPE_SZ, size)
    except OSError as error:
        raise FileRebuildFailed(
            f"size {size}: {error.strerror}",
            object=object,
            fix="Raise /proc/sys/fs/pipe-max-size (and pipe-user-pages-soft), or run with CAP_SYS_RESOURCE.",
        ) from error
    flags = FileFlag.NONBLOCK | (FileFlag.DIRECT if queue.packets else 0)
    before = fcntl.fcntl(write_end, fcntl.F_GETFL)
    fcntl.fcntl(write_end, fcntl.F_SETFL, before | flags)
    try:
        for chunk in queue.chunks:
            if os.write(write_end, chunk) != len(chunk):
                raise FileRebuildFailed(f"the queue does not fit a pipe of {size} bytes", object=object)
    except BlockingIOError:
        raise FileRebuildFailed(f"the queue does not fit a pipe of {size} bytes", object=object) from None
    finally:
        fcntl.fcntl(write_end, fcntl.F_SETFL, before)


@register("pipe", link=r"pipe:\[\d+\]", mode=stat.S_IFIFO)
@dataclass(frozen=True, slots=True, kw_only=True)
class Pipe(OpenFile):
    """One description of one end of a pipe (or of both, O_RDWR).

    pipe   tells which descriptions are the same pipe: its inode number at the source
    size   bytes that it can hold (F_GETPIPE_SZ)
    queue  the unread bytes; with one read end of each pipe, else None
    """

    pipe: int
    size: int
    queue: PipeQueue | None

    @classmethod
    def examine(cls, view: FdView) -> str:
        missing = other_end_outside(view)
        holders = view.table.outside.holders(view.link)
        if missing or holders:
            at = f" ({holders_text(holders)})" if holders else ""
            what = f"the {missing} is" if missing else "it is also held"
            text = f"{view.link}: {what} outside of the tree{at}"
            if not view.table.policy.cuts:
                raise PeerOutsideTree(text, object=view.object)
            return f"{text}, and is cut off"
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        missing = other_end_outside(view)
        if missing and not view.table.policy.cuts:
            raise PeerOutsideTree(f"{view.link}: the {missing} is outside of the tree", object=view.object)
        readers, writers = ends_in_tree(view)
        queue = None
        if readers and view is readers[0]:
            queue = read_queue(view.dup, _packets(readers, writers), view.object)
        size = fcntl.fcntl(view.dup, Fcntl.GETPIPE_SZ)
        return cls(pipe=view.stat.st_ino, size=size, queue=queue, **view.common())

    def rebuild(self, host: Rebuilder) -> int:
        made = host.shared.get(("pipe", self.pipe))
        if made is None:
            made = host.shared["pipe", self.pipe] = _NewPipe(host, self)
        if not isinstance(made, _NewPipe):
            raise BadFileRecord("two kinds of one pipe", object=f"pipe {self.pipe}")
        fd = made.end(self)
        set_flags(fd, self.flags)
        return fd


def _packets(readers: list[FdView], writers: list[FdView]) -> bool:
    # Packet mode is the writer's; pipe2 sets it on both ends, so where no writer is left the reader's flag tells.
    return any(view.flags & FileFlag.DIRECT for view in writers or readers)


class _NewPipe:
    """A pipe being rebuilt: its two first ends, each given to one description; the others reopen them."""

    def __init__(self, host: Rebuilder, record: Pipe) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        host.at_end(self.close)
        self._free = {AccessMode.READ: self.read_end, AccessMode.WRITE: self.write_end}
        ends = [f for f in host.files if isinstance(f, Pipe) and f.pipe == record.pipe]
        queue = next((f.queue for f in ends if f.queue is not None), PipeQueue(chunks=(), packets=False))
        write_queue(self.write_end, queue, record.size, f"pipe {record.pipe}")

    def end(self, record: Pipe) -> int:
        # a description that was made by open(2) has O_LARGEFILE, those of pipe(2) do not
        first = None if record.flags & FileFlag.LARGEFILE else self._free.pop(record.access, None)
        if first is not None:
            return first
        anchor = self.read_end if record.access is AccessMode.READ else self.write_end
        magic = f"/proc/self/fd/{anchor}"
        return os.open(magic, record.access | os.O_CLOEXEC | os.O_NONBLOCK)

    def close(self) -> None:
        """Give up the ends that no description took: a half-closed pipe is one again."""
        for fd in self._free.values():
            os.close(fd)
        self._free.clear()
