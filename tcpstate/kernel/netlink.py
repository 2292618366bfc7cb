"""Just enough netlink for sockets, rules and routes: requests, acknowledgements, dumps, attributes.

Source: include/uapi/linux/netlink.h, rtnetlink.h, fib_rules.h.  A library does more, but costs 180 ms to import, and
this runs inside the stop.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Self

__all__ = ["Message", "Netlink", "attribute", "attributes"]

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_ALIGN = 4
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_RECEIVE = 1 << 20


class Protocol(enum.IntEnum):
    """Netlink families."""

    ROUTE = 0
    SOCK_DIAG = 4


class Flags(enum.IntFlag):
    """nlmsg_flags of requests."""

    REQUEST = 1
    ACK = 4
    DUMP = 0x300
    EXCL = 0x200
    CREATE = 0x400


class _Control(enum.IntEnum):
    ERROR = 2
    DONE = 3


#: (nlmsg_type, payload)
Message = tuple[int, bytes]


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded."""
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length % _ALIGN)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, value) of each attribute in ``data``."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % _ALIGN


class Netlink:
    """A netlink socket of the calling thread's network namespace. A context manager."""

    def __init__(self, protocol: Protocol) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sock.close()

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags | Flags.REQUEST, self._sequence, 0)
        self._sock.sendto(header + body, (0, 0))

    def _answers(self) -> Iterator[Message]:
        """Messages that answer the last request, up to its end; OSError for an error message."""
        while True:
            data = self._sock.recv(_RECEIVE)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
                if length < _HEADER.size:
                    raise OSError("netlink: malformed message")
                body = data[at + _HEADER.size : at + length]
                at += length + -length % _ALIGN
                if sequence != self._sequence:
                    continue
                if kind == _Control.DONE:
                    return
                if kind == _Control.ERROR:
                    (error,) = struct.unpack_from("=i", body)
                    if error:
                        raise OSError(-error, os.strerror(-error))
                    return
                yield kind, body

    def request(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Ask for a change and wait until it is made; OSError if the kernel refuses it."""
        self._send(kind, flags | Flags.ACK, body)
        for _ in self._answers():
            pass

    def get(self, kind: int, body: bytes) -> Message:
        """Ask for one thing; OSError (ENOENT and the like) if there is none."""
        self._send(kind, 0, body)
        for message in self._answers():
            return message
        raise OSError("netlink: no answer")

    def dump(self, kind: int, body: bytes) -> Iterator[Message]:
        """Ask for all there are."""
        self._send(kind, Flags.DUMP, body)
        yield from self._answers()
