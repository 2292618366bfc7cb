"""What paths mean to a process: its working directory, its root directory, and the bits its new files do not get.

Threads share all three, but for those that have made a copy for themselves (unshare(CLONE_FS)): such a thread is
cloned without sharing, so that it begins where the tool is and not where the process has gone by then.  Threads that
were born by one of these share its copy.  Processes share them if they were cloned so; then the first gives them.

Source: Linux fs/fs_struct.c; /proc/PID/cwd, /proc/PID/root.
"""

from __future__ import annotations

import os
from typing import Final, Self

from checkpoint.errors import DirectoryGone
from checkpoint.namespaces.ways import way_of
from checkpoint.state.base import State, TaskBuilder, TaskView, bounded, register
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["Filesystem", "ThreadDirectories", "directory"]

_UMASK_MAX: Final = 0o777


@register("filesystem")
@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystem(State):
    """Paths are as the tool sees them, from its own root, or from that of the mount namespace, if it is the tree's own.

    cwd    working directory
    root   root directory; ``None``: that one
    umask  permission bits taken from new files
    """

    cwd: str
    root: str | None
    umask: int

    def __post_init__(self) -> None:
        bounded("umask", self.umask, 0, _UMASK_MAX)
        _absolute(self.cwd, self.root)

    @classmethod
    def capture(cls, task: TaskView) -> Self:
        # There is no call that only reads the umask; /proc/PID/status has it in octal.
        umask = int(task.view.status["Umask"], 8)
        return cls(cwd=directory(task.pid, "cwd"), root=_own_root(task.pid), umask=umask)

    def rebuild(self, task: TaskBuilder) -> None:
        if not task.placed:
            _enter(task, self.cwd, self.root, self.umask)


@register("directories of a thread")
@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadDirectories(State):
    """The same of a thread that does not share them with the first; ``cwd`` None: it does, or

    like  it shares them with the thread of this number, in its own PID namespace, which came before it
    """

    cwd: str | None = None
    root: str | None = None
    umask: int = 0
    like: int = 0

    def __post_init__(self) -> None:
        bounded("umask", self.umask, 0, _UMASK_MAX)
        bounded("the thread with the same directories", self.like, 0, 1 << 22)
        if self.like and self.cwd is not None:
            raise ValueError("directories of its own, and another's")
        _absolute(self.cwd, self.root)

    @classmethod
    def capture(cls, task: TaskView) -> Self:
        first = task.view.directories.first(task.tid)
        if task.leader or first == task.pid:
            return cls()
        if first != task.tid:
            return cls(like=task.view.inner_tid(first))
        where = f"{task.pid}/task/{task.tid}"
        return cls(cwd=directory(where, "cwd"), root=_own_root(where), umask=int(task.status["Umask"], 8))

    def rebuild(self, task: TaskBuilder) -> None:
        if self.cwd is not None:
            _enter(task, self.cwd, self.root, self.umask)


def _absolute(*paths: str | None) -> None:
    for path in paths:
        if path is not None and (not path.startswith("/") or "\0" in path):
            raise ValueError(f"{path!r} is not an absolute path")


def _enter(task: TaskBuilder, cwd: str, root: str | None, umask: int) -> None:
    calls = task.calls
    # The working directory first: its path is the tool's, and means something else after chroot.
    cwd = task.path(cwd)
    calls.call(SYS.chdir, calls.path(cwd), label=f"enter the working directory {cwd}")
    if root is not None:
        root = task.path(root)
        calls.call(SYS.chroot, calls.path(root), label=f"enter the root directory {root}")
    calls.call(SYS.umask, umask, label="set the umask")


def directory(pid: int | str, which: str) -> str:
    """The path of ``cwd`` or ``root`` of a process (or PID/task/TID), as this process sees it, or
    from the root of its mount namespace.

    DirectoryGone if no path leads there: it was removed, or lies outside of our root.
    """
    link = f"/proc/{pid}/{which}"
    path = os.readlink(link)
    seen = os.stat(link)
    try:
        found = os.stat(way_of(_number(pid)) + path)
    except OSError:
        found = None
    if found is None or not os.path.samestat(seen, found):
        what = {"cwd": "working directory", "root": "root directory"}[which]
        raise DirectoryGone(f"its {what} {path} cannot be reached by a path", object=f"pid {pid}")
    return path


def _number(pid: int | str) -> int:
    return int(str(pid).partition("/")[0])


def _own_root(pid: int | str) -> str | None:
    if os.path.samestat(os.stat(f"/proc/{pid}/root"), os.stat(way_of(_number(pid)) or "/")):
        return None
    return directory(pid, "root")
