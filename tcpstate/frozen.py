"""Connections that stay frozen when the program that froze them has ended, or their owner, and their way back.

The originals of each (:class:`~tcpstate.freeze.QuietState`) lie in the runtime directory, one file per connection,
0600, written *before* the socket is changed: whatever kills us, :func:`resume` has what it takes.  A file is of this
host if boot and network namespace are the same, and of the same connection if the socket's cookie is (no other socket
of this boot has it).

A process that only sleeps keeps the socket open (:mod:`tcpstate.holder`), so that the connection survives its owner,
and a capture of what the peer sends meanwhile.  The filter drops that unacknowledged; the resume replays it.

A connection that is being put together here (bound to a tuple, or rebuilt from a record) is frozen as well: what its
record says is still to be done at the resume, once its address is local, lies beside the originals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tcpstate import codec
from tcpstate.attach import Attached, Conn, attached, name_of
from tcpstate.capture import Capture, replay
from tcpstate.connid import ConnId
from tcpstate.discard import discard_connections
from tcpstate.errors import (
    AddressNotMoved,
    AlreadyFrozen,
    BadRecord,
    NoSuchConnection,
    NotFrozen,
    OwnerNotStill,
    UnsupportedSocket,
)
from tcpstate.freeze import QuietState, enter_repair, leave_repair, quiet, read_originals, thaw
from tcpstate.holder import Holder, starting
from tcpstate.kernel.bpf import tcpsock
from tcpstate.kernel.route import is_local
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.kick import doublings, kick
from tcpstate.locate import Owner, find, take
from tcpstate.record import ConnectionRecord
from tcpstate.release import release_connections, write_ends
from tcpstate.segment import SEQ_MASK, Segment
from tcpstate.silence import MARK, Blackhole
from tcpstate.slotted import dataclass
from tcpstate.standstill import standstill
from tcpstate.tuplefilter import arriving

__all__ = [
    "FrozenConnection",
    "adopt",
    "arrived",
    "arrives",
    "discard",
    "elsewhere",
    "entry_of",
    "freeze",
    "frozen",
    "resume",
    "rewrite",
    "runtime_dir",
]

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
    holder    who keeps it open beside its owner; None: nobody (an older version froze it)
    kept      the descriptor of the connection there
    capture   the descriptors of the capture there
    record    what the resume is to make of it, if it is in repair mode: a connection that is being put together; else
              empty
    undo      the record that it is made anew from if it was being replaced (:mod:`tcpstate.replacement`) when the
              replacing program was killed; else empty
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
    holder: Holder | None = None
    kept: int = -1
    capture: tuple[int, ...] = ()
    record: bytes = b""
    undo: bytes = b""

    @property
    def other_owners(self) -> tuple[Owner, ...]:
        """Who has it open now, but for the holder and ourselves."""
        ours = {os.getpid(), self.holder.pid if self.holder is not None else 0}
        try:
            return tuple(owner for owner in find(self.conn_id).owners if owner.pid not in ours)
        except NoSuchConnection:
            return ()


def runtime_dir() -> Path:
    """Where lies what lasts until the next boot: ``TCPMIG_RUNTIME_DIR``."""
    return Path(os.environ.get("TCPMIG_RUNTIME_DIR") or _RUNTIME_DIR)


def freeze(conn: Conn) -> FrozenConnection:
    """Freeze a connection at the quiet level, until :func:`resume`.

    AlreadyFrozen; NoSuchConnection (also: nobody has it open); UnsupportedSocket (the peer is on this host);
    ForeignFilter, ConnectionCallFailed, NotPermitted. The connection is as it was after any of them.
    """
    name = name_of(conn)
    if is_local(name.peer):
        raise UnsupportedSocket(
            "both ends are on this host: what is sent over loopback cannot be held back", object=str(name)
        )
    with attached(conn) as found, _store() as directory:
        others = _of_this_namespace(directory)
        cookie = _cookie(found.sock)
        if found.sock.getsockopt(Level.SOCKET, SO.MARK) == MARK or any(other.cookie == cookie for other in others):
            raise AlreadyFrozen("the connection is frozen", object=str(name))
        with _noted(directory, found, read_originals([found.sock])[0], b"", others) as entry:
            # it gives the socket back if it fails
            quiet([found.sock])
    return entry


def adopt(
    sock: socket.socket, record: ConnectionRecord, state: QuietState, build: Callable[[], None]
) -> FrozenConnection:
    """Note a connection that ``build`` makes of a fresh socket, as :func:`~tcpstate.rebuild.rebuild_connections` does:
    it is frozen until :func:`resume` makes of it what ``record`` says. What ``build`` raises; nothing is noted then."""
    found = Attached(record.conn_id, sock, None)
    with _store() as directory:
        others = _of_this_namespace(directory)
        if any(other.conn_id == record.conn_id for other in others):
            raise AlreadyFrozen("a connection of this name is frozen here", object=str(record.conn_id))
        with _noted(directory, found, state, record.to_bytes(), others) as entry:
            build()
    return entry


@contextlib.contextmanager
def _noted(
    directory: Path, found: Attached, state: QuietState, record: bytes, others: list[FrozenConnection]
) -> Iterator[FrozenConnection]:
    """Rules, capture, holder and note of a connection, before it is frozen in the block; none of them if that fails."""
    rules = Blackhole()
    rules.priorities = dict(others[0].rules) if others else {}
    owners = found.located.owners if found.located is not None else ()
    owner = owners[0] if owners else Owner(os.getpid(), found.sock.fileno())
    path = None
    try:
        rules.ensure()
        with Capture(program=arriving(found.conn_id, loopback=False)) as capture:
            kept = tuple(sock.fileno() for sock in capture.sockets)
            with starting([found.sock.fileno(), *kept], str(found.conn_id)) as holder:
                entry = FrozenConnection(
                    conn_id=found.conn_id,
                    pid=owner.pid,
                    fd=owner.fd,
                    cookie=_cookie(found.sock),
                    boot_id=_boot_id(),
                    netns=_netns(),
                    since=time.time(),
                    rules=dict(rules.priorities),
                    state=state,
                    holder=holder,
                    kept=found.sock.fileno(),
                    capture=kept,
                    record=record,
                )
                path = _write(directory, entry)
                yield entry
    except BaseException:
        if path is not None:
            path.unlink()
        if not others:
            rules.remove()
        raise


def resume(conn: Conn) -> FrozenConnection:
    """Give a frozen connection back as it was, or let one live that was put together here; what arrived meanwhile
    arrives now.

    NotFrozen: it is not frozen by :func:`freeze` here; NoSuchConnection: it has gone meanwhile (what was kept for it is
    removed); AddressNotMoved: it was put together for an address that is not this host's yet; ConnectionCallFailed: it
    stays kept, for another try.
    """
    name = name_of(conn)
    with _store() as directory:
        here = _of_this_namespace(directory)
        entry = _entry(here, name)
        try:
            with _socket(entry) as sock:
                _let_live(directory, entry, sock)
        except NoSuchConnection:
            _forget(directory, entry, here)
            raise
        _forget(directory, entry, here)
    return entry


def _let_live(directory: Path, entry: FrozenConnection, sock: socket.socket) -> None:
    capture = _kept_capture(entry)
    if entry.undo:
        # not at the top: replacing takes what is here
        from tcpstate.replacement import recover

        recover(sock, entry)
    known = _collect(directory, entry)
    oldest = None
    if entry.record:
        if not is_local(entry.conn_id.local):
            raise AddressNotMoved("its address is not an address of this host", object=str(entry.conn_id))
        release_connections([sock], [ConnectionRecord.from_bytes(entry.record)])
    else:
        oldest = _oldest(sock, entry)
        thaw([sock], [entry.state])
    with contextlib.closing(capture):
        capture.stop()
        # nobody knows which of it is new, but the kernel, which looks at each as at any other segment
        replay([*known, *capture.segments()], (), unknown=_any)
    # what has arrived may have acknowledged all; else what was sent into the silence is due
    kick(sock, entry.conn_id, oldest)


def _oldest(sock: socket.socket, entry: FrozenConnection) -> int | None:
    """The sequence number of the oldest byte on the way, where BPF cannot be asked for it later: read in repair mode,
    while the owners stand still. None: not needed, or they do not."""
    if not doublings(sock) or tcpsock.available() is None:
        return None
    try:
        with standstill(owner.pid for owner in entry.other_owners):
            enter_repair([sock])
            try:
                (end,) = write_ends([sock])
                return (end - ioctl_int(sock.fileno(), Ioctl.SIOCOUTQ)) & SEQ_MASK
            finally:
                leave_repair([sock], [entry.state.reuse_address], probe=False)
    except OwnerNotStill as error:
        _log.warning("what was sent before the freeze waits for its timeout: %s", error)
        return None


def _any(segment: Segment) -> bool:
    return True


def _kept_capture(entry: FrozenConnection) -> Capture:
    return Capture.adopt(entry.holder.take(entry.capture) if entry.holder is not None else ())


def arrived(entry: FrozenConnection) -> list[Segment]:
    """What has arrived for a connection since it was frozen. It stays noted, for the resume."""
    with _store() as directory:
        return _collect(directory, entry)


def arrives(entry: FrozenConnection, segments: Sequence[Segment]) -> None:
    """Note segments that shall arrive at the resume, as if the peer had sent them meanwhile."""
    with _store() as directory:
        known = _collect(directory, entry)
        _put(_arrivals(directory, entry), codec.pack(_Arrivals([*known, *segments])))


def _collect(directory: Path, entry: FrozenConnection) -> list[Segment]:
    """All segments so far: reading takes them out of the capture, so they are noted first."""
    path = _arrivals(directory, entry)
    known = codec.unpack(_Arrivals, _get(path)).segments if path.exists() else []
    with contextlib.closing(_kept_capture(entry)) as capture:
        new = capture.segments()
    if new:
        known = [*known, *new]
        _put(path, codec.pack(_Arrivals(known)))
    return known


@dataclass(frozen=True, slots=True)
class _Arrivals:
    segments: list[Segment]


def discard(conn: Conn) -> FrozenConnection:
    """End a frozen connection without a word to its peer, for everybody who has it open: once it lives elsewhere.

    NotFrozen, NoSuchConnection, ConnectionCallFailed.
    """
    name = name_of(conn)
    with _store() as directory:
        here = _of_this_namespace(directory)
        entry = _entry(here, name)
        try:
            discard_connections([_socket(entry)])
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


def entry_of(conn: Conn) -> FrozenConnection:
    """The note of a frozen connection. NotFrozen."""
    name = name_of(conn)
    return _entry(frozen(), name)


def rewrite(entry: FrozenConnection, **changes: object) -> FrozenConnection:
    """Change what is noted of a frozen connection, durably: its file is replaced in one step."""
    changed = dataclasses.replace(entry, **changes)  # type: ignore[arg-type]
    with _store() as directory:
        _write(directory, changed)
    return changed


def _entry(here: list[FrozenConnection], name: ConnId) -> FrozenConnection:
    found = next((entry for entry in here if entry.conn_id == name), None)
    if found is None:
        raise NotFrozen("the connection is not frozen", object=str(name))
    return found


def _socket(entry: FrozenConnection) -> socket.socket:
    # the owner may have passed it on, or moved it to another descriptor
    for sock in entry.holder.take([entry.kept]) if entry.holder is not None else ():
        return sock
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
    try:
        return codec.unpack(FrozenConnection, _get(path))
    except BadRecord as error:
        # it must not keep the others from being resumed
        _log.warning("%s is no record of a frozen connection: %s", path, error.message)
        return None


def _get(path: Path) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return file.read()


def _path(directory: Path, entry: FrozenConnection) -> Path:
    # cookies are unique within a boot; what is left of an earlier one may be overwritten
    return directory / f"{entry.cookie:x}.frozen"


def _arrivals(directory: Path, entry: FrozenConnection) -> Path:
    return _path(directory, entry).with_suffix(".arrived")


def _write(directory: Path, entry: FrozenConnection) -> Path:
    return _put(_path(directory, entry), codec.pack(entry))


def _put(path: Path, data: bytes) -> Path:
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.rename(path)
    return path


def _forget(directory: Path, entry: FrozenConnection, here: list[FrozenConnection]) -> None:
    if all(other is entry for other in here):
        rules = Blackhole()
        rules.priorities = dict(entry.rules)
        rules.remove()
    if entry.holder is not None:
        entry.holder.end()
    _arrivals(directory, entry).unlink(missing_ok=True)
    _path(directory, entry).unlink(missing_ok=True)
