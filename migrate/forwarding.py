"""``--address forward``: the addresses stay, and the connections are forwarded to where the processes go.

In step with the migration, on either side.  A move that begins a forwarding makes its two ends before the stop, and
proves that packets of full size come through; the source's is switched on at COMMIT and the target's when the addresses
are added there.  A move back home takes no address along at all: at COMMIT nothing is changed, home's end is switched
off when the sockets stand there, and both ends are taken away when the processes run.

docs/design/forwarding.md tells why.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from checkpoint.files.held import HeldSocket
from checkpoint.traces import NoteWriter
from checkpoint.verdict import Verdict, refusals
from migrate import forwardends, forwardstore
from migrate.addresses import Configuration, parse_address, read_configuration
from migrate.arrival import Arrival
from migrate.errors import (
    AddressCarriesControl,
    AddressNotHere,
    AddressTakenAtTarget,
    ForwardChangeFailed,
    ForwardedElsewhere,
    ForwardEndUnknown,
    ForwardUnavailable,
    NothingToForward,
    TargetRefused,
    from_remote,
)
from migrate.forwardstore import ForwardRecord
from migrate.hostfacts import FORWARD, host_facts
from migrate.messages import ForwardNeed, Needs
from migrate.rtnetlink import Netlink
from migrate.takeover import AddressPlan, select
from migrate.usage import users_of
from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.errors import TcpmigError
from tcpstate.kernel.bpf.steer import Role
from tcpstate.kernel.route import is_local, source_towards
from tcpstate.kernel.rtnetlink import RouteAttribute, find_route, packed_address
from tcpstate.slotted import dataclass

__all__ = [
    "NOTE",
    "OPTION",
    "ForwardNote",
    "SourceForward",
    "TargetForward",
    "plan_forward",
    "settle_source",
    "settle_target",
]

#: the value of ``--address``
OPTION = "forward"
#: the journal's note
NOTE = "forward"
_KIND = "address"
#: room for connections that begin between the look and the stop
_SPARE = 1024
_ANYWHERE = frozenset({"0.0.0.0", "::"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardNote:
    """What a journal keeps, written before anything is made. ``coming_home``: the move ends the forwarding."""

    record: ForwardRecord
    coming_home: bool


def plan_forward(
    netlink: Netlink,
    migration: str,
    needs: Needs,
    control: Mapping[str, str],
    host: str,
    towards: str,
    offered: Collection[str],
) -> tuple[SourceForward, AddressPlan]:
    """What will be forwarded, and whether it can be, as far as this host knows; nothing is changed.

    control  from :func:`migrate.takeover.control_addresses`
    towards  ``--forward-to``: an address of ``host``; empty: that of its name
    offered  features of the target

    NothingToForward, ForwardedElsewhere, AddressNotHere, AddressCarriesControl, ForwardEndUnknown, ForwardUnavailable.
    """
    if FORWARD not in offered:
        raise ForwardUnavailable("the tcpmig there does not know of it", object=host)
    wanted = select("auto", needs.used_addresses)
    if not wanted:
        raise NothingToForward("no connection and no listener of the processes tells an address")
    here = read_configuration(netlink)
    away = next((one for a in wanted if (one := forwardstore.of_address(a, Role.AWAY)) is not None), None)
    if away is not None:
        forward = _back(away, wanted, needs, host)
    else:
        forward = _begin(migration, wanted, here, control, host, towards)
    verdicts = [Verdict(subject=address, kind=_KIND, text=forward.told) for address in forward.addresses]
    return forward, AddressPlan(records=(), macs=(), verdicts=tuple(verdicts), configuration=here)


def _back(record: ForwardRecord, wanted: Collection[str], needs: Needs, host: str) -> SourceForward:
    """They are forwarded to here: they can only go home, and all at once."""
    strange = [address for address in wanted if address not in record.addresses]
    if strange:
        raise ForwardedElsewhere(
            "it would have to be forwarded, and others of the processes are already", object=strange[0]
        )
    pids = {pid for tree in needs.trees for pid in tree.pids}
    others = users_of(record.addresses, {*pids, os.getpid()})
    if others:
        raise ForwardedElsewhere(
            f"others use it, too: {others[0]}; all of them go home together", object=others[0].address
        )
    need = ForwardNeed(
        forward=record.forward, home=record.far, away=record.near, addresses=record.addresses, coming_home=True
    )
    return SourceForward(record, need, f"goes home to {host}: it is forwarded no longer", size=0)


def _begin(
    migration: str,
    wanted: Collection[str],
    here: Configuration,
    control: Mapping[str, str],
    host: str,
    towards: str,
) -> SourceForward:
    far = _end_of(host, towards)
    near = source_towards(far)
    if not near or near in wanted:
        what = f"the tunnel to {far} would end on it" if near else f"there is no route to {far}"
        raise AddressCarriesControl(what, object=near or far)
    size = 0
    for address in wanted:
        found = here.find(address)
        if found is None:
            raise AddressNotHere("not configured in this network namespace", object=address)
        if address in control:
            raise AddressCarriesControl(f"it carries {control[address]}", object=address)
        if ipaddress.ip_address(address).is_link_local or not found[0].resolves:
            what = "only what comes by Ethernet, for an address that is not the link's own, can be forwarded"
            raise ForwardedElsewhere(what, object=address)
        size = max(size, int(Path(f"/sys/class/net/{found[0].name}/mtu").read_text()))
    lack = forwardends.missing()
    if lack is not None:
        raise lack
    record = _record(migration, Role.HOME, host, near, far, tuple(wanted))
    need = ForwardNeed(forward=migration, home=near, away=far, addresses=tuple(wanted))
    return SourceForward(record, need, f"stays here, and is forwarded to {far}", size=size)


def _end_of(host: str, towards: str) -> str:
    """An address of the other host."""
    if towards:
        address, length = parse_address(towards)
        if length is not None:
            raise ForwardEndUnknown("an address without a prefix length is wanted", object=towards)
        return address
    name = host.rpartition("@")[2].strip("[]")
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise ForwardEndUnknown(f"its name cannot be resolved: {error}", object=host) from error
    # over IPv6 a packet of full size does not come through, unless the links carry longer ones
    usable = sorted(a for a in found if not ipaddress.ip_address(a.partition("%")[0]).is_loopback)
    usable.sort(key=lambda address: ":" in address)
    if not usable:
        raise ForwardEndUnknown("its name stands for this host", object=host)
    return usable[0]


def _record(forward: str, role: Role, host: str, near: str, far: str, addresses: tuple[str, ...]) -> ForwardRecord:
    facts = host_facts()
    return ForwardRecord(
        forward=forward,
        role=role,
        boot_id=facts.boot_id,
        network=facts.network,
        since=time.time(),
        host=host,
        near=near,
        far=far,
        addresses=addresses,
    )


def _ethernet(here: Configuration) -> list[int]:
    return [interface.index for interface in here.interfaces if interface.resolves]


class SourceForward:
    """The source's half of it; of nothing, where nothing is forwarded.

    told  what becomes of an address
    size  bytes of the longest packet
    """

    def __init__(
        self, record: ForwardRecord | None = None, need: ForwardNeed | None = None, told: str = "", *, size: int = 0
    ) -> None:
        self.record, self.need, self.told, self._size = record, need, told, size
        self._made = False

    @property
    def name(self) -> str:
        """Its ID, or nothing."""
        return "" if self.need is None else self.need.forward

    @property
    def addresses(self) -> tuple[str, ...]:
        """That are forwarded, or were."""
        return () if self.need is None else self.need.addresses

    @property
    def lasts(self) -> bool:
        """Whether this host forwards when the move is over."""
        return self._beginning is not None

    @property
    def _beginning(self) -> ForwardRecord | None:
        """What is to be made; None if nothing is, or if the move ends it."""
        return None if self.need is None or self.need.coming_home else self.record

    def prepare(self, note: NoteWriter, connections: int) -> None:
        """Before the stop, when the target has made its end: make ours, and prove the way. ForwardChangeFailed,
        ForwardPathBroken."""
        if self.record is None or self.need is None:
            return
        note(NOTE, codec.pack(ForwardNote(record=self.record, coming_home=self.need.coming_home)))
        if self.need.coming_home:
            return
        self._made = True
        with Netlink() as netlink:
            devices = _ethernet(read_configuration(netlink))
        room = 2 * connections + _SPARE
        forwardends.build(self.record, connections=room, ports=_SPARE, devices=devices)
        forwardends.prove(self.record, self._size)

    def fill(self, socks: Callable[[], Iterable[HeldSocket]]) -> None:
        """The frozen connections, and the listeners: before COMMIT. ForwardChangeFailed."""
        if self._beginning is None:
            return
        with Netlink() as netlink:
            device_of = _Devices(netlink, read_configuration(netlink))
            connections = []
            ports = []
            for one in socks():
                if one.file.conn_id:
                    connection = ConnId.parse(one.file.conn_id)
                    if connection.local in self.addresses:
                        connections.append((connection, device_of.peer(connection.peer, connection.local)))
                    continue
                name, port = one.sock.getsockname()[:2]
                name = name.partition("%")[0].removeprefix("::ffff:")
                bound = self.addresses if name in _ANYWHERE else tuple(a for a in self.addresses if a == name)
                ports += [(address, port, device_of.own(address)) for address in bound]
        forwardends.fill(self._beginning, connections, ports)

    def take_over(self) -> None:
        """COMMIT. ForwardChangeFailed."""
        if self._beginning is not None:
            _switch(self._beginning, on=True)

    def undo(self) -> None:
        """Everything as it was. Nothing if nothing was made. OSError."""
        if self._made and self.record is not None:
            self._made = False
            forwardends.dismantle(self.record)

    def settle(self) -> None:
        """They run there. ForwardChangeFailed, OSError."""
        if self._beginning is not None:
            forwardstore.write(replace(self._beginning, complete=True))
        elif self.record is not None:
            forwardends.dismantle(self.record)


class _Devices:
    """By which interface a packet leaves, by index."""

    def __init__(self, netlink: Netlink, here: Configuration) -> None:
        self._netlink, self._here = netlink, here
        self._known: dict[str, int] = {}

    def own(self, address: str) -> int:
        """That which has an address of ours."""
        found = self._here.find(address)
        if found is None:
            raise ForwardChangeFailed("the address is not configured any more", object=address)
        return found[0].index

    def peer(self, peer: str, local: str) -> int:
        """That which leads to a peer."""
        if peer not in self._known:
            self._known[peer] = self._ask(peer) or self.own(local)
        return self._known[peer]

    def _ask(self, peer: str) -> int:
        try:
            _, found = find_route(self._netlink, packed_address(peer)[1])
        except OSError:
            # no route: by the way it came, then
            return 0
        return int.from_bytes(found.get(RouteAttribute.OIF, b""), sys.byteorder)


def _switch(record: ForwardRecord, *, on: bool) -> None:
    try:
        with forwardends.Mouth(record) as maps:
            maps.switch(on=on)
    except OSError as error:
        raise ForwardChangeFailed(f"it cannot be switched: {error}", object=record.device) from error


class TargetForward:
    """The target's half of it."""

    def __init__(self, need: ForwardNeed, migration: str) -> None:
        self._need = need
        self._record: ForwardRecord | None = None
        self._done = False
        if need.coming_home:
            self._record = forwardstore.find(need.forward, Role.HOME)
        elif need.forward == migration:
            self._record = _record(migration, Role.AWAY, "", need.away, need.home, need.addresses)

    def check(self) -> list[Verdict]:
        """Nothing is changed."""
        try:
            if self._need.coming_home:
                return self._check_home()
            return self._check_away()
        except TcpmigError as error:
            return [Verdict.refuse(error, _KIND)]

    def _check_home(self) -> list[Verdict]:
        if self._record is None or self._record.addresses != self._need.addresses:
            what = "they are forwarded from another host: only there they can go with --address forward"
            raise ForwardedElsewhere(what, object=", ".join(self._need.addresses))
        return [
            Verdict(subject=address, kind=_KIND, text="is here, and forwarded no longer")
            for address in self._need.addresses
        ]

    def _check_away(self) -> list[Verdict]:
        if self._record is None:
            raise ForwardedElsewhere(
                "a forwarding has the ID of the migration that begins it", object=self._need.forward
            )
        if not is_local(self._need.away):
            raise ForwardEndUnknown("it is not an address of this host", object=self._need.away)
        lack = forwardends.missing()
        if lack is not None:
            raise lack
        with Netlink() as netlink:
            here = read_configuration(netlink)
        for address in self._need.addresses:
            if (found := here.find(address)) is not None:
                raise AddressTakenAtTarget(f"it is configured here, on {found[0].name}", object=address)
        return [
            Verdict(subject=address, kind=_KIND, text=f"comes through a tunnel from {self._need.home}")
            for address in self._need.addresses
        ]

    def prepare(self, note: NoteWriter, before: Arrival) -> Arrival:
        """Before the stop: make our end; how the addresses will arrive, in place of ``before``. ForwardChangeFailed."""
        record = self._the_record
        note(NOTE, codec.pack(ForwardNote(record=record, coming_home=self._need.coming_home)))
        if self._need.coming_home:
            return before
        self._done = True
        with Netlink() as netlink:
            devices = _ethernet(read_configuration(netlink))
        forwardends.build(record, devices=devices)
        before.close()
        records = forwardends.arrivals(record)
        arrival = Arrival(records, map_dev={record.device: record.device})
        for refusal in refusals(arrival.check(())):
            arrival.close()
            raise from_remote(
                refusal.code, refusal.text, refusal.subject, refusal.fix, otherwise=TargetRefused, where=""
            )
        arrival.prepare()
        return arrival

    def take_over(self) -> None:
        """After COMMIT: what comes through the tunnel is let in; at home, nothing is sent into it any more.
        ForwardChangeFailed."""
        self._done = True
        _switch(self._the_record, on=not self._need.coming_home)

    def undo(self) -> None:
        """Everything as it was. Nothing if nothing was made. ForwardChangeFailed, OSError."""
        if self._done:
            self._done = False
            if self._need.coming_home:
                _switch(self._the_record, on=True)
            else:
                forwardends.dismantle(self._the_record)

    def settle(self) -> None:
        """They run here. ForwardChangeFailed, OSError."""
        if self._need.coming_home:
            forwardends.dismantle(self._the_record)
        else:
            forwardstore.write(replace(self._the_record, complete=True))

    @property
    def _the_record(self) -> ForwardRecord:
        if self._record is None:
            raise RuntimeError("it was not accepted")
        return self._record


def release(record: ForwardRecord) -> None:
    """End a forwarding at this end. At home the host's own kernel answers for the addresses again: a peer that sends
    something is reset. Away, the addresses leave. ForwardChangeFailed while its migration is not settled; OSError."""
    if not record.complete:
        what = "the migration that makes it is at work, or died: `tcpmig recover`"
        raise ForwardChangeFailed(what, object=f"forwarding {record.forward}")
    forwardends.dismantle(record)


def settle_source(notes: Collection[bytes], *, gone: bool) -> None:
    """`recover` at the source: the processes are ``gone`` to the target, or here. ForwardChangeFailed, OSError."""
    for note in _noted(notes):
        if note.coming_home:
            if gone:
                forwardends.dismantle(note.record)
        elif gone:
            _switch(note.record, on=True)
            forwardstore.write(replace(note.record, complete=True))
        else:
            forwardends.dismantle(note.record)


def settle_target(notes: Collection[bytes], *, arrived: bool) -> None:
    """`recover` at the target: the processes have ``arrived``, or never will. ForwardChangeFailed, OSError."""
    for note in _noted(notes):
        if note.coming_home:
            if arrived:
                forwardends.dismantle(note.record)
            elif forwardstore.find(note.record.forward, Role.HOME) is not None:
                _switch(note.record, on=True)
        elif arrived:
            _switch(note.record, on=True)
            forwardstore.write(replace(note.record, complete=True))
        else:
            forwardends.dismantle(note.record)


def _noted(notes: Collection[bytes]) -> list[ForwardNote]:
    return [codec.unpack(ForwardNote, data) for data in list(notes)[-1:]]
