"""Routes and rules: the portable records of those that belong to an address that moves, and the kernel's messages.

Of this host's own routes the kernel's bytes are kept (:func:`route_key`, :class:`migrate.addresses.Configuration`);
what travels is checked field by field.

Source: net/ipv4/fib_frontend.c, net/ipv6/route.c, net/core/fib_rules.c; include/uapi/linux/{rtnetlink,fib_rules}.h.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Mapping
from typing import Final

from tcpstate.kernel.rtnetlink import (
    ROUTE_HEADER,
    RouteAttribute,
    RouteProtocol,
    RouteType,
    RuleAction,
    RuleAttribute,
    attribute,
    attributes,
    packed_address,
    unpacked_address,
)
from tcpstate.slotted import dataclass

__all__ = [
    "MAIN_TABLE",
    "RTNH_F_ONLINK",
    "RouteRecord",
    "RuleRecord",
    "configured",
    "portable_route",
    "portable_rule",
    "route_body",
    "route_key",
    "rule_body",
]

_U32 = struct.Struct("=I")
MAIN_TABLE = 254
#: tables that every host has: local, main, default
COMMON_TABLES: Final = frozenset({255, MAIN_TABLE, 253})
# of the flags of a route, what somebody configured; the others tell the state of its link
RTNH_F_ONLINK = 4
#: RTAX_*: numbers up to 17; RTAX_CC_ALGO is a name in requests and a number of this boot in answers
_METRICS: Final = frozenset(range(1, 18)) - {16}
_MAX32: Final = (1 << 32) - 1
#: what makes a route more than a destination, a gateway and a device
_SPECIAL: Final = (RouteAttribute.MULTIPATH, RouteAttribute.VIA, RouteAttribute.ENCAP, RouteAttribute.NH_ID)
_RULE_ATTRIBUTES: Final = frozenset(
    {
        RuleAttribute.DST,
        RuleAttribute.SRC,
        RuleAttribute.PRIORITY,
        RuleAttribute.FWMARK,
        RuleAttribute.FWMASK,
        RuleAttribute.TABLE,
        RuleAttribute.SUPPRESS_PREFIXLEN,
        RuleAttribute.PROTOCOL,
    }
)
_RULE_INVERT: Final = 2  # FIB_RULE_INVERT


def _check32(*values: int) -> None:
    for value in values:
        if not 0 <= value <= _MAX32:
            raise ValueError(f"{value} is outside 32 bits")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRecord:
    """A route that depends on an address that moves, to be made at the target where it is missing.

    destination  network with prefix length
    gateway      address of the next hop, or empty
    source       preferred source address, or empty
    interface    the one that it leads over; empty: that of the address
    index        number of the interface at the target, which finds it
    table, priority, scope, protocol  as in rtnetlink(7)
    onlink       the gateway counts as a neighbour whatever the subnets say
    metrics      RTAX_* number to value: MTU, windows, ..
    """

    destination: str
    gateway: str = ""
    source: str = ""
    interface: str = ""
    index: int = 0
    table: int = MAIN_TABLE
    priority: int = 0
    scope: int = 0
    protocol: int = 0
    onlink: bool = False
    metrics: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        network = ipaddress.ip_network(self.destination)
        for text in (self.gateway, self.source):
            if text and ipaddress.ip_address(text).version != network.version:
                raise ValueError(f"{text} belongs to another family than {self.destination}")
        _check32(self.table, self.priority, self.index, *(value for _, value in self.metrics))
        if not (0 <= self.scope <= 255 and 0 <= self.protocol <= 255):
            raise ValueError("scope or protocol is outside 8 bits")
        if not {number for number, _ in self.metrics} <= _METRICS:
            raise ValueError("a metric that is not known")

    @property
    def identity(self) -> tuple[str, int, int]:
        """What the kernel allows one route of."""
        return self.destination, self.table, self.priority

    def __str__(self) -> str:
        words = [self.destination]
        words += [f"via {self.gateway}"] if self.gateway else []
        words += [f"src {self.source}"] if self.source else []
        return " ".join(words + ([f"table {self.table}"] if self.table != MAIN_TABLE else []))


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleRecord:
    """A rule (`ip rule`) that names an address that moves, and sends its packets to a table.

    source, destination  networks with prefix length, or empty
    table, priority, mark, mask, protocol  as in ip-rule(8)
    """

    source: str = ""
    destination: str = ""
    table: int = MAIN_TABLE
    priority: int = 0
    mark: int = 0
    mask: int = 0
    protocol: int = 0

    def __post_init__(self) -> None:
        networks = [ipaddress.ip_network(text) for text in (self.source, self.destination) if text]
        if len({network.version for network in networks}) != 1:
            raise ValueError("a rule names addresses of one family")
        _check32(self.table, self.priority, self.mark, self.mask)
        if not 0 <= self.protocol <= 255:
            raise ValueError("protocol is outside 8 bits")

    def names(self, address: str) -> bool:
        """Whether it is about this address alone."""
        alone = str(ipaddress.ip_network(address))
        return alone in (self.source, self.destination)

    def __str__(self) -> str:
        words = [f"from {self.source}"] if self.source else []
        words += [f"to {self.destination}"] if self.destination else []
        return " ".join([*words, f"lookup {self.table}"])


def route_body(route: RouteRecord, index: int) -> bytes:
    """The body of RTM_NEWROUTE or RTM_DELROUTE for ``route``, over interface ``index`` if it has none of its own."""
    network = ipaddress.ip_network(route.destination)
    family, packed = packed_address(str(network.network_address))
    table = route.table if route.table < 256 else 0
    flags = RTNH_F_ONLINK if route.onlink else 0
    header = (family, network.prefixlen, 0, 0, table, route.protocol, route.scope, RouteType.UNICAST, flags)
    body = ROUTE_HEADER.pack(*header)
    body += attribute(RouteAttribute.DST, packed) + attribute(RouteAttribute.TABLE, _U32.pack(route.table))
    body += attribute(RouteAttribute.OIF, _U32.pack(route.index or index))
    if route.gateway:
        body += attribute(RouteAttribute.GATEWAY, packed_address(route.gateway)[1])
    if route.source:
        body += attribute(RouteAttribute.PREFSRC, packed_address(route.source)[1])
    if route.priority:
        body += attribute(RouteAttribute.PRIORITY, _U32.pack(route.priority))
    if route.metrics:
        nested = b"".join(attribute(number, _U32.pack(value)) for number, value in route.metrics)
        body += attribute(RouteAttribute.METRICS, nested)
    return body


def route_key(body: bytes) -> tuple[object, ...]:
    """What makes two routes the same: everything but ages, counters and the state of the link."""
    *header, flags = ROUTE_HEADER.unpack_from(body)
    found = attributes(body, ROUTE_HEADER.size)
    found.pop(RouteAttribute.CACHE, None)
    return (*header, flags & RTNH_F_ONLINK, *sorted(found.items()))


def configured(body: bytes) -> bool:
    """Whether a route has to be remembered: local, broadcast, anycast and multicast ones come with the address."""
    family, _, _, _, _, protocol, _, kind, _ = ROUTE_HEADER.unpack_from(body)
    if protocol != RouteProtocol.KERNEL:
        return True
    # an IPv4 subnet's route comes with its address; an IPv6 one too, but may have been given another metric since
    return bool(kind == RouteType.UNICAST and family == socket.AF_INET6)


def portable_route(body: bytes, names: Mapping[int, str] | None = None) -> RouteRecord | None:
    """The portable form of a plain unicast route; None for multipath routes, gateways of another family and such.

    names  number of an interface to its name
    """
    family, dst, _, _, table, protocol, scope, kind, flags = ROUTE_HEADER.unpack_from(body)
    found = attributes(body, ROUTE_HEADER.size)
    if kind != RouteType.UNICAST or any(special in found for special in _SPECIAL):
        return None
    any_address = bytes(4 if family == socket.AF_INET else 16)

    def text(kind: RouteAttribute) -> str:
        return unpacked_address(found[kind]) if kind in found else ""

    def number(kind: RouteAttribute, otherwise: int = 0) -> int:
        return int(_U32.unpack(found[kind])[0]) if kind in found else otherwise

    metrics = attributes(found.get(RouteAttribute.METRICS, b""))
    return RouteRecord(
        destination=f"{unpacked_address(found.get(RouteAttribute.DST, any_address))}/{dst}",
        gateway=text(RouteAttribute.GATEWAY),
        source=text(RouteAttribute.PREFSRC),
        interface=(names or {}).get(number(RouteAttribute.OIF), ""),
        table=number(RouteAttribute.TABLE, table),
        priority=number(RouteAttribute.PRIORITY),
        scope=scope,
        protocol=protocol,
        onlink=bool(flags & RTNH_F_ONLINK),
        metrics=tuple((n, int(_U32.unpack(v)[0])) for n, v in sorted(metrics.items()) if n in _METRICS),
    )


def portable_rule(body: bytes) -> RuleRecord | None:
    """The portable form of a rule that looks at addresses and a mark only, and leads to a table; else None."""
    family, dst, src, tos, table, _, _, action, flags = ROUTE_HEADER.unpack_from(body)
    found = attributes(body, ROUTE_HEADER.size)
    suppressed = _U32.unpack(found.get(RuleAttribute.SUPPRESS_PREFIXLEN, b"\xff" * 4))[0]
    plain = action == RuleAction.TO_TABLE and not tos and not flags & _RULE_INVERT and suppressed == _MAX32
    if not plain or not found.keys() <= _RULE_ATTRIBUTES or not (dst or src):
        return None
    any_address = bytes(4 if family == socket.AF_INET else 16)

    def network(kind: RuleAttribute, length: int) -> str:
        return f"{unpacked_address(found.get(kind, any_address))}/{length}" if length else ""

    def number(kind: RuleAttribute, otherwise: int = 0) -> int:
        return int(_U32.unpack(found[kind])[0]) if kind in found else otherwise

    return RuleRecord(
        source=network(RuleAttribute.SRC, src),
        destination=network(RuleAttribute.DST, dst),
        table=number(RuleAttribute.TABLE, table),
        priority=number(RuleAttribute.PRIORITY),
        mark=number(RuleAttribute.FWMARK),
        mask=number(RuleAttribute.FWMASK),
        protocol=found.get(RuleAttribute.PROTOCOL, b"\0")[0],
    )


def rule_body(rule: RuleRecord) -> bytes:
    """The body of RTM_NEWRULE or RTM_DELRULE."""
    lengths, ends = [], b""
    family = 0
    for kind, text in ((RuleAttribute.DST, rule.destination), (RuleAttribute.SRC, rule.source)):
        lengths.append(ipaddress.ip_network(text).prefixlen if text else 0)
        if text:
            family, packed = packed_address(text.partition("/")[0])
            ends += attribute(kind, packed)
    table = rule.table if rule.table < 256 else 0
    body = ROUTE_HEADER.pack(family, *lengths, 0, table, 0, 0, RuleAction.TO_TABLE, 0) + ends
    body += attribute(RuleAttribute.TABLE, _U32.pack(rule.table))
    body += attribute(RuleAttribute.PRIORITY, _U32.pack(rule.priority))
    if rule.mark or rule.mask:
        body += attribute(RuleAttribute.FWMARK, _U32.pack(rule.mark))
        body += attribute(RuleAttribute.FWMASK, _U32.pack(rule.mask))
    if rule.protocol:
        body += attribute(RuleAttribute.PROTOCOL, bytes([rule.protocol]))
    return body
