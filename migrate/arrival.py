"""The addresses' arrival at the target: checked and prepared before the stop, added and announced inside it.

The order inside the stop: the sockets stand in repair, then :meth:`Arrival.add`, then the sockets are released, then
:meth:`Arrival.announce`. (Announced earlier, the peers' segments would meet sockets that have not yet resent what was
unacknowledged, and be dropped with their data: TCP.md 8.)

Source: net/ipv6/addrconf.c (an IPv6 address becomes local from a work queue: its route is polled);
net/core/neighbour.c (NTF_USE starts the resolution of a neighbour).
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from checkpoint.verdict import Status, Verdict
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
from migrate.announce import REPEATS, LinkSocket
from migrate.dependents import drop_metrics
from migrate.errors import AddressChangeFailed, AddressNotLocal, AddressTakenAtTarget, NoInterfaceForAddress
from migrate.routes import RouteRecord, portable_route, portable_rule, route_body, rule_body
from migrate.rtnetlink import Netlink
from tcpstate.kernel.netlink import Request
from tcpstate.kernel.rtnetlink import (
    NEIGHBOUR_HEADER,
    AddressFlag,
    LinkFlag,
    MessageType,
    NeighbourAttribute,
    NeighbourFlag,
    RouteAttribute,
    RouteType,
    attribute,
    find_route,
    packed_address,
    unpacked_address,
)
from tcpstate.slotted import dataclass

__all__ = ["Arrival", "ArrivalRecord", "Landing", "choose_interface", "resolving", "take_away"]

#: seconds that a probe waits for another machine's answer
PROBE_WAIT = 0.25
#: seconds within which an added address must be local; IPv6 takes some 0.1 ms
LOCAL_WAIT = 2.0

#: neighbours that are resolved beforehand; the kernel's table begins to drop entries at 1024 (gc_thresh3)
WARM_LIMIT = 256

_log = logging.getLogger(__name__)

_ADD = Request.CREATE | Request.EXCLUSIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """One address and where it lands.

    record     as it will be here: with the name of the interface here
    interface  index of the interface
    """

    record: AddressRecord
    interface: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalRecord:
    """What the journal keeps before an address is added: enough to take it away again."""

    landings: tuple[Landing, ...]


def choose_interface(record: AddressRecord, here: Configuration, map_dev: Mapping[str, str]) -> InterfaceRecord:
    """The interface of this host that is on the subnet of ``record``.

    ``map_dev`` (source name to our name) decides; else the interface with the longest matching subnet, among equals the
    one of the same name. NoInterfaceForAddress if there is none.
    """
    if record.interface in map_dev:
        named = here.named(map_dev[record.interface])
        if named is None or not named.up:
            raise NoInterfaceForAddress(
                f"--map-dev names {map_dev[record.interface]}, which is not an interface that is up", object=str(record)
            )
        return named
    address = ipaddress.ip_address(record.address)
    best: tuple[int, bool, InterfaceRecord] | None = None
    for interface in here.interfaces:
        if interface.loopback or not interface.up:
            continue
        for own in interface.addresses:
            if own.family != record.family or ipaddress.ip_address(own.address).is_link_local:
                continue
            if address in own.network or ipaddress.ip_address(own.address) in record.network:
                rank = (own.prefixlen, interface.name == record.interface, interface)
                if best is None or rank[:2] > best[:2]:
                    best = rank
    if best is None:
        raise NoInterfaceForAddress("no interface that is up has an address in its subnet", object=str(record))
    return best[2]


class Arrival:
    """M addresses that come to this host together.

    Make it before the stop, ask :meth:`check`, then :meth:`prepare`; :meth:`close` at the end in every case.
    """

    def __init__(self, records: Sequence[AddressRecord], *, map_dev: Mapping[str, str] | None = None) -> None:
        self._netlink = Netlink()
        self._records = tuple(records)
        self._names = {record.address: record.interface for record in self._records}
        self._map_dev = dict(map_dev or {})
        self._landings: list[Landing] = []
        self._there: list[Landing] = []
        self._links: dict[int, LinkSocket] = {}
        self._changes: list[tuple[MessageType, Request, bytes]] = []
        self._due: list[float] = []
        # IPv6 routes of ours that only lack their preferred source: the kernel took it when the address left once
        self._completed: list[tuple[RouteRecord, int]] = []
        self._since = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.added = False

    def __enter__(self) -> Arrival:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets. The addresses stay as they are."""
        self._netlink.close()
        for link in self._links.values():
            link.close()

    def adopt(self, landings: Iterable[Landing]) -> None:
        """Addresses that an earlier program has added, to be announced again."""
        self._landings = list(landings)
        self._open_links(read_configuration(self._netlink))

    def _open_links(self, here: Configuration) -> None:
        for interface in here.interfaces:
            if interface.resolves and any(landing.interface == interface.index for landing in self._landings):
                self._links[interface.index] = LinkSocket(interface.name, interface.mac)

    @property
    def record(self) -> ArrivalRecord:
        """For the journal, before :meth:`add`."""
        return ArrivalRecord(landings=tuple(self._landings))

    def check(self, source_macs: Collection[str], *, wait: float = PROBE_WAIT) -> list[Verdict]:
        """One verdict per address: is there an interface, is it free? Takes ``wait`` seconds per link.

        source_macs  link-layer addresses of the source, which still has the addresses and may answer for them
        """
        if not self._records:
            return []
        here = read_configuration(self._netlink)
        verdicts: list[Verdict] = []
        probed: dict[int, tuple[InterfaceRecord, list[AddressRecord]]] = {}
        self._landings = []
        for record in self._records:
            try:
                if (found := here.find(record.address)) is not None:
                    raise AddressTakenAtTarget(f"it is configured here, on {found[0].name}", object=str(record))
                interface = choose_interface(record, here, self._map_dev)
            except (AddressTakenAtTarget, NoInterfaceForAddress) as error:
                verdicts.append(Verdict.refuse(error, "address"))
                continue
            label = record.label.replace(record.interface, interface.name, 1)[:15]
            record = replace(record, interface=interface.name, label=label)
            self._landings.append(Landing(record=record, interface=interface.index))
            if interface.resolves and interface.flags & LinkFlag.RUNNING:
                probed.setdefault(interface.index, (interface, []))[1].append(record)
        taken: dict[str, str] = {}
        for interface, records in probed.values():
            names = [r.address for r in records]
            with LinkSocket(interface.name, interface.mac, listen=True) as link:
                taken |= {c.address: c.mac for c in link.ask(names, ignore=source_macs, wait=wait)}
        for landing in self._landings:
            record = landing.record
            if record.address in taken:
                refusal = AddressTakenAtTarget(f"{taken[record.address]} answers for it", object=str(record))
                verdicts.append(Verdict.refuse(refusal, "address"))
            else:
                text = f"lands on {record.interface}"
                if not self._probed(landing, here):
                    text += ", which has no ARP: neither probed nor announced"
                verdicts.append(Verdict(subject=str(record), kind="address", text=text))
                verdicts += self._judge_routes(landing, here)
        return verdicts

    @staticmethod
    def _probed(landing: Landing, here: Configuration) -> bool:
        return any(i.index == landing.interface and i.resolves for i in here.interfaces)

    def _judge_routes(self, landing: Landing, here: Configuration) -> list[Verdict]:
        """A warning for every route over an interface that is not here."""
        return [
            Verdict(
                subject=str(route),
                kind="route",
                status=Status.WARN,
                text=f"it does not come along with {landing.record}: no interface {route.interface} is up here",
                fix="Name one with --map-dev OLD=NEW.",
            )
            for route in landing.record.routes
            if self._way(route, landing, here) is None
        ]

    def _way(self, route: RouteRecord, landing: Landing, here: Configuration) -> int | None:
        """The number of the interface here that a route leads over; None if there is none."""
        if route.interface in ("", self._names[landing.record.address]):
            return landing.interface
        named = here.named(self._map_dev.get(route.interface, route.interface))
        return None if named is None or not named.up else named.index

    def prepare(self, peers: Iterable[str] = ()) -> None:
        """After a check without refusals: make the requests of the stop, open the links, and have the kernel resolve
        the next hops towards ``peers`` so that the first segment does not wait for it."""
        if len(self._landings) != len(self._records):
            raise RuntimeError("prepare() before a check without refusals")
        self._completed = []
        if self._landings:
            here = read_configuration(self._netlink)
            self._landings = [self._choose(landing, here) for landing in self._landings]
            self._open_links(here)
        self._changes = [_addition(landing) for landing in self._landings]
        self._warm(peers)

    def _choose(self, landing: Landing, here: Configuration) -> Landing:
        """With those routes and rules only that are to be made here."""
        # a route of the same destination and metric is the target's own: it knows better, and it must outlive an undo
        own = {r.identity: r for r in map(portable_route, here.routes) if r is not None}
        rules = {replace(r, protocol=0) for r in map(portable_rule, here.rules) if r is not None}
        routes = []
        for route in landing.record.routes:
            way = self._way(route, landing, here)
            if way is None:
                continue
            theirs = own.get(route.identity)
            # by the names of this host from now on: `recover` may have to do it again
            route = replace(route, index=way, interface=next(i.name for i in here.interfaces if i.index == way))
            if theirs is None:
                routes.append(route)
            elif landing.record.family == socket.AF_INET6 and not theirs.source and theirs.gateway == route.gateway:
                self._completed.append((route, way))
        fresh = tuple(rule for rule in landing.record.rules if replace(rule, protocol=0) not in rules)
        return replace(landing, record=replace(landing.record, routes=tuple(routes), rules=fresh))

    def _warm(self, peers: Iterable[str]) -> None:
        hops = set()
        for peer in peers:
            _, packed = packed_address(peer)
            try:
                kind, found = find_route(self._netlink, packed)
            except OSError:
                # no route yet: it may come with the address. Then the first segment resolves its neighbour
                continue
            if kind == RouteType.UNICAST and RouteAttribute.OIF in found:
                hop = unpacked_address(found.get(RouteAttribute.GATEWAY, packed))
                hops.add((int.from_bytes(found[RouteAttribute.OIF], sys.byteorder), hop))
        if len(hops) > WARM_LIMIT:
            _log.debug("%d of %d neighbours are not resolved beforehand", len(hops) - WARM_LIMIT, len(hops))
        # a neighbour that cannot be resolved stays unresolved: that is no reason not to move
        self._netlink.change(resolving(index, hop) for index, hop in sorted(hops)[:WARM_LIMIT])

    def add(self) -> None:
        """Add the addresses and the routes that depend on them, and wait until the addresses are local.

        AddressChangeFailed, AddressNotLocal; what was added is taken away again then.
        """
        self.added = True
        try:
            passed = time.clock_gettime(time.CLOCK_BOOTTIME) - self._since
            for number, landing in enumerate(self._landings):
                if landing.record.limited:
                    # what is left of its life now
                    self._changes[number] = _addition(landing, passed)
            errors = self._netlink.change(self._changes)
            self._there = [x for x, error in zip(self._landings, errors, strict=True) if error is None]
            for landing, error in zip(self._landings, errors, strict=True):
                if error is not None:
                    raise AddressChangeFailed(f"adding failed: {error}", object=str(landing.record)) from error
            for landing in self._landings:
                self._wait_until_local(landing.record)
            self._add_routes()
        except BaseException:
            self.remove()
            raise

    def _wait_until_local(self, record: AddressRecord) -> None:
        _, packed = packed_address(record.address)
        end = time.monotonic() + LOCAL_WAIT
        while True:
            try:
                if find_route(self._netlink, packed)[0] == RouteType.LOCAL:
                    return
            except OSError as error:
                if error.errno not in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                    raise AddressChangeFailed(f"asking for its route failed: {error}", object=str(record)) from error
            if time.monotonic() > end:
                raise AddressNotLocal("the kernel does not treat it as local", object=str(record))
            # the work queue needs the processor that we would spin on
            time.sleep(50e-6)

    def _add_routes(self) -> None:
        changes = [
            (MessageType.NEWROUTE, _ADD, route_body(route, landing.interface))
            for landing in self._landings
            # the way to the gateway first
            for route in sorted(landing.record.routes, key=lambda r: bool(r.gateway))
        ]
        for error in self._netlink.change(changes):
            if error is not None and error.errno != errno.EEXIST:
                raise AddressChangeFailed(f"a route that depends on the address was refused: {error}") from error
        rules = [(MessageType.NEWRULE, _ADD, rule_body(rule)) for x in self._landings for rule in x.record.rules]
        # taken away again by itself with the address
        sources = [(MessageType.NEWROUTE, Request.REPLACE, route_body(r, index)) for r, index in self._completed]
        for error in self._netlink.change(rules + sources):
            if error is not None and error.errno != errno.EEXIST:
                raise AddressChangeFailed(f"a rule or route of the address was refused: {error}") from error

    def announce(self, now: float) -> None:
        """Announce for the first time. ``now``: time.monotonic(). A link that refuses the frames raises
        AddressChangeFailed."""
        self._send()
        self._due = [now + after for after in REPEATS] if self._links else []

    def repeat(self, now: float) -> float | None:
        """Announce again if it is due; how many seconds until the next time, None if that was the last."""
        if self._due and now >= self._due[0]:
            while self._due and now >= self._due[0]:
                del self._due[0]
            self._send()
        return max(0.0, self._due[0] - now) if self._due else None

    def _send(self) -> None:
        for index, link in self._links.items():
            try:
                link.announce(x.record.address for x in self._landings if x.interface == index)
            except OSError as error:
                raise AddressChangeFailed(f"announcing failed: {error}", object=link.interface) from error

    def settle(self) -> None:
        """After the processes run: give IPv6 addresses the flags that they had, and remember what came along with the
        addresses. Not urgent."""
        passed = time.clock_gettime(time.CLOCK_BOOTTIME) - self._since
        changes = [
            (MessageType.NEWADDR, Request.REPLACE, add_body(x.record.aged(passed), x.interface, stable_flags(x.record)))
            for x in self._landings
            if ":" in x.record.address and not x.record.flags & AddressFlag.NODAD
        ]
        for error in self._netlink.change(changes):
            if error is not None:
                raise AddressChangeFailed(f"an address's flags were refused: {error}") from error
        for landing in self._landings:
            brought.remember(self._netlink, landing.record)

    def remove(self) -> None:
        """Undo :meth:`add`; nothing if it was not called. AddressChangeFailed if the kernel refuses."""
        if self.added:
            # not the record: an address that could not be added is somebody else's
            take_away(self._netlink, ArrivalRecord(landings=tuple(self._there)))
            self.added = False


def _addition(landing: Landing, passed: float = 0.0) -> tuple[MessageType, Request, bytes]:
    # without NODAD an IPv6 address would be unusable for a second; that it is free was probed
    flags = stable_flags(landing.record) | AddressFlag.NODAD
    return MessageType.NEWADDR, _ADD, add_body(landing.record.aged(passed), landing.interface, flags)


def resolving(interface: int, hop: str) -> tuple[MessageType, Request, bytes]:
    """The request that has the kernel resolve a neighbour, as a segment to it would."""
    family, packed = packed_address(hop)
    head = NEIGHBOUR_HEADER.pack(family, interface, 0, NeighbourFlag.USE, 0)
    return MessageType.NEWNEIGH, Request.CREATE | Request.REPLACE, head + attribute(NeighbourAttribute.DST, packed)


def take_away(netlink: Netlink, record: ArrivalRecord) -> None:
    """Remove the addresses that arrived, and the routes made for them; from the journal too."""
    netlink.change(
        (MessageType.DELROUTE, Request(0), route_body(route, landing.interface))
        for landing in record.landings
        for route in landing.record.routes
    )
    netlink.change(
        (MessageType.DELRULE, Request(0), rule_body(rule))
        for landing in record.landings
        for rule in landing.record.rules
    )
    deletions = [(MessageType.DELADDR, Request(0), delete_body(x.record, x.interface)) for x in record.landings]
    for landing, error in zip(record.landings, netlink.change(deletions), strict=True):
        if error is not None and error.errno != errno.EADDRNOTAVAIL:
            raise AddressChangeFailed(f"removing failed: {error}", object=str(landing.record)) from error
    drop_metrics(netlink, [(x.record, x.interface) for x in record.landings])
