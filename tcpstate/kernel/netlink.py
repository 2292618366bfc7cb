"""Netlink as raw messages, for the places where pyroute2 does not do: docs/design/netlink.md says which, and why.

Requests that the stop sends ready-made, routes kept byte for byte, and dumps of thousands of sockets.  Everything else
asks pyroute2, through :mod:`tcpstate.kernel.route`.

Source: include/uapi/linux/netlink.h; net/netlink/af_netlink.c.
"""

from __future__ import annotations

import enum
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Self

from tcpstate.slotted import dataclass

__all__ = ["Netlink", "Protocol", "Request", "attribute", "attributes"]

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_ERROR = struct.Struct("=i")  # struct nlmsgerr, before the header of the request
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_ALIGN = 4
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_SEQUENCES = 1 << 32
_SOL_NETLINK = 270
_BATCH = 256  # changes in one message: their acknowledgements must fit into the receive buffer
_RECEIVE_BUFFER = 1 << 20
_ANSWER_WAIT = 5.0  # seconds; a transaction waits for all processors to leave the old rules
_RECEIVE_SIZE = 1 << 16  # the kernel builds dumps in blocks of at most 32 KiB


class Protocol(enum.IntEnum):
    """Netlink families."""

    ROUTE = 0
    SOCK_DIAG = 4
    NETFILTER = 12


class Request(enum.IntFlag):
    """Flags of a message's header: NLM_F_*."""

    REQUEST = 0x1
    ACK = 0x4
    DUMP_INTERRUPTED = 0x10
    CAPPED = 0x100  # in an answer
    ACK_ATTRIBUTES = 0x200  # in an answer
    DUMP = 0x300
    REPLACE = 0x100
    EXCLUSIVE = 0x200
    CREATE = 0x400
    APPEND = 0x800


class _SocketOption(enum.IntEnum):
    EXT_ACK = 11
    GET_STRICT_CHK = 12


class _Control(enum.IntEnum):
    ERROR = 2
    DONE = 3


_ERROR_MESSAGE = 1  # NLMSGERR_ATTR_MSG


@dataclass(frozen=True, slots=True)
class _Message:
    type: int
    flags: int
    body: bytes


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded."""
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length % _ALIGN)


def attributes(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """(type, value) of each attribute in ``data`` from ``offset``."""
    at = offset
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % _ALIGN


class Netlink:
    """A netlink socket of the calling thread's network namespace. A context manager.

    Every method raises OSError with the kernel's errno and, where it gives one, the kernel's own explanation.
    """

    def __init__(self, protocol: Protocol = Protocol.ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._socket.setsockopt(_SOL_NETLINK, _SocketOption.EXT_ACK, 1)
            # a dump can then be limited by the fields of its header, instead of giving everything
            self._socket.setsockopt(_SOL_NETLINK, _SocketOption.GET_STRICT_CHK, 1)
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The bodies of everything of this kind. A dump during which the table changed is made again."""
        while True:
            self._send([(kind, Request.DUMP, body)])
            found: list[bytes] = []
            interrupted = done = False
            while not done:
                for message in self._receive():
                    interrupted |= bool(message.flags & Request.DUMP_INTERRUPTED)
                    if message.type == _Control.ERROR:
                        raise _refusal(message)
                    if message.type == _Control.DONE:
                        done = True
                    else:
                        found.append(message.body)
            if not interrupted:
                return found

    def get(self, kind: int, body: bytes) -> bytes:
        """The body of the one object that ``body`` asks for."""
        self._send([(kind, Request.REQUEST, body)])
        (answer,) = self._receive()
        if answer.type == _Control.ERROR:
            raise _refusal(answer)
        return answer.body

    def change(self, requests: Iterable[tuple[int, Request, bytes]]) -> list[OSError | None]:
        """Make all changes in order, a batch of them in one system call; for each the error, or None.

        A failed one does not stop those after it (netlink_rcv_skb goes on).
        """
        todo = list(requests)
        results: list[OSError | None] = []
        for start in range(0, len(todo), _BATCH):
            batch = todo[start : start + _BATCH]
            self._send([(kind, flags | Request.ACK, body) for kind, flags, body in batch])
            while len(results) < start + len(batch):
                for message in self._receive():
                    (code,) = _ERROR.unpack_from(message.body)
                    results.append(_refusal(message) if code else None)
        return results

    def transaction(
        self, begin: tuple[int, bytes], requests: Iterable[tuple[int, Request, bytes]], end: tuple[int, bytes]
    ) -> None:
        """Make all changes or none, between a message that begins the batch and one that ends it (nfnetlink). OSError
        of the first that was refused, or ETIMEDOUT."""
        todo = [(kind, flags | Request.ACK, body) for kind, flags, body in requests]
        self._send([(begin[0], Request.REQUEST, begin[1]), *todo, (end[0], Request.REQUEST, end[1])])
        # If the batch itself is refused, only that is answered.
        self._socket.settimeout(_ANSWER_WAIT)
        refused: OSError | None = None
        answered = 0
        try:
            while answered < len(todo):
                for message in self._receive():
                    answered += 1
                    if refused is None and _ERROR.unpack_from(message.body) != (0,):
                        refused = _refusal(message)
        except TimeoutError:
            refused = refused or OSError(errno.ETIMEDOUT, "no answer to a transaction")
        finally:
            self._socket.settimeout(None)
        if refused is not None:
            raise refused

    def _send(self, messages: list[tuple[int, int, bytes]]) -> None:
        self._sequence = (self._sequence + 1) % _SEQUENCES
        data = b"".join(
            _HEADER.pack(_HEADER.size + len(body), kind, flags | Request.REQUEST, self._sequence, 0)
            + body
            + bytes(-len(body) % _ALIGN)
            for kind, flags, body in messages
        )
        self._socket.send(data)

    def _receive(self) -> list[_Message]:
        while True:
            data, _, flags, _ = self._socket.recvmsg(_RECEIVE_SIZE)
            if flags & socket.MSG_TRUNC:
                raise OSError(errno.EMSGSIZE, "a netlink answer was cut off")
            found = []
            offset = 0
            while offset + _HEADER.size <= len(data):
                length, kind, header_flags, sequence, _ = _HEADER.unpack_from(data, offset)
                if length < _HEADER.size or offset + length > len(data):
                    raise OSError(errno.EBADMSG, "a netlink message has an impossible length")
                # answers to an earlier request that failed half-way are still in the queue: not ours
                if sequence == self._sequence:
                    found.append(_Message(kind, header_flags, data[offset + _HEADER.size : offset + length]))
                offset += length + -length % _ALIGN
            if found:
                return found


def _refusal(message: _Message) -> OSError:
    (code,) = _ERROR.unpack_from(message.body)
    text = os.strerror(-code)
    if message.flags & Request.ACK_ATTRIBUTES:
        # the request follows the code: its header alone where the answer is capped
        (length,) = struct.unpack_from("=I", message.body, _ERROR.size)
        skip = _HEADER.size if message.flags & Request.CAPPED else length + -length % _ALIGN
        said = dict(attributes(message.body, _ERROR.size + skip)).get(_ERROR_MESSAGE, b"")
        if said:
            text += ": " + said.rstrip(b"\0").decode(errors="replace")
    return OSError(-code, text)
