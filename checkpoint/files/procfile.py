"""Files and directories of /proc/PID: of the process itself or of another one of the tree, whatever name led there
(/proc/self, /proc/thread-self).

What such a file shows is made when it is read, so the same file of the same process is the same file; opened for
writing are kept those that set something of the process, and ask whoever writes, not whoever has opened them, whether
he may.  The tool opens them: what shows more to a privileged opener is refused.

Source: fs/proc/base.c (tgid_base_stuff, tid_base_stuff), fs/proc/task_mmu.c (pagemap_read).
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

from checkpoint import procfs
from checkpoint.errors import FileRebuildFailed, NoSuchProcess, PeerOutsideTree, UnsupportedFile
from checkpoint.files.abi import REOPEN_FLAGS, FileFlag
from checkpoint.files.base import FdView, OpenFile, register
from checkpoint.files.content import DELETED
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["ProcFile"]

_LINK: Final = re.compile(r"/proc/(\d+)(?:/task/(\d+))?(?:/(.+))?")
#: what a writer needs no privilege of the opener for
_WRITABLE: Final = frozenset({"comm", "coredump_filter", "oom_adj", "oom_score_adj"})
#: show frames of physical memory and where the kernel stands, if their opener may see it
_BY_OPENER: Final = frozenset({"pagemap", "stack"})
#: links to elsewhere, and what there is only for a descriptor that is open
_LINKS: Final = frozenset({"cwd", "exe", "root"})
_ELSEWHERE: Final = _LINKS | {"fd", "fdinfo", "map_files", "ns"}
_MOST: Final = 1 << 22


def _is_ours(view: FdView) -> bool:
    """Whether it is below a process in the /proc that we see: its numbers are ours."""
    return (
        stat.S_IFMT(view.stat.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
        and not view.link.endswith(DELETED)
        and view.stat.st_dev == os.stat("/proc").st_dev
    )


@register("file of a process", link=_LINK.pattern, match=_is_ours)
@dataclass(frozen=True, slots=True, kw_only=True)
class ProcFile(OpenFile):
    """One of them.

    pid     the process, or a thread that is named like one; of the tree
    thread  the thread below whose task/TID it is; 0: not there
    name    the rest of its path; empty: the directory itself
    """

    pid: int
    thread: int = 0
    name: str = ""

    def validate(self) -> None:
        if not (0 < self.pid < _MOST and 0 <= self.thread < _MOST):
            raise ValueError("PID out of range")
        parts = self.name.split("/")
        if self.name and not all(part and part not in (".", "..") and "\0" not in part for part in parts):
            raise ValueError(f"{self.name!r} is not a path below a process")
        link = self.flags & FileFlag.PATH and self.flags & FileFlag.NOFOLLOW
        if (parts[0] in _LINKS and not link) or (len(parts) > 1 and parts[0] in _ELSEWHERE):
            raise ValueError(f"{self.name!r} leads out of /proc")

    def renumbered(self, number: Callable[[int], int]) -> Self:
        kept = self._with_parts("renumbered", number)
        return dataclasses.replace(kept, pid=number(self.pid), thread=number(self.thread) if self.thread else 0)

    @classmethod
    def examine(cls, view: FdView) -> str:
        _named(view)
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        pid, thread, name = _named(view)
        return cls(pid=pid, thread=thread, name=name, **view.common())

    @property
    def tids(self) -> frozenset[int]:
        return frozenset({self.pid, self.thread}) - {0}

    def rebuild(self, host: Rebuilder) -> int:
        task = f"/task/{host.number(self.thread)}" if self.thread else ""
        path = "/".join([f"/proc/{host.number(self.pid)}{task}", *([self.name] if self.name else [])])
        try:
            fd = os.open(path, self.flags & (REOPEN_FLAGS | FileFlag.PATH) | os.O_CLOEXEC)
            if self.pos:
                os.lseek(fd, self.pos, os.SEEK_SET)
        except OSError as error:
            raise FileRebuildFailed(f"open: {error.strerror}", object=path) from error
        return fd


def _named(view: FdView) -> tuple[int, int, str]:
    """Process, thread and name. PeerOutsideTree if it is none of the tree; UnsupportedFile if it cannot be the same."""
    found = _LINK.fullmatch(view.link)
    if found is None:
        raise UnsupportedFile(f"file in /proc that has moved ({view.link})", object=view.object)
    pid, thread, name = int(found[1]), int(found[2] or 0), found[3] or ""
    pids = view.table.pids
    if pid not in pids and not any(procfs.exists_in(each, pid) for each in pids) and not _zombie_of(pid, pids):
        if not procfs.exists(pid):
            raise UnsupportedFile(f"file of a process that has ended ({view.link})", object=view.object)
        raise PeerOutsideTree(f"{view.link} tells of process {pid}, which is outside of the tree", object=view.object)
    head, _, rest = name.partition("/")
    if (rest and head in _ELSEWHERE) or head in _BY_OPENER:
        raise UnsupportedFile(f"file that differs for each who opens it ({view.link})", object=view.object)
    if view.access.writes and name not in _WRITABLE:
        raise UnsupportedFile(f"file of a process, opened for writing ({view.link})", object=view.object)
    return pid, thread, name


def _zombie_of(pid: int, pids: list[int]) -> bool:
    try:
        found = procfs.read_stat(pid)
    except NoSuchProcess:
        return False
    return found.zombie and found.ppid in pids
