"""Names of AF_UNIX sockets, bound again without disturbing what has the name now.

The kernel remembers the very text that bind() was given, and peers see it: a socket bound elsewhere and renamed would
show the wrong name. But until the commit the original may still live on the same file system, under that path. So the
socket is bound with its own text in a private root (a directory beside the real one; a thread with its own root and
working directory does it) and the file is moved over the real path when the original is gone: rename(2) is atomic,
and connect() finds sockets by inode.

Source: net/unix/af_unix.c (unix_bind_bsd, unix_find_bsd); unix(7).
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Final

from checkpoint.errors import AddressTaken, FileRebuildFailed
from checkpoint.files.abi import unshare_filesystem
from checkpoint.namespaces.ways import found_in, way_of
from tcpstate.slotted import dataclass

__all__ = ["BoundName", "Stage", "UnixName", "name_of"]

#: sizeof(sun_path)
_LONGEST: Final = 108
_MINOR_BITS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixName:
    """What a socket is bound to.

    address         the text given to bind(): a path, or an abstract name, which begins with a zero byte
    path            where the socket's file lies; empty: nowhere (an abstract name, or it was removed)
    mode, uid, gid  of that file
    """

    address: bytes
    path: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0

    def __post_init__(self) -> None:
        if not 0 < len(self.address) <= _LONGEST:
            raise ValueError("the address of a local socket has 1 to 108 bytes")
        if not self.abstract and b"\0" in self.address:
            raise ValueError("a path holds a zero byte")
        if self.path and (self.abstract or not self.path.startswith("/") or "\0" in self.path):
            raise ValueError("the path of a local socket is not absolute")
        if not 0 <= self.mode <= 0o7777:
            raise ValueError("mode out of range")

    @property
    def abstract(self) -> bool:
        """Whether no file stands for it."""
        return self.address.startswith(b"\0")

    def __str__(self) -> str:
        if self.abstract:
            return "@" + self.address[1:].decode(errors="backslashreplace")
        return os.fsdecode(self.address)


def name_of(sock: socket.socket, vfs: tuple[int, int] | None, pids: Sequence[int]) -> UnixName | None:
    """The name of a socket, None if it has none. ``vfs``: inode and device of its file, as sock_diag tells; ``pids``:
    the holders, whose working directories a relative path may start from."""
    address = os.fsencode(sock.getsockname())
    if not address:
        return None
    if address.startswith(b"\0") or vfs is None:
        return UnixName(address=address)
    text = os.fsdecode(address)
    way = next(map(way_of, pids), "")
    bases = [""] if text.startswith("/") else [os.readlink(f"/proc/{pid}/cwd") for pid in pids]
    for base in bases:
        there = found_in(way, os.path.normpath(os.path.join(base, text)))
        if there is None:
            continue
        found, path = there
        device = os.major(found.st_dev) << _MINOR_BITS | os.minor(found.st_dev)
        if stat.S_ISSOCK(found.st_mode) and (found.st_ino & 0xFFFFFFFF, device & 0xFFFFFFFF) == vfs:
            return UnixName(
                address=address, path=path, mode=stat.S_IMODE(found.st_mode), uid=found.st_uid, gid=found.st_gid
            )
    return UnixName(address=address)


@dataclass(slots=True)
class BoundName:
    """A bound name whose file waits in its stage.

    staged  where the file is; empty: it has none, or it is at its place
    real    where it belongs; empty: nowhere, it is only a text
    """

    name: UnixName
    staged: str
    real: str
    folder: int = -1  # descriptor of the directory that the staged file is in

    @property
    def way(self) -> tuple[bytes, int]:
        """(address, descriptor of the directory that it starts from, -1: of none): who else connects has not our
        /proc/self."""
        if self.staged and self.folder >= 0:
            return os.fsencode(os.path.basename(self.staged)), self.folder
        return self.name.address, -1

    @property
    def address(self) -> bytes:
        """What connect() can be given, wherever the file is now; paths to stages are too long."""
        if self.staged and self.folder >= 0:
            return os.fsencode(f"/proc/self/fd/{self.folder}/{os.path.basename(self.staged)}")
        return self.name.address


@dataclass(slots=True)
class Stage:
    """Binds sockets in private roots and puts their files into place, or takes everything away again.

    note  told the path of each directory before it is made
    """

    note: Callable[[str], None] | None = None
    _folders: list[str] = field(default_factory=list)
    _bound: list[BoundName] = field(default_factory=list)

    def bind(self, sock: socket.socket, name: UnixName, real: str) -> BoundName:
        """Bind ``sock``; its file will lie at ``real`` (empty: at no place) after :meth:`publish`. AddressTaken if an
        abstract name is in use."""
        try:
            bound = BoundName(name, "", "") if name.abstract else self._bind_path(sock, name, real)
            if name.abstract:
                sock.bind(name.address)
        except OSError as error:
            if name.abstract:
                raise AddressTaken(f"bind: {error.strerror}", object=str(name)) from error
            raise FileRebuildFailed(f"bind: {error}", object=str(name)) from error
        self._bound.append(bound)
        return bound

    def bind_for_now(self, sock: socket.socket, name: UnixName) -> BoundName:
        """Bind ``sock`` with a file that is never published: it can be connected to until the stage is taken down."""
        if name.abstract:
            return self.bind(sock, name, "")
        folder = self._folder(tempfile.gettempdir())
        try:
            bound = self._bind_in(folder, sock, name, keep=True)
        except OSError as error:
            raise FileRebuildFailed(f"bind: {error}", object=str(name)) from error
        self._bound.append(bound)
        return bound

    def _bind_path(self, sock: socket.socket, name: UnixName, real: str) -> BoundName:
        folder = self._folder(os.path.dirname(real) if real else tempfile.gettempdir())
        bound = self._bind_in(folder, sock, name, keep=bool(real))
        bound.real = real
        return bound

    def _folder(self, parent: str) -> str:
        folder = os.path.join(parent, f".tcpmig-{secrets.token_hex(8)}")
        if self.note is not None:
            self.note(folder)
        os.mkdir(folder, 0o700)
        return folder

    @property
    def names(self) -> list[tuple[str, str]]:
        """(where it waits, its place) of each file that :meth:`publish` will move."""
        return [(bound.staged, bound.real) for bound in self._bound if bound.staged and bound.real]

    def _bind_in(self, folder: str, sock: socket.socket, name: UnixName, *, keep: bool) -> BoundName:
        self._folders.append(folder)
        text = os.fsdecode(name.address)
        start = folder
        if not text.startswith("/"):
            # as many directories down as the text may climb up
            start = os.path.join(folder, *("d" for _ in range(text.split("/").count("..") + 1)))
        staged = os.path.normpath(start + "/" + text)
        if not staged.startswith(folder + "/"):
            raise FileRebuildFailed("the path climbs out of its root", object=text)
        os.makedirs(os.path.dirname(staged), exist_ok=True)
        os.makedirs(start, exist_ok=True)
        _in_private_root(folder, start, lambda: sock.bind(name.address))
        if not keep:
            os.unlink(staged)
            return BoundName(name, "", "")
        os.chown(staged, name.uid, name.gid)
        os.chmod(staged, name.mode)
        return BoundName(name, staged, "", os.open(os.path.dirname(staged), os.O_PATH | os.O_CLOEXEC))

    def publish(self) -> None:
        """Move every file to its place, over what is there."""
        for bound in self._bound:
            if bound.staged and bound.real:
                try:
                    os.rename(bound.staged, bound.real)
                except OSError as error:
                    raise FileRebuildFailed(f"rename: {error.strerror}", object=bound.real) from error
                bound.staged = ""
        self.remove()

    def remove(self) -> None:
        """Take the stage down; names that were not published vanish."""
        for bound in self._bound:
            if bound.folder >= 0:
                os.close(bound.folder)
        self._bound.clear()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        self._folders.clear()


def _in_private_root(root: str, start: str, act: object) -> None:
    """Call ``act`` in a thread whose root is ``root`` and whose working directory is ``start``."""
    problem: list[BaseException] = []

    def run() -> None:
        try:
            unshare_filesystem()
            inside = "/" + os.path.relpath(start, root)
            os.chroot(root)
            os.chdir(inside)
            act()  # type: ignore[operator]
        except BaseException as error:  # handed to the caller, whatever it is
            problem.append(error)

    thread = threading.Thread(target=run, name="private root")
    thread.start()
    thread.join()
    if problem:
        raise problem[0]
