"""Frozen connections to portable records (paper, 5.2 and 5.4).

The owner must be stopped and the sockets quiet (:func:`tcpstate.freeze.quiet`). What is read, and how, is told in
:mod:`tcpstate.reading`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import socket
import sys
import time
from collections.abc import Mapping, Sequence

from tcpstate import options
from tcpstate.closed import pending_error
from tcpstate.connid import ConnId
from tcpstate.early import Early
from tcpstate.errors import KernelFeatureMissing
from tcpstate.freeze import QuietState, enter_repair
from tcpstate.kernel import sockets
from tcpstate.kernel.bpf.urgentmode import urgent_bytes
from tcpstate.kernel.sockets import SO, BufferLock, Level
from tcpstate.kernel.tcp import TCP, InfoOption, Repair, TcpState
from tcpstate.md5keys import SigningKey, keys_of
from tcpstate.preflight import refusal, state_of, supported
from tcpstate.reading import Numbers, Raw, read_all
from tcpstate.record import (
    LOCALLY_FINISHED,
    PEER_FINISHED,
    VERSION,
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
from tcpstate.segment import SEQ_MASK, before
from tcpstate.trusted import maker

__all__ = ["advance", "export_connections", "later", "refusal", "state_of", "supported"]

log = logging.getLogger(__name__)

#: bytes of TCP_INFO from which on min_rtt is among them (kernel 4.3)
_WITH_MIN_RTT = 152
#: likewise pacing_rate (3.15)
_WITH_PACING = 112
_TIMESTAMPS = int(InfoOption.TIMESTAMPS)
_ESTABLISHED = int(TcpState.ESTABLISHED)


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
    entered = enter_repair(socks)
    try:
        raw = read_all(socks, saved, known)
        for one, unsent in zip(raw, entered.unsent, strict=True):
            if unsent > one.nsd:
                one.nsd = max(one.nsd, min(one.told.outq, unsent))
    except BaseException:
        for i in entered.new:
            socks[i].setsockopt(Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE)
        for sock, state in zip(socks, states, strict=True):
            sock.setsockopt(Level.SOCKET, SO.REUSEADDR, state.reuse_address)
        raise
    spent = time.monotonic() - begun
    make = functools.partial(_record, spent=spent, shared=_Shared(), urgent=_urgent(raw))
    return list(map(make, raw, socks, states, saved, signing))


def _urgent(raw: Sequence[Raw]) -> Mapping[ConnId, int]:
    """Where the connections have urgent bytes of their own among what they have to send."""
    if not any(one.send_queue for one in raw):
        return {}
    try:
        return urgent_bytes()
    except (KernelFeatureMissing, OSError) as error:
        # they go out as ordinary bytes then (docs/reference/states.md)
        log.warning("whether urgent data is under way is not known, it would go on without its mark: %s", error)
        return {}


class _Shared:
    """Parts of records that many connections have in common: made, and checked, once each."""

    def __init__(self) -> None:
        self.negotiated = functools.cache(_negotiated)
        self.buffers = functools.cache(_buffers)
        self.address = functools.cache(_address)
        self.congestion = functools.cache(_congestion)
        self._options: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}

    def options(self, state: QuietState, saved: options.Saved) -> dict[str, tuple[int, ...]]:
        """The options in a record; of connections that are alike it is the same mapping."""
        # by identity: both outlive this, and looking for equal ones would take longer than making them
        key = id(state), id(saved)
        found = self._options.get(key)
        if found is None:
            found = self._options[key] = _options(state, saved)
        return found


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
    urgent: Mapping[ConnId, int],
) -> ConnectionRecord:
    told = raw.told
    fin, error, name = LocalFin.NONE, "", State.ESTABLISHED
    end, outq, nsd, rcv_nxt, beyond = told.write_seq, told.outq, raw.nsd, told.rcv_nxt, 0
    if told.number != _ESTABLISHED:
        name = raw.state
        finished = name in PEER_FINISHED
        if name in LOCALLY_FINISHED:
            fin = LocalFin.ACKED if not outq else LocalFin.QUEUED if nsd else LocalFin.SENT
            end, outq, nsd = end - 1, max(0, outq - 1), max(0, nsd - 1)
        elif name is State.CLOSED:
            # the send queue went with the connection
            outq = nsd = 0
            established = bool(told.rcv_nxt or told.max_window)
            error, _ = pending_error(sock, established=established)
            finished = established and not error
            end -= finished
        rcv_nxt = (told.rcv_nxt - finished) & SEQ_MASK
        # the window update that acknowledged the peer's FIN counts it
        beyond = 1 if finished and told.rcv_wup == told.rcv_nxt else 0
    local, _, scope, family = shared.address(told.local_family, told.local_rest)
    if raw.peer is None:
        peer, flow_info, _, _ = shared.address(told.peer_family, told.peer_rest)
        peer_port = told.peer_port
    else:
        peer, flow_info, _, _ = shared.address(raw.peer[:2], raw.peer[4:])
        peer_port = raw.peer[2:4]
    device = ""
    if scope:
        device = socket.if_indextoname(scope)
        local, peer = f"{local}%{device}", f"{peer}%{device}"
    timestamps = None
    if told.info_options & _TIMESTAMPS or name is State.SYN_SENT:
        usec = told.timestamp & 1
        timestamps = _make_timestamps(later(told.timestamp, usec, spent), bool(usec))
    conn = _make_conn_id("tcp", local, int.from_bytes(told.local_port, "big"), peer, int.from_bytes(peer_port, "big"))
    snd_una = (end - outq) & SEQ_MASK
    ahead = (urgent[conn] - snd_una) & SEQ_MASK if urgent and conn in urgent else 0
    made = _make_record(
        conn,
        family,
        name,
        snd_una,
        (end - nsd) & SEQ_MASK,
        raw.send_queue,
        rcv_nxt,
        raw.receive_queue,
        _windows(told, rcv_nxt, beyond),
        shared.negotiated(told.mss, told.info_options, told.scales),
        shared.buffers(told.sndbuf, told.rcvbuf, told.lock),
        shared.congestion(told.congestion),
        timestamps,
        fin,
        shared.options(state, saved),
        saved.data,
        state.filter,
        state.filter_locked,
        state.reuse_address,
        _make_soft(
            told.cwnd, told.ssthresh, told.srtt, told.rttvar, told.rto,
            told.min_rtt if told.info_length >= _WITH_MIN_RTT else None,
            told.reordering, told.path_mtu, told.advertised_mss,
            told.pacing_rate if told.info_length >= _WITH_PACING else None,
        ),
        flow_info,
        device,
        keys,
        error,
        raw.urgent,
        raw.taken,
        ahead if 0 < ahead <= len(raw.send_queue) else None,
        ("urgent_in",) if raw.urgent is not None else (),
        VERSION,
    )  # fmt: skip
    # what the kernel told is in range; whether it goes together is another matter
    made.check()
    return made


#: their parts are the kernel's numbers, of the right size
_make_conn_id = maker(ConnId, "protocol", "local", "local_port", "peer", "peer_port")
_make_windows = maker(Windows, "snd_wl1", "snd_wnd", "max_window", "rcv_wnd", "rcv_wup")
_make_timestamps = maker(Timestamps, "value", "microseconds")
_make_soft = maker(
    SoftState, "cwnd", "ssthresh", "srtt", "rttvar", "rto", "min_rtt", "reordering", "path_mtu", "advertised_mss",
    "pacing_rate",
)  # fmt: skip
_make_record = maker(
    ConnectionRecord,
    "conn_id", "family", "state", "snd_una", "snd_nxt", "send_queue", "rcv_nxt", "receive_queue", "windows",
    "negotiated", "buffers", "congestion", "timestamps", "local_fin", "options", "option_data", "filter",
    "filter_locked", "reuse_address", "soft", "flow_info", "scope", "signing_keys", "error", "urgent_in",
    "urgent_taken", "urgent_out", "required", "version",
)  # fmt: skip


def _address(family: bytes, rest: bytes) -> tuple[str, int, int, Family]:
    """(text, flow info, scope, kind of socket) of what stands before and behind the port in a struct sockaddr."""
    text, _, flow_info, scope = sockets.unpack_address(family + bytes(2) + rest)
    if int.from_bytes(family, sys.byteorder) == socket.AF_INET:
        return text, flow_info, scope, Family.IPV4
    return text, flow_info, scope, Family.IPV6 if sockets.is_v6(text) else Family.MAPPED


def _windows(told: Numbers, rcv_nxt: int, beyond: int) -> Windows:
    """As read, but such that the kernel takes it back.

    Where memory was short it offers no window at all, although a later segment was the last to update the peer's: then
    that segment lies beyond our window, which tcp_repair_set_window refuses.
    """
    rcv_wnd, wl1, snd_wnd, largest = told.rcv_wnd + beyond, told.snd_wl1, told.snd_wnd, told.max_window
    return _make_windows(
        rcv_nxt if before((rcv_nxt + rcv_wnd) & SEQ_MASK, wl1) else wl1,
        snd_wnd,
        largest if largest > snd_wnd else snd_wnd,
        rcv_wnd,
        (told.rcv_wup - beyond) & SEQ_MASK,
    )


def advance(timestamps: Timestamps, seconds: float) -> Timestamps:
    """The clock after ``seconds``, at least one tick on: it may run ahead of the real one, never behind."""
    return dataclasses.replace(timestamps, value=later(timestamps.value, timestamps.microseconds, seconds))


def later(value: int, microseconds: int, seconds: float) -> int:
    """As :func:`advance`, of the bare 32-bit number."""
    ticks = int(max(0.0, seconds) * (1_000_000 if microseconds else 1_000)) + 1
    # bit 0 is the kernel's microsecond flag, not part of the clock
    return (value + ticks + 1) & SEQ_MASK & ~1 | microseconds
