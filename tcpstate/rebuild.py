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
import itertools
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from socket import htons
from typing import ClassVar, Final, Self

from tcpstate import giving, opening, softstate
from tcpstate.comparison import Difference, compare, differences, read_back
from tcpstate.errors import ConnectionCallFailed, UnknownHardState, UnsupportedState
from tcpstate.export import Passed
from tcpstate.firstdata import put_first
from tcpstate.freeze import MARK, shut
from tcpstate.inward import MARK as INWARD
from tcpstate.kernel import bpf
from tcpstate.kernel.columns import Column, Field, Reusable, RowResult, Rows, numbers_of
from tcpstate.kernel.lanes import in_portions
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
)
from tcpstate.kernel.tcp import repair_options as pack_repair_options
from tcpstate.md5keys import give_keys
from tcpstate.options import Stage, number
from tcpstate.preflight import supported
from tcpstate.record import ConnectionRecord, Family, State
from tcpstate.refill import SMALL, put, put_sent, put_small
from tcpstate.release import release_connections
from tcpstate.roundtrip import Teachers
from tcpstate.rows import Names, failures
from tcpstate.segment import SEQ_MASK
from tcpstate.slotted import dataclass
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
#: what a bound socket does not take any more, and has already
_BEFORE_BIND: Final = frozenset({"ipv6.v6only"})
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
    bound: int = 0,
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
    bound    so many of ``socks``, the first, are bound to their ports already: they had been before they were dissolved
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
    records = [record if record.urgent_in is None else held_back(record) for record in records]
    made = _fresh(records) if socks is None else list(socks)
    heads = [early.get(i, ()) for i in range(len(records))] if early else [()] * len(records)
    known = softstate.means(records) if soft else softstate.NO_MEANS

    def rebuild(part: slice) -> tuple[()]:
        plans = softstate.plan(records[part], known) if soft else [softstate.NOTHING] * len(records[part])
        later = elapsed + time.monotonic() - begun
        _rebuild(made[part], records[part], heads[part], plans, teachers, bound=bound - part.start, elapsed=later)
        return ()

    try:
        with softstate.way_in(known) as teachers:
            in_portions(len(records), rebuild)
    except BaseException:
        if socks is None:
            # in repair closing sends nothing
            _close(made)
        raise
    return made


def _rebuild(
    socks: Sequence[socket.socket],
    records: Sequence[ConnectionRecord],
    heads: Sequence[Sequence[memoryview]],
    plans: Sequence[softstate.Plan],
    teachers: Teachers,
    *,
    bound: int,
    elapsed: float,
) -> None:
    """Some of them, of which the first ``bound`` are bound; ``elapsed``: seconds since the export at the call."""
    begun = time.monotonic()
    opened = [i for i, r in enumerate(records) if r.state is State.ESTABLISHED or not r.unopened]
    if len(opened) < len(records):
        _prepare(socks, records, elapsed)
    kinds: dict[tuple[int, bool], list[int]] = {}
    for i in opened:
        kinds.setdefault((record_family(records[i]), i < bound), []).append(i)
    starts = [0] * len(records)
    for (family, is_bound), mine in kinds.items():
        groups, expected = _connect(
            [socks[i] for i in mine],
            [records[i] for i in mine],
            [heads[i] for i in mine],
            [plans[i] for i in mine],
            family,
            is_bound,
        )
        for i, start in zip(mine, expected, strict=True):
            starts[i] = start
    ready = [socks[i] for i in opened], [records[i] for i in opened]
    with failures(ready[0], Names(ready[1])):
        softstate.give(*ready, [plans[i] for i in opened], [starts[i] for i in opened], teachers)
    _fill(*ready, [heads[i] for i in opened])
    if len(kinds) != 1:
        groups = giving.alike(ready[1])
    _finish(*ready, groups, elapsed + time.monotonic() - begun)


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
    """Calls before the options that must be set before bind: fresh sockets enter repair mode.

    row  a line of :data:`ROW`
    """

    ROW: ClassVar = struct.Struct("=IIi")

    fd: Column
    row: Field
    shut: RowResult | None

    @classmethod
    def build(cls, rows: Rows, family: int, *, shut: bool) -> Self:
        fd, row = rows.column(), rows.room(cls.ROW.size)
        # Before bind: else the kernel finds the port taken by the listener.
        rows.setsockopt(fd, Level.TCP, TCP.REPAIR, Repair.ON, label="entering repair mode")
        # Bind and connect work before the address is here (IP_FREEBIND would not do for connect).
        if family == socket.AF_INET6:
            rows.setsockopt(fd, Level.IPV6, IPV6.TRANSPARENT, 1)
        else:
            rows.setsockopt(fd, Level.IP, IP.TRANSPARENT, 1)
        rows.setsockopt(fd, Level.SOCKET, SO.SNDBUFFORCE, row.part(0, 4))
        rows.setsockopt(fd, Level.SOCKET, SO.RCVBUFFORCE, row.part(4, 4))
        done = rows.setsockopt(fd, Level.SOCKET, SO.ATTACH_BPF, row.part(8, 4), ignore=True) if shut else None
        return cls(fd, row, done)


@dataclass(slots=True)
class _Connecting:
    """Calls up to the queues.

    row              a line of :attr:`form`: mark; starts of the send and the receive queue; local and peer address,
                     each family, port, rest; what was negotiated
    negotiated_size  how much of that last is used
    """

    form: struct.Struct
    fd: Column
    row: Field
    negotiated_size: Column

    @classmethod
    def build(cls, rows: Rows, family: int, *, bind: bool, marked: bool) -> Self:
        size = len(pack_address("::1" if family == socket.AF_INET6 else "127.0.0.1", 0, family=family))
        form = struct.Struct(f"=III{2 * f'HH{size - 4}s'}{REPAIR_OPTIONS_SIZE}s")
        fd, negotiated_size, row = rows.column(), rows.column(), rows.room(form.size)
        mark, send_start, receive_start = (row.part(at, 4) for at in (0, 4, 8))
        local, peer = row.part(12, size), row.part(12 + size, size)
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
        negotiated = row.part(12 + 2 * size, REPAIR_OPTIONS_SIZE)
        rows.setsockopt(fd, Level.TCP, TCP.REPAIR_OPTIONS, negotiated, size=negotiated_size)
        # Whatever the options: setting them computes the MSS anew, which connect() in repair left at 524 bytes for
        # good.
        rows.call(SYS.setsockopt, fd, Level.IP, IP.OPTIONS, 0, 0, label="computing the MSS anew")
        if family == socket.AF_INET6:
            rows.call(SYS.setsockopt, fd, Level.IPV6, IPV6.DSTOPTS, 0, 0, label="computing the MSS anew")
        # From here on its timers must not be heard, nor end it.
        rows.setsockopt(fd, Level.SOCKET, SO.MARK, rows.shared(struct.pack("I", MARK)), label="setting the mark")
        rows.setsockopt(fd, Level.TCP, TCP.USER_TIMEOUT, USER_TIMEOUT_MAX)
        return cls(form, fd, row, negotiated_size)


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
) -> tuple[list[giving.Alike], list[int]]:
    """Steps up to the queues: an established connection with the right numbers, and nothing in it. Which are alike;
    the sequence number that each expects next."""
    names, fds = Names(records), numbers_of(socks)
    ahead = [sum(map(len, head)) if head else 0 for head in heads]
    # Where the address is here already, nothing of the peer may arrive, but what teaches them.
    but = INWARD if any(p.samples for p in plans) else None
    program = bpf.drop_program() if but is None else bpf.mark_program(but)
    rows, opening = _opening[family, program is not None].of(len(socks))
    opening.fd.set(fds)
    pack, attached, size = _Opening.ROW.pack, -1 if program is None else program, functools.cache(_buffer)
    opening.row.set_bytes(
        [
            pack(
                size(r.buffers.send, len(r.send_queue)), size(r.buffers.receive, len(r.receive_queue) + n), attached
            )
            for r, n in zip(records, ahead, strict=True)
        ]
    )  # fmt: skip
    with failures(socks, names):
        rows.run()
        if opening.shut is None or any(opening.shut.values()):
            shut(socks, but=but)
        groups = giving.alike(records)
        giving.give(socks, groups, Stage.BEFORE_CONNECT, skip=_BEFORE_BIND if bound else frozenset())
    for sock, record in zip(socks, records, strict=True):
        # nothing of an ended connection is signed any more
        if record.signing_keys and record.state is not State.CLOSED:
            give_keys(sock, record.signing_keys, str(record.conn_id))

    marks = [number(r, "so.mark") for r in records] if any("so.mark" in numbers for _, numbers, _ in groups) else ()
    rows, table = _connecting[family, not bound, any(marks)].of(len(socks))
    table.fd.set(fds)
    starts = [(r.rcv_nxt - len(r.receive_queue) - n) & SEQ_MASK for r, n in zip(records, ahead, strict=True)]
    lines, sizes = _lines(table.form, family, records, plans, starts, marks or itertools.repeat(0))
    table.row.set_bytes(lines)
    table.negotiated_size.set(sizes)
    with failures(socks, names):
        rows.run()
    return groups, starts


def _lines(
    form: struct.Struct,
    family: int,
    records: Sequence[ConnectionRecord],
    plans: Sequence[softstate.Plan],
    starts: Sequence[int],
    marks: Iterable[int],
) -> tuple[list[bytes], list[int]]:
    """Lines of the :class:`_Connecting` table, and how much each negotiated."""
    pack, ends, options = (
        form.pack,
        functools.cache(functools.partial(_behind_port, family)),
        functools.cache(_repair_options),
    )
    lines, sizes = [], []
    for r, plan, start, mark in zip(records, plans, starts, marks, strict=False):
        conn, n, scope = r.conn_id, r.negotiated, socket.if_nametoindex(r.scope) if r.scope else 0
        agreed, size = options(n.mss, n.snd_wscale, n.rcv_wscale, n.sack, n.timestamps)
        lines.append(
            pack(
                mark, (r.snd_una - len(plan.samples)) & SEQ_MASK, start,
                family, htons(conn.local_port), ends(conn.local, 0, scope),
                family, htons(conn.peer_port), ends(conn.peer, r.flow_info, scope),
                agreed,
            )
        )  # fmt: skip
        sizes.append(size)
    return lines, sizes


def _buffer(reported: int, queue: int) -> int:
    """What to ask for: the kernel doubles it and reports the double."""
    return min(_BUFFER_MAX, max(reported // 2, 2 * queue + _BUFFER_SLACK))


def _behind_port(family: int, address: str, flow_info: int, scope: int) -> bytes:
    """What stands behind the port in the struct sockaddr of an address."""
    return pack_address(address.partition("%")[0], 0, family=family, flow_info=flow_info, scope=scope)[4:]


def _repair_options(
    mss: int, snd_wscale: int | None, rcv_wscale: int | None, sack: bool, timestamps: bool
) -> tuple[bytes, int]:
    """What TCP_REPAIR_OPTIONS takes, and its size."""
    scales = None if snd_wscale is None or rcv_wscale is None else (snd_wscale, rcv_wscale)
    data = pack_repair_options(mss, wscale=scales, sack=sack, timestamps=timestamps)
    return data, len(data)


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
    """Calls once the queues are in.

    row   a line of :attr:`ROW`: receive buffer; the windows; the clock; the congestion control
    size  of that last one's name
    """

    ROW: ClassVar = struct.Struct(f"=I5II{CONGESTION_NAME_SIZE}s")

    fd: Column
    row: Field
    size: Column

    @classmethod
    def build(cls, rows: Rows) -> Self:
        fd, size, row = rows.column(), rows.column(), rows.room(cls.ROW.size)
        receive, windows, clock = row.part(0, 4), row.part(4, WINDOW_SIZE), row.part(4 + WINDOW_SIZE, 4)
        name = row.part(8 + WINDOW_SIZE, CONGESTION_NAME_SIZE)
        # The buffer has its own size again before any window is computed.  One that was offered cannot be taken back,
        # and what does not fit the real buffer would be dropped, and come again after a time-out.
        rows.setsockopt(fd, Level.SOCKET, SO.RCVBUFFORCE, receive)
        rows.setsockopt(fd, Level.TCP, TCP.REPAIR_WINDOW, windows, size=WINDOW_SIZE, label="setting the windows")
        # Its own; ours was there to set its congestion window.
        rows.setsockopt(fd, Level.TCP, TCP.CONGESTION, name, size=size, label="setting the congestion control")
        rows.setsockopt(fd, Level.TCP, TCP.TIMESTAMP, clock)
        return cls(fd, row, size)


_finishing = Reusable(_Finishing.build)


def _finish(
    socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], groups: Sequence[giving.Alike], elapsed: float
) -> None:
    """Windows, congestion control and what else can be set before the address is here."""
    rows, table = _finishing.of(len(socks))
    table.fd.set(numbers_of(socks))
    pack, passed, lines, sizes = _Finishing.ROW.pack, Passed(elapsed), [], []
    for r in records:
        w, t, name = r.windows, r.timestamps, r.congestion.encode("ascii")
        lines.append(
            pack(
                r.buffers.receive // 2,
                w.snd_wl1, w.snd_wnd, w.max_window, w.rcv_wnd, w.rcv_wup,
                0 if t is None else passed.later(t.value, t.microseconds),
                name,
            )
        )  # fmt: skip
        sizes.append(len(name))
    table.row.set_bytes(lines)
    table.size.set(sizes)
    with failures(socks, Names(records)):
        rows.run()
        giving.give(socks, groups, Stage.REPAIRED)
