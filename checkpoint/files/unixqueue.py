"""The unread messages of AF_UNIX sockets: looked at without taking them, and sent again.

SO_PEEK_OFF lets MSG_PEEK walk along the queue. Peeking installs the descriptors that a message carries in our process:
the file table keeps them as files of the tree. Peeking a stream glues bytes without descriptors to the following ones
that have some. Where those begin shows when the kernel may not write the last byte: it copies piece by piece, gives up
the piece in which it faults, and returns what came before.

Source: net/unix/af_unix.c (unix_stream_read_generic, __unix_dgram_recvmsg); net/core/datagram.c.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final

from checkpoint.errors import FileCaptureFailed, FileRebuildFailed, UnsupportedFile
from tcpstate.kernel import batch
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import SO, Level
from tcpstate.slotted import dataclass

__all__ = ["Message", "read", "send"]

#: the most descriptors in one message (SCM_MAX_FD)
_MAX_RIGHTS: Final = 253
_SCM_RIGHTS: Final = 1
_SCM_CREDENTIALS: Final = 2
_SCM_PIDFD: Final = 4
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred
_ANCILLARY: Final = (
    socket.CMSG_SPACE(_MAX_RIGHTS * 4) + socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4) + 512
)
_IOVEC: Final = struct.Struct("=QQ")
#: struct msghdr: name, its length, vector, its length, control, its length, flags
_MSGHDR: Final = struct.Struct("=QI4xQQQQi4x")
_CHUNK: Final = 1 << 20
_RECEIVE_SHUT: Final = 1
_PEEK: Final = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One unread message; of a stream: some bytes that belong together.

    rights       indexes of the open files that it carries
    sender       datagrams: the address of who sent it, empty if it had none
    credentials  (pid, uid, gid) of the sender, where the receiver asked for them
    """

    data: bytes
    rights: tuple[int, ...] = ()
    sender: bytes = b""
    credentials: tuple[int, int, int] | None = None

    def renumbered(self, number: Callable[[int], int]) -> Message:
        """With the sender as another PID namespace numbers it; 0: it has no number there."""
        if self.credentials is None:
            return self
        return dataclasses.replace(self, credentials=(number(self.credentials[0]), *self.credentials[1:]))


@dataclass(frozen=True, slots=True)
class _Peeked:
    data: bytes
    rights: tuple[int, ...]  # descriptors of ours
    sender: bytes
    credentials: tuple[int, int, int] | None


def read(sock: socket.socket, shutdown: int, add: Callable[[int], int], object: str) -> tuple[Message, ...]:
    """All unread messages of a resting socket, which keeps them. ``add`` takes a descriptor of ours and gives the index
    of the file; ``shutdown``: which sides are shut."""
    _no_urgent_byte(sock, object)
    before = sock.getsockopt(Level.SOCKET, SO.PEEK_OFF)
    try:
        stream = sock.type == socket.SOCK_STREAM
        found = list(_walk(sock, stream, shutdown, object))
    finally:
        sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, before)
    return tuple(
        Message(
            data=peeked.data,
            rights=tuple(add(fd) for fd in peeked.rights),
            sender=peeked.sender,
            credentials=peeked.credentials,
        )
        for peeked in found
    )


def _no_urgent_byte(sock: socket.socket, object: str) -> None:
    """A byte sent with MSG_OOB cannot be put back in its place."""
    if sock.type != socket.SOCK_STREAM:
        return
    try:
        sock.recv(1, socket.MSG_OOB | socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        # EINVAL: none is there; EOPNOTSUPP: this kernel has none at all
        return
    raise UnsupportedFile("an urgent byte (MSG_OOB) is unread in a local socket", object=object)


def _walk(sock: socket.socket, stream: bool, shutdown: int, object: str) -> Iterator[_Peeked]:
    offset = 0
    size = _CHUNK
    sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, 0)
    while True:
        try:
            peeked, flags = _peek(sock, size)
        except BlockingIOError:
            return
        if flags & socket.MSG_TRUNC or flags & socket.MSG_CTRUNC:
            _close(peeked.rights)
            if flags & socket.MSG_CTRUNC or size > 1 << 30:
                raise FileCaptureFailed("a message in a local socket cannot be read whole", object=object)
            size *= 4
            sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, offset)
            continue
        if not peeked.data and (stream or shutdown & _RECEIVE_SHUT):
            # the end of the stream; a datagram of no bytes is a message, though
            return
        if stream and peeked.rights and len(peeked.data) > 1:
            begin = _begin_of_rights(sock, offset, len(peeked.data), object)
            sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, offset + len(peeked.data))
            if begin:
                yield _Peeked(peeked.data[:begin], (), peeked.sender, peeked.credentials)
            yield _Peeked(peeked.data[begin:], peeked.rights, peeked.sender, peeked.credentials)
        else:
            yield peeked
        offset += len(peeked.data)


def _peek(sock: socket.socket, size: int) -> tuple[_Peeked, int]:
    data, ancillary, flags, sender = sock.recvmsg(size, _ANCILLARY, _PEEK)
    rights: list[int] = []
    credentials = None
    for level, number, value in ancillary:
        if level != Level.SOCKET:
            continue
        if number == _SCM_RIGHTS:
            rights += struct.unpack(f"={len(value) // 4}i", value[: len(value) // 4 * 4])
        elif number == _SCM_CREDENTIALS:
            credentials = _CREDENTIALS.unpack(value)
        elif number == _SCM_PIDFD:
            _close(struct.unpack("=i", value))
    return _Peeked(data, tuple(rights), os.fsencode(sender) if sender else b"", credentials), flags


def _begin_of_rights(sock: socket.socket, offset: int, length: int, object: str) -> int:
    """How many of the ``length`` bytes at ``offset`` come before the piece that has descriptors with it: the last."""
    sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, offset)
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as forbidden:
        wall = ctypes.addressof(ctypes.c_char.from_buffer(forbidden))
        batch.syscall(SYS.mprotect, wall, mmap.PAGESIZE, mmap.PROT_READ)
        room = ctypes.create_string_buffer(length - 1)
        vector = ctypes.create_string_buffer(_IOVEC.pack(ctypes.addressof(room), length - 1) + _IOVEC.pack(wall, 1))
        header = ctypes.create_string_buffer(_MSGHDR.pack(0, 0, ctypes.addressof(vector), 2, 0, 0, 0))
        try:
            return batch.syscall(SYS.recvmsg, sock.fileno(), ctypes.addressof(header), _PEEK)
        except OSError as error:
            if error.errno == errno.EFAULT:
                return 0
            raise FileCaptureFailed(f"peeking a local socket: {error.strerror}", object=object) from error


def _close(descriptors: tuple[int, ...]) -> None:
    for fd in descriptors:
        if fd >= 0:
            os.close(fd)


def send(
    sock: socket.socket,
    message: Message,
    to: bytes,
    descriptor: Callable[[int], int],
    warn: Callable[[str], None],
    object: str,
) -> None:
    """Send a message again; ``to``: the receiver's address, empty where ``sock`` is connected to it."""
    ancillary: list[tuple[int, int, bytes]] = []
    if message.rights:
        fds = struct.pack(f"={len(message.rights)}i", *(descriptor(i) for i in message.rights))
        ancillary.append((Level.SOCKET, _SCM_RIGHTS, fds))
    with_credentials = list(ancillary)
    if message.credentials is not None and message.credentials[0] > 0:
        with_credentials.append((Level.SOCKET, _SCM_CREDENTIALS, _CREDENTIALS.pack(*message.credentials)))
    try:
        _send(sock, message.data, with_credentials, to, object)
    except ProcessLookupError:
        # the kernel takes the credentials of living processes only
        warn(f"{object}: a message's sender (pid {message.credentials}) has ended; it shows tcpmig as its sender")
        _send(sock, message.data, ancillary, to, object)


def _send(sock: socket.socket, data: bytes, ancillary: list[tuple[int, int, bytes]], to: bytes, object: str) -> None:
    rest = memoryview(data)
    try:
        while True:
            sent = sock.sendmsg([rest], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, *([to] if to else []))
            rest = rest[sent:]
            ancillary = []
            if not rest:
                return
    except ProcessLookupError:
        raise
    except OSError as error:
        raise FileRebuildFailed(
            f"{len(data)} queued bytes could not be sent again: {error.strerror}",
            object=object,
            fix="Compare net.core.wmem_max and net.unix.max_dgram_qlen of the two hosts.",
        ) from error
