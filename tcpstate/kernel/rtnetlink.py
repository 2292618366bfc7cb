"""rtnetlink: links, addresses, routes, rules and neighbours as the kernel's messages have them.

Source: include/uapi/linux/{rtnetlink,if_link,if_addr,if,fib_rules,neighbour}.h.
"""

from __future__ import annotations

import enum
import ipaddress
import socket
import struct

from tcpstate.kernel import netlink
from tcpstate.kernel.netlink import Netlink, attribute

__all__ = [
    "ADDRESS_HEADER",
    "INFINITE",
    "LINK_HEADER",
    "NEIGHBOUR_HEADER",
    "ROUTE_HEADER",
    "AddressAttribute",
    "AddressFlag",
    "AddressOrigin",
    "LinkAttribute",
    "LinkFlag",
    "MessageType",
    "NeighbourAttribute",
    "NeighbourFlag",
    "RouteAttribute",
    "RouteProtocol",
    "RouteType",
    "RuleAction",
    "RuleAttribute",
    "Scope",
    "attribute",
    "attributes",
    "find_route",
    "packed_address",
    "unpacked_address",
]

LINK_HEADER = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
NEIGHBOUR_HEADER = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, interface, state, flags, type
ADDRESS_HEADER = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, interface
# struct rtmsg: family, dst, src, tos, table, protocol, scope, type, flags; struct fib_rule_hdr: the action for the type
ROUTE_HEADER = struct.Struct("=BBBBBBBBI")

INFINITE = 0xFFFFFFFF  # lifetime of an address that does not expire, seconds


class MessageType(enum.IntEnum):
    """Types of messages (linux/rtnetlink.h)."""

    GETLINK = 18
    NEWADDR = 20
    DELADDR = 21
    GETADDR = 22
    NEWROUTE = 24
    DELROUTE = 25
    GETROUTE = 26
    NEWNEIGH = 28
    NEWRULE = 32
    DELRULE = 33
    GETRULE = 34


class LinkAttribute(enum.IntEnum):
    """IFLA_*, and IFLA_INFO_* within LINKINFO (linux/if_link.h)."""

    ADDRESS = 1
    IFNAME = 3
    LINKINFO = 18
    INFO_KIND = 1
    INFO_DATA = 2


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


class AddressOrigin(enum.IntEnum):
    """IFAPROT_* (linux/if_addr.h): who made an address. Told since Linux 5.18."""

    KERNEL_RA = 2


class RouteAttribute(enum.IntEnum):
    """RTA_* (linux/rtnetlink.h)."""

    DST = 1
    SRC = 2
    OIF = 4
    GATEWAY = 5
    PRIORITY = 6
    PREFSRC = 7
    METRICS = 8
    MULTIPATH = 9
    CACHE = 12
    TABLE = 15
    VIA = 18
    ENCAP = 22
    NH_ID = 30


class RuleAttribute(enum.IntEnum):
    """FRA_* (linux/fib_rules.h)."""

    DST = 1
    SRC = 2
    PRIORITY = 6
    FWMARK = 10
    SUPPRESS_PREFIXLEN = 14
    TABLE = 15
    FWMASK = 16
    PROTOCOL = 21
    IP_PROTO = 22
    SPORT_RANGE = 23
    DPORT_RANGE = 24


class RuleAction(enum.IntEnum):
    """FR_ACT_* (linux/fib_rules.h)."""

    TO_TABLE = 1
    BLACKHOLE = 6


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


class NeighbourAttribute(enum.IntEnum):
    """NDA_* (linux/neighbour.h)."""

    DST = 1


class NeighbourFlag(enum.IntFlag):
    """NTF_* (linux/neighbour.h)."""

    USE = 0x01


class LinkFlag(enum.IntFlag):
    """IFF_* (linux/if.h)."""

    UP = 0x1
    LOOPBACK = 0x8
    RUNNING = 0x40
    NOARP = 0x80


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes in ``data`` from ``offset``: type to value."""
    return dict(netlink.attributes(data, offset))


def packed_address(text: str) -> tuple[int, bytes]:
    """(family, network-order bytes) of an address. ValueError if it is none."""
    address = ipaddress.ip_address(text)
    return (socket.AF_INET if address.version == 4 else socket.AF_INET6), address.packed


def unpacked_address(data: bytes) -> str:
    """The text of an address of 4 or 16 bytes."""
    return str(ipaddress.ip_address(data))


def find_route(netlink: Netlink, packed: bytes) -> tuple[RouteType | int, dict[int, bytes]]:
    """The type and the attributes of the route that packets to the address ``packed`` take. OSError if there is none.

    For the stop, and for thousands of peers: 15 µs.
    """
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    query = ROUTE_HEADER.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0) + attribute(RouteAttribute.DST, packed)
    body = netlink.get(MessageType.GETROUTE, query)
    return ROUTE_HEADER.unpack_from(body)[7], attributes(body, ROUTE_HEADER.size)
