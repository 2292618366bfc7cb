"""The line to a holder: a unix socket in the runtime directory, over which sockets travel (SCM_RIGHTS).

Records of one codec family, each behind its length (u32, little endian); descriptors come with the first byte.  Both
ends are of one release of the program on one host, and both are root: a peer of another user is not spoken to.

::

    tool                             holder
    (connects)                  <-   Told      whose hold it is, where, and what it has
    Put + descriptors                          sockets to be kept
    Watch                                      capture what arrives for them from now on
    Kept                                       what was captured before
    Seal                        <-   Done      from now on it outlives the tool
    Take                        <-   Put.., Done
    Captured                    <-   Kept.., Done
    End                         <-   Done      and it is gone
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from checkpoint.files.held import HeldFile, HeldSocket
from migrate.errors import HolderFailed
from tcpstate import codec
from tcpstate.codec import family, member
from tcpstate.errors import BadRecord
from tcpstate.slotted import dataclass

__all__ = [
    "Captured",
    "Done",
    "End",
    "HoldLine",
    "HoldMessage",
    "Kept",
    "Put",
    "Seal",
    "Take",
    "Told",
    "Watch",
    "bind",
    "connect",
    "reach",
    "received",
]

_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_LONGEST = 16 << 20
#: descriptors in one message; the kernel takes 253 (SCM_MAX_FD)
DESCRIPTORS = 200
#: bytes of captured segments in one message
_KEPT_BYTES = 1 << 20
_ROOM = 1 << 20

_M = TypeVar("_M", bound="HoldMessage")


@family
@dataclass(frozen=True, slots=True, kw_only=True)
class HoldMessage:
    """Base of the messages."""


@member(HoldMessage, "told")
@dataclass(frozen=True, slots=True, kw_only=True)
class Told(HoldMessage):
    """The holder's first word. ``sealed``: the hold stands."""

    hold: str
    shard: int
    boot_id: str
    network: int
    pid: int
    sealed: bool
    cgroup: str = ""


@member(HoldMessage, "put")
@dataclass(frozen=True, slots=True, kw_only=True)
class Put(HoldMessage):
    """Sockets, a descriptor for each."""

    files: tuple[HeldFile, ...]


@member(HoldMessage, "watch")
@dataclass(frozen=True, slots=True, kw_only=True)
class Watch(HoldMessage):
    """Keep what arrives for the connections."""


@member(HoldMessage, "kept")
@dataclass(frozen=True, slots=True, kw_only=True)
class Kept(HoldMessage):
    """Captured segments, packed."""

    segments: tuple[bytes, ...]


@member(HoldMessage, "seal")
@dataclass(frozen=True, slots=True, kw_only=True)
class Seal(HoldMessage):
    """The hold stands, for so many seconds (0: until it is taken or released)."""

    timeout: float


@member(HoldMessage, "take")
@dataclass(frozen=True, slots=True, kw_only=True)
class Take(HoldMessage):
    """Give duplicates of all sockets."""


@member(HoldMessage, "captured")
@dataclass(frozen=True, slots=True, kw_only=True)
class Captured(HoldMessage):
    """Tell what has arrived."""


@member(HoldMessage, "end")
@dataclass(frozen=True, slots=True, kw_only=True)
class End(HoldMessage):
    """Close all and end. ``reset``: tell the peers, by a RST; else without a packet."""

    reset: bool


@member(HoldMessage, "done")
@dataclass(frozen=True, slots=True, kw_only=True)
class Done(HoldMessage):
    """It is done."""


class HoldLine:
    """One end. Owns the socket. HolderFailed for whatever goes wrong on it; a context manager."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._sock = sock
        self._name = name
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _ROOM)
        _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid != os.geteuid():
            sock.close()
            raise HolderFailed(f"the other end belongs to user {uid}", object=name)

    def __enter__(self) -> HoldLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def send(self, message: HoldMessage, descriptors: Sequence[int] = ()) -> None:
        """One message."""
        data = codec.pack(message)
        data = _LENGTH.pack(len(data)) + data
        rights = array.array("i", descriptors).tobytes()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
        try:
            sent = self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            self._sock.sendall(data[sent:], socket.MSG_NOSIGNAL)
        except OSError as error:
            raise HolderFailed(f"the line broke: {error.strerror}", object=self._name) from error

    def receive(self) -> tuple[HoldMessage, list[int]] | None:
        """The next message and its descriptors, which are the caller's; None at the end of the line."""
        descriptors = array.array("i")
        try:
            head, ancillary, flags, _ = self._sock.recvmsg(
                _LENGTH.size, socket.CMSG_SPACE(4 * DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
            if not head:
                return None
            if flags & socket.MSG_CTRUNC:
                raise HolderFailed("descriptors were lost: too many are open", object=self._name)
            head += self._exactly(_LENGTH.size - len(head))
            (length,) = _LENGTH.unpack(head)
            if length > _LONGEST:
                raise HolderFailed(f"a message claims {length} bytes", object=self._name)
            return codec.unpack(HoldMessage, self._exactly(length)), list(descriptors)
        except BaseException as error:
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(error, BadRecord | OSError):
                raise HolderFailed(f"the line broke: {error}", object=self._name) from error
            raise

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self._sock.recv(count - len(data))
            if not piece:
                raise HolderFailed("the line ended within a message", object=self._name)
            data += piece
        return bytes(data)

    def expect(self, kind: type[_M]) -> _M:
        """The next message, which must be of this kind and bring no descriptor."""
        found = self.receive()
        if found is None:
            raise HolderFailed("it ended", object=self._name)
        message, descriptors = found
        for descriptor in descriptors:
            os.close(descriptor)
        if not isinstance(message, kind) or descriptors:
            raise HolderFailed(f"{type(message).__name__} was not expected", object=self._name)
        return message

    def put(self, sockets: Sequence[HeldSocket]) -> None:
        """Give sockets; ours stay open."""
        for start in range(0, len(sockets), DESCRIPTORS):
            part = sockets[start : start + DESCRIPTORS]
            self.send(Put(files=tuple(one.file for one in part)), [one.sock.fileno() for one in part])

    def keep(self, segments: Sequence[bytes]) -> None:
        """Give captured segments."""
        batch: list[bytes] = []
        size = 0
        for segment in segments:
            batch.append(segment)
            size += len(segment)
            if size >= _KEPT_BYTES:
                self.send(Kept(segments=tuple(batch)))
                batch, size = [], 0
        if batch:
            self.send(Kept(segments=tuple(batch)))

    def answers(self) -> Iterator[tuple[HoldMessage, list[int]]]:
        """The messages until Done."""
        while True:
            found = self.receive()
            if found is None:
                raise HolderFailed("it ended", object=self._name)
            if isinstance(found[0], Done):
                return
            yield found


def received(message: Put, descriptors: Sequence[int]) -> list[HeldSocket]:
    """The sockets of a message. HolderFailed if they are not as many as it names; all are closed then."""
    if len(message.files) != len(descriptors):
        for descriptor in descriptors:
            os.close(descriptor)
        raise HolderFailed(f"{len(descriptors)} descriptors came for {len(message.files)} sockets")
    return [HeldSocket(file, socket.socket(fileno=fd)) for file, fd in zip(message.files, descriptors, strict=True)]


def bind(path: Path) -> socket.socket:
    """A listening socket there, for its owner alone. OSError."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as name:
            sock.bind(name)
        path.chmod(0o600)
        sock.listen(8)
    except BaseException:
        sock.close()
        raise
    return sock


def reach(path: Path) -> socket.socket:
    """A connection to who listens there. OSError (nobody does)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: Path) -> HoldLine:
    """The line to who listens there. OSError (nobody does), HolderFailed."""
    return HoldLine(reach(path), path.name)


class _short:  # noqa: N801  (a context manager)
    """A name of the path that fits sockaddr_un's 108 bytes, wherever the runtime directory is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._directory = -1

    def __enter__(self) -> str:
        self._directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._directory}/{self._path.name}"

    def __exit__(self, *_: object) -> None:
        os.close(self._directory)
