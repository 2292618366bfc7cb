"""What is in a file system in memory (tmpfs) that is a tree's own: read, and made again.

Directories, files, symbolic and hard links, fifos, and the devices that every system has (null, zero, ..), with owners,
modes, times and extended attributes.  Names of local sockets are not here: whoever is bound to one makes it.  Files
without a name are with the open files.

What comes from elsewhere is only made below the mount, without following a link.

Source: Documentation/filesystems/tmpfs.rst; mm/shmem.c.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import field
from typing import Final

from checkpoint.errors import MemoryFilesTooLarge, MountNotMovable, NamespaceNotMade
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["DEVICES", "Folder", "Node", "ensure"]

#: bytes of all files of a tree's file systems in memory, and how many they may be: they are read in the stop
_LARGEST: Final = 32 << 20
_MOST: Final = 20_000
#: major, minor of the devices that keep no state: Documentation/admin-guide/devices.txt
DEVICES: Final = frozenset({(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)})
_TYPES: Final = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR})
_IDS: Final = (1 << 32) - 1
_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One entry.

    path    below the mount, empty for its root
    mode    type and permissions
    times   of access and of modification, nanoseconds
    device  major and minor, of a device
    data    of a file; where a symbolic link leads to
    same    the path of an entry before it that it is a hard link of
    """

    path: bytes
    mode: int
    uid: int
    gid: int
    times: tuple[int, int]
    device: tuple[int, int] = (0, 0)
    data: bytes = b""
    same: bytes = b""
    attributes: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in (self.path, self.same):
            if path and not _plain(path):
                raise ValueError(f"{path!r} is no path below a mount")
        kind = stat.S_IFMT(self.mode)
        if kind not in _TYPES or self.mode >> 16 or not all(0 <= one < _IDS for one in (self.uid, self.gid)):
            raise ValueError("an entry of a file system of an impossible type, or of nobody")
        if kind == stat.S_IFCHR and self.device not in DEVICES:
            raise ValueError(f"a device {self.device} is not made out of an image")
        if kind == stat.S_IFLNK and (not self.data or b"\0" in self.data):
            raise ValueError("a symbolic link to nowhere")
        if not all(0 <= time < 1 << 63 for time in self.times):
            raise ValueError("a file's time out of range")

    @property
    def parts(self) -> list[bytes]:
        """Its directories, and its name."""
        return self.path.split(b"/") if self.path else []


def _plain(path: bytes) -> bool:
    return b"\0" not in path and all(part not in (b"", b".", b"..") for part in path.split(b"/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """All of one file system. ``at``: where it is mounted; ``nodes``: directories before what is in them."""

    at: str
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        directories, all_paths = {b""}, {b""}
        if not self.nodes or self.nodes[0].path:
            raise ValueError("a file system without a root")
        for node in self.nodes[1:]:
            if os.path.dirname(node.path) not in directories or node.path in all_paths:
                raise ValueError(f"{node.path!r} comes before its directory, or twice")
            if node.same and node.same not in all_paths - directories:
                raise ValueError(f"{node.path!r} is a link to what is not there")
            all_paths.add(node.path)
            if stat.S_ISDIR(node.mode):
                directories.add(node.path)

    @classmethod
    def read(cls, root: str, at: str, points: Collection[str] = (), *, contents: bool = True) -> Folder:
        """``root``: a path of the tree's root directory; ``points``: where something is mounted; without ``contents``
        it is only looked through. MountNotMovable, MemoryFilesTooLarge."""
        reader = _Reader(at, _below(at, points), contents=contents)
        try:
            with _opened(root, at) as base:
                nodes = tuple(reader.walk(base, b"", os.fstat(base).st_dev))
        except OSError as error:
            raise MountNotMovable(f"what is in a file system in memory cannot be read: {error}", object=at) from error
        return cls(at=at, nodes=nodes)

    def write(self, root: str, owner: tuple[int, int], points: Collection[str] = ()) -> None:
        """Make it again in one that is empty but for mount points (``points``) and what :func:`ensure` has made.
        ``owner``: user and group that may make files in it. NamespaceNotMade."""
        try:
            with _opened(root, self.at) as base:
                _remove_others(
                    base, b"", _with_folders([*(node.path for node in self.nodes), *_below(self.at, points)])
                )
                for node in self.nodes:
                    with _parent(base, node) as folder:
                        _make(base, folder, node, owner)
                # what is made in a directory changes its time
                for node in reversed(self.nodes):
                    with _parent(base, node) as folder:
                        name = node.parts[-1] if node.parts else b"."
                        os.utime(name, ns=node.times, dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            raise NamespaceNotMade(f"what was in its file system in memory: {error}", object=self.at) from error


def ensure(root: str, path: str, owner: tuple[int, int]) -> None:
    """Make an empty file, and its directories, where there are none, so that it can be mapped before its bytes come;
    others than plain ones are left to be found by who opens it. OSError."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        *folders, name = filter(None, path.split("/"))
        with _acting(owner):
            for folder in folders:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, 0o700, dir_fd=fd)
                below = os.open(folder, _OPEN, dir_fd=fd)
                os.close(fd)
                fd = below
            with contextlib.suppress(FileExistsError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                os.close(os.open(name, flags, 0o600, dir_fd=fd))
    finally:
        os.close(fd)


def _below(at: str, points: Collection[str]) -> set[bytes]:
    """The mount points that are below one, from there."""
    start = f"{at.rstrip('/')}/"
    return {os.fsencode(one[len(start) :]) for one in points if one.startswith(start) and one != start}


def _remove_others(folder: int, path: bytes, wanted: set[bytes]) -> None:
    """Of an earlier round, what is gone by now. ``wanted``: paths with all their directories."""
    for name in map(os.fsencode, os.listdir(folder)):
        here = path + b"/" + name if path else name
        is_directory = stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
        if here not in wanted:
            if is_directory:
                shutil.rmtree(name, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)
        elif is_directory:
            below = os.open(name, _OPEN, dir_fd=folder)
            try:
                # what is in a directory that something is mounted on is not ours
                if os.fstat(below).st_dev == os.fstat(folder).st_dev:
                    _remove_others(below, here, wanted)
            finally:
                os.close(below)


def _with_folders(paths: Iterable[bytes]) -> set[bytes]:
    found = set(paths)
    for path in paths:
        while path := path.rpartition(b"/")[0]:
            found.add(path)
    return found


@contextlib.contextmanager
def _opened(root: str, at: str) -> Iterator[int]:
    """A descriptor of a directory, by no link below the root. OSError."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in filter(None, at.split("/")):
            below = os.open(part, _OPEN, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _parent(base: int, node: Node) -> Iterator[int]:
    """A descriptor of the directory that an entry is in. OSError."""
    fd = os.dup(base)
    try:
        for part in node.parts[:-1]:
            below = os.open(part, _OPEN, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


class _Reader:
    """Reads one file system."""

    def __init__(self, at: str, points: set[bytes], *, contents: bool) -> None:
        self._at = at
        self._points = points
        self._contents = contents
        self._seen: dict[int, bytes] = {}
        self._bytes = self._count = 0

    def walk(self, fd: int, path: bytes, device: int) -> Iterator[Node]:
        """A directory, and all below it that is on this file system."""
        yield self._node(fd, b"", path, os.fstat(fd))
        for name in sorted(map(os.fsencode, os.listdir(fd))):
            try:
                yield from self._entry(fd, name, path + b"/" + name if path else name, device)
            except FileNotFoundError:
                if self._contents:
                    raise
                # of a tree that runs: it has just been removed

    def _entry(self, fd: int, name: bytes, path: bytes, device: int) -> Iterator[Node]:
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        # the directory of a mount is itself on another device
        if found.st_dev != device or stat.S_ISSOCK(found.st_mode) or path in self._points:
            return
        if not stat.S_ISDIR(found.st_mode):
            yield self._node(fd, name, path, found)
            return
        below = os.open(name, _OPEN, dir_fd=fd)
        try:
            yield from self.walk(below, path, device)
        finally:
            os.close(below)

    def _node(self, folder: int, name: bytes, path: bytes, found: os.stat_result) -> Node:
        self._count += 1
        same = self._seen.setdefault(found.st_ino, path) if name else path
        new = same == path
        size = found.st_size if new and stat.S_ISREG(found.st_mode) else 0
        self._bytes += size
        if self._bytes > _LARGEST or self._count > _MOST:
            raise MemoryFilesTooLarge(f"more than {_LARGEST >> 20} MiB, or {_MOST} entries, are in it", object=self._at)
        number = os.major(found.st_rdev), os.minor(found.st_rdev)
        if stat.S_IFMT(found.st_mode) not in _TYPES or (stat.S_ISCHR(found.st_mode) and number not in DEVICES):
            raise MountNotMovable(
                f"a device {number[0]}:{number[1]} is in it", object=f"{self._at}/{os.fsdecode(path)}"
            )
        data = b"/" if stat.S_ISLNK(found.st_mode) else b""
        attributes: dict[str, bytes] = {}
        if self._contents:
            attributes = _attributes(f"/proc/self/fd/{folder}/{os.fsdecode(name)}")
            if stat.S_ISLNK(found.st_mode):
                data = os.readlink(name, dir_fd=folder)
            elif size:
                data = _content(folder, name)
        return Node(
            path=path,
            mode=found.st_mode,
            uid=found.st_uid,
            gid=found.st_gid,
            times=(max(found.st_atime_ns, 0), max(found.st_mtime_ns, 0)),
            device=number if stat.S_ISCHR(found.st_mode) else (0, 0),
            data=data,
            same=b"" if new else same,
            attributes=attributes,
        )


def _content(folder: int, name: bytes) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        pieces = []
        while piece := os.read(fd, _PIECE):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def _attributes(path: str) -> dict[str, bytes]:
    names = [name for name in os.listxattr(path, follow_symlinks=False) if not name.startswith("security.selinux")]
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


@contextlib.contextmanager
def _acting(owner: tuple[int, int]) -> Iterator[None]:
    """New files are this user's and group's: a file system of a user namespace takes no others (fs/namei.c,
    may_o_create)."""
    try:
        syscall(SYS.setfsgid, owner[1])
        syscall(SYS.setfsuid, owner[0])
        yield
    finally:
        syscall(SYS.setfsuid, os.geteuid())
        syscall(SYS.setfsgid, os.getegid())


def _make(base: int, folder: int, node: Node, owner: tuple[int, int]) -> None:
    name, mode = node.parts[-1] if node.parts else b".", stat.S_IMODE(node.mode)
    if node.same:
        os.link(b"/".join([b".", node.same]), name, src_dir_fd=base, dst_dir_fd=folder, follow_symlinks=False)
        return
    with _acting(owner):
        _create(folder, name, node)
    os.chown(name, node.uid, node.gid, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISLNK(node.mode):
        # after the owner, whose change takes the bits that set IDs
        os.chmod(name, mode, dir_fd=folder)
    path = f"/proc/self/fd/{folder}/{os.fsdecode(name)}"
    for attribute, value in node.attributes.items():
        os.setxattr(path, attribute, value, follow_symlinks=False)


def _create(folder: int, name: bytes, node: Node) -> None:
    kind = stat.S_IFMT(node.mode)
    if kind == stat.S_IFDIR:
        if name != b".":
            with contextlib.suppress(FileExistsError):  # a mount point in it
                os.mkdir(name, 0o700, dir_fd=folder)
    elif kind == stat.S_IFLNK:
        os.symlink(node.data, name, dir_fd=folder)
    elif kind == stat.S_IFREG:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            rest = memoryview(node.data)
            while rest:
                rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)
    else:
        with contextlib.suppress(FileExistsError):
            os.mknod(name, kind | 0o600, os.makedev(*node.device), dir_fd=folder)
