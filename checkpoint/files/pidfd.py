"""pidfd: a descriptor that names a process.

Source: kernel/pid.c, fs/pidfs.c; fdinfo line ``Pid`` (-1: the process has ended and was reaped). Flag O_EXCL: it names
a thread (PIDFD_THREAD, since 6.9), which is born before the files are made then.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

from checkpoint import procfs
from checkpoint.errors import FileRebuildFailed, NoSuchProcess, PeerOutsideTree
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["PidFd"]

_THREAD: Final = os.O_EXCL
_REAPED: Final = -1


@register("pidfd", link=r"anon_inode:\[?pidfd\]?|pidfd:.*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PidFd(OpenFile):
    """One pidfd.

    pid     the process or thread, one of the tree; -1: it is no more
    """

    pid: int

    def validate(self) -> None:
        if not (self.pid == _REAPED or 0 < self.pid < 1 << 22):
            raise ValueError("PID out of range")

    def renumbered(self, number: Callable[[int], int]) -> Self:
        kept = self._with_parts("renumbered", number)
        return kept if self.pid == _REAPED else dataclasses.replace(kept, pid=number(self.pid))

    @classmethod
    def examine(cls, view: FdView) -> str:
        _named(view)
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        return cls(pid=_named(view), **view.common())

    def rebuild(self, host: Rebuilder) -> int:
        fd = _of_nobody(self.flags & _THREAD) if self.pid == _REAPED else self._of_tree(host)
        set_flags(fd, self.flags)
        return fd

    @property
    def tids(self) -> frozenset[int]:
        return frozenset({self.pid} if self.flags & _THREAD else ()) - {_REAPED}

    def _of_tree(self, host: Rebuilder) -> int:
        try:
            return os.pidfd_open(host.number(self.pid), self.flags & _THREAD)
        except ProcessLookupError:
            raise FileRebuildFailed("it names a process that is not there", object=f"pid {self.pid}") from None
        except OSError as error:
            text = f"a pidfd of a thread (PIDFD_THREAD) cannot be had here: {error.strerror}"
            raise FileRebuildFailed(text, object=f"pid {self.pid}") from error


def _named(view: FdView) -> int:
    """The process or thread; PeerOutsideTree if it is none of the tree."""
    pid = view.number("Pid")
    if pid <= 0:
        return _REAPED
    pids = view.table.pids
    if pid in pids:
        return pid
    if view.flags & _THREAD and any(procfs.exists_in(each, pid) for each in pids):
        return pid
    try:
        stat = procfs.read_stat(pid)
    except NoSuchProcess:
        return _REAPED
    if stat.zombie and stat.ppid in pids:
        return pid
    raise PeerOutsideTree(f"pidfd of process {pid} ({stat.comm}), which is outside of the tree", object=view.object)


def _of_nobody(flags: int) -> int:
    """A pidfd whose process has ended and is reaped."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        return os.pidfd_open(pid, flags)
    finally:
        os.waitpid(pid, 0)
