"""Frozen connections to portable records (paper, 5.2 and 5.4).

The owner must be stopped and the sockets quiet (:func:`tcpstate.freeze.quiet`). What is read, and how, is told in
:mod:`tcpstate.reading`.
"""

from __future__ import annotations

import dataclasses
import functools
import socket
import time
from collections.abc import Sequence

from tcpstate import options
from tcpstate.closed import pending_error
from tcpstate.connid import ConnId
from tcpstate.early import Early
from tcpstate.freeze import QuietState, enter_repair, not_in_repair
from tcpstate.kernel import sockets
from tcpstate.kernel.columns import Column, Field, Reusable, Rows
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import SO, BufferLock, Ioctl, Level
from tcpstate.kernel.tcp import TCP, InfoOption
from tcpstate.md5keys import SigningKey, keys_of
from tcpstate.preflight import refusal, state_of, supported
from tcpstate.reading import Raw, read_all
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
from tcpstate.rows import failures
from tcpstate.segment import SEQ_MASK, before

__all__ = ["advance", "export_connections", "later", "refusal", "state_of", "supported"]

#: bytes of TCP_INFO from which on min_rtt is among them (kernel 4.3)
_WITH_MIN_RTT = 152
#: likewise pacing_rate (3.15)
_WITH_PACING = 112
_TIMESTAMPS = int(InfoOption.TIMESTAMPS)
#: by whether the socket is an IPv4 one, and whether its addresses are IPv6
_FAMILIES = {(True, False): Family.IPV4, (False, True): Family.IPV6, (False, False): Family.MAPPED}


def export_connections(
    socks: Sequence[socket.socket],
    states: Sequence[QuietState],
    *,
    saved_options: Sequence[options.Saved] | None = None,
    early: list[Early | None] | None = None,
    keys: Sequence[tuple[SigningKey, ...]] | None = None,
) -> list[ConnectionRecord]:
    """Records of quiet connections, in the same order. They are in repair mode afterwards, or as before if it fails.

    states         what :func:`~tcpstate.freeze.quiet` returned: their originals go into the records
    saved_options  their options, if :func:`tcpstate.options.save` read them since their owners were stopped
    keys           what :func:`tcpstate.md5keys.keys_of` said since then
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
    signing = keys_of(socks) if keys is None else keys
    new = not_in_repair(socks)
    unsent = dict(zip((s.fileno() for s in new), _unsent(new), strict=True))
    enter_repair(new)
    try:
        raw = read_all(socks, saved, known)
        for one, sock in zip(raw, socks, strict=True):
            one.nsd = max(one.nsd, min(one.outq, unsent.get(sock.fileno(), 0)))
    except BaseException:
        for sock in new:
            sock.setsockopt(Level.TCP, TCP.REPAIR, -1)
        for sock, state in zip(socks, states, strict=True):
            sock.setsockopt(Level.SOCKET, SO.REUSEADDR, state.reuse_address)
        raise
    spent = time.monotonic() - begun
    shared = _Shared()
    return [_record(*parts, spent, shared) for parts in zip(raw, socks, states, saved, signing, strict=True)]


def _build_unsent(rows: Rows) -> tuple[Column, Field]:
    fd, value = rows.column(), rows.room(4)
    rows.call(SYS.ioctl, fd, Ioctl.SIOCOUTQNSD, value, label="SIOCOUTQNSD")
    return fd, value


_unsent_rows = Reusable(_build_unsent)


def _unsent(socks: Sequence[socket.socket]) -> list[int]:
    """Bytes that quiet connections have never sent.

    Asked before repair mode: while that has chosen the send queue, whatever makes the kernel look at the queue (a
    timer, a packet that left the device) counts all of it as sent, and what was never sent would wait for a
    time-out.
    """
    rows, (fd, value) = _unsent_rows.of(len(socks))
    fd.set(s.fileno() for s in socks)
    with failures(socks):
        rows.run()
    return value.u32()


class _Shared:
    """Parts of records that many connections have in common: made, and checked, once each."""

    def __init__(self) -> None:
        self.negotiated = functools.cache(_negotiated)
        self.buffers = functools.cache(_buffers)
        self.soft = functools.cache(_soft)
        self.address = functools.cache(sockets.unpack_address)
        self.congestion = functools.cache(_congestion)


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


def _congestion(name: bytes) -> str:
    return name.rstrip(b"\0").decode("ascii", "replace")


def _buffers(send: int, receive: int, lock: int) -> Buffers:
    return Buffers(
        send=send,
        receive=receive,
        send_locked=bool(lock & BufferLock.SEND),
        receive_locked=bool(lock & BufferLock.RECEIVE),
    )


def _soft(
    cwnd: int, ssthresh: int, srtt: int, rttvar: int, rto: int, min_rtt: int | None, reordering: int, mtu: int,
    mss: int, pacing_rate: int | None,
) -> SoftState:  # fmt: skip
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
        pacing_rate=pacing_rate,
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
    raw: Raw,
    sock: socket.socket,
    state: QuietState,
    saved: options.Saved,
    keys: tuple[SigningKey, ...],
    spent: float,
    shared: _Shared,
) -> ConnectionRecord:
    name = raw.state
    fin, error = LocalFin.NONE, ""
    end, outq, nsd = raw.write_seq, raw.outq, raw.nsd
    finished = name in PEER_FINISHED
    if name in LOCALLY_FINISHED:
        fin = LocalFin.ACKED if not outq else LocalFin.QUEUED if nsd else LocalFin.SENT
        end, outq, nsd = end - 1, max(0, outq - 1), max(0, nsd - 1)
    elif name is State.CLOSED:
        # the send queue went with the connection
        outq = nsd = 0
        established = bool(raw.rcv_nxt or raw.max_window)
        error, _ = pending_error(sock, established=established)
        finished = established and not error
        end -= finished
    rcv_nxt = (raw.rcv_nxt - finished) & SEQ_MASK
    # the window update that acknowledged the peer's FIN counts it
    beyond = 1 if finished and raw.rcv_wup == raw.rcv_nxt else 0
    local, local_port, _, scope = _address(raw.local, shared)
    peer, peer_port, flow_info, _ = _address(raw.peer, shared)
    suffix = f"%{socket.if_indextoname(scope)}" if scope else ""
    timestamps = None
    if raw.info_options & _TIMESTAMPS or name is State.SYN_SENT:
        usec = raw.timestamp & 1
        timestamps = Timestamps(value=later(raw.timestamp, usec, spent), microseconds=bool(usec))
    return ConnectionRecord(
        conn_id=ConnId("tcp", local + suffix, local_port, peer + suffix, peer_port),
        family=_FAMILIES[sockets.family_of(sock) == socket.AF_INET, sockets.is_v6(local)],
        state=name,
        snd_una=(end - outq) & SEQ_MASK,
        snd_nxt=(end - nsd) & SEQ_MASK,
        send_queue=raw.send_queue,
        rcv_nxt=rcv_nxt,
        receive_queue=raw.receive_queue,
        windows=_windows(raw, rcv_nxt, beyond),
        negotiated=shared.negotiated(raw.mss, raw.info_options, raw.scales),
        buffers=shared.buffers(raw.sndbuf, raw.rcvbuf, raw.lock),
        congestion=shared.congestion(raw.congestion),
        timestamps=timestamps,
        local_fin=fin,
        options=_options(state, saved),
        option_data=saved.data,
        filter=state.filter,
        filter_locked=state.filter_locked,
        reuse_address=state.reuse_address,
        urgent_in=raw.urgent,
        urgent_taken=raw.taken,
        required=("urgent_in",) if raw.urgent is not None else (),
        soft=shared.soft(
            raw.cwnd, raw.ssthresh, raw.srtt, raw.rttvar, raw.rto,
            raw.min_rtt if raw.info_length >= _WITH_MIN_RTT else None,
            raw.reordering, raw.path_mtu, raw.advertised_mss,
            raw.pacing_rate if raw.info_length >= _WITH_PACING else None,
        ),
        flow_info=flow_info,
        scope=suffix.removeprefix("%"),
        signing_keys=keys,
        error=error,
    )  # fmt: skip


def _address(data: bytes, shared: _Shared) -> tuple[str, int, int, int]:
    """As :func:`tcpstate.kernel.sockets.unpack_address`; the text of each address is made once."""
    # the port is the one part that differs from connection to connection
    text, _, flow_info, scope = shared.address(data[:2] + b"\0\0" + data[4:])
    return text, data[2] << 8 | data[3], flow_info, scope


def _windows(raw: Raw, rcv_nxt: int, beyond: int) -> Windows:
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
    return dataclasses.replace(timestamps, value=later(timestamps.value, timestamps.microseconds, seconds))


def later(value: int, microseconds: int, seconds: float) -> int:
    """As :func:`advance`, of the bare 32-bit number."""
    ticks = int(max(0.0, seconds) * (1_000_000 if microseconds else 1_000)) + 1
    # bit 0 is the kernel's microsecond flag, not part of the clock
    return (value + ticks + 1) & SEQ_MASK & ~1 | microseconds
