"""What paths mean to a process: its working directory, its root directory, and the bits its new files do not get.

Threads share all three (threads that do not are refused by the check before the stop).

Source: Linux fs/fs_struct.c; /proc/PID/cwd, /proc/PID/root.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final, Self

from checkpoint.errors import DirectoryGone
from checkpoint.state.base import State, TaskBuilder, TaskView, bounded, register
from tcpstate.kernel.machine import SYS

__all__ = ["Filesystem", "directory"]

_UMASK_MAX: Final = 0o777


@register("filesystem")
@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystem(State):
    """Paths are as the tool sees them, from its own root.

    cwd    working directory
    root   root directory; ``None``: the same as the tool's
    umask  permission bits taken from new files
    """

    cwd: str
    root: str | None
    umask: int

    def __post_init__(self) -> None:
        bounded("umask", self.umask, 0, _UMASK_MAX)
        for path in (self.cwd, self.root):
            if path is not None and (not path.startswith("/") or "\0" in path):
                raise ValueError(f"{path!r} is not an absolute path")

    @classmethod
    def capture(cls, task: TaskView) -> Self:
        # There is no call that only reads the umask; /proc/PID/status has it in octal.
        umask = int(task.view.status["Umask"], 8)
        return cls(cwd=directory(task.pid, "cwd"), root=_own_root(task.pid), umask=umask)

    def rebuild(self, task: TaskBuilder) -> None:
        calls = task.calls
        # The working directory first: its path is the tool's, and means something else after chroot.
        cwd = task.path(self.cwd)
        calls.call(SYS.chdir, calls.path(cwd), label=f"enter the working directory {cwd}")
        if self.root is not None:
            root = task.path(self.root)
            calls.call(SYS.chroot, calls.path(root), label=f"enter the root directory {root}")
        calls.call(SYS.umask, self.umask, label="set the umask")


def directory(pid: int, which: str) -> str:
    """The path of ``cwd`` or ``root`` of a process, as this process sees it.

    DirectoryGone if no path leads there: it was removed, or lies outside of our root.
    """
    link = f"/proc/{pid}/{which}"
    path = os.readlink(link)
    seen = os.stat(link)
    try:
        found = os.stat(path)
    except OSError:
        found = None
    if found is None or not os.path.samestat(seen, found):
        what = {"cwd": "working directory", "root": "root directory"}[which]
        raise DirectoryGone(f"its {what} {path} cannot be reached by a path", object=f"pid {pid}")
    return path


def _own_root(pid: int) -> str | None:
    if os.path.samestat(os.stat(f"/proc/{pid}/root"), os.stat("/")):
        return None
    return directory(pid, "root")
