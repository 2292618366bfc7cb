"""Questions about routes and addresses, the rules that silence sockets; and pyroute2, where it is needed:
docs/design/netlink.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tcpstate.kernel.netlink import Netlink, Request
from tcpstate.kernel.rtnetlink import (
    ADDRESS_HEADER,
    ROUTE_HEADER,
    AddressAttribute,
    MessageType,
    RouteAttribute,
    RouteType,
    RuleAction,
    RuleAttribute,
    attribute,
    attributes,
    find_route,
    packed_address,
    unpacked_address,
)

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute

__all__ = [
    "Flow",
    "add_blackhole_rule",
    "blackhole_rules",
    "device_towards",
    "iproute",
    "is_local",
    "local_addresses",
    "mtu_towards",
    "refusals",
    "remove_blackhole_rule",
    "source_towards",
]

#: (source, port, destination, port) of packets that leave
Flow = tuple[str, int, str, int]

#: linux/in.h, linux/in6.h
_IP_MTU, _IPV6_MTU = 14, 24
_DISCARD = 9  # a port; nothing is sent
_U32 = struct.Struct("=I")
_RANGE = struct.Struct("=HH")  # struct fib_rule_port_range
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What pyroute2 raises in the block for an error that the kernel told becomes the OSError that it is."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error


@contextlib.contextmanager
def iproute() -> Iterator[IPRoute]:
    """pyroute2 in the calling thread's network namespace, as long as the block lasts. OSError.

    Its socket and its event loop end with the block, and it starts no thread: processes may be cloned and namespaces
    entered afterwards. The first use imports it, 0.2 s. Not from within a coroutine.
    """
    from pyroute2.iproute.linux import IPRoute

    with refusals(), IPRoute() as channel:
        yield channel


def _route_to(address: str) -> tuple[int, dict[int, bytes]] | None:
    """The type and the attributes of the route that packets to ``address`` take; None if there is none."""
    try:
        with Netlink() as channel:
            return find_route(channel, packed_address(address.partition("%")[0])[1])
    except OSError as error:
        if error.errno in _NO_WAY:
            return None
        raise


def is_local(address: str) -> bool:
    """Whether packets to ``address`` are delivered in this network namespace (a new IPv6 address takes a moment)."""
    route = _route_to(address)
    return route is not None and route[0] == RouteType.LOCAL


def local_addresses() -> set[str]:
    """The addresses that are configured in this network namespace, loopback included."""
    found = set()
    with Netlink() as channel:
        for body in channel.dump(MessageType.GETADDR, ADDRESS_HEADER.pack(0, 0, 0, 0, 0)):
            told = attributes(body, ADDRESS_HEADER.size)
            # the former is this end's, where the other end has one of its own
            packed = told.get(AddressAttribute.LOCAL) or told.get(AddressAttribute.ADDRESS)
            if packed:
                found.add(socket.inet_ntop(body[0], packed))
    return found


def device_towards(address: str) -> str:
    """The interface through which packets to ``address`` leave, loopback for our own; nothing if there is no route."""
    route = _route_to(address)
    return "" if route is None else socket.if_indextoname(int.from_bytes(route[1][RouteAttribute.OIF], sys.byteorder))


def mtu_towards(address: str) -> int:
    """Bytes of the longest packet that goes to ``address`` in one piece, for all that the kernel knows: by the
    interface, the route, and what routers have told. OSError if there is no route."""
    family, _ = packed_address(address)
    level, option = (socket.IPPROTO_IP, _IP_MTU) if family == socket.AF_INET else (socket.IPPROTO_IPV6, _IPV6_MTU)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, _DISCARD))
        return probe.getsockopt(level, option)


def source_towards(address: str) -> str:
    """The source address that the kernel would choose towards ``address``, or nothing if there is no route."""
    route = _route_to(address)
    packed = b"" if route is None else route[1].get(RouteAttribute.PREFSRC, b"")
    return unpacked_address(packed) if packed else ""


def _rule(family: int, mark: int, priority: int, flow: Flow | None) -> bytes:
    bits = 0
    parts = [
        (RuleAttribute.PRIORITY, _U32.pack(priority)),
        (RuleAttribute.FWMARK, _U32.pack(mark)),
        (RuleAttribute.FWMASK, _U32.pack(0xFFFFFFFF)),
    ]
    if flow is not None:
        source, source_port, destination, destination_port = flow
        near, far = (packed_address(address)[1] for address in (source, destination))
        bits = 8 * len(near)
        parts += [
            (RuleAttribute.SRC, near),
            (RuleAttribute.DST, far),
            (RuleAttribute.IP_PROTO, bytes([socket.IPPROTO_TCP])),
            (RuleAttribute.SPORT_RANGE, _RANGE.pack(source_port, source_port)),
            (RuleAttribute.DPORT_RANGE, _RANGE.pack(destination_port, destination_port)),
        ]
    head = ROUTE_HEADER.pack(family, bits, bits, 0, 0, 0, 0, RuleAction.BLACKHOLE, 0)
    return head + b"".join(attribute(kind, data) for kind, data in parts)


def add_blackhole_rule(channel: Netlink, family: int, mark: int, priority: int, flow: Flow | None = None) -> bool:
    """Add the rule, for all packets with the mark or only those of one TCP ``flow``; False if the very same one is
    there already. OSError if the kernel refuses it (ports: since 4.17)."""
    fresh = Request.CREATE | Request.EXCLUSIVE
    return _changed(channel, MessageType.NEWRULE, fresh, _rule(family, mark, priority, flow), errno.EEXIST)


def remove_blackhole_rule(channel: Netlink, family: int, mark: int, priority: int, flow: Flow | None = None) -> bool:
    """Remove the rule; False if there is none."""
    return _changed(channel, MessageType.DELRULE, Request(0), _rule(family, mark, priority, flow), errno.ENOENT)


def _changed(channel: Netlink, kind: MessageType, flags: Request, rule: bytes, as_wished: int) -> bool:
    """Whether it was done; False for an error that means that there is nothing to do. OSError."""
    (error,) = channel.change([(kind, flags, rule)])
    if error is not None and error.errno != as_wished:
        raise error
    return error is None


def blackhole_rules(family: int, mark: int) -> list[int]:
    """Priorities of the rules that blackhole ``mark``."""
    found = []
    with Netlink() as channel:
        for body in channel.dump(MessageType.GETRULE, ROUTE_HEADER.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
            told = attributes(body, ROUTE_HEADER.size)
            action = ROUTE_HEADER.unpack_from(body)[7]
            if action == RuleAction.BLACKHOLE and told.get(RuleAttribute.FWMARK) == _U32.pack(mark):
                found.append(int.from_bytes(told.get(RuleAttribute.PRIORITY, b""), sys.byteorder))
    return sorted(found)
