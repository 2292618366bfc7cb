"""Everything of ours that stands on this host: holds, the rules that they and others left, frozen connections, and
processes whose memory still comes."""

from __future__ import annotations

import enum
import socket
import time

from migrate import forwardends, forwardstore, holdstore, lazystore
from migrate.forwardstore import ForwardRecord
from migrate.holdstore import HoldRecord
from migrate.lazystore import Lazy
from tcpstate import frozen
from tcpstate.frozen import FrozenConnection
from tcpstate.kernel import route
from tcpstate.silence import MARK
from tcpstate.slotted import dataclass
from tcpstate.uses.hold import PREFIX, standing

__all__ = ["Forwarding", "Frozen", "Hold", "HoldState", "Rule", "Standing", "describe", "survey"]


class HoldState(enum.Enum):
    """How a hold is."""

    HELD = "held"
    PARTIAL = "partial"  # some holders have died
    DEAD = "dead"  # all holders have: the rule keeps peers from being reset; a restore rebuilds from the image
    UNFINISHED = "unfinished"  # its checkpoint is at work, or died: `tcpmig recover`
    ELSEWHERE = "elsewhere"  # of another boot or another namespace


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """One hold.

    age, left  seconds since it was made, and until it ends by itself (None: it does not)
    holders    PIDs of those that live
    rule       whether its drop rule stands
    """

    hold: str
    state: HoldState
    age: float
    left: float | None
    connections: int
    listeners: tuple[str, ...]
    addresses: tuple[str, ...]
    image: str
    roots: tuple[int, ...]
    holders: tuple[int, ...]
    rule: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule of ours in this network namespace.

    kind   ``drop`` (a table of nf_tables) or ``silence`` (a routing rule for the mark of frozen sockets)
    name   of the table; or family and priority
    owner  what it belongs to: a hold's ID, ``frozen``, or empty if nothing is known to need it (a command at work does)
    """

    kind: str
    name: str
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """One connection that `tcpmig freeze` has frozen. ``here``: in this network namespace and boot."""

    connection: str
    pid: int
    age: float
    here: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarding:
    """One end of a forwarding.

    role         ``home`` (this host has the addresses) or ``away`` (it runs the processes)
    state        ``forwarding``, ``off``, ``unfinished`` (its migration is at work, or died: `tcpmig recover`) or
                 ``broken`` (somebody has taken its tunnel or its programs away)
    host         the other host, as far as it is known
    connections  at home: those that moved and are not closed, new ones apart
    ports        at home: where new connections are forwarded
    """

    forward: str
    role: str
    state: str
    age: float
    host: str
    far: str
    addresses: tuple[str, ...]
    connections: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """All of it."""

    holds: tuple[Hold, ...]
    rules: tuple[Rule, ...]
    frozen: tuple[Frozen, ...]
    lazy: tuple[Lazy, ...] = ()
    forwards: tuple[Forwarding, ...] = ()


def survey() -> Standing:
    """What there is; a forwarding that has nothing left to forward ends. OSError."""
    records = holdstore.holds()
    tables = standing()
    here = [record for record in records if record.here]
    return Standing(
        holds=tuple(describe(record, tables) for record in records),
        rules=(*_drops(tables, here), *_silences(here, frozen.frozen())),
        frozen=(
            *(_frozen(entry, here=True) for entry in frozen.frozen()),
            *(_frozen(entry, here=False) for entry in frozen.elsewhere()),
        ),
        lazy=tuple(lazystore.survey()),
        forwards=tuple(told for record in forwardstore.forwards() if (told := _forwarding(record)) is not None),
    )


def _forwarding(record: ForwardRecord) -> Forwarding | None:
    """One end; None if it has just ended."""
    state, connections, ports = "forwarding", list[str](), list[str]()
    if not record.complete:
        state = "unfinished"
    else:
        try:
            if forwardends.sweep(record):
                return None
            with forwardends.Mouth(record) as maps:
                state = "forwarding" if maps.on else "off"
                connections = [str(entry.connection) for entry in maps.entries()]
                ports = [f"[{a}]:{p}" if ":" in a else f"{a}:{p}" for a, p in maps.ports()]
        except FileNotFoundError:
            state = "broken"
    return Forwarding(
        forward=record.forward,
        role=record.role.value,
        state=state,
        age=round(record.age, 3),
        host=record.host,
        far=record.far,
        addresses=record.addresses,
        connections=tuple(sorted(connections)),
        ports=tuple(ports),
    )


def describe(record: HoldRecord, tables: list[str]) -> Hold:
    """One hold; ``tables``: the IDs of those whose rules stand here."""
    living = tuple(holder.pid for holder in record.holders if holder.alive) if record.here else ()
    if not record.here:
        state = HoldState.ELSEWHERE
    elif not record.complete:
        state = HoldState.UNFINISHED
    elif not living:
        state = HoldState.DEAD
    else:
        state = HoldState.HELD if len(living) == len(record.holders) else HoldState.PARTIAL
    return Hold(
        hold=record.hold,
        state=state,
        age=round(record.age, 3),
        left=round(max(0.0, record.timeout - record.age), 3) if record.timeout else None,
        connections=record.connections,
        listeners=record.listeners,
        addresses=tuple(address.address for address in record.addresses),
        image=record.image,
        roots=record.roots,
        holders=living,
        rule=record.here and record.hold in tables,
    )


def _drops(tables: list[str], here: list[HoldRecord]) -> list[Rule]:
    known = {record.hold for record in here}
    return [Rule(kind="drop", name=PREFIX + hold, owner=hold if hold in known else "") for hold in tables]


def _silences(here: list[HoldRecord], entries: list[FrozenConnection]) -> list[Rule]:
    owners = {(f, p): record.hold for record in here for f, p in (record.rules or {}).items()}
    owners |= {(f, p): "frozen" for entry in entries for f, p in entry.rules.items()}
    return [
        Rule(kind="silence", name=f"{name} priority {priority}", owner=owners.get((family, priority), ""))
        for family, name in ((int(socket.AF_INET), "ipv4"), (int(socket.AF_INET6), "ipv6"))
        for priority in route.blackhole_rules(family, MARK)
    ]


def _frozen(entry: FrozenConnection, *, here: bool) -> Frozen:
    age = round(max(0.0, time.time() - entry.since), 3)
    return Frozen(connection=str(entry.conn_id), pid=entry.pid, age=age, here=here)
