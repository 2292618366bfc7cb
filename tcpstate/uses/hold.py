"""A rule that keeps this host from answering for held connections, and outlives whoever holds them.

A segment that meets no socket is answered with a reset; so is a SYN to a port on which nobody listens.  The rule drops
both before the stack looks for a socket: segments of the connections named, and SYNs to the listeners named.  Other
connections of the same addresses and ports, and what the kernel still has to finish by itself (FIN_WAIT, TIME_WAIT),
go on.

It is one table of nf_tables per hold, in this network namespace: sets of conn-IDs and of listening ends, hash tables
to the kernel, so that a packet costs the same whether one connection is held or ten thousand.  It hooks in at *input*:
there fragments are whole again, addresses are translated back (DNAT), and every interface, also one that comes later,
and loopback lead through it.  Elements may have a time-out: the rule then ends by itself, whoever has died.

Why not a tcx program with a pinned map: it would need a kernel of 6.6, a mounted bpffs and a link per interface, and
would see addresses before they are translated.  What speaks against nf_tables: `nft flush ruleset` takes the rule away
as well; as long as a holder lives its sockets are deaf by themselves, so that both must be gone to harm a peer.

Source: net/netfilter/nf_tables_api.c, nft_set_hash.c; net/ipv4/ip_input.c ip_local_deliver (defragments, then input).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator

from tcpstate.connid import ConnId
from tcpstate.inward import MARK as INWARD
from tcpstate.kernel import nftables
from tcpstate.kernel.nftables import (
    REGISTER,
    Base,
    Bitwise,
    Compare,
    Direction,
    Immediate,
    KeyType,
    Lookup,
    Meta,
    MetaKey,
    NfTables,
    Operation,
    Payload,
    SetKey,
    expression,
    number,
    text,
    value,
)
from tcpstate.kernel.sockets import is_v6
from tcpstate.slotted import dataclass

__all__ = ["DropRule", "ListeningEnd", "standing"]

#: names of tables of ours begin so
PREFIX = "tcpmig_hold_"
#: before whatever else the host does at input (conntrack's helpers, the filters of administrators at 0)
_PRIORITY = -500
_CHAIN = "in"
_PORT = struct.Struct(">H2x")
_FLAGS_OFFSET = 13
_SYN, _SYN_AND_ACK = 0x02, 0x12


@dataclass(frozen=True, slots=True)
class ListeningEnd:
    """Where a socket listens: a local address (the unspecified one: all of its family) and a port.

    both  an IPv6 socket on the unspecified address that takes IPv4 as well
    """

    address: str
    port: int
    both: bool = False

    @property
    def anywhere(self) -> bool:
        """Whether it listens on all addresses."""
        return self.address in ("0.0.0.0", "::")

    @property
    def v6(self) -> bool:
        """Whether IPv6 packets reach it."""
        return is_v6(self.address)


@dataclass(frozen=True, slots=True)
class _Set:
    """One set: which fields of which packets are looked up in it.

    loads    (base, offset, length) of what makes the key
    syn      only SYNs are
    """

    name: str
    family: int
    key: SetKey
    loads: tuple[tuple[Base, int, int], ...]
    syn: bool

    def rule(self, identity: int) -> list[bytes]:
        """Drop what is found in it."""
        found = [*_meta(MetaKey.FAMILY, bytes([self.family])), *_meta(MetaKey.PROTOCOL, bytes([socket.IPPROTO_TCP]))]
        if self.syn:
            found += _only_syns()
        register = REGISTER
        for base, offset, length in self.loads:
            found.append(_load(base, offset, length, register))
            register += -(-length // 4)
        found += [
            expression(
                Operation.LOOKUP,
                text(Lookup.SET, self.name),
                number(Lookup.REGISTER, REGISTER),
                number(Lookup.SET_ID, identity),
            ),
            # for people: `nft list ruleset` shows what it has dropped
            expression(Operation.COUNTER),
            expression(
                Operation.IMMEDIATE,
                number(Immediate.TO, nftables.VERDICT_REGISTER),
                nftables.verdict(Immediate.DATA, nftables.DROP),
            ),
        ]
        return found


def _meta(key: MetaKey, wanted: bytes) -> list[bytes]:
    return [
        expression(Operation.META, number(Meta.TO, REGISTER), number(Meta.KEY, key)),
        _equals(wanted),
    ]


def _equals(wanted: bytes) -> bytes:
    return expression(
        Operation.COMPARE,
        number(Compare.REGISTER, REGISTER),
        number(Compare.OPERATION, nftables.EQUAL),
        value(Compare.DATA, wanted),
    )


def _load(base: Base, offset: int, length: int, register: int) -> bytes:
    return expression(
        Operation.PAYLOAD,
        number(Payload.TO, register),
        number(Payload.BASE, base),
        number(Payload.OFFSET, offset),
        number(Payload.LENGTH, length),
    )


def _ours() -> list[bytes]:
    """What we inject ourselves passes: a connection that is rebuilt while the rule stands is taught by it."""
    return [
        *_meta(MetaKey.MARK, struct.pack("=I", INWARD)),
        expression(
            Operation.IMMEDIATE,
            number(Immediate.TO, nftables.VERDICT_REGISTER),
            nftables.verdict(Immediate.DATA, nftables.ACCEPT),
        ),
    ]


def _only_syns() -> list[bytes]:
    return [
        _load(Base.TRANSPORT, _FLAGS_OFFSET, 1, REGISTER),
        expression(
            Operation.BITWISE,
            number(Bitwise.FROM, REGISTER),
            number(Bitwise.TO, REGISTER),
            number(Bitwise.LENGTH, 1),
            value(Bitwise.MASK, bytes([_SYN_AND_ACK])),
            value(Bitwise.XOR, bytes(1)),
        ),
        _equals(bytes([_SYN])),
    ]


_V4, _V6, _SERVICE = KeyType.IPV4_ADDRESS, KeyType.IPV6_ADDRESS, KeyType.SERVICE
_SOURCE_PORT, _TO_PORT = (Base.TRANSPORT, 0, 2), (Base.TRANSPORT, 2, 2)
_SETS = (
    _Set(
        "connections4",
        socket.AF_INET,
        SetKey((_V4, _SERVICE, _V4, _SERVICE)),
        ((Base.NETWORK, 12, 4), _SOURCE_PORT, (Base.NETWORK, 16, 4), _TO_PORT),
        syn=False,
    ),
    _Set(
        "connections6",
        socket.AF_INET6,
        SetKey((_V6, _SERVICE, _V6, _SERVICE)),
        ((Base.NETWORK, 8, 16), _SOURCE_PORT, (Base.NETWORK, 24, 16), _TO_PORT),
        syn=False,
    ),
    _Set("listeners4", socket.AF_INET, SetKey((_V4, _SERVICE)), ((Base.NETWORK, 16, 4), _TO_PORT), syn=True),
    _Set("listeners6", socket.AF_INET6, SetKey((_V6, _SERVICE)), ((Base.NETWORK, 24, 16), _TO_PORT), syn=True),
    _Set("ports4", socket.AF_INET, SetKey((_SERVICE,)), (_TO_PORT,), syn=True),
    _Set("ports6", socket.AF_INET6, SetKey((_SERVICE,)), (_TO_PORT,), syn=True),
)


class DropRule:
    """The rule of one hold, by its ID. It belongs to the network namespace of the thread that makes it stand, and needs
    no object of ours to go on. OSError wherever the kernel refuses: no nf_tables, no CAP_NET_ADMIN.
    """

    def __init__(self, hold: str) -> None:
        self.name = PREFIX + hold

    def stand(self) -> None:
        """Set it up, empty: nothing is dropped. EEXIST if it stands already."""
        with NfTables() as nft:
            messages = [nft.table(self.name), nft.chain(self.name, _CHAIN, Direction.INPUT, _PRIORITY)]
            messages.append(nft.rule(self.name, _CHAIN, _ours()))
            for identity, one in enumerate(_SETS, 1):
                messages.append(nft.set(self.name, one.name, one.key, identity))
                messages.append(nft.rule(self.name, _CHAIN, one.rule(identity)))
            nft.commit(messages)

    def add(
        self, connections: Iterable[ConnId] = (), listeners: Iterable[ListeningEnd] = (), *, timeout: float = 0
    ) -> None:
        """From now on drop what arrives for these, until ``timeout`` seconds have passed (0: for good).

        All of it or nothing.
        """
        keys: dict[str, dict[bytes, None]] = {}
        for connection in connections:
            name = "connections6" if connection.v6 else "connections4"
            keys.setdefault(name, {})[_connection_key(connection)] = None
        for listener in listeners:
            for name, key in _listener_keys(listener):
                keys.setdefault(name, {})[key] = None
        if keys:
            with NfTables() as nft:
                milliseconds = int(timeout * 1000)
                nft.commit(
                    message
                    for name, found in keys.items()
                    for message in nft.elements(self.name, name, list(found), milliseconds)
                )

    def lift(self) -> bool:
        """Take it away; False if it did not stand."""
        with NfTables() as nft:
            try:
                nft.commit([nft.without_table(self.name)])
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return False
                raise
        return True


def standing() -> list[str]:
    """The IDs of the holds whose rules stand in this network namespace. None where the kernel has no nf_tables."""
    with NfTables() as nft:
        try:
            names = nft.tables()
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                return []
            raise
    return [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]


def _packed(address: str) -> bytes:
    family = socket.AF_INET6 if is_v6(address) else socket.AF_INET
    # packets do not tell the scope of a link-local address
    return socket.inet_pton(family, address.partition("%")[0])


def _connection_key(connection: ConnId) -> bytes:
    return (
        _packed(connection.peer)
        + _PORT.pack(connection.peer_port)
        + _packed(connection.local)
        + _PORT.pack(connection.local_port)
    )


def _listener_keys(listener: ListeningEnd) -> Iterator[tuple[str, bytes]]:
    if listener.anywhere:
        port = struct.pack(">H", listener.port)
        if listener.v6:
            yield "ports6", port
        if not listener.v6 or listener.both:
            yield "ports4", port
        return
    name = "listeners6" if listener.v6 else "listeners4"
    yield name, _packed(listener.address) + _PORT.pack(listener.port)
