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
import errno
import functools
import itertools
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tcpstate import options
from tcpstate.connid import ConnId
from tcpstate.early import COUNTED, Early, consumed
from tcpstate.errors import StillMoving, UnsupportedState, UrgentData
from tcpstate.freeze import QuietState, enter_repair, not_in_repair
from tcpstate.kernel import sockets
from tcpstate.kernel.columns import Column, Field, Reusable, RowResult, Rows
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import SO, BufferLock, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import (
    CONGESTION_NAME_SIZE,
    INFO_SIZE,
    TCP,
    WINDOW_SIZE,
    InfoOption,
    RepairQueue,
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
    State,
    Timestamps,
    Windows,
)
from tcpstate.rows import describe, failures
from tcpstate.segment import SEQ_MASK, before

__all__ = ["advance", "export_connections", "refusal", "state_of", "supported"]

#: how often a connection is read again whose state changed while it was read
_TRIES = 5
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
#: bytes of a queue up to which queues are read in one batch
_SMALL = 64 << 10
#: bytes of TCP_INFO from which on min_rtt is among them (kernel 4.3)
_WITH_MIN_RTT = 152
_TIMESTAMPS = int(InfoOption.TIMESTAMPS)
_STATES = {int(number): state for number, state in STATES.items()}


def export_connections(
    socks: Sequence[socket.socket],
    states: Sequence[QuietState],
    *,
    saved_options: Sequence[options.Saved] | None = None,
    early: list[Early | None] | None = None,
) -> list[ConnectionRecord]:
    """Records of quiet connections, in the same order. They are in repair mode afterwards, or as before if it fails.

    states         what :func:`~tcpstate.freeze.quiet` returned: their originals go into the records
    saved_options  their options, if :func:`tcpstate.options.save` read them since their owners were stopped
    early          what :func:`tcpstate.early.read_early` read since then, and what a record's receive queue is to be
                   without: it begins behind it. What does not hold any more becomes None in the list, and the record is
                   whole

    The timestamps of the records are those of the moment of return: whoever rebuilds counts the seconds from there.
    UnsupportedState, UrgentData, StillMoving, ConnectionCallFailed: of the first connection that has the trouble.
    """
    if len(socks) != len(states):
        raise ValueError(f"{len(socks)} sockets, {len(states)} states")
    if not socks:
        return []
    begun = time.monotonic()
    known: list[Early | None] = [None] * len(socks) if early is None else early
    saved = options.save(socks) if saved_options is None else options.refresh(socks, saved_options)
    new = not_in_repair(socks)
    enter_repair(new)
    try:
        raw = _read_all(socks, saved, known)
    except BaseException:
        for sock in new:
            sock.setsockopt(Level.TCP, TCP.REPAIR, -1)
        for sock, state in zip(socks, states, strict=True):
            sock.setsockopt(Level.SOCKET, SO.REUSEADDR, state.reuse_address)
        raise
    spent = time.monotonic() - begun
    shared = _Shared()
    return [_record(*parts, spent, shared) for parts in zip(raw, socks, states, saved, strict=True)]


@dataclass(slots=True)
class _Raw:
    """One connection as the kernel's calls gave it; up to ``mss`` in the order of :func:`_build_reading`."""

    number: int
    info_options: int
    scales: int
    rto: int
    path_mtu: int
    srtt: int
    rttvar: int
    ssthresh: int
    cwnd: int
    advertised_mss: int
    reordering: int
    bytes_received: int
    min_rtt: int
    info_length: int
    mss: int
    timestamp: int
    snd_wl1: int
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int
    congestion: bytes
    sndbuf: int
    rcvbuf: int
    lock: int
    at_mark: int
    outq: int
    nsd: int
    inq: int
    write_seq: int
    rcv_nxt: int
    local: bytes
    peer: bytes
    send_queue: bytes = b""
    receive_queue: bytes = b""
    #: bytes at the head of the receive queue that were read early, and are not read again
    early: int = 0

    @property
    def position(self) -> tuple[int, ...]:
        """What must not change while it is read."""
        return self.number, self.outq, self.nsd, self.inq, self.write_seq, self.rcv_nxt

    @property
    def state(self) -> State:
        """In the record's words."""
        return _STATES[self.number]

    @property
    def consumed(self) -> int | None:
        """Bytes that the application has taken, by the kernel's count; None on a kernel that does not count."""
        if self.info_length < COUNTED:
            return None
        return consumed(TcpState(self.number), self.bytes_received, self.inq)


def _read_all(socks: Sequence[socket.socket], saved: Sequence[options.Saved], early: list[Early | None]) -> list[_Raw]:
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
            _peek(todo, socks, raw, early)
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


def _build_inline(rows: Rows) -> tuple[Column, Field]:
    fd, value = rows.column(), rows.room(4)
    rows.setsockopt(fd, Level.SOCKET, SO.OOBINLINE, value)
    return fd, value


_inline = Reusable(_build_inline)


def _set_inline(socks: Sequence[socket.socket], values: Sequence[int]) -> None:
    rows, (fd, value) = _inline.of(len(socks))
    fd.set(s.fileno() for s in socks)
    value.set(values)
    with failures(socks):
        rows.run()


def _ioctl(rows: Rows, fd: Column, request: Ioctl) -> Field:
    value = rows.room(4)
    rows.call(SYS.ioctl, fd, request, value, label=request.name)
    return value


def _queue_seq(rows: Rows, fd: Column, queue: RepairQueue) -> Field:
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, queue)
    return rows.getsockopt(fd, Level.TCP, TCP.QUEUE_SEQ, 4)


def _build_reading(rows: Rows) -> tuple[Column, struct.Struct]:
    fd = rows.column()
    info = rows.getsockopt(fd, Level.TCP, TCP.INFO, INFO_SIZE)
    mss = rows.getsockopt(fd, Level.TCP, TCP.MAXSEG, 4)
    timestamp = rows.getsockopt(fd, Level.TCP, TCP.TIMESTAMP, 4)
    window = rows.getsockopt(fd, Level.TCP, TCP.REPAIR_WINDOW, WINDOW_SIZE)
    congestion = rows.getsockopt(fd, Level.TCP, TCP.CONGESTION, CONGESTION_NAME_SIZE)
    sndbuf = rows.getsockopt(fd, Level.SOCKET, SO.SNDBUF, 4)
    rcvbuf = rows.getsockopt(fd, Level.SOCKET, SO.RCVBUF, 4)
    # before 5.14 there is none: as if the application had fixed nothing
    lock = rows.getsockopt(fd, Level.SOCKET, SO.BUF_LOCK, 4, ignore=True)
    requests = (Ioctl.SIOCATMARK, Ioctl.SIOCOUTQ, Ioctl.SIOCOUTQNSD, Ioctl.SIOCINQ)
    queues = [_ioctl(rows, fd, request) for request in requests]
    write_seq = _queue_seq(rows, fd, RepairQueue.SEND)
    rcv_nxt = _queue_seq(rows, fd, RepairQueue.RECEIVE)
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    names = []
    for number, label in ((SYS.getsockname, "getsockname"), (SYS.getpeername, "getpeername")):
        address, length = rows.room(sockets.ADDRESS_SIZE), rows.constant(struct.pack("i", sockets.ADDRESS_SIZE))
        rows.call(number, fd, address, length, ignore=True, label=label)
        names.append(address)
    numbers = [(field, "I") for field in (sndbuf, rcvbuf, lock, *queues, write_seq, rcv_nxt)]
    if info.length_field is None:
        raise RuntimeError("a getsockopt without a length")
    # In struct tcp_info: state, options, scales, rto, pmtu, rtt and what follows, bytes_received, min_rtt.
    return fd, rows.reader(
        (info, "B4xBBxI48xI4xIIIIII36xQ12xI"),
        (info.length_field, "I"),
        (mss, "I"),
        (timestamp, "I"),
        (window, "5I"),
        (congestion, f"{CONGESTION_NAME_SIZE}s"),
        *numbers,
        *((name, f"{sockets.ADDRESS_SIZE}s") for name in names),
    )


_reading = Reusable(_build_reading)


def _read_once(socks: Sequence[socket.socket]) -> list[_Raw]:
    rows, (fd, reader) = _reading.of(len(socks))
    fd.set(s.fileno() for s in socks)
    with failures(socks):
        rows.run()
    found = [_Raw(*parts) for parts in reader.iter_unpack(rows.memory)]
    for sock, raw in zip(socks, found, strict=True):
        state = _STATES.get(raw.number)
        if state is None or not supported(state):
            kind = "LISTEN" if state is None else state.value
            raise UnsupportedState(f"its state is {kind}", object=describe(sock))
        if raw.at_mark:
            raise UrgentData("the urgent mark is the next byte to be read", object=describe(sock))
    return found


def _build_position(rows: Rows) -> tuple[Column, struct.Struct]:
    fd = rows.column()
    # the first byte of TCP_INFO is the state
    info = rows.getsockopt(fd, Level.TCP, TCP.INFO, 8)
    queues = [_ioctl(rows, fd, request) for request in (Ioctl.SIOCOUTQ, Ioctl.SIOCOUTQNSD, Ioctl.SIOCINQ)]
    ends = [_queue_seq(rows, fd, RepairQueue.SEND), _queue_seq(rows, fd, RepairQueue.RECEIVE)]
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    return fd, rows.reader((info, "B"), *((part, "I") for part in (*queues, *ends)))


_position = Reusable(_build_position)


def _positions(socks: Sequence[socket.socket]) -> list[tuple[int, ...]]:
    rows, (fd, reader) = _position.of(len(socks))
    fd.set(s.fileno() for s in socks)
    with failures(socks):
        rows.run()
    return list(reader.iter_unpack(rows.memory))


def _peek(
    indices: Iterable[int], socks: Sequence[socket.socket], raw: Sequence[_Raw], early: list[Early | None]
) -> None:
    """Read the queues' bytes into ``raw``."""
    small: dict[RepairQueue, list[tuple[int, int]]] = {RepairQueue.SEND: [], RepairQueue.RECEIVE: []}
    for i in indices:
        one, sock, known = raw[i], socks[i], early[i]
        one.send_queue = one.receive_queue = b""
        out = one.outq - (1 if _sent_fin(one) and one.outq else 0)
        if out > _SMALL:
            one.send_queue = _peek_large(sock, RepairQueue.SEND, out)
        elif out:
            small[RepairQueue.SEND].append((i, out))
        if known is not None and (known.consumed != one.consumed or known.count > one.inq):
            # somebody has read from it
            known = early[i] = None
        if known is not None or one.inq > _SMALL:
            done = 0 if known is None else known.count
            one.receive_queue = _peek_large(sock, RepairQueue.RECEIVE, one.inq, done) if one.inq > done else b""
            _whole(sock, one, done + len(one.receive_queue))
        elif one.inq:
            small[RepairQueue.RECEIVE].append((i, one.inq))
    for queue, sizes in small.items():
        if sizes:
            for (i, _), data in zip(sizes, _peek_small([socks[i] for i, _ in sizes], sizes, queue), strict=True):
                if queue is RepairQueue.SEND:
                    raw[i].send_queue = data
                else:
                    raw[i].receive_queue = data
                    _whole(socks[i], raw[i], len(data))


def _whole(sock: socket.socket, raw: _Raw, position: int) -> None:
    """UrgentData if peeking stopped in the middle of the queue although nothing else can stop it: at the mark."""
    if position < raw.inq and ioctl_int(sock.fileno(), Ioctl.SIOCINQ) > position:
        raise UrgentData(f"an urgent mark stands {position} bytes into it", object=describe(sock))


def _peek_large(sock: socket.socket, queue: RepairQueue, size: int, start: int = 0) -> bytes:
    """The bytes of a queue from ``start`` up to ``size``, with one copy."""
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, queue)
    try:
        skip = start and not _skip(sock, start)
        data = sock.recv(size if skip else size - start, _PEEK)
        return data[start:] if skip else data
    except BlockingIOError:
        # nothing there any more: a short queue, and the connection is read again
        return b""
    finally:
        if start:
            _skip(sock, -1)
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)


def _skip(sock: socket.socket, offset: int) -> bool:
    """Let peeking begin at an offset (-1: at the head, as usual); whether this kernel can (TCP since 6.10)."""
    try:
        sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, offset)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    return True


def _build_peeking(rows: Rows) -> tuple[Column, Field, Column, Column, RowResult]:
    fd, queue, at, size = rows.column(), rows.room(4), rows.column(), rows.column()
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, queue)
    # an error (nothing there any more) shows as a short queue, and the connection is read again
    got = rows.call(SYS.recvfrom, fd, at, size, _PEEK, 0, 0, ignore=True, label="peeking a queue")
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    return fd, queue, at, size, got


_peeking = Reusable(_build_peeking)


def _peek_small(socks: Sequence[socket.socket], sizes: Sequence[tuple[int, int]], queue: RepairQueue) -> list[bytes]:
    lengths = [size for _, size in sizes]
    starts = list(itertools.accumulate(lengths, initial=0))
    memory = ctypes.create_string_buffer(starts[-1])
    base = ctypes.addressof(memory)
    rows, (fd, which, at, size, got) = _peeking.of(len(socks))
    fd.set(s.fileno() for s in socks)
    which.set([queue] * len(socks))
    at.set(base + start for start in starts[:-1])
    size.set(lengths)
    with failures(socks):
        rows.run()
    view = memoryview(memory)
    return [bytes(view[start : start + max(0, count)]) for start, count in zip(starts, got.values(), strict=False)]


def _sent_fin(raw: _Raw) -> bool:
    return raw.state in LOCALLY_FINISHED


class _Shared:
    """Parts of records that many connections have in common: made, and checked, once each."""

    def __init__(self) -> None:
        self.negotiated = functools.cache(_negotiated)
        self.buffers = functools.cache(_buffers)
        self.soft = functools.cache(_soft)
        self.address = functools.cache(sockets.unpack_address)


def _negotiated(mss: int, options: int, scales: int) -> Negotiated:
    scaled = bool(options & InfoOption.WSCALE)
    return Negotiated(
        mss=mss,
        # two bit fields: the low half is snd_wscale on little-endian machines
        snd_wscale=scales & 15 if scaled else None,
        rcv_wscale=scales >> 4 if scaled else None,
        sack=bool(options & InfoOption.SACK),
        timestamps=bool(options & InfoOption.TIMESTAMPS),
        ecn=bool(options & InfoOption.ECN),
    )


def _buffers(send: int, receive: int, lock: int) -> Buffers:
    return Buffers(
        send=send,
        receive=receive,
        send_locked=bool(lock & BufferLock.SEND),
        receive_locked=bool(lock & BufferLock.RECEIVE),
    )


def _soft(
    cwnd: int, ssthresh: int, srtt: int, rttvar: int, rto: int, min_rtt: int | None, reordering: int, mtu: int, mss: int
) -> SoftState:
    return SoftState(
        cwnd=cwnd,
        ssthresh=ssthresh,
        srtt=srtt,
        rttvar=rttvar,
        rto=rto,
        min_rtt=min_rtt,
        reordering=reordering,
        path_mtu=mtu,
        advertised_mss=mss,
    )


def _options(state: QuietState, saved: options.Saved) -> dict[str, tuple[int, ...]]:
    """Its own, where the freeze changed them."""
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
    return numbers


def _record(
    raw: _Raw, sock: socket.socket, state: QuietState, saved: options.Saved, spent: float, shared: _Shared
) -> ConnectionRecord:
    name = raw.state
    fin = LocalFin.NONE
    end, outq, nsd = raw.write_seq, raw.outq, raw.nsd
    if name in LOCALLY_FINISHED:
        fin = LocalFin.ACKED if not outq else LocalFin.QUEUED if nsd else LocalFin.SENT
        end, outq, nsd = end - 1, max(0, outq - 1), max(0, nsd - 1)
    finished = name in PEER_FINISHED
    rcv_nxt = (raw.rcv_nxt - finished) & SEQ_MASK
    # the window update that acknowledged the peer's FIN counts it
    beyond = 1 if finished and raw.rcv_wup == raw.rcv_nxt else 0
    local, local_port, _, scope = _address(raw.local, shared)
    peer, peer_port, flow_info, _ = _address(raw.peer, shared)
    suffix = f"%{socket.if_indextoname(scope)}" if scope else ""
    timestamps = None
    if raw.info_options & _TIMESTAMPS:
        usec = raw.timestamp & 1
        timestamps = Timestamps(value=_later(raw.timestamp, usec, spent), microseconds=bool(usec))
    return ConnectionRecord(
        conn_id=ConnId.tcp(local + suffix, local_port, peer + suffix, peer_port),
        family=Family.IPV4 if sock.family == socket.AF_INET else Family.IPV6 if sockets.is_v6(local) else Family.MAPPED,
        state=name,
        snd_una=(end - outq) & SEQ_MASK,
        snd_nxt=(end - nsd) & SEQ_MASK,
        send_queue=raw.send_queue,
        rcv_nxt=rcv_nxt,
        receive_queue=raw.receive_queue,
        windows=_windows(raw, rcv_nxt, beyond),
        negotiated=shared.negotiated(raw.mss, raw.info_options, raw.scales),
        buffers=shared.buffers(raw.sndbuf, raw.rcvbuf, raw.lock),
        congestion=raw.congestion.rstrip(b"\0").decode("ascii", "replace"),
        timestamps=timestamps,
        local_fin=fin,
        options=_options(state, saved),
        option_data=saved.data,
        filter=state.filter,
        filter_locked=state.filter_locked,
        reuse_address=state.reuse_address,
        soft=shared.soft(
            raw.cwnd, raw.ssthresh, raw.srtt, raw.rttvar, raw.rto,
            raw.min_rtt if raw.info_length >= _WITH_MIN_RTT else None,
            raw.reordering, raw.path_mtu, raw.advertised_mss,
        ),
        flow_info=flow_info,
        scope=suffix.removeprefix("%"),
    )  # fmt: skip


def _address(data: bytes, shared: _Shared) -> tuple[str, int, int, int]:
    """As :func:`tcpstate.kernel.sockets.unpack_address`; the text of each address is made once."""
    # the port is the one part that differs from connection to connection
    text, _, flow_info, scope = shared.address(data[:2] + b"\0\0" + data[4:])
    return text, data[2] << 8 | data[3], flow_info, scope


def _windows(raw: _Raw, rcv_nxt: int, beyond: int) -> Windows:
    """As read, but such that the kernel takes it back.

    Where memory was short it offers no window at all, although a later segment was the last to update the peer's: then
    that segment lies beyond our window, which tcp_repair_set_window refuses.
    """
    rcv_wnd = raw.rcv_wnd + beyond
    edge = (rcv_nxt + rcv_wnd) & SEQ_MASK
    return Windows(
        snd_wl1=rcv_nxt if before(edge, raw.snd_wl1) else raw.snd_wl1,
        snd_wnd=raw.snd_wnd,
        max_window=max(raw.max_window, raw.snd_wnd),
        rcv_wnd=rcv_wnd,
        rcv_wup=(raw.rcv_wup - beyond) & SEQ_MASK,
    )


def advance(timestamps: Timestamps, seconds: float) -> Timestamps:
    """The clock after ``seconds``, at least one tick on: it may run ahead of the real one, never behind."""
    return dataclasses.replace(timestamps, value=_later(timestamps.value, timestamps.microseconds, seconds))


def _later(value: int, microseconds: int, seconds: float) -> int:
    ticks = int(max(0.0, seconds) * (1_000_000 if microseconds else 1_000)) + 1
    # bit 0 is the kernel's microsecond flag, not part of the clock
    return (value + ticks + 1) & SEQ_MASK & ~1 | microseconds
