"""Fifos: pipes with a path.

Source: fs/pipe.c (fifo_open). The queue is kept as long as somebody has the fifo open; it travels with one read end.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING, Self

from checkpoint.errors import FileMissing, FileRebuildFailed, PeerOutsideTree
from checkpoint.files.abi import REOPEN_FLAGS, Fcntl
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.outside import holders_text
from checkpoint.files.pipe import PipeQueue, ends_in_tree, read_queue, write_queue
from checkpoint.files.regular import path_of
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Fifo"]


@register("fifo", link=r"/.*", mode=stat.S_IFIFO)
@dataclass(frozen=True, slots=True, kw_only=True)
class Fifo(OpenFile):
    """One description of a fifo.

    path   of the source
    size   bytes that it can hold
    queue  the unread bytes; with one read end of each fifo, else None
    """

    path: str
    size: int
    queue: PipeQueue | None

    def validate(self) -> None:
        if not self.path.startswith("/") or "\0" in self.path:
            raise ValueError(f"{self.path!r} is not an absolute path")

    @classmethod
    def examine(cls, view: FdView) -> str:
        path_of(view)
        holders = view.table.outside.holders(view.link)
        if holders:
            text = f"fifo {view.link} is also open in {holders_text(holders)}"
            if not view.table.policy.cuts:
                raise PeerOutsideTree(text, object=view.object)
            return f"{text}, which is cut off"
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        path = path_of(view)
        readers, _ = ends_in_tree(view)
        queue = read_queue(view.dup, False, view.object) if readers and view is readers[0] else None
        return cls(path=path, size=fcntl.fcntl(view.dup, Fcntl.GETPIPE_SZ), queue=queue, **view.common())

    def check(self, host: Rebuilder) -> str:
        self._found(host.path(self.path))
        return ""

    def _found(self, path: str) -> str:
        try:
            found = os.stat(path)
        except OSError as error:
            raise FileMissing(f"fifo: {error.strerror}", object=path) from None
        if not stat.S_ISFIFO(found.st_mode):
            raise FileMissing("not a fifo", object=path)
        return path

    def rebuild(self, host: Rebuilder) -> int:
        path = self._found(host.place(self.path))
        try:
            if ("fifo", path) not in host.shared:
                # Open both ways while the descriptions are made: none of them waits for a partner then.
                anchor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                host.shared["fifo", path] = anchor
                host.at_end(lambda: os.close(anchor))
                same = [f for f in host.files if isinstance(f, Fifo) and f.path == self.path]
                queue = next((f.queue for f in same if f.queue is not None), PipeQueue(chunks=(), packets=False))
                write_queue(anchor, queue, self.size, path)
            fd = os.open(path, self.flags & REOPEN_FLAGS | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise FileRebuildFailed(f"fifo: {error.strerror}", object=path) from error
        set_flags(fd, self.flags)
        return fd
