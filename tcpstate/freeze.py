"""Freezing connections without a firewall, and giving them back exactly.

Two levels::

    quiet    a filter on the socket drops every segment that arrives (no ACK leaves), the mark sends every packet of
             it into a blackhole.  The owner may go on running; nothing comes in, nothing goes out.
    repair   TCP_REPAIR on top, for reading and writing the connection's state.  The owner must be stopped: its send()
             would get EINVAL, its recv() EPERM.

::

    with blackhole():                        # one rule per network namespace and family
        capture.start()                      # keep what the filters will drop
        states = quiet(socks)
        enter_repair(socks)
        ...                                  # read, move away, or give up:
        thaw(socks, states)                  # and replay what was captured

A quiet socket's timers go on: TCP_USER_TIMEOUT would kill it within seconds and keepalive would reset it.  So both are
put out of action, and the originals are in the :class:`QuietState`.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from collections.abc import Sequence

from tcpstate import codec
from tcpstate.errors import ConnectionCallFailed
from tcpstate.filters import (
    ListenerState,
    drop_syns,
    give_filter,
    own_filter,
    read_filters,
    remove_syn_filter,
    undo_drop_syns,
)
from tcpstate.kernel import bpf
from tcpstate.kernel.bpf import Instruction
from tcpstate.kernel.columns import Column, Field, Reusable, RowResult, Rows, numbers_of
from tcpstate.kernel.lanes import in_portions
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import IP, IPV6, SO, Ioctl, Level
from tcpstate.kernel.tcp import TCP, USER_TIMEOUT_MAX, Repair, RepairQueue
from tcpstate.rows import describe, failures
from tcpstate.silence import MARK, Blackhole, blackhole
from tcpstate.slotted import dataclass

__all__ = [
    "MARK",
    "Blackhole",
    "Entered",
    "Gate",
    "ListenerState",
    "QuietState",
    "blackhole",
    "drop_syns",
    "enter_repair",
    "leave_repair",
    "quiet",
    "read_originals",
    "remove_syn_filter",
    "thaw",
    "undo_drop_syns",
]

#: no packet that was forwarded even once arrives with it, and stacks start lower (RFC 5082)
_MINIMUM_TTL = 255


class Gate(enum.Enum):
    """What keeps arriving segments out of a quiet socket."""

    FILTER = "filter"
    TTL = "ttl"  # SO_LOCK_FILTER forbids the filter: IP_MINTTL drops what has a smaller TTL than 255


@dataclass(frozen=True, slots=True, kw_only=True)
class QuietState:
    """What :func:`quiet` changed on a socket: the originals.

    filter         the application's own classic filter; () if it has none
    filter_locked  SO_LOCK_FILTER
    mark           SO_MARK
    user_timeout   TCP_USER_TIMEOUT, milliseconds
    keepalive      SO_KEEPALIVE
    reuse_address  SO_REUSEADDR (leaving repair clears it)
    minimum_ttl    IP_MINTTL
    minimum_hops   IPV6_MINHOPCOUNT (0 for IPv4 sockets)
    gate           which way was used
    """

    filter: tuple[Instruction, ...]
    filter_locked: bool
    mark: int
    user_timeout: int
    keepalive: bool
    reuse_address: bool
    minimum_ttl: int
    minimum_hops: int
    gate: Gate

    def to_bytes(self) -> bytes:
        """For a journal."""
        return codec.pack(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> QuietState:
        """Of :meth:`to_bytes`; BadRecord if it is none."""
        return codec.unpack(cls, data)


def _build_originals(rows: Rows) -> tuple[Column, list[Field]]:
    fd = rows.column()
    return fd, [
        rows.getsockopt(fd, Level.SOCKET, SO.LOCK_FILTER, 4),
        rows.getsockopt(fd, Level.SOCKET, SO.MARK, 4),
        rows.getsockopt(fd, Level.TCP, TCP.USER_TIMEOUT, 4),
        rows.getsockopt(fd, Level.SOCKET, SO.KEEPALIVE, 4),
        rows.getsockopt(fd, Level.SOCKET, SO.REUSEADDR, 4),
        rows.getsockopt(fd, Level.IP, IP.MINTTL, 4, ignore=True),
        rows.getsockopt(fd, Level.IPV6, IPV6.MINHOPCOUNT, 4, ignore=True),
    ]


_originals = Reusable(_build_originals)


def read_originals(socks: Sequence[socket.socket]) -> list[QuietState]:
    """What :func:`quiet` is going to change, to be written down before it does. ForeignFilter, ConnectionCallFailed."""
    # most connections of a server have the same
    known: dict[tuple[object, ...], QuietState] = {}
    return in_portions(len(socks), lambda part: _read_originals(socks[part], known))


def _read_originals(socks: Sequence[socket.socket], states: dict[tuple[object, ...], QuietState]) -> list[QuietState]:
    filters = [own_filter(f) if f else f for f in read_filters(socks)]
    rows, (fd, fields) = _originals.of(len(socks))
    fd.set(numbers_of(socks))
    with failures(socks):
        rows.run()
    found = []
    for parts in zip(filters, *(f.u32() for f in fields), strict=True):
        state = states.get(parts)
        if state is None:
            state = states[parts] = _original(*parts)
        found.append(state)
    return found


def _original(
    own: tuple[Instruction, ...], lock: int, mark: int, timeout: int, alive: int, reuse: int, ttl: int, hops: int
) -> QuietState:
    return QuietState(
        filter=own,
        filter_locked=bool(lock),
        mark=mark,
        user_timeout=timeout,
        keepalive=bool(alive),
        reuse_address=bool(reuse),
        minimum_ttl=ttl,
        minimum_hops=hops,
        gate=Gate.TTL if lock else Gate.FILTER,
    )


def _build_silencing(rows: Rows) -> Column:
    fd = rows.column()
    rows.setsockopt(fd, Level.SOCKET, SO.MARK, rows.shared(struct.pack("I", MARK)), label="setting the mark")
    rows.setsockopt(fd, Level.TCP, TCP.USER_TIMEOUT, USER_TIMEOUT_MAX)
    rows.setsockopt(fd, Level.SOCKET, SO.KEEPALIVE, 0)
    return fd


_silencing = Reusable(_build_silencing)


def quiet(socks: Sequence[socket.socket], originals: Sequence[QuietState] | None = None) -> list[QuietState]:
    """Freeze connections at the quiet level; returns the originals, in the same order.

    originals  what :func:`read_originals` said, if their owners have been stopped since

    All of them, or none: at the first failure those that were changed are given back.  Nothing arrives any more when it
    returns, but a segment that was past the filter already may still be at work for a moment; the export checks for it.
    ForeignFilter, ConnectionCallFailed.
    """
    if not socks:
        return []
    states = read_originals(socks) if originals is None else list(originals)
    try:
        in_portions(len(socks), lambda part: _quiet(socks[part], states[part]))
    except BaseException:
        thaw(socks, states)
        raise
    return states


def _quiet(socks: Sequence[socket.socket], states: Sequence[QuietState]) -> tuple[()]:
    locked = [s for s, state in zip(socks, states, strict=True) if state.gate is Gate.TTL]
    shut([s for s in socks if s not in locked] if locked else socks)
    _gate_ttl(locked)
    rows, fd = _silencing.of(len(socks))
    fd.set(numbers_of(socks))
    with failures(socks):
        rows.run()
    return ()


def _build_attaching(rows: Rows) -> tuple[Column, Field, RowResult]:
    fd, value = rows.column(), rows.room(4)
    label = "attaching the filter"
    return fd, value, rows.setsockopt(fd, Level.SOCKET, SO.ATTACH_BPF, value, ignore=True, label=label)


_attaching = Reusable(_build_attaching)


def shut(socks: Sequence[socket.socket], *, but: int | None = None) -> None:
    """Attach the filter that drops every arriving segment; ``but``: those with this mark pass. ConnectionCallFailed."""
    if not socks:
        return
    program = bpf.drop_program() if but is None else bpf.mark_program(but)
    if program is not None:
        rows, (fd, value, attached) = _attaching.of(len(socks))
        fd.set(numbers_of(socks))
        value.set([program] * len(socks))
        rows.run()
        if all(result == 0 for result in attached.values()):
            return
    # classic: the same effect; the kernel translates the program for each socket
    classic = bpf.program(bpf.DROP_ALL if but is None else bpf.drop_but(but))
    rows = Rows(len(socks))
    fd = rows.numbers(numbers_of(socks))
    rows.setsockopt(
        fd, Level.SOCKET, SO.ATTACH_FILTER, rows.shared(classic.bytes), size=len(classic.bytes),
        label="attaching the filter",
    )  # fmt: skip
    with failures(socks):
        rows.run()


def _gate_ttl(socks: Sequence[socket.socket], values: Sequence[tuple[int, int]] | None = None) -> None:
    """Set the minimum TTL and, on IPv6 sockets, hop count: to 255, or to ``values``."""
    for family in (socket.AF_INET, socket.AF_INET6):
        mine = [i for i, s in enumerate(socks) if s.family == family]
        if not mine:
            continue
        ttl, hops = zip(
            *([values[i] for i in mine] if values else [(_MINIMUM_TTL, _MINIMUM_TTL)] * len(mine)), strict=True
        )
        rows = Rows(len(mine))
        fd = rows.numbers([socks[i].fileno() for i in mine])
        rows.setsockopt(fd, Level.IP, IP.MINTTL, rows.u32(ttl), label="setting the minimum TTL")
        if family == socket.AF_INET6:
            rows.setsockopt(fd, Level.IPV6, IPV6.MINHOPCOUNT, rows.u32(hops), label="setting the minimum hop count")
        with failures([socks[i] for i in mine]):
            rows.run()


def thaw(socks: Sequence[socket.socket], states: Sequence[QuietState], *, probe: bool = True) -> None:
    """Give frozen connections back as they were, out of repair if they are in it. May be repeated.

    What the filter dropped meanwhile nobody sends again at once: replay the capture.  ``probe``: let the kernel ask the
    peer for its window (and so for an ACK) when it leaves repair.  All sockets are tried; ConnectionCallFailed names
    the first that failed.
    """
    if len(socks) != len(states):
        raise ValueError(f"{len(socks)} sockets, {len(states)} states")
    rows = Rows(len(socks))
    fd = rows.numbers(numbers_of(socks))
    done = [
        rows.setsockopt(fd, Level.SOCKET, SO.MARK, rows.u32([s.mark for s in states]), ignore=True),
        rows.setsockopt(fd, Level.TCP, TCP.USER_TIMEOUT, rows.u32([s.user_timeout for s in states]), ignore=True),
        rows.setsockopt(fd, Level.SOCKET, SO.KEEPALIVE, rows.u32([s.keepalive for s in states]), ignore=True),
    ]
    rows.run()
    results = zip(*(result.values() for result in done), strict=True)
    failed = [
        f"{describe(sock)}: {os.strerror(-min(row))}" for sock, row in zip(socks, results, strict=True) if min(row) < 0
    ]
    for sock, state in zip(socks, states, strict=True):
        try:
            if state.gate is Gate.FILTER:
                give_filter(sock, state.filter)
            else:
                _gate_ttl([sock], [(state.minimum_ttl, state.minimum_hops)])
        except (OSError, ConnectionCallFailed) as error:
            failed.append(f"{describe(sock)}: {error}")
    # last: only now an answer to the probe gets in
    living = {id(sock) for sock in not_in_repair(socks)}
    in_repair = [pair for pair in zip(socks, states, strict=True) if id(pair[0]) not in living]
    if in_repair:
        leave_repair([sock for sock, _ in in_repair], [state.reuse_address for _, state in in_repair], probe=probe)
    if failed:
        raise ConnectionCallFailed(f"{len(failed)} of {len(socks)} sockets were not given back whole", object=failed[0])


def _build_asking(rows: Rows) -> tuple[Column, Field]:
    fd = rows.column()
    return fd, rows.getsockopt(fd, Level.TCP, TCP.REPAIR, 4)


_asking = Reusable(_build_asking)


def not_in_repair(socks: Sequence[socket.socket]) -> list[socket.socket]:
    """Those that are not in repair mode. ConnectionCallFailed."""
    rows, (fd, mode) = _asking.of(len(socks))
    fd.set(numbers_of(socks))
    with failures(socks):
        rows.run()
    return [sock for sock, value in zip(socks, mode.u32(), strict=True) if value != Repair.ON]


def _build_entering(rows: Rows) -> tuple[Column, Field, Field, RowResult]:
    fd, label = rows.column(), "entering repair mode"
    before = rows.getsockopt(fd, Level.TCP, TCP.REPAIR, 4)
    unsent = rows.room(4)
    # Asked before repair mode: while that has chosen the send queue, whatever makes the kernel look at the queue (a
    # timer, a packet that left the device) counts all of it as sent, and what was never sent would wait for a time-out.
    rows.call(SYS.ioctl, fd, Ioctl.SIOCOUTQNSD, unsent, ignore=True)
    return fd, before, unsent, rows.setsockopt(fd, Level.TCP, TCP.REPAIR, Repair.ON, ignore=True, label=label)


_entering = Reusable(_build_entering)


@dataclass(frozen=True, slots=True)
class Entered:
    """What :func:`enter_repair` found.

    new     which of the sockets were not in repair mode before
    unsent  bytes that each has never sent, as far as that can still be told
    """

    new: list[int]
    unsent: list[int]


def enter_repair(socks: Sequence[socket.socket]) -> Entered:
    """Put sockets in repair mode. All or none; ConnectionCallFailed (EPERM: a listener, or no CAP_NET_ADMIN)."""
    rows, (fd, before, unsent, entered) = _entering.of(len(socks))
    fd.set(numbers_of(socks))
    with failures(socks):
        rows.run()
    results = entered.values()
    new = [i for i, mode in enumerate(before.u32()) if mode != Repair.ON]
    if any(results):
        for i in new:
            if results[i] == 0:
                socks[i].setsockopt(Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE)
        first = next(i for i, result in enumerate(results) if result)
        error = os.strerror(-results[first])
        raise ConnectionCallFailed(f"entering repair mode: {error}", object=describe(socks[first]))
    return Entered(new, unsent.u32())


def leave_repair(socks: Sequence[socket.socket], reuse_address: Sequence[bool], *, probe: bool) -> None:
    """Take sockets out of repair mode and give SO_REUSEADDR back, which the kernel clears on the way out.

    probe: send a window probe (its answer clears the send queue of what the peer has). ConnectionCallFailed.
    """
    rows = Rows(len(socks))
    fd = rows.numbers(numbers_of(socks))
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    rows.setsockopt(
        fd, Level.TCP, TCP.REPAIR, Repair.OFF if probe else Repair.OFF_NO_PROBE, label="leaving repair mode"
    )
    rows.setsockopt(fd, Level.SOCKET, SO.REUSEADDR, rows.u32(reuse_address))
    with failures(socks):
        rows.run()
