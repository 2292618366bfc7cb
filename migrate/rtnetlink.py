"""rtnetlink: addresses, routes, neighbours and links of this network namespace, as the kernel writes them.

Not pyroute2: inside the stop a request must be a buffer that is ready to be sent, and a route that the kernel dropped
must come back byte for byte, including attributes that no library knows.  Once both exist, a second decoder for the
same messages would only add its 300 ms of imports.

Source: include/uapi/linux/{netlink,rtnetlink,if_addr,if_link,neighbour}.h; net/netlink/af_netlink.c.
"""

from __future__ import annotations

import enum
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from tcpstate.kernel import netlink
from tcpstate.kernel.netlink import attribute

__all__ = [
    "ADDRESS_HEADER",
    "INFINITE",
    "LINK_HEADER",
    "NEIGHBOUR_HEADER",
    "ROUTE_HEADER",
    "AddressAttribute",
    "AddressFlag",
    "LinkAttribute",
    "LinkFlag",
    "MessageType",
    "NeighbourAttribute",
    "NeighbourFlag",
    "Netlink",
    "NetlinkMessage",
    "Request",
    "RouteAttribute",
    "RouteProtocol",
    "RouteType",
    "Scope",
    "attribute",
    "attributes",
    "packed_address",
    "unpacked_address",
]

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
ERROR = struct.Struct("=i")  # struct nlmsgerr, before the header of the request
ADDRESS_HEADER = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, interface
ROUTE_HEADER = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst, src, tos, table, protocol, scope, type, flags
LINK_HEADER = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
NEIGHBOUR_HEADER = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, interface, state, flags, type

INFINITE = 0xFFFFFFFF  # lifetime of an address that does not expire, seconds
SOL_NETLINK = 270
BATCH = 256  # changes in one message: their acknowledgements must fit into the receive buffer
RECEIVE_BUFFER = 1 << 20
RECEIVE_SIZE = 1 << 16  # the kernel builds dumps in blocks of at most 32 KiB


class SocketOption(enum.IntEnum):
    """Options of level SOL_NETLINK (linux/netlink.h)."""

    EXT_ACK = 11
    GET_STRICT_CHK = 12


class MessageType(enum.IntEnum):
    """Types of messages (linux/netlink.h, linux/rtnetlink.h)."""

    ERROR = 2
    DONE = 3
    NEWLINK = 16
    GETLINK = 18
    NEWADDR = 20
    DELADDR = 21
    GETADDR = 22
    NEWROUTE = 24
    DELROUTE = 25
    GETROUTE = 26
    NEWNEIGH = 28
    DELNEIGH = 29
    GETNEIGH = 30


class Request(enum.IntFlag):
    """Flags of a message's header: NLM_F_* (linux/netlink.h)."""

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


class ErrorAttribute(enum.IntEnum):
    """NLMSGERR_ATTR_* (linux/netlink.h)."""

    MESSAGE = 1


class AddressAttribute(enum.IntEnum):
    """IFA_* (linux/if_addr.h)."""

    ADDRESS = 1
    LOCAL = 2
    LABEL = 3
    BROADCAST = 4
    CACHE = 6
    FLAGS = 8
    PRIORITY = 9
    PROTOCOL = 11


class AddressFlag(enum.IntFlag):
    """IFA_F_* (linux/if_addr.h)."""

    SECONDARY = 0x01
    NODAD = 0x02
    OPTIMISTIC = 0x04
    DADFAILED = 0x08
    HOMEADDRESS = 0x10
    DEPRECATED = 0x20
    TENTATIVE = 0x40
    PERMANENT = 0x80
    MANAGETEMPADDR = 0x100
    NOPREFIXROUTE = 0x200
    MCAUTOJOIN = 0x400
    STABLE_PRIVACY = 0x800


class RouteAttribute(enum.IntEnum):
    """RTA_* (linux/rtnetlink.h)."""

    DST = 1
    SRC = 2
    OIF = 4
    GATEWAY = 5
    PRIORITY = 6
    PREFSRC = 7
    MULTIPATH = 9
    CACHE = 12
    TABLE = 15
    VIA = 18


class RouteType(enum.IntEnum):
    """RTN_* (linux/rtnetlink.h)."""

    UNICAST = 1
    LOCAL = 2


class RouteProtocol(enum.IntEnum):
    """RTPROT_* (linux/rtnetlink.h)."""

    KERNEL = 2


class Scope(enum.IntEnum):
    """RT_SCOPE_* (linux/rtnetlink.h)."""

    UNIVERSE = 0
    LINK = 253
    HOST = 254


class LinkAttribute(enum.IntEnum):
    """IFLA_* (linux/if_link.h)."""

    ADDRESS = 1
    IFNAME = 3


class LinkFlag(enum.IntFlag):
    """IFF_* (linux/if.h)."""

    UP = 0x1
    LOOPBACK = 0x8
    NOARP = 0x80


class NeighbourAttribute(enum.IntEnum):
    """NDA_* (linux/neighbour.h)."""

    DST = 1
    LLADDR = 2


class NeighbourFlag(enum.IntFlag):
    """NTF_* (linux/neighbour.h)."""

    USE = 0x01


@dataclass(frozen=True, slots=True)
class NetlinkMessage:
    """One message without its header: ``body`` is the fixed structure and the attributes after it."""

    type: int
    flags: int
    body: bytes


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes in ``data`` from ``offset``: type to value."""
    return dict(netlink.attributes(data[offset:]))


def packed_address(text: str) -> tuple[int, bytes]:
    """(family, network-order bytes) of an address. ValueError if it is none."""
    address = ipaddress.ip_address(text)
    return (socket.AF_INET if address.version == 4 else socket.AF_INET6), address.packed


def unpacked_address(data: bytes) -> str:
    """The text of an address of 4 or 16 bytes."""
    return str(ipaddress.ip_address(data))


class Netlink:
    """A NETLINK_ROUTE socket of the calling thread's network namespace, to be opened before the stop.

    Every method raises OSError with the kernel's errno and, where it gives one, the kernel's own explanation.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            self._socket.setsockopt(SOL_NETLINK, SocketOption.EXT_ACK, 1)
            # a dump can then be limited by the fields of its header, instead of giving everything
            self._socket.setsockopt(SOL_NETLINK, SocketOption.GET_STRICT_CHK, 1)
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def dump(self, kind: MessageType, body: bytes) -> list[NetlinkMessage]:
        """Everything of this kind. A dump during which the table changed is made again."""
        while True:
            self._send([(kind, Request.DUMP, body)])
            found: list[NetlinkMessage] = []
            interrupted = False
            while True:
                answers = self._receive()
                interrupted |= any(m.flags & Request.DUMP_INTERRUPTED for m in answers)
                for message in answers:
                    if message.type == MessageType.ERROR:
                        raise self._error(message)
                found += [m for m in answers if m.type != MessageType.DONE]
                if any(m.type == MessageType.DONE for m in answers):
                    break
            if not interrupted:
                return found

    def get(self, kind: MessageType, body: bytes) -> NetlinkMessage:
        """The one object that ``body`` asks for."""
        self._send([(kind, Request.REQUEST, body)])
        (answer,) = self._receive()
        if answer.type == MessageType.ERROR:
            raise self._error(answer)
        return answer

    def change(self, requests: Iterable[tuple[MessageType, Request, bytes]]) -> list[OSError | None]:
        """Make all changes in order, a batch of them in one system call; for each the error, or None.

        A failed one does not stop those after it (netlink_rcv_skb goes on).
        """
        todo = list(requests)
        results: list[OSError | None] = []
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            self._send([(kind, flags | Request.ACK, body) for kind, flags, body in batch])
            while len(results) < start + len(batch):
                for message in self._receive():
                    (code,) = ERROR.unpack_from(message.body)
                    results.append(self._error(message) if code else None)
        return results

    def _send(self, messages: list[tuple[MessageType, int, bytes]]) -> None:
        self._sequence = (self._sequence + 1) & INFINITE
        data = b"".join(
            HEADER.pack(HEADER.size + len(body), kind, flags | Request.REQUEST, self._sequence, 0)
            + body
            + bytes(-len(body) % 4)
            for kind, flags, body in messages
        )
        self._socket.send(data)

    def _receive(self) -> list[NetlinkMessage]:
        while True:
            data, _, flags, _ = self._socket.recvmsg(RECEIVE_SIZE)
            if flags & socket.MSG_TRUNC:
                raise OSError(errno.EMSGSIZE, "a netlink answer was cut off")
            found = []
            offset = 0
            while offset + HEADER.size <= len(data):
                length, kind, header_flags, sequence, _ = HEADER.unpack_from(data, offset)
                if length < HEADER.size or offset + length > len(data):
                    raise OSError(errno.EBADMSG, "a netlink message has an impossible length")
                # answers to an earlier request that failed half-way are still in the queue: not ours
                if sequence == self._sequence:
                    found.append(NetlinkMessage(kind, header_flags, data[offset + HEADER.size : offset + length]))
                offset += length + -length % 4
            if found:
                return found

    @staticmethod
    def _error(message: NetlinkMessage) -> OSError:
        (code,) = ERROR.unpack_from(message.body)
        text = os.strerror(-code)
        if message.flags & Request.ACK_ATTRIBUTES:
            # the request follows the code: its header alone where the answer is capped
            (length,) = struct.unpack_from("=I", message.body, ERROR.size)
            skip = HEADER.size if message.flags & Request.CAPPED else length + -length % 4
            said = attributes(message.body, ERROR.size + skip).get(ErrorAttribute.MESSAGE, b"")
            if said:
                text += ": " + said.rstrip(b"\0").decode(errors="replace")
        return OSError(-code, text)
