"""Which addresses move, and whether they may: everything that is decided before the stop.

Inside the stop :mod:`migrate.departure` removes them at the source and :mod:`migrate.arrival` adds them at the target;
both classes are offered here as well.  Loopback addresses never move: they are on every host.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from checkpoint.verdict import Status, Verdict
from migrate import brought
from migrate.addresses import (
    AddressRecord,
    Configuration,
    parse_address,
    read_configuration,
)
from migrate.arrival import Arrival, ArrivalRecord, take_away
from migrate.departure import Departure, DepartureRecord, give_back
from migrate.dependents import dependents, only_way
from migrate.errors import AddressNotHere, AddressSyntax
from migrate.judge import AddressPolicy, judge, tunnel_ends
from migrate.rtnetlink import Netlink
from migrate.usage import descendants, held_by, users_of
from tcpstate.kernel.route import source_towards
from tcpstate.kernel.rtnetlink import RouteAttribute, Scope, find_route, packed_address, unpacked_address
from tcpstate.slotted import dataclass

__all__ = [
    "AddressPlan",
    "AddressPolicy",
    "Arrival",
    "ArrivalRecord",
    "Departure",
    "DepartureRecord",
    "all_addresses",
    "consider",
    "control_addresses",
    "give_back",
    "movable",
    "plan",
    "prefix_lengths",
    "remarks",
    "select",
    "take_away",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressPlan:
    """What will move, and what is to be said about it.

    records   the addresses, with the routes that depend on them
    macs      link-layer addresses of this host: an answer from one of them is no conflict at the target
    verdicts  one per address at least; if one refuses, nothing may be stopped
    """

    records: tuple[AddressRecord, ...]
    macs: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    configuration: Configuration


def select(option: str, used: Iterable[str]) -> tuple[str, ...]:
    """The addresses that ``--address`` means: ``auto`` the ones that the tree uses, ``none``, or a list with commas.

    Loopback addresses are left out. AddressSyntax if the option is none of these.
    """
    if option == "none":
        return ()
    texts = list(used) if option == "auto" else [parse_address(text.strip())[0] for text in option.split(",")]
    found: dict[str, None] = {}
    for text in texts:
        address = ipaddress.ip_address(text)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if address.is_loopback or address.is_unspecified:
            if option != "auto":
                raise AddressSyntax("a loopback or unspecified address does not move", object=text)
            continue
        found[str(address)] = None
    return tuple(found)


def all_addresses(netlink: Netlink) -> str:
    """For ``--address``: all that move with a network namespace: neither the loopback's, nor those that a link has by
    itself."""
    found = [
        record.address
        for interface in read_configuration(netlink).interfaces
        for record in interface.addresses
        if not interface.loopback and not ipaddress.ip_address(record.address).is_link_local
    ]
    return ",".join(found) or "none"


def prefix_lengths(option: str) -> dict[str, int]:
    """The lengths that ``--address`` names with its addresses. AddressSyntax."""
    if option in ("auto", "none"):
        return {}
    found = (parse_address(text.strip()) for text in option.split(","))
    return {address: length for address, length in found if length is not None}


def remarks(option: str, used: Iterable[str], moved: Collection[str], anywhere: Collection[str]) -> list[Verdict]:
    """What is to be said about addresses that do not move.

    used      by the trees' connections and listeners
    moved     of them, or beside them
    anywhere  listeners on every address, in words
    """
    found = []
    if option == "auto" and anywhere and not moved:
        text = "it listens on every address, and no connection tells which one is the service's: none moves"
        fix = "Name the service's address with --address ADDR if its clients are to find it on HOST."
        found.append(Verdict(subject=", ".join(anywhere), kind="listener", status=Status.WARN, text=text, fix=fix))
    text = "it is used by the processes and does not move: something else must bring its packets to HOST"
    return found + [
        Verdict(subject=address, kind="address", status=Status.WARN, text=text)
        for address in select("auto", used)
        if option != "auto" and address not in moved
    ]


def movable(netlink: Netlink, control: Collection[str]) -> list[str]:
    """The addresses of this host that could move: not those on every host, and none that ``control`` depends on."""
    return [
        record.address
        for interface in read_configuration(netlink).interfaces
        if not interface.loopback
        for record in interface.addresses
        if record.scope not in (Scope.HOST, Scope.LINK) and record.address not in control
    ]


def control_addresses(netlink: Netlink, rsh_pid: int, host: str) -> dict[str, str]:
    """The local addresses that the channel to the target depends on, each with the reason in words.

    Those of the connections of the remote shell ``rsh_pid`` and its children; and, as a shell may share the connection
    of another process (ssh's ControlMaster), the source address of the route to ``host`` if its name can be resolved,
    and the address in whose subnet the next hop is, if no other's is the same.
    """
    found: dict[str, str] = {}
    for user in held_by(descendants(rsh_pid)):
        if user.peer:
            found[user.address] = f"the channel to {host} ({user})"
    name = host.rpartition("@")[2].strip("[]")
    try:
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        # an alias that only the remote shell knows: its connections must do
        return found
    here = read_configuration(netlink)
    every = [a for i in here.interfaces for a in i.addresses if a.scope != Scope.HOST]
    for *_, sockaddr in infos:
        source = source_towards(str(sockaddr[0]))
        if not source:
            continue
        found.setdefault(source, f"the route to {host}")
        hop = _next_hop(netlink, str(sockaddr[0]))
        for record in every:
            if hop and only_way(hop, record, [a for a in every if a is not record]):
                found.setdefault(record.address, f"the route to {host}")
    return found


def _next_hop(netlink: Netlink, address: str) -> str:
    """The neighbour to which packets to ``address`` go, or nothing."""
    packed = packed_address(address.partition("%")[0])[1]
    try:
        _, found = find_route(netlink, packed)
    except OSError:
        return ""
    return unpacked_address(found.get(RouteAttribute.GATEWAY, packed))


def consider(
    netlink: Netlink,
    option: str,
    used: Collection[str],
    anywhere: Collection[str],
    pids: Collection[int],
    control: Mapping[str, str],
    policy: AddressPolicy,
) -> AddressPlan:
    """:func:`select`, :func:`plan` and :func:`remarks` for a migration; what is a warning goes to the log as well."""
    wanted = select(option, used)
    lengths = prefix_lengths(option)
    found = plan(netlink, wanted, pids=pids, control=control, policy=policy, lengths=lengths)
    said = remarks(option, used, [record.address for record in found.records], anywhere)
    found = replace(found, verdicts=(*found.verdicts, *said))
    for verdict in found.verdicts:
        if verdict.status is Status.WARN:
            _log.warning("%s: %s", verdict.subject, verdict.text)
    return found


def plan(
    netlink: Netlink,
    addresses: Collection[str],
    *,
    pids: Collection[int],
    control: Mapping[str, str],
    policy: AddressPolicy = AddressPolicy.REFUSE,
    lengths: Mapping[str, int] | None = None,
) -> AddressPlan:
    """Look at everything that speaks against moving ``addresses``; nothing is changed.

    pids     the processes of the moving trees
    control  from :func:`control_addresses`
    lengths  from :func:`prefix_lengths`
    """
    here = read_configuration(netlink)
    leaving = frozenset(addresses)
    # our own sockets are not another process's: the channel is judged by `control`
    users = users_of(leaving, {*pids, os.getpid()})
    tunnels = tunnel_ends(netlink)
    records: list[AddressRecord] = []
    verdicts: list[Verdict] = []
    for address in addresses:
        found = here.find(address)
        length = (lengths or {}).get(address)
        if found is None or (length is not None and length != found[1].prefixlen):
            text = "not configured in this network namespace" if found is None else f"it is configured as {found[1]}"
            verdicts.append(Verdict.refuse(AddressNotHere(text, object=address), "address"))
            continue
        _, record = found
        if record.scope == Scope.HOST:
            text = f"it is valid on this host only (scope host, on {record.interface}): it does not move"
            verdicts.append(Verdict(subject=str(record), kind="address", status=Status.WARN, text=text))
            continue
        depend = dependents(here, leaving, record, brought.recall(netlink, address))
        record = replace(record, routes=depend.routes, rules=depend.rules)
        records.append(record)
        mine = [user for user in users if user.address == address]
        verdicts += judge(record, here, control, mine, depend, tunnels.get(address, ()), policy)
    return AddressPlan(
        records=tuple(records),
        macs=tuple(sorted({i.mac for i in here.interfaces if i.resolves})),
        verdicts=tuple(verdicts),
        configuration=here,
    )
