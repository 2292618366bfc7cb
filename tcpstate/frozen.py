"""Connections that stay frozen when the program that froze them has ended, and their way back.

The originals of each (:class:`~tcpstate.freeze.QuietState`) lie in the runtime directory, one file per connection,
0600, written *before* the socket is changed: whatever kills us, :func:`resume` has what it takes.  A file is of this
host if boot and network namespace are the same, and of the same connection if the socket's cookie is (no other socket
of this boot has it).

What the peer sends while a connection is frozen is dropped unacknowledged; its retransmission brings it again after the
resume.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.errors import AlreadyFrozen, BadRecord, NoSuchConnection, NotFrozen, UnsupportedSocket
from tcpstate.freeze import QuietState, quiet, read_originals, thaw
from tcpstate.kernel.route import is_local
from tcpstate.kernel.sockets import SO, Level
from tcpstate.locate import find, take
from tcpstate.silence import MARK, Blackhole

__all__ = ["FrozenConnection", "elsewhere", "freeze", "frozen", "resume", "runtime_dir"]

_log = logging.getLogger(__name__)

_RUNTIME_DIR = "/run/tcpmig"
_COOKIE = struct.Struct("=Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenConnection:
    """One connection that was frozen here.

    conn_id   its name
    pid, fd   where it was found
    cookie    SO_COOKIE of its socket: unique since boot
    boot_id   of the boot in which this was
    netns     device and inode of the network namespace
    since     seconds since the epoch
    rules     priority of the blackhole rule, by address family; shared by all that are frozen in one namespace
    state     the originals
    """

    conn_id: ConnId
    pid: int
    fd: int
    cookie: int
    boot_id: str
    netns: tuple[int, int]
    since: float
    rules: dict[int, int]
    state: QuietState


def runtime_dir() -> Path:
    """Where lies what lasts until the next boot: ``TCPMIG_RUNTIME_DIR``."""
    return Path(os.environ.get("TCPMIG_RUNTIME_DIR") or _RUNTIME_DIR)


def freeze(conn_id: ConnId) -> FrozenConnection:
    """Freeze a connection at the quiet level, until :func:`resume`.

    AlreadyFrozen; NoSuchConnection (also: nobody has it open); UnsupportedSocket (the peer is on this host);
    ForeignFilter, ConnectionCallFailed, NotPermitted. The connection is as it was after any of them.
    """
    if is_local(conn_id.peer):
        raise UnsupportedSocket(
            "both ends are on this host: what is sent over loopback cannot be held back", object=str(conn_id)
        )
    located = find(conn_id)
    if not located.owners:
        raise NoSuchConnection("no process has this connection open", object=str(conn_id))
    owner = located.owners[0]
    with _store() as directory, take(owner.pid, owner.fd) as sock:
        cookie = _cookie(sock)
        others = _of_this_namespace(directory)
        if sock.getsockopt(Level.SOCKET, SO.MARK) == MARK or any(other.cookie == cookie for other in others):
            raise AlreadyFrozen("the connection is frozen", object=str(conn_id))
        rules = Blackhole()
        rules.priorities = dict(others[0].rules) if others else {}
        rules.ensure()
        entry = FrozenConnection(
            conn_id=conn_id,
            pid=owner.pid,
            fd=owner.fd,
            cookie=cookie,
            boot_id=_boot_id(),
            netns=_netns(),
            since=time.time(),
            rules=dict(rules.priorities),
            state=read_originals([sock])[0],
        )
        path = _write(directory, entry)
        try:
            quiet([sock])
        except BaseException:
            # quiet() has given the socket back
            path.unlink()
            if not others:
                rules.remove()
            raise
    return entry


def resume(conn_id: ConnId) -> FrozenConnection:
    """Give a frozen connection back as it was.

    NotFrozen: it is not frozen by :func:`freeze` here; NoSuchConnection: it has gone meanwhile (what was kept for it is
    removed); ConnectionCallFailed: it stays kept, for another try.
    """
    with _store() as directory:
        here = _of_this_namespace(directory)
        entry = next((e for e in here if e.conn_id == conn_id), None)
        if entry is None:
            raise NotFrozen("the connection is not frozen", object=str(conn_id))
        try:
            with _socket(entry) as sock:
                thaw([sock], [entry.state])
        except NoSuchConnection:
            _forget(directory, entry, here)
            raise
        _forget(directory, entry, here)
    return entry


def frozen() -> list[FrozenConnection]:
    """What is frozen in this network namespace."""
    with _store() as directory:
        return _of_this_namespace(directory)


def elsewhere() -> list[FrozenConnection]:
    """What the runtime directory tells of other boots and network namespaces."""
    with _store() as directory:
        here = _of_this_namespace(directory)
        return [entry for entry in map(_read, sorted(directory.glob("*.frozen"))) if entry and entry not in here]


def _socket(entry: FrozenConnection) -> socket.socket:
    # the owner may have passed it on, or moved it to another descriptor
    for owner in find(entry.conn_id).owners:
        sock = take(owner.pid, owner.fd)
        if _cookie(sock) == entry.cookie:
            return sock
        sock.close()
    raise NoSuchConnection("the connection that was frozen has gone", object=str(entry.conn_id))


def _cookie(sock: socket.socket) -> int:
    (cookie,) = _COOKIE.unpack(sock.getsockopt(Level.SOCKET, SO.COOKIE, _COOKIE.size))
    return int(cookie)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _netns() -> tuple[int, int]:
    status = os.stat("/proc/thread-self/ns/net")
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _store() -> Iterator[Path]:
    """The directory, locked against other runs of us."""
    directory = runtime_dir() / "frozen"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield directory
    finally:
        os.close(descriptor)


def _of_this_namespace(directory: Path) -> list[FrozenConnection]:
    here = (_boot_id(), _netns())
    return [e for e in map(_read, sorted(directory.glob("*.frozen"))) if e and (e.boot_id, e.netns) == here]


def _read(path: Path) -> FrozenConnection | None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        try:
            return codec.unpack(FrozenConnection, file.read())
        except BadRecord as error:
            # it must not keep the others from being resumed
            _log.warning("%s is no record of a frozen connection: %s", path, error.message)
            return None


def _path(directory: Path, entry: FrozenConnection) -> Path:
    # cookies are unique within a boot; what is left of an earlier one may be overwritten
    return directory / f"{entry.cookie:x}.frozen"


def _write(directory: Path, entry: FrozenConnection) -> Path:
    path = _path(directory, entry)
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(codec.pack(entry))
    temporary.rename(path)
    return path


def _forget(directory: Path, entry: FrozenConnection, here: list[FrozenConnection]) -> None:
    if all(other is entry for other in here):
        rules = Blackhole()
        rules.priorities = dict(entry.rules)
        rules.remove()
    _path(directory, entry).unlink(missing_ok=True)
