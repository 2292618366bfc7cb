"""Which addresses move, and whether they may: everything that is decided before the stop.

Inside the stop :mod:`migrate.departure` removes them at the source and :mod:`migrate.arrival` adds them at the target;
both classes are offered here as well.  Loopback addresses never move: they are on every host.
"""

from __future__ import annotations

import enum
import ipaddress
import os
import socket
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from checkpoint.verdict import Status, Verdict
from migrate.addresses import (
    AddressRecord,
    Configuration,
    dependent_routes,
    parse_address,
    read_configuration,
)
from migrate.arrival import Arrival, ArrivalRecord, take_away
from migrate.departure import Departure, DepartureRecord, give_back
from migrate.errors import (
    AddressCarriesControl,
    AddressInUseByOthers,
    AddressNotHere,
    AddressNotMovable,
    AddressSyntax,
)
from migrate.rtnetlink import Netlink, Scope
from migrate.usage import AddressUser, descendants, held_by, users_of
from tcpstate.kernel.route import source_towards

__all__ = [
    "AddressPlan",
    "AddressPolicy",
    "Arrival",
    "ArrivalRecord",
    "Departure",
    "DepartureRecord",
    "control_addresses",
    "give_back",
    "plan",
    "select",
    "take_away",
]


class AddressPolicy(enum.Enum):
    """``--address-policy``: what to do where processes outside the tree use an address that would move."""

    REFUSE = "refuse"
    ALLOW = "allow"


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


def control_addresses(netlink: Netlink, rsh_pid: int, host: str) -> dict[str, str]:
    """The local addresses that the channel to the target depends on, each with the reason in words.

    Those of the connections of the remote shell ``rsh_pid`` and its children; and, as a shell may share the connection
    of another process (ssh's ControlMaster), the source address of the route to ``host`` if its name can be resolved.
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
    for *_, sockaddr in infos:
        source = source_towards(str(sockaddr[0]))
        if source:
            found.setdefault(source, f"the route to {host}")
    return found


def plan(
    netlink: Netlink,
    addresses: Collection[str],
    *,
    pids: Collection[int],
    control: Mapping[str, str],
    policy: AddressPolicy = AddressPolicy.REFUSE,
) -> AddressPlan:
    """Look at everything that speaks against moving ``addresses``; nothing is changed.

    pids     the processes of the moving trees
    control  from :func:`control_addresses`
    """
    here = read_configuration(netlink)
    leaving = frozenset(addresses)
    # our own sockets are not another process's: the channel is judged by `control`
    users = users_of(leaving, {*pids, os.getpid()})
    records: list[AddressRecord] = []
    verdicts: list[Verdict] = []
    for address in addresses:
        found = here.find(address)
        if found is None:
            verdicts.append(
                Verdict.refuse(AddressNotHere("not configured in this network namespace", object=address), "address")
            )
            continue
        _, record = found
        if record.scope == Scope.HOST:
            continue
        record = replace(record, routes=tuple(dependent_routes(here, leaving, record)))
        records.append(record)
        verdicts += _judge(record, [u for u in users if u.address == address], control, policy)
    return AddressPlan(
        records=tuple(records),
        macs=tuple(sorted({i.mac for i in here.interfaces if i.resolves})),
        verdicts=tuple(verdicts),
        configuration=here,
    )


def _judge(
    record: AddressRecord, users: list[AddressUser], control: Mapping[str, str], policy: AddressPolicy
) -> list[Verdict]:
    text = str(record)
    address = ipaddress.ip_address(record.address)
    if address.is_link_local or address.is_multicast:
        return [Verdict.refuse(AddressNotMovable("it belongs to its interface", object=text), "address")]
    if record.address in control:
        reason = control[record.address]
        return [Verdict.refuse(AddressCarriesControl(f"it carries {reason}", object=text), "address")]
    if users:
        shown = "; ".join(f"{u}, pid {' '.join(map(str, u.pids)) or 'hidden'}" for u in users[:3])
        more = f" and {len(users) - 3} more" if len(users) > 3 else ""
        error = AddressInUseByOthers(f"sockets outside the tree use it: {shown}{more}", object=text)
        if policy is AddressPolicy.REFUSE:
            return [Verdict.refuse(error, "address")]
        return [Verdict(subject=text, kind="address", status=Status.WARN, text=error.message, fix=error.fix)]
    return [Verdict(subject=text, kind="address")]
