"""What hangs on an address beside sockets: routes through its subnet or with it as their source, rules that name it,
tunnels that end on it.

Routes and rules of the address go with it.  A route in a common table that has it as the preferred source says that
*this host* speaks from the address; so does a tunnel: that is somebody else's use of it.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterable

from migrate.addresses import AddressRecord, Configuration, read_configuration
from migrate.routes import COMMON_TABLES, RouteRecord, RuleRecord, portable_route, portable_rule, route_body
from migrate.rtnetlink import Netlink
from tcpstate.kernel.netlink import Request
from tcpstate.kernel.rtnetlink import (
    ROUTE_HEADER,
    MessageType,
    RouteAttribute,
    RouteProtocol,
    Scope,
    attributes,
    packed_address,
)
from tcpstate.slotted import dataclass

__all__ = ["Dependents", "dependents", "drop_metrics", "only_way"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependents:
    """What depends on one address.

    routes  go with it: through its subnet, with it as their source, or in a table that only its rules lead to
    rules   that name it, and go with it
    hosts   those of ``routes`` by which this host, and not the address's rules alone, chooses it as its source
    left    routes and rules, in words, that go with it in part or not at all: what they are has no portable form
    """

    routes: tuple[RouteRecord, ...] = ()
    rules: tuple[RuleRecord, ...] = ()
    hosts: tuple[RouteRecord, ...] = ()
    left: tuple[str, ...] = ()


def dependents(
    configuration: Configuration,
    leaving: Collection[str],
    record: AddressRecord,
    came: AddressRecord | None = None,
) -> Dependents:
    """What depends on ``record`` when ``leaving`` are gone; ``came``: :func:`migrate.brought.recall`."""
    staying = _staying(configuration, leaving)
    every = [rule for body in configuration.rules if (rule := portable_rule(body)) is not None]
    rules = [rule for rule in every if rule.names(record.address)]
    # tables that nothing leads to but the rules of addresses that leave
    own = {r.table for r in rules} - COMMON_TABLES
    own -= {r.table for r in every if not any(r.names(address) for address in leaving)}
    names = {interface.index: interface.name for interface in configuration.interfaces}
    with_it = {(r.identity, r.gateway) for r in came.routes} if came else set()
    routes: list[RouteRecord] = []
    hosts: list[RouteRecord] = []
    left = [_left_rule(body) for body in configuration.rules if _names(body, record.address)]
    for body in configuration.routes:
        route = portable_route(body, names)
        if route is None:
            if _mentions(body, record.address):
                left.append("a route with several ways, or one that is made of a nexthop object")
            continue
        if route.protocol == RouteProtocol.KERNEL:
            continue
        if route.source == record.address:
            routes.append(route)
            if route.table not in own and (route.identity, route.gateway) not in with_it:
                hosts.append(route)
        elif not route.source and (
            route.table in own
            or (route.identity, route.gateway) in with_it
            or (route.gateway and only_way(route.gateway, record, staying))
        ):
            routes.append(route)
    return Dependents(routes=tuple(routes), rules=tuple(rules), hosts=tuple(hosts), left=tuple(filter(None, left)))


def drop_metrics(netlink: Netlink, gone: Iterable[tuple[AddressRecord, int]]) -> None:
    """Take away the routes of IPv6 subnets that have a metric of an address that is gone. The kernel leaves them where
    another address of the subnet stays, without looking at its metric (check_cleanup_prefix_route)."""
    suspects = [(r, i) for r, i in gone if r.family == socket.AF_INET6 and r.priority]
    if not suspects:
        return
    here = read_configuration(netlink)
    for record, index in suspects:
        stays = [a for i in here.interfaces if i.index == index for a in i.addresses]
        if not any((a.network, a.priority) == (record.network, record.priority) for a in stays):
            route = RouteRecord(
                destination=str(record.network), priority=record.priority, protocol=RouteProtocol.KERNEL, index=index
            )
            # refused: the kernel has taken it away this time
            netlink.change([(MessageType.DELROUTE, Request(0), route_body(route, index))])


def _staying(configuration: Configuration, leaving: Collection[str]) -> list[AddressRecord]:
    return [
        a for i in configuration.interfaces for a in i.addresses if a.address not in leaving and a.scope != Scope.HOST
    ]


def only_way(hop: str, record: AddressRecord, staying: Collection[AddressRecord]) -> bool:
    """Whether a next hop is a neighbour by the subnet of ``record``, and of no address that stays."""
    address = ipaddress.ip_address(hop)
    return address in record.network and not any(address in other.network for other in staying)


def _names(body: bytes, address: str) -> bool:
    """Whether a rule that has no portable form names the address."""
    return portable_rule(body) is None and packed_address(address)[1] in attributes(body, ROUTE_HEADER.size).values()


def _left_rule(body: bytes) -> str:
    return f"a rule of another kind than `from` or `to` an address (action {body[7]})"


def _mentions(body: bytes, address: str) -> bool:
    """Whether the address is the preferred source of a route, or of one of its ways."""
    packed = packed_address(address)[1]
    found = attributes(body, ROUTE_HEADER.size)
    return found.get(RouteAttribute.PREFSRC) == packed
