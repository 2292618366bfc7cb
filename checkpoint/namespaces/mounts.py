"""A mount namespace that is a copy of the host's, with a few mounts of its own on top.

That is what `unshare --mount` makes, and what a service with private mounts has.  The rebuilt tree gets a copy of the
target's mount tree, and on top what the original had: file systems that the kernel fills (proc, sysfs, ..), those in
memory, with what is in them (:mod:`checkpoint.namespaces.memoryfs`), overlays, and directories and files of the host
shown in a second place.  A tree with another root directory (pivot_root), or mounts that propagate, is refused by name.

Source: mount_namespaces(7); fs/namespace.c (copy_tree, do_change_type).
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from checkpoint.errors import MountNotMovable
from checkpoint.kernel.clone import CloneFlag
from checkpoint.kernel.mountinfo import MountInfo, read_mounts
from checkpoint.kernel.mounts import MountFlag, mount
from checkpoint.namespaces.memoryfs import Folder
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS

__all__ = ["Mount", "Mounts", "judge"]

#: what the kernel fills
_MADE_UP: Final = frozenset({"proc", "sysfs", "mqueue", "cgroup2"})
_MEMORY: Final = "tmpfs"
#: options of a tmpfs that are given to mount(2) again; owner and mode are those of its root
_TMPFS: Final = ("size", "nr_blocks", "nr_inodes", "mode")
_OVERLAY: Final = "overlay"
#: options of an overlay: directories, and the others; Documentation/filesystems/overlayfs.rst
_LAYERS: Final = ("lowerdir", "upperdir", "workdir")
_OVERLAYS: Final = (*_LAYERS, "userxattr", "redirect_dir", "index", "metacopy", "nfs_export", "xino", "uuid")
_AT_FDCWD: Final = (1 << 64) - 100
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
    file    what is shown in a second place is a file
    """

    kind: str
    source: str
    at: str
    flags: int
    data: str = ""
    file: bool = False

    def __post_init__(self) -> None:
        if self.kind and self.kind not in (*_MADE_UP, _MEMORY, _OVERLAY):
            raise ValueError(f"a file system {self.kind!r} is not mounted out of an image")
        paths = [self.at] if self.kind else [self.at, self.source]
        if not all(path.startswith("/") for path in paths) or "\0" in self.at + self.source + self.data:
            raise ValueError("the path of a mount is not absolute, or holds a zero byte")
        if self.flags & ~_ALL:
            raise ValueError("flags of a mount out of range")
        if self.kind == _OVERLAY:
            names = [option.partition("=")[0] for option in self.data.split(",")]
            if not {*names} <= {*_OVERLAYS} or "lowerdir" not in names or not all(map(_absolute, self.layers)):
                raise ValueError("an overlay without directories, or with other options than it has")

    @property
    def layers(self) -> list[str]:
        """The directories of an overlay."""
        options = [option.partition("=") for option in self.data.split(",")] if self.kind == _OVERLAY else []
        return [path for name, _, value in options if name in _LAYERS for path in value.split(":")]

    def make(self, calls: CallTable, path: Callable[[str], str]) -> None:
        """Queue it. ``path``: maps a path of the source to one here."""
        if self.kind:
            mount(calls, self.source, self.at, self.kind, self.flags, self._mapped(path))
            return
        mount(calls, path(self.source), self.at, flags=MountFlag.BIND)
        if self.flags:
            mount(calls, "none", self.at, flags=MountFlag.REMOUNT | MountFlag.BIND | self.flags)

    def _mapped(self, path: Callable[[str], str]) -> str:
        if self.kind != _OVERLAY:
            return self.data
        options = [option.partition("=") for option in self.data.split(",")]
        return ",".join(
            f"{name}={':'.join(map(path, value.split(':')))}" if name in _LAYERS else name + equals + value
            for name, equals, value in options
        )

    def make_place(self, calls: CallTable, above: str) -> None:
        """Queue the mount point, which is in a file system in memory that is mounted at ``above``, and still empty."""
        parts = os.path.relpath(self.at, above).split("/")
        for number in range(1, len(parts) + 1):
            at = calls.path("/".join([above.rstrip("/"), *parts[:number]]))
            if number == len(parts) and self.file:
                calls.call(SYS.mknodat, _AT_FDCWD, at, stat.S_IFREG | 0o600, 0, label=f"make {self.at}")
            else:
                # others may be mounted in the same directory
                calls.call(SYS.mkdirat, _AT_FDCWD, at, 0o755, ignore=True, label=f"make {self.at}")


def _absolute(path: str) -> bool:
    return path.startswith("/") and not set(path) & set("\\,:\0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounts:
    """A mount namespace.

    slave  what is mounted on the host later shows in it, too
    added  what it has on top of the host's mounts, in the order of their making
    """

    slave: bool = False
    added: tuple[Mount, ...] = ()

    @classmethod
    def of(cls, pid: int, cgroup: str = "/") -> Mounts:
        """That of a process. ``cgroup``: of version 2, where its cgroup namespace begins. MountNotMovable,
        NoSuchProcess."""
        theirs, ours = read_mounts(pid), read_mounts("thread-self")
        for error in _reasons(theirs, ours):
            raise error
        added = tuple(_added(one, pid, ours, cgroup) for one in _on_top(theirs, ours))
        return cls(slave=any(field.startswith("master:") for field in _root(theirs).propagation), added=added)

    @property
    def directories(self) -> set[str]:
        """Directories of the host that must be at the target, too."""
        return {path for one in self.added for path in ([one.source] if not (one.kind or one.file) else one.layers)}

    @property
    def memory(self) -> list[str]:
        """Where file systems in memory are mounted."""
        return [one.at for one in self.added if one.kind == _MEMORY]

    def folders(self, pid: int) -> tuple[Folder, ...]:
        """What is in them, of a process that stands still. MemoryFilesTooLarge, MountNotMovable, OSError."""
        return tuple(Folder.read(f"/proc/{pid}/root", at) for at in self.memory)

    def enter(self, calls: CallTable, path: Callable[[str], str]) -> None:
        """Queue what makes such a namespace, and enters it."""
        calls.call(SYS.unshare, CloneFlag.NEWNS, label="unshare the mount namespace")
        mount(calls, "none", "/", flags=MountFlag.REC | (MountFlag.SLAVE if self.slave else MountFlag.PRIVATE))
        memory: list[str] = []
        for one in self.added:
            above = [at for at in memory if one.at.startswith(f"{at.rstrip('/')}/")]
            if above:
                one.make_place(calls, max(above, key=len))
            one.make(calls, path)
            if one.kind == _MEMORY:
                memory.append(one.at)


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


def _reasons(theirs: Sequence[MountInfo], ours: Sequence[MountInfo]) -> Iterator[MountNotMovable]:
    """Why a mount tree cannot be made again at all."""
    uppermost = {one.at: one for one in theirs}
    for one in _on_top(theirs, ours):
        if one.kind == _MEMORY and uppermost[one.at] is not one:
            yield MountNotMovable("something else is mounted over a file system in memory", object=one.at)
    for one in theirs:
        if any(field.startswith("shared:") for field in one.propagation):
            yield MountNotMovable("what is mounted below it shows in another mount namespace, too", object=one.at)


def _added(one: MountInfo, pid: int, ours: Sequence[MountInfo], cgroup: str) -> Mount:
    """A mount of theirs. MountNotMovable."""
    flags = sum(flag for name, flag in _FLAGS.items() if name in one.options)
    if one.at == "/":
        raise MountNotMovable("the tree has another root file system than the host", object="/")
    if one.kind in _MADE_UP and one.root == (cgroup if one.kind == "cgroup2" else "/"):
        return Mount(kind=one.kind, source=one.source, at=one.at, flags=flags)
    bound = _place(one, pid, ours)
    if bound is not None:
        return Mount(kind="", source=bound, at=one.at, flags=flags, file=not os.path.isdir(bound))
    if one.kind == _MEMORY and one.root == "/":
        folder = Folder.read(f"/proc/{pid}/root", one.at, contents=False)
        if flags & MountFlag.RDONLY and len(folder.nodes) > 1:
            raise MountNotMovable("a file system in memory with files in it is mounted read-only", object=one.at)
        data = ",".join(option for option in one.super if option.partition("=")[0] in _TMPFS)
        return Mount(kind=one.kind, source=one.source, at=one.at, flags=flags, data=data)
    if one.kind == _OVERLAY and one.root == "/":
        data = ",".join(option for option in one.super if option.partition("=")[0] in _OVERLAYS)
        try:
            made = Mount(kind=one.kind, source=one.source, at=one.at, flags=flags, data=data)
        except ValueError:
            raise MountNotMovable("the directories of an overlay have no plain paths", object=one.at) from None
        missing = [path for path in made.layers if not os.path.isdir(path)]
        if missing:
            raise MountNotMovable(f"{missing[0]}, of an overlay, is no directory of the host", object=one.at)
        return made
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
        if same:
            return path
    return None


def judge(pid: int, cgroup: str) -> Iterator[MountNotMovable]:
    """What of a process's mount namespace cannot be made again. ``cgroup``: as of :meth:`Mounts.of`. NoSuchProcess."""
    theirs, ours = read_mounts(pid), read_mounts("thread-self")
    yield from _reasons(theirs, ours)
    for one in _on_top(theirs, ours):
        try:
            _added(one, pid, ours, cgroup)
        except MountNotMovable as error:
            yield error
