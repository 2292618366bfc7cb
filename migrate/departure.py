"""The addresses' leave from the source: taken away inside the stop, given back exactly when the move is undone.

What the kernel does when an IPv4 address is deleted, and what is done about it here:

* The secondary addresses of its subnet are deleted with it (promote_secondaries=0), or the first of them becomes the
  primary.  Those that do not move are added again in the same system call; on the way back their order is made again,
  because the primary is the source address of new connections.
* Routes whose preferred source it is are deleted (IPv6: they lose the preferred source), and if it was the interface's
  last, all routes through the interface.  The picture taken before the stop has them all, in the kernel's bytes.

The order among the primaries of *different* subnets is not restored: it decides nothing (inet_select_addr looks for the
subnet first), and to restore it addresses that never moved would have to be taken away for a moment.

Source: net/ipv4/devinet.c __inet_del_ifa, __inet_insert_ifa; net/ipv4/fib_frontend.c fib_del_ifaddr;
net/ipv6/addrconf.c inet6_addr_modify, net/ipv6/route.c rt6_remove_prefsrc.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from dataclasses import replace

from migrate import brought
from migrate.addresses import (
    AddressRecord,
    Configuration,
    InterfaceRecord,
    add_body,
    delete_body,
    read_configuration,
    stable_flags,
)
from migrate.dependents import drop_metrics
from migrate.errors import AddressChangeFailed, AddressNotHere, AddressRestoreIncomplete
from migrate.routes import RTNH_F_ONLINK, route_key
from migrate.rtnetlink import Netlink
from tcpstate.kernel.netlink import Request
from tcpstate.kernel.rtnetlink import (
    ROUTE_HEADER,
    AddressFlag,
    MessageType,
    RouteAttribute,
    RouteProtocol,
    attribute,
    attributes,
    packed_address,
)
from tcpstate.slotted import dataclass

__all__ = ["Departure", "DepartureRecord", "give_back"]

_Change = tuple[MessageType, Request, bytes]
_ADD = Request.CREATE | Request.EXCLUSIVE
_IN_NEXTHOP = (
    RouteAttribute.CACHE,
    RouteAttribute.OIF,
    RouteAttribute.GATEWAY,
    RouteAttribute.VIA,
    RouteAttribute.MULTIPATH,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DepartureRecord:
    """What the journal keeps before an address is removed: all that :func:`give_back` needs.

    moved          the addresses that leave
    configuration  the picture of the host with them
    """

    moved: tuple[str, ...]
    configuration: Configuration


class Departure:
    """M addresses that leave this host together. Made before the stop; AddressNotHere if one is not configured.

    The netlink socket stays the caller's, and open until the move is over.
    """

    def __init__(self, netlink: Netlink, addresses: Iterable[str], configuration: Configuration | None = None) -> None:
        self._netlink = netlink
        configuration = read_configuration(netlink) if configuration is None else configuration
        self.record = DepartureRecord(moved=tuple(addresses), configuration=configuration)
        self._moved = frozenset(self.record.moved)
        for address in self._moved:
            if configuration.find(address) is None:
                raise AddressNotHere("the address is not configured in this network namespace", object=address)
        self._deletions: list[_Change] = []
        self._kept: list[_Change] = []
        for interface in configuration.interfaces:
            self._prepare(interface)
        self.removed = False

    def _prepare(self, interface: InterfaceRecord) -> None:
        leaving = [a for a in interface.addresses if a.address in self._moved]
        # secondaries first: so that none is promoted, or deleted, on the way
        for record in sorted(leaving, key=lambda a: not a.secondary):
            self._deletions.append((MessageType.DELADDR, Request(0), delete_body(record, interface.index)))
        networks = {a.network for a in leaving if a.family == socket.AF_INET and not a.secondary}
        for record in interface.addresses:
            if record.secondary and record.address not in self._moved and record.network in networks:
                self._kept.append((MessageType.NEWADDR, _ADD, add_body(record, interface.index, stable_flags(record))))

    def remove(self) -> None:
        """Take the addresses away: one system call, prepared beforehand.

        AddressChangeFailed if the kernel refuses one; those already gone are given back then.
        """
        self.removed = True
        errors = self._netlink.change(self._deletions + self._kept)
        for error in errors[: len(self._deletions)]:
            # gone already: with its primary, or by somebody else's hand
            if error is not None and error.errno != errno.EADDRNOTAVAIL:
                self.restore()
                raise AddressChangeFailed(f"removing failed: {error}", object=", ".join(self.record.moved)) from error
        for error in errors[len(self._deletions) :]:
            # there still: the kernel promoted a secondary address instead of deleting all of them
            if error is not None and error.errno != errno.EEXIST:
                self.restore()
                raise AddressChangeFailed(f"keeping a secondary address failed: {error}") from error

    def settle(self) -> None:
        """After the move: put back the routes of addresses that stayed, which the kernel dropped with their address for
        the moment between deletion and addition; take away what the addresses had brought along when they came here.
        Not urgent. AddressRestoreIncomplete if a route cannot be put back."""
        if self._kept:
            _restore_routes(self._netlink, self.record, without=self._moved)
        brought.withdraw(self._netlink, self.record.moved)
        drop_metrics(self._netlink, [(a, i.index) for i, a in self._leaving()])

    def _leaving(self) -> list[tuple[InterfaceRecord, AddressRecord]]:
        return [(i, a) for i in self.record.configuration.interfaces for a in i.addresses if a.address in self._moved]

    def restore(self) -> None:
        """Undo :meth:`remove`; nothing if it was not called. AddressRestoreIncomplete names what is still missing."""
        if self.removed:
            give_back(self._netlink, self.record)
            self.removed = False


def give_back(netlink: Netlink, record: DepartureRecord) -> None:
    """Make this host's addresses and routes those of ``record`` again, touching only what differs.

    Works from the journal as well, in another process. AddressRestoreIncomplete names what could not be put back.
    """
    now = read_configuration(netlink)
    moved = frozenset(record.moved)
    for before in record.configuration.interfaces:
        if not any(a.address in moved for a in before.addresses):
            continue
        current = next((i for i in now.interfaces if i.index == before.index), None)
        if current is None or current.name != before.name:
            raise AddressRestoreIncomplete("the interface of the address is gone", object=before.name)
        # life goes on while an address is away
        aged = replace(before, addresses=tuple(a.aged(record.configuration.age) for a in before.addresses))
        for error in netlink.change(_address_changes(aged, current, moved)):
            if error is not None and error.errno not in (errno.EEXIST, errno.EADDRNOTAVAIL):
                raise AddressRestoreIncomplete(f"an address was refused: {error}", object=before.name) from error
    _restore_routes(netlink, record, without=frozenset())
    after = read_configuration(netlink)
    for address in record.moved:
        if after.find(address) is None:
            raise AddressRestoreIncomplete("the address is not configured again", object=address)


def _address_changes(before: InterfaceRecord, current: InterfaceRecord, moved: frozenset[str]) -> list[_Change]:
    """The changes that make the subnets of the moved addresses on ``current`` what they were."""
    changes: list[_Change] = []
    present = {a.address: a for a in current.addresses}
    for network in dict.fromkeys(a.network for a in before.addresses if a.address in moved):
        group = [a for a in before.addresses if a.network == network]
        if group[0].family == socket.AF_INET6:
            # the newest of a scope comes first (ipv6_link_dev_addr), and is preferred as a source among equals
            for record in reversed(group):
                if record.address in moved and record.address not in present:
                    changes += _add6(record, before.index)
            continue
        roles_kept = all(present[a.address].secondary == a.secondary for a in group if a.address in present)
        first_missing = group[0].address not in present
        if not roles_kept or first_missing:
            # the primary has to come first: what took its place goes for a moment, last one first, so that the kernel
            # neither promotes nor deletes another
            there = [a for a in current.addresses if a.network == network]
            changes += [
                (MessageType.DELADDR, Request(0), delete_body(a, current.index))
                for a in sorted(there, key=lambda a: not a.secondary)
            ]
            known = {a.address for a in group}
            wanted = group + [a for a in there if a.address not in known]
        else:
            wanted = [a for a in group if a.address not in present]
        changes += [(MessageType.NEWADDR, _ADD, add_body(a, before.index, stable_flags(a))) for a in wanted]
    return changes


def _add6(record: AddressRecord, index: int) -> list[_Change]:
    # Without NODAD the address would be tentative, and unusable, for a second.  The flag is taken off by replacing the
    # address, which does not start duplicate detection (inet6_addr_modify).
    flags = stable_flags(record)
    changes: list[_Change] = [(MessageType.NEWADDR, _ADD, add_body(record, index, flags | AddressFlag.NODAD))]
    if not flags & AddressFlag.NODAD:
        changes.append((MessageType.NEWADDR, Request.REPLACE, add_body(record, index, flags)))
    return changes


def _restore_routes(netlink: Netlink, record: DepartureRecord, *, without: frozenset[str]) -> None:
    """Add the routes of the picture that are missing now, except those whose source is one of ``without``."""
    now = read_configuration(netlink)
    present = {route_key(body) for body in now.routes}
    skip = {packed_address(address)[1] for address in without}
    missing = [
        body
        for body in record.configuration.routes
        if route_key(body) not in present and _source(body) not in skip and _protocol(body) != RouteProtocol.KERNEL
    ]
    # An IPv6 route that lost its preferred source is still there, and would become a second path beside the new one
    stripped = {_without_source(body) for body in now.routes}
    refused: list[OSError] = []
    # gateways need the routes to them first: as long as a round makes progress, try again
    while missing:
        changes = [
            (
                MessageType.NEWROUTE,
                Request.CREATE | (Request.REPLACE if _without_source(body) in stripped else Request.APPEND),
                _clean(body),
            )
            for body in missing
        ]
        errors = netlink.change(changes)
        left = [b for b, e in zip(missing, errors, strict=True) if e is not None and e.errno != errno.EEXIST]
        refused = [e for e in errors if e is not None and e.errno != errno.EEXIST]
        if len(left) == len(missing):
            break
        missing = left
    # without some of its addresses a host cannot have all of its routes: nothing is wrong with that
    if refused and not without:
        raise AddressRestoreIncomplete(f"{len(refused)} routes could not be put back: {refused[0]}") from refused[0]


def _source(body: bytes) -> bytes:
    return attributes(body, ROUTE_HEADER.size).get(RouteAttribute.PREFSRC, b"")


def _protocol(body: bytes) -> int:
    protocol: int = ROUTE_HEADER.unpack_from(body)[5]
    return protocol


def _without_source(body: bytes) -> tuple[object, ...]:
    """The key of an IPv6 route but for its preferred source; of an IPv4 route the key itself."""
    key = route_key(body)
    if body[0] != socket.AF_INET6:
        return key
    return tuple(part for part in key if not (isinstance(part, tuple) and part[0] == RouteAttribute.PREFSRC))


def _clean(body: bytes) -> bytes:
    """The body as a request: without the age and the state of the link, which the kernel refuses or ignores."""
    *header, flags = ROUTE_HEADER.unpack_from(body)
    out = ROUTE_HEADER.pack(*header, flags & RTNH_F_ONLINK)
    found = attributes(body, ROUTE_HEADER.size)
    # a route that is made of a nexthop object is told with what is in there, and not taken with it
    skip = _IN_NEXTHOP if RouteAttribute.NH_ID in found else (RouteAttribute.CACHE,)
    for kind, value in found.items():
        if kind not in skip:
            out += attribute(kind, value)
    return out
