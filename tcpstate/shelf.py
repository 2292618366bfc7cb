"""Sockets that outlive us: what was taken out of an accept queue belongs to nobody but us.

They lie as messages in a pair of local sockets, whose both ends a process of its own has open
(:mod:`tcpstate.holder`); it was started before, so putting one there is one system call.  Whoever finds the note of it
takes them out again, after our death or at any time.

Source: unix(7), SCM_RIGHTS; net/unix/af_unix.c (MSG_PEEK gives descriptors of its own for what stays in the queue).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Final, Self

from tcpstate.holder import Holder, starting
from tcpstate.kernel.sockets import SO, Level
from tcpstate.slotted import dataclass

__all__ = ["Shelf", "Shelved"]

#: bytes of messages that may lie there: more than an accept queue has connections, at about 1 KiB each
_ROOM: Final = 128 << 20
_MESSAGE: Final = b"."
_COOKIE: Final = 8
_FD: Final = struct.Struct("i")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelved:
    """Where sockets lie.

    holder  who keeps them
    ends    the pair's descriptors there: what is sent to the first comes out of the second
    """

    holder: Holder
    ends: tuple[int, int]

    def open(self) -> Shelf | None:
        """None: the holder is gone, and they with it. OSError."""
        if not (found := self.holder.take(self.ends)):
            return None
        way_in, way_out = found
        return Shelf(way_in, way_out, self)


class Shelf:
    """A shelf that is open here. A context manager that closes it here; what lies there stays."""

    def __init__(self, way_in: socket.socket, way_out: socket.socket, shelved: Shelved) -> None:
        self._in, self._out, self.shelved = way_in, way_out, shelved

    @classmethod
    def make(cls, note: Callable[[Shelved], None]) -> Self:
        """An empty one; ``note`` is told where it is, before it stays without us. OSError."""
        way_in, way_out = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            way_in.setsockopt(Level.SOCKET, SO.SNDBUFFORCE, _ROOM // 2)
            ends = way_in.fileno(), way_out.fileno()
            with starting(ends, "accept queues") as holder:
                shelved = Shelved(holder=holder, ends=ends)
                note(shelved)
            return cls(way_in, way_out, shelved)
        except BaseException:
            way_in.close()
            way_out.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it here."""
        self._in.close()
        self._out.close()

    def put(self, sock: socket.socket) -> None:
        """Lay a socket there, too. OSError."""
        self._put(sock.fileno())

    def _put(self, fd: int) -> None:
        # not by socket.send_fds() and recv_fds(), which leave their flags out
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(fd))
        self._in.sendmsg([_MESSAGE], [rights], socket.MSG_DONTWAIT)

    def sockets(self) -> list[socket.socket]:
        """Descriptors of our own for all that lie there. They stay there: our death loses none. OSError."""
        found: dict[bytes, socket.socket] = {}
        try:
            while (sock := self._first()) is not None:
                # the kernel numbers sockets for as long as it runs
                cookie = sock.getsockopt(Level.SOCKET, SO.COOKIE, _COOKIE)
                if cookie in found:
                    # once around
                    sock.close()
                    break
                found[cookie] = sock
                # first behind the others, then off the front
                self._put(sock.fileno())
                if (head := self._head()) >= 0:
                    os.close(head)
        except BaseException:
            for sock in found.values():
                sock.close()
            raise
        return list(found.values())

    def _first(self) -> socket.socket | None:
        fd = self._head(socket.MSG_PEEK)
        return socket.socket(fileno=fd) if fd >= 0 else None

    def _head(self, flags: int = 0) -> int:
        """A descriptor of what lies first; -1: nothing does."""
        try:
            _, told, _, _ = self._out.recvmsg(len(_MESSAGE), socket.CMSG_LEN(_FD.size), flags | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return -1
        for level, kind, data in told:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                (fd,) = _FD.unpack(data)
                return int(fd)
        return -1

    def end(self) -> None:
        """Nothing is needed of it any more."""
        self.close()
        self.shelved.holder.end()
