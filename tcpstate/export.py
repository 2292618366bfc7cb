"""Frozen connections to portable records (paper, 5.2 and 5.4).

::

    send queue   snd_una ........ snd_nxt ........ write_seq     outq = write_seq - snd_una, nsd = write_seq - snd_nxt
                     sent, unacked      not yet sent  [FIN]      our FIN counts for one in all three
    recv queue   copied_seq ..... rcv_nxt                        inq  = rcv_nxt - copied_seq
                     not yet read        [FIN]                   the peer's FIN counts for one in rcv_nxt

The owner must be stopped and the sockets quiet (:func:`tcpstate.freeze.quiet`).  A segment that was past the filter
when it was attached may still be at work: what was read is read again, and once more if it changed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tcpstate import options
from tcpstate.connid import ConnId
from tcpstate.errors import StillMoving, UnsupportedState, UrgentData
from tcpstate.freeze import QuietState, enter_repair, is_in_repair
from tcpstate.kernel import sockets
from tcpstate.kernel.columns import Rows
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import SO, BufferLock, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import (
    CONGESTION_NAME_SIZE,
    INFO_SIZE,
    TCP,
    WINDOW_SIZE,
    InfoOption,
    RepairQueue,
    RepairWindow,
    TcpInfo,
    TcpState,
)
from tcpstate.preflight import STATES, refusal, state_of, supported
from tcpstate.record import (
    LOCALLY_FINISHED,
    PEER_FINISHED,
    Buffers,
    ConnectionRecord,
    Family,
    LocalFin,
    Negotiated,
    SoftState,
    Timestamps,
    Windows,
)
from tcpstate.rows import describe, failures
from tcpstate.segment import SEQ_MASK, before

__all__ = ["advance", "export_connections", "refusal", "state_of", "supported"]

#: how often a connection is read again whose state changed while it was read
_TRIES = 5
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


def export_connections(
    socks: Sequence[socket.socket],
    states: Sequence[QuietState],
    *,
    saved_options: Sequence[options.Saved] | None = None,
) -> list[ConnectionRecord]:
    """Records of quiet connections, in the same order. They are in repair mode afterwards, or as before if it fails.

    states         what :func:`~tcpstate.freeze.quiet` returned: their originals go into the records
    saved_options  their options, if :func:`tcpstate.options.save` read them before the stop

    The timestamps of the records are those of the moment of return: whoever rebuilds counts the seconds from there.
    UnsupportedState, UrgentData, StillMoving, ConnectionCallFailed: of the first connection that has the trouble.
    """
    if len(socks) != len(states):
        raise ValueError(f"{len(socks)} sockets, {len(states)} states")
    if not socks:
        return []
    begun = time.monotonic()
    saved = list(options.save(socks) if saved_options is None else saved_options)
    new = [sock for sock in socks if not is_in_repair(sock)]
    enter_repair(new)
    try:
        raw = _read_all(socks, saved)
    except BaseException:
        for sock in new:
            sock.setsockopt(Level.TCP, TCP.REPAIR, -1)
        for sock, state in zip(socks, states, strict=True):
            sock.setsockopt(Level.SOCKET, SO.REUSEADDR, state.reuse_address)
        raise
    spent = time.monotonic() - begun
    return [_record(*parts, spent) for parts in zip(raw, states, saved, strict=True)]


@dataclass(slots=True)
class _Raw:
    """One connection as the kernel's calls gave it."""

    family: int
    info: TcpInfo
    mss: int
    timestamp: int
    window: RepairWindow
    congestion: str
    sndbuf: int
    rcvbuf: int
    lock: int
    outq: int
    nsd: int
    inq: int
    write_seq: int
    rcv_nxt: int
    local: bytes
    peer: bytes
    send_queue: bytes = b""
    receive_queue: bytes = b""

    @property
    def position(self) -> tuple[int, ...]:
        """What must not change while it is read."""
        return self.info.state, self.outq, self.nsd, self.inq, self.write_seq, self.rcv_nxt


def _read_all(socks: Sequence[socket.socket], saved: Sequence[options.Saved]) -> list[_Raw]:
    """Read until nothing moves; SO_OOBINLINE and SO_PEEK_OFF are given back in any case."""
    peeked = [(s, o.numbers["so.peek_off"][0]) for s, o in zip(socks, saved, strict=True) if "so.peek_off" in o.numbers]
    inline = [o.numbers.get("so.oobinline", (0,))[0] for o in saved]
    for sock, _ in peeked:
        # else peeking would begin at the application's offset
        sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, -1)
    # Otherwise SIOCINQ stops at the urgent mark and hides what is behind it.
    _set_inline(socks, [1] * len(socks))
    try:
        raw = _read_once(socks)
        todo = list(range(len(socks)))
        for _ in range(_TRIES):
            _peek(todo, socks, raw)
            again = _positions([socks[i] for i in todo])
            todo = [i for i, position in zip(todo, again, strict=True) if position != raw[i].position]
            if not todo:
                return raw
            for i, fresh in zip(todo, _read_once([socks[i] for i in todo]), strict=True):
                raw[i] = fresh
        raise StillMoving("its queues keep changing although it is frozen", object=describe(socks[todo[0]]))
    finally:
        _set_inline(socks, inline)
        for sock, offset in peeked:
            sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, offset)


def _set_inline(socks: Sequence[socket.socket], values: Sequence[int]) -> None:
    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    rows.setsockopt(fd, Level.SOCKET, SO.OOBINLINE, rows.u32(values))
    with failures(socks):
        rows.run()


def _ioctl(rows: Rows, fd: object, request: Ioctl) -> Callable[[], list[int]]:
    value = rows.room(4)
    rows.call(SYS.ioctl, fd, request, value, label=request.name)  # type: ignore[arg-type]
    return value.u32


def _queue_seq(rows: Rows, fd: object, queue: RepairQueue) -> Callable[[], list[int]]:
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, queue)  # type: ignore[arg-type]
    return rows.getsockopt(fd, Level.TCP, TCP.QUEUE_SEQ, 4).u32  # type: ignore[arg-type]


def _read_once(socks: Sequence[socket.socket]) -> list[_Raw]:
    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    info = rows.getsockopt(fd, Level.TCP, TCP.INFO, INFO_SIZE)
    mss = rows.getsockopt(fd, Level.TCP, TCP.MAXSEG, 4)
    timestamp = rows.getsockopt(fd, Level.TCP, TCP.TIMESTAMP, 4)
    window = rows.getsockopt(fd, Level.TCP, TCP.REPAIR_WINDOW, WINDOW_SIZE)
    congestion = rows.getsockopt(fd, Level.TCP, TCP.CONGESTION, CONGESTION_NAME_SIZE)
    sndbuf = rows.getsockopt(fd, Level.SOCKET, SO.SNDBUF, 4)
    rcvbuf = rows.getsockopt(fd, Level.SOCKET, SO.RCVBUF, 4)
    # before 5.14 there is none: as if the application had fixed nothing
    lock = rows.getsockopt(fd, Level.SOCKET, SO.BUF_LOCK, 4, ignore=True)
    mark = _ioctl(rows, fd, Ioctl.SIOCATMARK)
    queues = [_ioctl(rows, fd, request) for request in (Ioctl.SIOCOUTQ, Ioctl.SIOCOUTQNSD, Ioctl.SIOCINQ)]
    write_seq = _queue_seq(rows, fd, RepairQueue.SEND)
    rcv_nxt = _queue_seq(rows, fd, RepairQueue.RECEIVE)
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    names = []
    for number, label in ((SYS.getsockname, "getsockname"), (SYS.getpeername, "getpeername")):
        address, length = rows.room(sockets.ADDRESS_SIZE), rows.constant(struct.pack("i", sockets.ADDRESS_SIZE))
        rows.call(number, fd, address, length, ignore=True, label=label)
        names.append(address)
    with failures(socks):
        rows.run()
    infos = [TcpInfo.unpack(data) for data in info.all()]
    for sock, known, at_mark in zip(socks, infos, mark(), strict=True):
        state = STATES.get(TcpState(known.state))
        if state is None or not supported(state):
            kind = "LISTEN" if state is None else state.value
            raise UnsupportedState(f"its state is {kind}", object=describe(sock))
        if at_mark:
            raise UrgentData("the urgent mark is the next byte to be read", object=describe(sock))
    columns = zip(
        [s.family for s in socks],
        infos,
        mss.u32(),
        timestamp.u32(),
        [RepairWindow.unpack(data) for data in window.all()],
        [data.rstrip(b"\0").decode("ascii", "replace") for data in congestion.all()],
        sndbuf.u32(),
        rcvbuf.u32(),
        lock.u32(),
        *(queue() for queue in queues),
        write_seq(),
        rcv_nxt(),
        names[0].all(),
        names[1].all(),
        strict=True,
    )
    return [_Raw(*column) for column in columns]


def _positions(socks: Sequence[socket.socket]) -> list[tuple[int, ...]]:
    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    # the first bytes of TCP_INFO hold the state
    info = rows.getsockopt(fd, Level.TCP, TCP.INFO, 8)
    queues = [_ioctl(rows, fd, request) for request in (Ioctl.SIOCOUTQ, Ioctl.SIOCOUTQNSD, Ioctl.SIOCINQ)]
    ends = [_queue_seq(rows, fd, RepairQueue.SEND), _queue_seq(rows, fd, RepairQueue.RECEIVE)]
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    with failures(socks):
        rows.run()
    states = [number & 0xFF for number in info.u32()]
    return list(zip(states, *(read() for read in (*queues, *ends)), strict=True))


def _peek(indices: Iterable[int], socks: Sequence[socket.socket], raw: Sequence[_Raw]) -> None:
    """Read the queues' bytes into ``raw``."""
    wanted: dict[RepairQueue, list[tuple[int, int]]] = {RepairQueue.SEND: [], RepairQueue.RECEIVE: []}
    for i in indices:
        sent = _sent_fin(raw[i])
        out = raw[i].outq - (1 if sent and raw[i].outq else 0)
        raw[i].send_queue = raw[i].receive_queue = b""
        if out:
            wanted[RepairQueue.SEND].append((i, out))
        if raw[i].inq:
            wanted[RepairQueue.RECEIVE].append((i, raw[i].inq))
    for queue, sizes in wanted.items():
        if sizes:
            for (i, size), data in zip(sizes, _peek_queue([socks[i] for i, _ in sizes], sizes, queue), strict=True):
                short = len(data) < size
                if short and queue is RepairQueue.RECEIVE and _stops_at_mark(socks[i], len(data)):
                    raise UrgentData(f"an urgent mark stands {len(data)} bytes into it", object=describe(socks[i]))
                if queue is RepairQueue.SEND:
                    raw[i].send_queue = data
                else:
                    raw[i].receive_queue = data


def _stops_at_mark(sock: socket.socket, position: int) -> bool:
    """Whether peeking stopped in the middle of the queue although nothing else can stop it: at the urgent mark."""
    return ioctl_int(sock.fileno(), Ioctl.SIOCINQ) > position


def _peek_queue(socks: Sequence[socket.socket], sizes: Sequence[tuple[int, int]], queue: RepairQueue) -> list[bytes]:
    lengths = [size for _, size in sizes]
    memory = ctypes.create_string_buffer(sum(lengths))
    base = ctypes.addressof(memory)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, queue)
    at, size = rows.numbers([base + start for start in starts[:-1]]), rows.numbers(lengths)
    # an error (nothing there any more) shows as a short queue, and the connection is read again
    got = rows.call(SYS.recvfrom, fd, at, size, _PEEK, 0, 0, ignore=True, label="peeking a queue")
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    with failures(socks):
        rows.run()
    view = memoryview(memory)
    return [bytes(view[start : start + max(0, count)]) for start, count in zip(starts, got.values(), strict=False)]


def _sent_fin(raw: _Raw) -> bool:
    return STATES[TcpState(raw.info.state)] in LOCALLY_FINISHED


def _record(raw: _Raw, state: QuietState, saved: options.Saved, spent: float) -> ConnectionRecord:
    name = STATES[TcpState(raw.info.state)]
    fin = LocalFin.NONE
    end, outq, nsd = raw.write_seq, raw.outq, raw.nsd
    if name in LOCALLY_FINISHED:
        fin = LocalFin.ACKED if not outq else LocalFin.QUEUED if nsd else LocalFin.SENT
        end, outq, nsd = end - 1, max(0, outq - 1), max(0, nsd - 1)
    rcv_nxt = raw.rcv_nxt - (name in PEER_FINISHED)
    # the window update that acknowledged the peer's FIN counts it
    beyond = 1 if name in PEER_FINISHED and raw.window.rcv_wup == raw.rcv_nxt else 0
    local, local_port, _, scope = sockets.unpack_address(raw.local)
    peer, peer_port, flow_info, _ = sockets.unpack_address(raw.peer)
    suffix = f"%{socket.if_indextoname(scope)}" if scope else ""
    info = raw.info
    scaled = bool(info.options & InfoOption.WSCALE)
    timestamps = None
    if info.options & InfoOption.TIMESTAMPS:
        timestamps = advance(Timestamps(value=raw.timestamp, microseconds=bool(raw.timestamp & 1)), spent)
    numbers = dict(saved.numbers)
    for keyword, value in (
        ("so.mark", state.mark),
        ("so.keepalive", int(state.keepalive)),
        ("tcp.user_timeout", state.user_timeout),
        ("ip.minttl", state.minimum_ttl),
        ("ipv6.minhopcount", state.minimum_hops),
    ):
        numbers.pop(keyword, None)
        if value:
            numbers[keyword] = (value,)
    return ConnectionRecord(
        conn_id=ConnId.tcp(local + suffix, local_port, peer + suffix, peer_port),
        family=Family.IPV4 if raw.family == socket.AF_INET else Family.IPV6 if sockets.is_v6(local) else Family.MAPPED,
        state=name,
        snd_una=(end - outq) & SEQ_MASK,
        snd_nxt=(end - nsd) & SEQ_MASK,
        send_queue=raw.send_queue,
        rcv_nxt=rcv_nxt & SEQ_MASK,
        receive_queue=raw.receive_queue,
        windows=_windows(raw.window, rcv_nxt & SEQ_MASK, beyond),
        negotiated=Negotiated(
            mss=raw.mss,
            snd_wscale=info.snd_wscale if scaled else None,
            rcv_wscale=info.rcv_wscale if scaled else None,
            sack=bool(info.options & InfoOption.SACK),
            timestamps=timestamps is not None,
            ecn=bool(info.options & InfoOption.ECN),
        ),
        buffers=Buffers(
            send=raw.sndbuf,
            receive=raw.rcvbuf,
            send_locked=bool(raw.lock & BufferLock.SEND),
            receive_locked=bool(raw.lock & BufferLock.RECEIVE),
        ),
        congestion=raw.congestion,
        timestamps=timestamps,
        local_fin=fin,
        options=numbers,
        option_data=saved.data,
        filter=state.filter,
        filter_locked=state.filter_locked,
        reuse_address=state.reuse_address,
        soft=SoftState(
            cwnd=info.snd_cwnd,
            ssthresh=info.snd_ssthresh,
            srtt=info.rtt,
            rttvar=info.rttvar,
            rto=info.rto,
            min_rtt=info.min_rtt,
            reordering=info.reordering,
            path_mtu=info.pmtu,
            advertised_mss=info.advmss,
        ),
        flow_info=flow_info,
        scope=suffix.removeprefix("%"),
    )


def _windows(window: RepairWindow, rcv_nxt: int, beyond: int) -> Windows:
    """As read, but such that the kernel takes it back.

    Where memory was short it offers no window at all, although a later segment was the last to update the peer's: then
    that segment lies beyond our window, which tcp_repair_set_window refuses.
    """
    rcv_wnd = window.rcv_wnd + beyond
    edge = (rcv_nxt + rcv_wnd) & SEQ_MASK
    return Windows(
        snd_wl1=rcv_nxt if before(edge, window.snd_wl1) else window.snd_wl1,
        snd_wnd=window.snd_wnd,
        max_window=max(window.max_window, window.snd_wnd),
        rcv_wnd=rcv_wnd,
        rcv_wup=(window.rcv_wup - beyond) & SEQ_MASK,
    )


def advance(timestamps: Timestamps, seconds: float) -> Timestamps:
    """The clock after ``seconds``, at least one tick on: it may run ahead of the real one, never behind."""
    ticks = int(max(0.0, seconds) * (1_000_000 if timestamps.microseconds else 1_000)) + 1
    # bit 0 is the kernel's microsecond flag, not part of the clock
    value = (timestamps.value + ticks + 1) & SEQ_MASK & ~1 | timestamps.microseconds
    return dataclasses.replace(timestamps, value=value)
