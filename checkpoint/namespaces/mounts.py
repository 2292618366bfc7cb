"""A mount namespace: a copy of the host's with a few mounts of its own on top, or one with a root of its own.

The first is what `unshare --mount` makes, and what a service with private mounts has; the second is a container's
(pivot_root).  The rebuilt tree gets a copy of the target's mount tree, and on top, or on a new root, what the original
had: file systems that the kernel fills (proc, sysfs, ..), those in memory, with what is in them
(:mod:`checkpoint.namespaces.memoryfs`), terminals, overlays, and directories and files of the host shown in a second
place.  What a tree has is found by :mod:`checkpoint.namespaces.mountlook`.

Source: mount_namespaces(7), pivot_root(2); fs/namespace.c (copy_tree, do_change_type, path_pivot_root).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Final

from checkpoint.kernel.clone import CloneFlag
from checkpoint.kernel.mounts import MNT_DETACH, MountFlag, mount
from checkpoint.namespaces.memoryfs import DEVICES, Folder
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["FLAGS", "LAYERS", "MADE_UP", "MEMORY", "OPTIONS", "OVERLAY", "TERMINALS", "Mount", "Mounts"]

#: what the kernel fills
MADE_UP: Final = frozenset({"proc", "sysfs", "mqueue", "cgroup2"})
MEMORY: Final = "tmpfs"
#: pseudo terminals: each one that is mounted is a new one (since Linux 4.7)
TERMINALS: Final = "devpts"
OVERLAY: Final = "overlay"
#: options of an overlay: directories, and the others; Documentation/filesystems/overlayfs.rst
LAYERS: Final = ("lowerdir", "upperdir", "workdir")
#: options that are given to mount(2) again; owner and mode of a tmpfs are those of its root
OPTIONS: Final = {
    "proc": ("hidepid", "gid", "subset"),
    MEMORY: ("size", "nr_blocks", "nr_inodes", "mode"),
    TERMINALS: ("gid", "mode", "ptmxmode", "max"),
    OVERLAY: (*LAYERS, "userxattr", "redirect_dir", "index", "metacopy", "nfs_export", "xino", "uuid"),
}
_AT_FDCWD: Final = (1 << 64) - 100
#: where a new root is mounted while its mounts are made: a directory that every host has, and nobody's source
_STAGING: Final = "/proc"
FLAGS: Final = {
    "ro": MountFlag.RDONLY,
    "nosuid": MountFlag.NOSUID,
    "nodev": MountFlag.NODEV,
    "noexec": MountFlag.NOEXEC,
    "noatime": MountFlag.NOATIME,
    "nodiratime": MountFlag.NODIRATIME,
    "relatime": MountFlag.RELATIME,
    "nosymfollow": MountFlag.NOSYMFOLLOW,
}
_ALL: Final = sum(FLAGS.values()) | int(MountFlag.STRICTATIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One mount on top of the host's, or on a root of its own.

    kind    of file system; empty: a directory of the host, ``source``, shown in a second place
    source  as given to mount(2)
    at      where; the root directory: it is the tree's root
    flags   MS_* of the mount
    data    options of the file system
    file    what is shown in a second place is a file, or
    device  a device: major and minor
    inside  what is shown in a second place is the tree's own, and not the host's
    private  what is mounted on the host below ``source`` later does not show here, though the others are slaves
    """

    kind: str
    source: str
    at: str
    flags: int
    data: str = ""
    file: bool = False
    device: tuple[int, int] = (0, 0)
    inside: bool = False
    private: bool = False

    def __post_init__(self) -> None:
        if self.kind and self.kind not in (*MADE_UP, MEMORY, TERMINALS, OVERLAY):
            raise ValueError(f"a file system {self.kind!r} is not mounted out of an image")
        paths = [self.at] if self.kind else [self.at, self.source]
        if not all(map(_plain, paths)) or "\0" in self.at + self.source + self.data:
            raise ValueError("the path of a mount is not absolute, or holds a zero byte")
        if self.flags & ~_ALL:
            raise ValueError("flags of a mount out of range")
        if self.inside and (self.kind or self.at == "/"):
            raise ValueError("a mount of what is the tree's own that is not one, or is its root")
        if self.device != (0, 0) and self.device not in DEVICES:
            raise ValueError(f"a device {self.device} is not made out of an image")
        names = [option.partition("=")[0] for option in self.data.split(",") if option]
        if not {*names} <= {*OPTIONS.get(self.kind, ())}:
            raise ValueError(f"a file system {self.kind} with other options than it has")
        if self.kind == OVERLAY and ("lowerdir" not in names or not all(map(_absolute, self.layers))):
            raise ValueError("an overlay without directories")

    @property
    def _options(self) -> list[tuple[str, str, str]]:
        return [option.partition("=") for option in self.data.split(",")] if self.kind == OVERLAY else []

    @property
    def layers(self) -> list[str]:
        """The directories of an overlay."""
        return [path for name, _, value in self._options if name in LAYERS for path in value.split(":")]

    @property
    def stack(self) -> list[str]:
        """Those that its files are in, the uppermost first."""
        found = {name: value.split(":") for name, _, value in self._options}
        return [*found.get("upperdir", ()), *found.get("lowerdir", ())]

    def make(self, calls: CallTable, path: Callable[[str], str], base: str) -> None:
        """Queue it. ``path``: maps a path of the source to one here; ``base``: where the tree's root is mounted, empty:
        it is the host's."""
        at = f"{base}{self.at}" if self.at != "/" else base
        if self.kind:
            mount(calls, self.source, at, self.kind, self.flags, self._mapped(path))
            return
        mount(calls, f"{base}{self.source}" if self.inside else path(self.source), at, flags=MountFlag.BIND)
        if self.private:
            mount(calls, "none", at, flags=MountFlag.PRIVATE)
        if self.flags:
            mount(calls, "none", at, flags=MountFlag.REMOUNT | MountFlag.BIND | self.flags)

    def _mapped(self, path: Callable[[str], str]) -> str:
        if self.kind != OVERLAY:
            return self.data
        return ",".join(
            f"{name}={':'.join(map(path, value.split(':')))}" if name in LAYERS else name + equals + value
            for name, equals, value in self._options
        )

    def make_place(self, calls: CallTable, place: str, above: str, base: str) -> None:
        """Queue ``place``, its mount point or its source, which is in a file system in memory that is mounted at
        ``above``, and still empty."""
        parts = os.path.relpath(place, above).split("/")
        for number in range(1, len(parts) + 1):
            at = calls.path("/".join([base + above.rstrip("/"), *parts[:number]]))
            # others may be mounted in the same directory, or of the same file
            if number < len(parts) or not self.file:
                calls.call(SYS.mkdirat, _AT_FDCWD, at, 0o755, ignore=True, label=f"make {place}")
                continue
            device = self.device if place == self.source else (0, 0)
            kind = stat.S_IFREG if device == (0, 0) else stat.S_IFCHR
            calls.call(
                SYS.mknodat, _AT_FDCWD, at, kind | 0o600, os.makedev(*device), ignore=True, label=f"make {place}"
            )


def _plain(path: str) -> bool:
    return path.startswith("/") and not {"", ".", ".."} & set(path.strip("/").split("/") if path != "/" else ["x"])


def _absolute(path: str) -> bool:
    return path.startswith("/") and not set(path) & set("\\,:\0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounts:
    """A mount namespace.

    slave  what is mounted on the host later shows in it, too
    added  what it has on top of the host's mounts, in the order of their making; if it has a root of its own that is
           the first, and all others are here, too
    """

    slave: bool = False
    added: tuple[Mount, ...] = ()

    def __post_init__(self) -> None:
        if any(one.at == "/" for one in self.added[1:]):
            raise ValueError("a root directory that is mounted over others")

    @property
    def own_root(self) -> bool:
        """Whether its root is not the host's."""
        return bool(self.added) and self.added[0].at == "/"

    @property
    def directories(self) -> set[str]:
        """Directories of the host that must be at the target, too."""
        bound = {one.source for one in self.added if not (one.kind or one.file or one.inside)}
        return bound.union(*(one.layers for one in self.added))

    @property
    def memory(self) -> list[str]:
        """Where file systems in memory are mounted, but for those that are empty for ever."""
        return [one.at for one in self.added if one.kind == MEMORY and not one.flags & MountFlag.RDONLY]

    @property
    def terminals(self) -> str:
        """Where its own pseudo terminals are mounted; empty: they are the host's."""
        return next((one.at for one in self.added if one.kind == TERMINALS), "")

    def folders(self, pid: int) -> tuple[Folder, ...]:
        """What is in file systems in memory, of a process that stands still. MemoryFilesTooLarge, MountNotMovable,
        OSError."""
        return tuple(Folder.read(f"/proc/{pid}/root", at, self.points) for at in self.memory)

    @property
    def points(self) -> frozenset[str]:
        """Where something is mounted."""
        return frozenset(one.at for one in self.added)

    def over(self, path: str, upto: int | None = None) -> tuple[int, Mount] | None:
        """(number, mount) that a path is on, of the first ``upto``; None: one that the host has as well."""
        found = [
            (len(one.at), number, one)
            for number, one in enumerate(self.added[:upto])
            if path == one.at or path.startswith(f"{one.at.rstrip('/')}/")
        ]
        return max(found, key=lambda each: each[:2])[1:] if found else None

    def enter(self, calls: CallTable, path: Callable[[str], str]) -> None:
        """Queue what makes such a namespace, and enters it."""
        calls.call(SYS.unshare, CloneFlag.NEWNS, label="unshare the mount namespace")
        mount(calls, "none", "/", flags=MountFlag.REC | (MountFlag.SLAVE if self.slave else MountFlag.PRIVATE))
        base = _STAGING if self.own_root else ""
        memory: list[str] = []
        for one in self.added:
            for place in (*([one.source] if one.inside else []), one.at):
                above = [at for at in memory if place.startswith(f"{at.rstrip('/')}/")]
                if above:
                    one.make_place(calls, place, max(above, key=len), base)
            one.make(calls, path, base)
            if one.kind == MEMORY:
                memory.append(one.at)
        if base:
            # the old root comes to lie on the new one, and is what "." leads to then (pivot_root(2))
            calls.call(SYS.chdir, calls.path(base), label="enter the new root")
            calls.call(SYS.pivot_root, calls.path("."), calls.path("."), label="make it the root")
            calls.call(SYS.umount2, calls.path("."), MNT_DETACH, label="unmount the old root")
            calls.call(SYS.chdir, calls.path("/"), label="enter the root")
