"""Frozen connections to portable records (paper, 5.2 and 5.4).

The owner must be stopped and the sockets quiet (:func:`tcpstate.freeze.quiet`). What is read, and how, is told in
:mod:`tcpstate.reading`.
"""

from __future__ import annotations

import dataclasses
import logging
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from socket import ntohs
from typing import Final, NamedTuple

from tcpstate import options
from tcpstate.closed import pending_error
from tcpstate.connid import ConnId
from tcpstate.early import Early
from tcpstate.errors import KernelFeatureMissing
from tcpstate.freeze import QuietState, enter_repair
from tcpstate.kernel import sockets
from tcpstate.kernel.bpf.urgentmode import urgent_bytes
from tcpstate.kernel.lanes import in_portions
from tcpstate.kernel.sockets import SO, BufferLock, Level
from tcpstate.kernel.tcp import TCP, InfoOption, Repair, TcpState
from tcpstate.making import make_record, make_soft, make_timestamps, make_windows
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
    State,
    Timestamps,
)
from tcpstate.segment import SEQ_MASK
from tcpstate.trusted import maker

__all__ = ["Passed", "advance", "export_connections", "idle_records", "later", "refusal", "state_of", "supported"]

log = logging.getLogger(__name__)

#: bytes of TCP_INFO from which on min_rtt is among them (kernel 4.3)
_WITH_MIN_RTT = 152
#: likewise pacing_rate (3.15)
_WITH_PACING = 112
_TIMESTAMPS = int(InfoOption.TIMESTAMPS)
_ESTABLISHED = int(TcpState.ESTABLISHED)
#: name, FIN, error, what the peer's FIN adds: of an established connection
_PLAIN: Final = State.ESTABLISHED, LocalFin.NONE, "", 0
_URGENT_IN: Final = ("urgent_in",)
_CLOCK: Final = SEQ_MASK & ~1
_SIGN: Final = 1 << 31


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

    The timestamps of the records are those of the moment of return, or hardly earlier: whoever rebuilds counts the
    seconds from there.
    UnsupportedState, UrgentData, StillMoving, ConnectionCallFailed: of the first connection that has the trouble.
    """
    if len(socks) != len(states):
        raise ValueError(f"{len(socks)} sockets, {len(states)} states")
    if not socks:
        return []
    known: list[Early | None] = [None] * len(socks) if early is None else early
    signing = keys_of(socks) if keys is None else keys
    shared, entered = _Shared(), list[int]()

    def export(part: slice) -> list[ConnectionRecord]:
        mine, some = socks[part], known[part]
        saved = None if saved_options is None else saved_options[part]
        made = _export(mine, states[part], saved, some, signing[part], shared, entered, part.start)
        known[part] = some
        return made

    try:
        return in_portions(len(socks), export)
    except BaseException:
        for i in entered:
            socks[i].setsockopt(Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE)
        for sock, state in zip(socks, states, strict=True):
            sock.setsockopt(Level.SOCKET, SO.REUSEADDR, state.reuse_address)
        raise


def _export(
    socks: Sequence[socket.socket],
    states: Sequence[QuietState],
    saved: Sequence[options.Saved] | None,
    early: list[Early | None],
    keys: Sequence[tuple[SigningKey, ...]],
    shared: _Shared,
    entered: list[int],
    first: int,
) -> list[ConnectionRecord]:
    """Records of some of them; ``entered``: the places, counted from ``first``, of those that enter repair mode."""
    begun = time.monotonic()
    saved = options.save(socks) if saved is None else options.refresh(socks, saved)
    found = enter_repair(socks)
    entered += [first + i for i in found.new]
    raw = read_all(socks, saved, early)
    for one, unsent in zip(raw, found.unsent, strict=True):
        if unsent > one.nsd:
            one.nsd = max(one.nsd, min(one.told.outq, unsent))
    urgent = shared.urgent() if any(one.send_queue for one in raw) else {}
    return _records(raw, socks, states, saved, keys, Passed(time.monotonic() - begun), shared, urgent)


def idle_records(
    told: Sequence[Numbers],
    socks: Sequence[socket.socket],
    states: Sequence[QuietState],
    saved: Sequence[options.Saved],
    seconds: float,
) -> list[ConnectionRecord]:
    """Records of established connections with nothing in their queues and no keys, read ``seconds`` ago."""
    none = [()] * len(told)
    return _records(list(map(Raw, told)), socks, states, saved, none, Passed(seconds), _Shared(), {})


def _urgent() -> Mapping[ConnId, int]:
    """Where the connections have urgent bytes of their own among what they have to send."""
    try:
        return urgent_bytes()
    except (KernelFeatureMissing, OSError) as error:
        # they go out as ordinary bytes then (docs/reference/states.md)
        log.warning("whether urgent data is under way is not known, it would go on without its mark: %s", error)
        return {}


class _Shared:
    """Parts of records that many connections have in common: made, and checked, once each."""

    def __init__(self) -> None:
        self.agreed: dict[tuple[object, ...], tuple[Negotiated, Buffers, str]] = {}
        self.ends: dict[tuple[bytes, ...], _Ends] = {}
        self._options: dict[tuple[int, int], tuple[dict[str, tuple[int, ...]], QuietState, options.Saved]] = {}
        self._urgent: Mapping[ConnId, int] | None = None
        self._lock = threading.Lock()

    def urgent(self) -> Mapping[ConnId, int]:
        """Asked once, when all are frozen: it is a pass over all sockets."""
        with self._lock:
            if self._urgent is None:
                self._urgent = _urgent()
            return self._urgent

    def options(self, state: QuietState, saved: options.Saved) -> dict[str, tuple[int, ...]]:
        """The options in a record; of connections that are alike it is the same mapping."""
        # by identity: looking for equal ones would take longer than making them; both are kept, so that it stays theirs
        key = id(state), id(saved)
        found = self._options.get(key)
        if found is None:
            found = self._options[key] = _options(state, saved), state, saved
        return found[0]


class _Ends(NamedTuple):
    """Both ends of a connection but for their ports."""

    local: str
    peer: str
    family: Family
    flow_info: int
    device: str


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


class _Place(NamedTuple):
    """Where a connection is in its life and in its sequence numbers, our FIN and the peer's not counted.

    end, outq, nsd, rcv_nxt  as in :class:`~tcpstate.reading.Numbers`
    beyond                   1: the window update that acknowledged the peer's FIN counts it
    """

    name: State
    fin: LocalFin
    error: str
    end: int
    outq: int
    nsd: int
    rcv_nxt: int
    beyond: int


def _place(raw: Raw, sock: socket.socket) -> _Place:
    """Of a connection that is not simply established."""
    told, name = raw.told, raw.state
    fin, error = LocalFin.NONE, ""
    end, outq, nsd = told.write_seq, told.outq, raw.nsd
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
    beyond = 1 if finished and told.rcv_wup == told.rcv_nxt else 0
    return _Place(name, fin, error, end, outq, nsd, (told.rcv_nxt - finished) & SEQ_MASK, beyond)


def _records(
    raw: Sequence[Raw],
    socks: Sequence[socket.socket],
    states: Sequence[QuietState],
    saved: Sequence[options.Saved],
    keys: Sequence[tuple[SigningKey, ...]],
    passed: Passed,
    shared: _Shared,
    urgent: Mapping[ConnId, int],
) -> list[ConnectionRecord]:
    """One loop, and parts that are alike looked up, not made: it runs thousands of times while peers wait."""
    found = []
    for one, sock, state, own, signing in zip(raw, socks, states, saved, keys, strict=True):
        (
            number, info_options, scales, rto, path_mtu, srtt, rttvar, ssthresh, cwnd, advertised_mss, reordering,
            pacing_rate, _, _, _, _, min_rtt, info_length, mss, timestamp, snd_wl1, snd_wnd, max_window, rcv_wnd,
            rcv_wup, congestion, sndbuf, rcvbuf, lock, _, outq, _, _, end, rcv_nxt, local_family, local_port,
            local_rest, peer_family, peer_port, peer_rest,
        ) = one.told  # fmt: skip
        nsd, plain = one.nsd, number == _ESTABLISHED
        name, fin, error, beyond = _PLAIN
        if not plain:
            name, fin, error, end, outq, nsd, rcv_nxt, beyond = _place(one, sock)
        alike = mss, info_options, scales, sndbuf, rcvbuf, lock, congestion
        agreed = shared.agreed.get(alike)
        fresh = agreed is None
        if agreed is None:
            agreed = shared.agreed[alike] = _agreed(*alike)
        if one.peer is not None:
            peer_family, peer_port, peer_rest = one.peer[:2], int.from_bytes(one.peer[2:4], sys.byteorder), one.peer[4:]
        between = local_family, local_rest, peer_family, peer_rest
        ends = shared.ends.get(between)
        if ends is None:
            ends = shared.ends[between] = _ends(*between)
        local, peer, family, flow_info, device = ends
        timestamps = None
        if info_options & _TIMESTAMPS or name is State.SYN_SENT:
            usec = timestamp & 1
            timestamps = make_timestamps(passed.later(timestamp, usec), bool(usec))
        rcv_wnd += beyond
        # Where memory was short the kernel offers no window at all, although a later segment was the last to update the
        # peer's: then that segment lies beyond our window, which tcp_repair_set_window refuses.
        if (rcv_nxt + rcv_wnd - snd_wl1) & _SIGN:
            snd_wl1 = rcv_nxt
        conn = _make_conn_id("tcp", local, ntohs(local_port), peer, ntohs(peer_port))
        snd_una = (end - outq) & SEQ_MASK
        ahead = (urgent[conn] - snd_una) & SEQ_MASK if urgent and conn in urgent else 0
        made = make_record(
            conn,
            family,
            name,
            snd_una,
            (end - nsd) & SEQ_MASK,
            one.send_queue,
            rcv_nxt,
            one.receive_queue,
            make_windows(
                snd_wl1,
                snd_wnd,
                max_window if max_window > snd_wnd else snd_wnd,
                rcv_wnd,
                (rcv_wup - beyond) & SEQ_MASK,
            ),
            *agreed,
            timestamps,
            fin,
            shared.options(state, own),
            own.data,
            state.filter,
            state.filter_locked,
            state.reuse_address,
            make_soft(
                cwnd, ssthresh, srtt, rttvar, rto,
                min_rtt if info_length >= _WITH_MIN_RTT else None,
                reordering, path_mtu, advertised_mss,
                pacing_rate if info_length >= _WITH_PACING else None,
            ),
            flow_info,
            device,
            signing,
            error,
            one.urgent,
            one.taken,
            ahead if 0 < ahead <= len(one.send_queue) else None,
            () if one.urgent is None else _URGENT_IN,
            VERSION,
        )  # fmt: skip
        # What the kernel told is in range; whether it goes together is another matter.  Of a connection with nothing in
        # its queues only what it shares with others could contradict, which is looked at with the first of them.
        if fresh or outq or nsd or one.receive_queue or not plain:
            made.check()
        found.append(made)
    return found


def _agreed(
    mss: int, options: int, scales: int, send: int, receive: int, lock: int, congestion: bytes
) -> tuple[Negotiated, Buffers, str]:
    return (
        _negotiated(mss, options, scales),
        _buffers(send, receive, lock),
        congestion.rstrip(b"\0").decode("ascii", "replace"),
    )


def _ends(local_family: bytes, local_rest: bytes, peer_family: bytes, peer_rest: bytes) -> _Ends:
    local, _, scope, family = _address(local_family, local_rest)
    peer, flow_info, _, _ = _address(peer_family, peer_rest)
    if not scope:
        return _Ends(local, peer, family, flow_info, "")
    device = socket.if_indextoname(scope)
    return _Ends(f"{local}%{device}", f"{peer}%{device}", family, flow_info, device)


#: its parts are the kernel's numbers, of the right size
_make_conn_id = maker(ConnId, "protocol", "local", "local_port", "peer", "peer_port")


def _address(family: bytes, rest: bytes) -> tuple[str, int, int, Family]:
    """(text, flow info, scope, kind of socket) of what stands before and behind the port in a struct sockaddr."""
    text, _, flow_info, scope = sockets.unpack_address(family + bytes(2) + rest)
    if int.from_bytes(family, sys.byteorder) == socket.AF_INET:
        return text, flow_info, scope, Family.IPV4
    return text, flow_info, scope, Family.IPV6 if sockets.is_v6(text) else Family.MAPPED


def advance(timestamps: Timestamps, seconds: float) -> Timestamps:
    """The clock after ``seconds``, at least one tick on: it may run ahead of the real one, never behind."""
    return dataclasses.replace(timestamps, value=later(timestamps.value, timestamps.microseconds, seconds))


def later(value: int, microseconds: int, seconds: float) -> int:
    """As :func:`advance`, of the bare 32-bit number."""
    return Passed(seconds).later(value, microseconds)


class Passed:
    """So many seconds, for the clocks of many connections: at least one tick."""

    def __init__(self, seconds: float) -> None:
        passed = max(0.0, seconds)
        #: what to add to a clock of milliseconds, and to one of microseconds
        self.ticks = int(passed * 1_000) + 2, int(passed * 1_000_000) + 2

    def later(self, value: int, microseconds: int) -> int:
        """The 32-bit number then."""
        # bit 0 is the kernel's microsecond flag, not part of the clock
        return (value + self.ticks[microseconds]) & _CLOCK | microseconds
