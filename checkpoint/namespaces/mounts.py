"""A mount namespace that is a copy of the host's, with a few mounts of its own on top.

That is what `unshare --mount` makes, and what a service with private mounts has.  The rebuilt tree gets a copy of the
target's mount tree, and on top what the original had: file systems that the kernel fills (proc, sysfs, ..), empty ones
in memory, and directories of the host shown in a second place.  A tree with another root directory (pivot_root), an
overlay, or mounts that propagate is refused by name.

Source: mount_namespaces(7); fs/namespace.c (copy_tree, do_change_type).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from checkpoint.errors import MountNotMovable
from checkpoint.kernel.clone import CloneFlag
from checkpoint.kernel.mountinfo import MountInfo, read_mounts
from checkpoint.kernel.mounts import MountFlag, mount
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS

__all__ = ["Mount", "Mounts", "judge"]

#: what the kernel fills
_MADE_UP: Final = frozenset({"proc", "sysfs", "mqueue", "cgroup2"})
_MEMORY: Final = "tmpfs"
#: options of a tmpfs that are given to mount(2) again
_TMPFS: Final = ("size", "nr_blocks", "nr_inodes", "mode", "uid", "gid")
_FLAGS: Final = {
    "ro": MountFlag.RDONLY,
    "nosuid": MountFlag.NOSUID,
    "nodev": MountFlag.NODEV,
    "noexec": MountFlag.NOEXEC,
    "noatime": MountFlag.NOATIME,
    "nodiratime": MountFlag.NODIRATIME,
    "relatime": MountFlag.RELATIME,
    "nosymfollow": MountFlag.NOSYMFOLLOW,
}
_ALL: Final = sum(_FLAGS.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One mount on top of the host's.

    kind    of file system; empty: a directory of the host, ``source``, shown in a second place
    source  as given to mount(2)
    at      where
    flags   MS_* of the mount
    data    options of the file system
    """

    kind: str
    source: str
    at: str
    flags: int
    data: str = ""

    def __post_init__(self) -> None:
        if self.kind and self.kind not in (*_MADE_UP, _MEMORY):
            raise ValueError(f"a file system {self.kind!r} is not mounted out of an image")
        paths = [self.at] if self.kind else [self.at, self.source]
        if not all(path.startswith("/") for path in paths) or "\0" in self.at + self.source + self.data:
            raise ValueError("the path of a mount is not absolute, or holds a zero byte")
        if self.flags & ~_ALL:
            raise ValueError("flags of a mount out of range")

    def make(self, calls: CallTable, path: Callable[[str], str]) -> None:
        """Queue it. ``path``: maps a path of the source to one here."""
        if self.kind:
            mount(calls, self.source, self.at, self.kind, self.flags, self.data)
            return
        mount(calls, path(self.source), self.at, flags=MountFlag.BIND)
        if self.flags:
            mount(calls, "none", self.at, flags=MountFlag.REMOUNT | MountFlag.BIND | self.flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounts:
    """A mount namespace.

    slave  what is mounted on the host later shows in it, too
    added  what it has on top of the host's mounts, in the order of their making
    """

    slave: bool = False
    added: tuple[Mount, ...] = ()

    @classmethod
    def of(cls, pid: int) -> Mounts:
        """That of a process. MountNotMovable, NoSuchProcess."""
        theirs, ours = read_mounts(pid), read_mounts("thread-self")
        for error in _reasons(theirs):
            raise error
        added = tuple(_added(one, pid, ours) for one in _on_top(theirs, ours))
        return cls(slave=any(field.startswith("master:") for field in _root(theirs).propagation), added=added)

    @property
    def directories(self) -> set[str]:
        """Directories of the host that must be at the target, too."""
        return {one.source for one in self.added if not one.kind}

    def enter(self, calls: CallTable, path: Callable[[str], str]) -> None:
        """Queue what makes such a namespace, and enters it."""
        calls.call(SYS.unshare, CloneFlag.NEWNS, label="unshare the mount namespace")
        mount(calls, "none", "/", flags=MountFlag.REC | (MountFlag.SLAVE if self.slave else MountFlag.PRIVATE))
        for one in self.added:
            one.make(calls, path)


def _root(mounts: Sequence[MountInfo]) -> MountInfo:
    return next(one for one in mounts if one.at == "/")


def _on_top(theirs: Sequence[MountInfo], ours: Sequence[MountInfo]) -> list[MountInfo]:
    """What they have and we have not."""
    known = Counter(one.key for one in ours)
    found = []
    for one in theirs:
        if known[one.key]:
            known[one.key] -= 1
        else:
            found.append(one)
    return found


def _reasons(theirs: Sequence[MountInfo]) -> Iterator[MountNotMovable]:
    """Why a mount tree cannot be made again at all."""
    for one in theirs:
        if any(field.startswith("shared:") for field in one.propagation):
            yield MountNotMovable("what is mounted below it shows in another mount namespace, too", object=one.at)


def _added(one: MountInfo, pid: int, ours: Sequence[MountInfo]) -> Mount:
    """A mount of theirs. MountNotMovable."""
    flags = sum(flag for name, flag in _FLAGS.items() if name in one.options)
    if one.at == "/":
        raise MountNotMovable("the tree has another root file system than the host", object="/")
    if one.kind in _MADE_UP and one.root == "/":
        return Mount(kind=one.kind, source=one.source, at=one.at, flags=flags)
    bound = _place(one, pid, ours)
    if bound is not None:
        return Mount(kind="", source=bound, at=one.at, flags=flags)
    if one.kind == _MEMORY and one.root == "/":
        if os.listdir(f"/proc/{pid}/root{one.at}"):
            raise MountNotMovable("a file system in memory with files in it is the tree's own", object=one.at)
        data = ",".join(option for option in one.super if option.partition("=")[0] in _TMPFS)
        return Mount(kind=one.kind, source=one.source, at=one.at, flags=flags, data=data)
    raise MountNotMovable(f"a file system {one.kind} ({one.source}) is mounted there for the tree alone", object=one.at)


def _place(one: MountInfo, pid: int, ours: Sequence[MountInfo]) -> str | None:
    """The path by which the host has the directory that is mounted; None: by none."""
    for ground in ours:
        beyond = os.path.relpath(one.root, ground.root)
        if ground.device != one.device or beyond.startswith(".."):
            continue
        path = os.path.normpath(os.path.join(ground.at, beyond))
        try:
            same = os.path.samestat(os.stat(path), os.stat(f"/proc/{pid}/root{one.at}"))
        except OSError:
            continue
        if same and os.path.isdir(path):
            return path
    return None


def judge(pid: int) -> Iterator[MountNotMovable]:
    """What of a process's mount namespace cannot be made again. NoSuchProcess."""
    theirs, ours = read_mounts(pid), read_mounts("thread-self")
    yield from _reasons(theirs)
    for one in _on_top(theirs, ours):
        try:
            _added(one, pid, ours)
        except MountNotMovable as error:
            yield error
