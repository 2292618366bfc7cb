"""Where the paths of a tree in a mount namespace of its own lead, seen from outside.

Records have paths as the tree sees them.  At the source they are followed below ``/proc/PID/root`` of the tree's root;
at the target, before the tree stands, at the place of the host that its mounts will show there; afterwards below
``/proc/PID/root`` of the new root again.

Source: proc(5), /proc/PID/root; openat2(2), RESOLVE_IN_ROOT.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from checkpoint import procfs
from checkpoint.errors import NoSuchProcess
from checkpoint.files.terminal import PTMX
from checkpoint.tree import INIT
from tcpstate.kernel import batch
from tcpstate.kernel.machine import SYS

if TYPE_CHECKING:
    from checkpoint.namespaces.mounts import Mount, Mounts

__all__ = ["Ways", "found_in", "real", "way_of"]

_HOW: Final = struct.Struct("<QQQ")  # struct open_how: flags, mode, resolve
_RESOLVE_IN_ROOT: Final = 0x10
#: mount namespace -> the way into it that was found last
_known: dict[str, str] = {}


def _space(pid: int | str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""  # it has ended, or is nobody's to look at


def way_of(pid: int) -> str:
    """Our path of the root of a process's mount namespace; empty if that is ours, or the process has ended.

    It is that of the first process of the tree: others may have a root directory of their own below it.
    """
    space = _space(pid)
    if not space or space == _space("thread-self"):
        return ""
    known = _known.get(space)
    if known is None or _space(known.split("/")[2]) != space:
        known = _known[space] = f"/proc/{_first(pid, space)}/root"
    return known


def _first(pid: int, space: str) -> int:
    """The first ancestor that is in the same mount namespace; none before the first process of a PID namespace."""
    try:
        while int(procfs.read_status(pid)["NSpid"].split()[-1]) != INIT:
            parent = procfs.read_stat(pid).ppid
            if not parent or _space(parent) != space:
                break
            pid = parent
    except NoSuchProcess:
        return pid
    return pid


def found_in(way: str, path: str) -> tuple[os.stat_result, str] | None:
    """What is at a path below a way, links followed as inside but for the last: with its path without links; None:
    nothing that we could look at."""
    try:
        if not way:
            return os.lstat(path), path
        root = os.open(way, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            how = ctypes.create_string_buffer(_HOW.pack(os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT))
            name = ctypes.create_string_buffer(os.fsencode(path))
            fd = batch.syscall(SYS.openat2, root, ctypes.addressof(name), ctypes.addressof(how), _HOW.size)
        finally:
            os.close(root)
        try:
            return os.fstat(fd), os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
    except OSError:
        return None


def real(path: str) -> str:
    """Without symbolic links; what is below another process's root has none, and is led astray by its own."""
    return path if path.startswith("/proc/") else os.path.realpath(path)


class Ways:
    """Maps paths of a tree to paths here. Called with one it gives the place on this host; of a file on an overlay it
    is in the layer that shows it, until the tree stands.

    path    maps a path of the source's host to one here
    mounts  the tree's, if they are its own
    root    our path of the tree's root directory, once it stands
    """

    def __init__(self, path: Callable[[str], str], mounts: Mounts | None = None) -> None:
        self._path = path
        self._mounts = mounts
        self.root = ""

    def __call__(self, path: str) -> str:
        """Where the file is looked at, and where others are made beside it."""
        one, inner = self._lead(path)
        if one is None:
            return self._path(inner)
        if self.root:
            return self.root + path
        layers = self._layers(one, inner)
        return next((layer for layer in layers if os.path.lexists(layer)), layers[0] if layers else inner)

    def place(self, path: str) -> str:
        """Where it is opened: on the mounts that are the tree's own, if it has some."""
        return self.root + self.within(path)

    def within(self, path: str) -> str:
        """How the tree itself names it here."""
        return self._path(path) if self._mounts is None or self._mounts.over(path) is None else path

    def carried(self, path: str) -> bool:
        """Whether it is on a file system that is made for the tree, and so is nowhere before the tree stands."""
        one, _ = self._lead(path)
        return one is not None and not one.stack

    def carried_file(self, record: object) -> bool:
        """The same of a record of an open file; not of one without a path."""
        return self.carried(str(getattr(record, "path", "")))

    @property
    def terminals(self) -> str:
        """Where the tree's own pseudo terminals are mounted; empty: they are the host's."""
        return "" if self._mounts is None else self._mounts.terminals

    @property
    def ptmx(self) -> str:
        """What is opened for a new one, when the tree stands."""
        return f"{self.root}{self.terminals}/ptmx" if self.terminals else PTMX

    def lasting(self, path: str) -> str:
        """Where something is found that was made at ``path``, which may be below the tree's root, when the tree is
        gone; empty: it is gone as well."""
        if not self.root or not path.startswith(f"{self.root}/"):
            return path
        one, inner = self._lead(path[len(self.root) :])
        return "" if one is None else next(iter(self._layers(one, inner)), "")

    def _lead(self, path: str) -> tuple[Mount | None, str]:
        """(the tree's own file system that it is on, None: one of the host's; its path in the tree or on the source's
        host)"""
        upto = None
        while self._mounts is not None and (found := self._mounts.over(path, upto)) is not None:
            upto, one = found
            if one.kind:
                return one, path
            path = f"{one.source.rstrip('/')}{_below(one, path)}" or "/"
            if not one.inside:
                break
        return None, path

    def _layers(self, one: Mount, path: str) -> list[str]:
        """Where a file of an overlay is, if it is in the uppermost directory, in the next one, and so on."""
        return [self._path(f"{layer.rstrip('/')}{_below(one, path)}" or "/") for layer in one.stack]


def _below(one: Mount, path: str) -> str:
    """What of a path is below a mount; empty, or with a slash before it."""
    return path[len(one.at.rstrip("/")) :].rstrip("/")
