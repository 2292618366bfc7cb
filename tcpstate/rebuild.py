"""Portable records to sockets (paper, 5.2 and 5.4): in repair before the address is here, released once it is.

::

    socks = rebuild_connections(records, elapsed=...)    # silent, in repair; re-export and compare() them now
    ...                                                  # the address moves here, until route.is_local() says so
    release_connections(socks, records)                  # they leave repair, and send
    capture.replay(...)                                  # what arrived while nobody was home

Sent data of which no ACK came back is *not* put into the send queue as sent, as long as all of it fits a fresh
congestion window: a lost segment would then wait for a retransmission timeout of seconds.  It is sent again at the
release instead, and a peer that has it already acknowledges at once.  Beyond the congestion window that would deadlock
(an ACK of what we have not sent again yet is ignored), so there it is queued as sent.  The window is the connection's
own again by then, where the kernel lets us (:mod:`tcpstate.softstate`), so that most of what was in flight fits.

Between rebuild and release the sockets are as quiet as frozen ones: the filter drops what arrives (the capture has it),
and their timers send nothing, as long as there is a :func:`tcpstate.freeze.blackhole` in this network namespace.
"""

from __future__ import annotations

import functools
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from tcpstate import giving, opening, softstate
from tcpstate.comparison import Difference, compare, differences, read_back
from tcpstate.errors import ConnectionCallFailed, UnknownHardState, UnsupportedState
from tcpstate.export import later
from tcpstate.firstdata import put_first
from tcpstate.freeze import MARK, shut
from tcpstate.inward import MARK as INWARD
from tcpstate.kernel import bpf
from tcpstate.kernel.columns import Column, Field, Reusable, RowResult, Rows, numbers_of
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import IP, IPV6, SO, Level, pack_address
from tcpstate.kernel.tcp import (
    CONGESTION_NAME_SIZE,
    REPAIR_OPTIONS_SIZE,
    TCP,
    USER_TIMEOUT_MAX,
    WINDOW_SIZE,
    Repair,
    RepairQueue,
    pack_window,
)
from tcpstate.kernel.tcp import repair_options as pack_repair_options
from tcpstate.md5keys import give_keys
from tcpstate.options import Stage, number
from tcpstate.preflight import supported
from tcpstate.record import ConnectionRecord, Family, Negotiated, State, Windows
from tcpstate.refill import SMALL, put, put_sent, put_small
from tcpstate.release import release_connections
from tcpstate.rows import Names, failures
from tcpstate.segment import SEQ_MASK
from tcpstate.urgent import held_back

#: what records may ask a reader to know (:attr:`~tcpstate.record.ConnectionRecord.required`)
KNOWN: Final = frozenset({"urgent_in"})

__all__ = [
    "Difference",
    "compare",
    "differences",
    "read_back",
    "rebuild_connections",
    "record_family",
    "release_connections",
]

#: room beside a queue's bytes in its buffer: the kernel counts its own bookkeeping
_BUFFER_SLACK = 64 << 10
#: SO_SNDBUFFORCE takes an int and doubles it
_BUFFER_MAX = (1 << 30) - 1


def record_family(record: ConnectionRecord) -> int:
    """AF_INET or AF_INET6: what a socket of the connection must be."""
    return socket.AF_INET if record.family is Family.IPV4 else socket.AF_INET6


def _fresh(records: Sequence[ConnectionRecord]) -> list[socket.socket]:
    made: list[socket.socket] = []
    try:
        for record in records:
            made.append(socket.socket(record_family(record), socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
    except OSError:
        _close(made)
        raise
    return made


def _close(socks: Sequence[socket.socket]) -> None:
    for sock in socks:
        sock.close()


def rebuild_connections(
    records: Sequence[ConnectionRecord],
    socks: Sequence[socket.socket] | None = None,
    *,
    elapsed: float = 0.0,
    early: Mapping[int, Sequence[memoryview]] | None = None,
    bound: bool = False,
    soft: bool = True,
) -> list[socket.socket]:
    """Sockets in repair mode that continue the connections of ``records``, in the same order. Interfaces must have the
    names of this host: :meth:`ConnectionRecord.on_devices`.

    socks    fresh TCP sockets of the right families, never bound or connected, that shall become them (the new owner
             may have their descriptors already); made here if None
    elapsed  seconds since the export returned, measured by one clock; never two hosts' wall clocks.  Rather too much
             than too little: a peer drops what comes with an older timestamp
    early    by the record's place: pieces of the receive queue that come before what is in the record
             (:mod:`tcpstate.early`)
    bound    ``socks`` are bound to their ports already: they had been before they were dissolved
    soft     give back what they had learned about their paths (:mod:`tcpstate.softstate`); False: they begin anew

    All or none: on failure sockets made here are closed silently, given ones are left in repair mode, to be closed.
    UnsupportedState, AddressInUse (the 4-tuple exists here), QueueNotRestored, SoftStateNotRestored,
    ConnectionCallFailed.
    """
    if socks is not None and len(socks) != len(records):
        raise ValueError(f"{len(socks)} sockets for {len(records)} records")
    for record in records:
        if record.state is not State.ESTABLISHED and not supported(record.state):
            raise UnsupportedState(f"its state is {record.state.value}", object=str(record.conn_id))
        if record.required and (unknown := set(record.required) - KNOWN):
            raise UnknownHardState(f"it says {', '.join(sorted(unknown))}", object=str(record.conn_id))
    if not records:
        return []
    begun = time.monotonic()
    # what stands behind an urgent mark follows at the release
    records = [held_back(record) for record in records]
    made = _fresh(records) if socks is None else list(socks)
    heads = [early.get(i, ()) for i in range(len(records))] if early else [()] * len(records)
    opened = [i for i, record in enumerate(records) if not record.unopened]
    try:
        plans = softstate.plan(records) if soft else [softstate.NOTHING] * len(records)
        if len(opened) < len(records):
            _prepare(made, records, elapsed)
        families = {record_family(records[i]) for i in opened}
        for family in families:
            mine = [i for i in opened if record_family(records[i]) == family]
            groups = _connect(
                [made[i] for i in mine],
                [records[i] for i in mine],
                [heads[i] for i in mine],
                [plans[i] for i in mine],
                family,
                bound,
            )
        ready = [made[i] for i in opened], [records[i] for i in opened]
        _fill(*ready, [heads[i] for i in opened])
        if len(families) != 1:
            groups = giving.alike(ready[1])
        _finish(*ready, groups, elapsed + time.monotonic() - begun)
    except BaseException:
        if socks is None:
            # in repair closing sends nothing
            _close(made)
        raise
    return made


def _prepare(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], elapsed: float) -> None:
    """Those that are still to be opened, one by one: there are few."""
    for sock, record in zip(socks, records, strict=True):
        if record.unopened:
            try:
                opening.prepare(sock, record, elapsed=elapsed)
            except OSError as error:
                raise ConnectionCallFailed(f"preparing it: {error.strerror}", object=str(record.conn_id)) from error


@dataclass(slots=True)
class _Opening:
    """Calls before the options that must be set before bind: fresh sockets enter repair mode."""

    fd: Column
    send: Field
    receive: Field
    program: Field
    shut: RowResult | None

    @classmethod
    def build(cls, rows: Rows, family: int, *, shut: bool) -> Self:
        fd, send, receive, program = rows.column(), rows.room(4), rows.room(4), rows.room(4)
        # Before bind: else the kernel finds the port taken by the listener.
        rows.setsockopt(fd, Level.TCP, TCP.REPAIR, Repair.ON, label="entering repair mode")
        # Bind and connect work before the address is here (IP_FREEBIND would not do for connect).
        if family == socket.AF_INET6:
            rows.setsockopt(fd, Level.IPV6, IPV6.TRANSPARENT, 1)
        else:
            rows.setsockopt(fd, Level.IP, IP.TRANSPARENT, 1)
        rows.setsockopt(fd, Level.SOCKET, SO.SNDBUFFORCE, send)
        rows.setsockopt(fd, Level.SOCKET, SO.RCVBUFFORCE, receive)
        done = rows.setsockopt(fd, Level.SOCKET, SO.ATTACH_BPF, program, ignore=True) if shut else None
        return cls(fd, send, receive, program, done)


@dataclass(slots=True)
class _Connecting:
    """Calls up to the queues."""

    fd: Column
    mark: Field
    send_start: Field
    receive_start: Field
    local: Field
    peer: Field
    negotiated: Field
    negotiated_size: Column

    @classmethod
    def build(cls, rows: Rows, family: int, *, bind: bool, marked: bool) -> Self:
        size = len(pack_address("::1" if family == socket.AF_INET6 else "127.0.0.1", 0, family=family))
        fd, negotiated_size = rows.column(), rows.column()
        mark, send_start, receive_start = (rows.room(4) for _ in range(3))
        local, peer, negotiated = rows.room(size), rows.room(size), rows.room(REPAIR_OPTIONS_SIZE)
        if marked:
            # The route is chosen at connect, and the application's mark may choose it.
            rows.setsockopt(fd, Level.SOCKET, SO.MARK, mark)
        for queue, start in ((RepairQueue.SEND, send_start), (RepairQueue.RECEIVE, receive_start)):
            rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, queue)
            rows.setsockopt(fd, Level.TCP, TCP.QUEUE_SEQ, start)
        rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
        if bind:
            rows.call(SYS.bind, fd, local, size, label="bind")
        rows.call(SYS.connect, fd, peer, size, label="connect")
        rows.setsockopt(fd, Level.TCP, TCP.REPAIR_OPTIONS, negotiated, size=negotiated_size)
        # Whatever the options: setting them computes the MSS anew, which connect() in repair left at 524 bytes for
        # good.
        rows.call(SYS.setsockopt, fd, Level.IP, IP.OPTIONS, 0, 0, label="computing the MSS anew")
        if family == socket.AF_INET6:
            rows.call(SYS.setsockopt, fd, Level.IPV6, IPV6.DSTOPTS, 0, 0, label="computing the MSS anew")
        # From here on its timers must not be heard, nor end it.
        rows.setsockopt(fd, Level.SOCKET, SO.MARK, rows.shared(struct.pack("I", MARK)), label="setting the mark")
        rows.setsockopt(fd, Level.TCP, TCP.USER_TIMEOUT, USER_TIMEOUT_MAX)
        return cls(fd, mark, send_start, receive_start, local, peer, negotiated, negotiated_size)


_FAMILIES: Final[tuple[int, ...]] = (socket.AF_INET, socket.AF_INET6)
_BOTH: Final = (True, False)
_opening = {
    (f, shut): Reusable(functools.partial(_Opening.build, family=f, shut=shut)) for f in _FAMILIES for shut in _BOTH
}
_connecting = {
    (f, bind, marked): Reusable(functools.partial(_Connecting.build, family=f, bind=bind, marked=marked))
    for f in _FAMILIES
    for bind in _BOTH
    for marked in _BOTH
}


def _connect(
    socks: Sequence[socket.socket],
    records: Sequence[ConnectionRecord],
    heads: Sequence[Sequence[memoryview]],
    plans: Sequence[softstate.Plan],
    family: int,
    bound: bool,
) -> list[giving.Alike]:
    """Steps up to the queues: an established connection with the right numbers, and nothing in it. Which are alike."""
    names, fds = Names(records), numbers_of(socks)
    ahead = [sum(map(len, head)) if head else 0 for head in heads]
    # Where the address is here already, nothing of the peer may arrive, but what teaches them.
    but = INWARD if any(p.samples for p in plans) else None
    program = bpf.drop_program() if but is None else bpf.mark_program(but)
    rows, opening = _opening[family, program is not None].of(len(socks))
    opening.fd.set(fds)
    opening.send.set([_buffer(r.buffers.send, len(r.send_queue)) for r in records])
    unread = [len(r.receive_queue) + n for r, n in zip(records, ahead, strict=True)]
    opening.receive.set([_buffer(r.buffers.receive, n) for r, n in zip(records, unread, strict=True)])
    if program is not None:
        opening.program.set([program] * len(socks))
    with failures(socks, names):
        rows.run()
        if opening.shut is None or any(opening.shut.values()):
            shut(socks, but=but)
        groups = giving.alike(records)
        giving.give(socks, groups, Stage.BEFORE_CONNECT)
    for sock, record in zip(socks, records, strict=True):
        # nothing of an ended connection is signed any more
        if record.signing_keys and record.state is not State.CLOSED:
            give_keys(sock, record.signing_keys, str(record.conn_id))

    marks = [number(r, "so.mark") for r in records]
    rows, table = _connecting[family, not bound, any(marks)].of(len(socks))
    table.fd.set(fds)
    table.mark.set(marks)
    starts = [(r.copied_seq - n) & SEQ_MASK for r, n in zip(records, ahead, strict=True)]
    table.send_start.set([(r.snd_una - len(p.samples)) & SEQ_MASK for r, p in zip(records, plans, strict=True)])
    table.receive_start.set(starts)
    ends = functools.cache(functools.partial(_around_port, family))
    scopes = [socket.if_nametoindex(r.scope) if r.scope else 0 for r in records]
    local, peer = [], []
    for r, scope in zip(records, scopes, strict=True):
        conn = r.conn_id
        before, behind = ends(conn.local, 0, scope)
        local.append(before + conn.local_port.to_bytes(2, "big") + behind)
        before, behind = ends(conn.peer, r.flow_info, scope)
        peer.append(before + conn.peer_port.to_bytes(2, "big") + behind)
    table.local.set_bytes(local)
    table.peer.set_bytes(peer)
    agreed = functools.cache(_repair_options)
    negotiated = [agreed(r.negotiated) for r in records]
    table.negotiated.set_bytes(negotiated)
    table.negotiated_size.set(list(map(len, negotiated)))
    with failures(socks, names):
        rows.run()
        softstate.give(socks, records, plans, starts)
    return groups


def _buffer(reported: int, queue: int) -> int:
    """What to ask for: the kernel doubles it and reports the double."""
    return min(_BUFFER_MAX, max(reported // 2, 2 * queue + _BUFFER_SLACK))


def _around_port(family: int, address: str, flow_info: int, scope: int) -> tuple[bytes, bytes]:
    """What stands before and behind the port in the struct sockaddr of an address."""
    data = pack_address(address.partition("%")[0], 0, family=family, flow_info=flow_info, scope=scope)
    return data[:2], data[4:]


def _repair_options(agreed: Negotiated) -> bytes:
    scales = None
    if agreed.snd_wscale is not None and agreed.rcv_wscale is not None:
        scales = agreed.snd_wscale, agreed.rcv_wscale
    return pack_repair_options(agreed.mss, wscale=scales, sack=agreed.sack, timestamps=agreed.timestamps)


def _fill(
    socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], heads: Sequence[Sequence[memoryview]]
) -> None:
    """Put the bytes back that had arrived, and those that must count as sent."""
    small = [i for i, r in enumerate(records) if not heads[i] and 0 < len(r.receive_queue) <= SMALL]
    counts = put_small([socks[i] for i in small], [records[i].receive_queue for i in small])
    taken = dict(zip(small, counts, strict=True)) | put_first(socks, records, heads)
    filled = {i for i, count in taken.items() if count == len(records[i].receive_queue)}
    for i, (sock, record, head) in enumerate(zip(socks, records, heads, strict=True)):
        if (i in filled or not (head or record.receive_queue)) and not record.sent:
            continue
        if i not in filled and (head or record.receive_queue):
            sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.RECEIVE)
            done = taken.get(i, 0)
            for piece in (*head, memoryview(record.receive_queue)):
                put(sock, piece[done:], record)
                done = max(0, done - len(piece))
        if record.sent and not (record.sent <= softstate.room(sock, record) and record.state is not State.CLOSING):
            sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
            put_sent(sock, record, 0, record.sent)
        if head or record.receive_queue or record.sent:
            sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)


@dataclass(slots=True)
class _Finishing:
    """Calls once the queues are in."""

    fd: Column
    receive: Field
    windows: Field
    congestion: Field
    congestion_size: Column
    clock: Field

    @classmethod
    def build(cls, rows: Rows) -> Self:
        fd, size = rows.column(), rows.column()
        receive, windows, name, clock = (rows.room(n) for n in (4, WINDOW_SIZE, CONGESTION_NAME_SIZE, 4))
        # The buffer has its own size again before any window is computed.  One that was offered cannot be taken back,
        # and what does not fit the real buffer would be dropped, and come again after a time-out.
        rows.setsockopt(fd, Level.SOCKET, SO.RCVBUFFORCE, receive)
        rows.setsockopt(fd, Level.TCP, TCP.REPAIR_WINDOW, windows, size=WINDOW_SIZE, label="setting the windows")
        # Its own; ours was there to set its congestion window.
        rows.setsockopt(fd, Level.TCP, TCP.CONGESTION, name, size=size, label="setting the congestion control")
        rows.setsockopt(fd, Level.TCP, TCP.TIMESTAMP, clock)
        return cls(fd, receive, windows, name, size, clock)


_finishing = Reusable(_Finishing.build)


def _finish(
    socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], groups: Sequence[giving.Alike], elapsed: float
) -> None:
    """Windows, congestion control and what else can be set before the address is here."""
    rows, table = _finishing.of(len(socks))
    table.fd.set(numbers_of(socks))
    table.receive.set([r.buffers.receive // 2 for r in records])
    table.windows.set_bytes([_window(r.windows) for r in records])
    table.congestion.set_bytes([r.congestion.encode("ascii") for r in records])
    table.congestion_size.set([len(r.congestion) for r in records])
    clocks = [r.timestamps for r in records]
    table.clock.set([later(t.value, t.microseconds, elapsed) if t is not None else 0 for t in clocks])
    with failures(socks, Names(records)):
        rows.run()
        giving.give(socks, groups, Stage.REPAIRED)


def _window(w: Windows) -> bytes:
    return pack_window(w.snd_wl1, w.snd_wnd, w.max_window, w.rcv_wnd, w.rcv_wup)
