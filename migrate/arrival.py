"""The addresses' arrival at the target: checked and prepared before the stop, added and announced inside it.

The order inside the stop: the sockets stand in repair, then :meth:`Arrival.add`, then the sockets are released, then
:meth:`Arrival.announce`. (Announced earlier, the peers' segments would meet sockets that have not yet resent what was
unacknowledged, and be dropped with their data: TCP.md 8.)

Source: net/ipv6/addrconf.c (an IPv6 address becomes local from a work queue: its route is polled);
net/core/neighbour.c (NTF_USE starts the resolution of a neighbour).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from checkpoint.verdict import Verdict
from migrate.addresses import (
    AddressRecord,
    Configuration,
    InterfaceRecord,
    RouteRecord,
    add_body,
    delete_body,
    portable_route,
    read_configuration,
    route_body,
    stable_flags,
)
from migrate.announce import REPEATS, LinkSocket
from migrate.errors import AddressChangeFailed, AddressNotLocal, AddressTakenAtTarget, NoInterfaceForAddress
from migrate.rtnetlink import (
    AddressFlag,
    MessageType,
    Netlink,
    Request,
    RouteAttribute,
    RouteType,
    find_route,
    packed_address,
    unpacked_address,
)
from tcpstate.kernel.route import refusals

__all__ = ["Arrival", "ArrivalRecord", "Landing", "choose_interface", "take_away"]

#: seconds that a probe waits for another machine's answer
PROBE_WAIT = 0.25
#: seconds within which an added address must be local; IPv6 takes some 0.1 ms
LOCAL_WAIT = 2.0

#: neighbours that are resolved beforehand; the kernel's table begins to drop entries at 1024 (gc_thresh3)
WARM_LIMIT = 256

NTF_USE = 0x01  # linux/neighbour.h: resolve it, as a segment would

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
        self._map_dev = dict(map_dev or {})
        self._landings: list[Landing] = []
        self._there: list[Landing] = []
        self._links: dict[int, LinkSocket] = {}
        self._changes: list[tuple[MessageType, Request, bytes]] = []
        self._due: list[float] = []
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
            if interface.resolves:
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
                verdicts.append(Verdict(subject=str(record), kind="address", text=f"lands on {record.interface}"))
        return verdicts

    def prepare(self, peers: Iterable[str] = ()) -> None:
        """After a check without refusals: make the requests of the stop, open the links, and have the kernel resolve
        the next hops towards ``peers`` so that the first segment does not wait for it."""
        if len(self._landings) != len(self._records):
            raise RuntimeError("prepare() before a check without refusals")
        here = read_configuration(self._netlink)
        # a route of the same destination and metric is the target's own: it knows better, and it must outlive an undo
        own = {_identity(r) for r in map(portable_route, here.routes) if r is not None}
        self._landings = [
            replace(x, record=replace(x.record, routes=tuple(r for r in x.record.routes if _identity(r) not in own)))
            for x in self._landings
        ]
        self._open_links(here)
        self._changes = [
            # without NODAD an IPv6 address would be unusable for a second; that it is free was probed
            (MessageType.NEWADDR, _ADD, add_body(x.record, x.interface, stable_flags(x.record) | AddressFlag.NODAD))
            for x in self._landings
        ]
        self._warm(peers)

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
        for index, hop in sorted(hops)[:WARM_LIMIT]:
            # a neighbour that cannot be resolved stays unresolved: that is no reason not to move
            with contextlib.suppress(OSError), refusals():
                self._netlink.iproute.neigh("set", dst=hop, ifindex=index, state=0, flags=NTF_USE)

    def add(self) -> None:
        """Add the addresses and the routes that depend on them, and wait until the addresses are local.

        AddressChangeFailed, AddressNotLocal; what was added is taken away again then.
        """
        self.added = True
        try:
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

    def announce(self, now: float) -> None:
        """Announce for the first time. ``now``: time.monotonic(). A link that refuses the frames raises
        AddressChangeFailed."""
        self._send()
        self._due = [now + after for after in REPEATS]

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
        """After the processes run: give IPv6 addresses the flags that they had. Not urgent."""
        changes = [
            (MessageType.NEWADDR, Request.REPLACE, add_body(x.record, x.interface, stable_flags(x.record)))
            for x in self._landings
            if ":" in x.record.address and not x.record.flags & AddressFlag.NODAD
        ]
        for error in self._netlink.change(changes):
            if error is not None:
                raise AddressChangeFailed(f"an address's flags were refused: {error}") from error

    def remove(self) -> None:
        """Undo :meth:`add`; nothing if it was not called. AddressChangeFailed if the kernel refuses."""
        if self.added:
            # not the record: an address that could not be added is somebody else's
            take_away(self._netlink, ArrivalRecord(landings=tuple(self._there)))
            self.added = False


def _identity(route: RouteRecord) -> tuple[str, int, int]:
    """What the kernel allows one route of."""
    return route.destination, route.table, route.priority


def take_away(netlink: Netlink, record: ArrivalRecord) -> None:
    """Remove the addresses that arrived, and the routes made for them; from the journal too."""
    netlink.change(
        (MessageType.DELROUTE, Request(0), route_body(route, landing.interface))
        for landing in record.landings
        for route in landing.record.routes
    )
    deletions = [(MessageType.DELADDR, Request(0), delete_body(x.record, x.interface)) for x in record.landings]
    for landing, error in zip(record.landings, netlink.change(deletions), strict=True):
        if error is not None and error.errno != errno.EADDRNOTAVAIL:
            raise AddressChangeFailed(f"removing failed: {error}", object=str(landing.record)) from error
