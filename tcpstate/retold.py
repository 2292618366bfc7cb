"""A connection that was told before, told again by its numbers: a row of them, and the bytes in its queues.

What traffic changes of a plain connection are numbers of fixed size; what it is and what was agreed is as it was, and
its options are what many have (the kernel itself sets some, such as TCP_QUICKACK).  A hundred such rows are written and
read in a fifth of the time that as many whole records take, while peers wait.  Whatever else has changed is told as a
whole record again.
"""

from __future__ import annotations

import struct
from operator import attrgetter
from typing import Final

from tcpstate.making import make_record, make_soft, make_timestamps, make_windows
from tcpstate.record import Buffers, ConnectionRecord, SoftState

__all__ = ["ROW", "SAME", "numbers", "told_again"]

#: snd_una, snd_nxt, rcv_nxt; the windows; the clock; both buffers; cwnd, ssthresh, srtt, rttvar, rto, min_rtt,
#: reordering, path_mtu, advertised_mss; pacing_rate; bytes in the send and in the receive queue; its options, as the
#: caller counts them
ROW: Final = struct.Struct("<3I 5I I 2I 9I Q 2I I")
#: what is as it was, or the whole record is told
SAME: Final = (
    "conn_id", "family", "state", "negotiated", "congestion", "local_fin", "option_data", "filter", "filter_locked",
    "reuse_address", "flow_info", "scope", "signing_keys", "error", "urgent_in", "urgent_taken", "urgent_out",
    "required", "version",
)  # fmt: skip
_same: Final = attrgetter(*SAME)
_OPTIONAL: Final = ("min_rtt", "reordering", "path_mtu", "advertised_mss", "pacing_rate")
_optional: Final = attrgetter(*_OPTIONAL)


def _missing(soft: SoftState) -> tuple[bool, ...]:
    return tuple([value is None for value in _optional(soft)])


def numbers(before: ConnectionRecord, now: ConnectionRecord, options: int) -> bytes | None:
    """The :data:`ROW` that makes ``now`` of ``before``, together with the queues and options (``options``: which); None
    if it does not."""
    old, new, buffers = before.soft, now.soft, now.buffers
    was, clock = before.timestamps, now.timestamps
    if (
        _same(before) != _same(now)
        or old is None
        or new is None
        or (None if was is None else was.microseconds) is not (None if clock is None else clock.microseconds)
        or buffers.locks != before.buffers.locks
        or _missing(old) != _missing(new)
    ):
        return None
    w = now.windows
    try:
        return ROW.pack(
            now.snd_una, now.snd_nxt, now.rcv_nxt,
            w.snd_wl1, w.snd_wnd, w.max_window, w.rcv_wnd, w.rcv_wup,
            0 if clock is None else clock.value,
            buffers.send, buffers.receive,
            new.cwnd, new.ssthresh, new.srtt, new.rttvar, new.rto,
            new.min_rtt or 0, new.reordering or 0, new.path_mtu or 0, new.advertised_mss or 0, new.pacing_rate or 0,
            len(now.send_queue), len(now.receive_queue), options,
        )  # fmt: skip
    except struct.error:
        # a number that needs more room
        return None


def told_again(
    before: ConnectionRecord,
    row: tuple[int, ...],
    options: dict[str, tuple[int, ...]],
    send_queue: bytes,
    receive_queue: bytes,
) -> ConnectionRecord:
    """The record that :func:`numbers` made this row of. ValueError if its parts contradict each other."""
    (
        snd_una, snd_nxt, rcv_nxt, snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup, clock, send, receive, cwnd, ssthresh,
        srtt, rttvar, rto, min_rtt, reordering, path_mtu, advertised_mss, pacing_rate, _, _, _,
    ) = row  # fmt: skip
    soft, buffers, timestamps = before.soft, before.buffers, before.timestamps
    if soft is None:
        raise ValueError("numbers of a connection whose path was not told")
    if send != buffers.send or receive != buffers.receive:
        locked = buffers.send_locked, buffers.receive_locked
        buffers = Buffers(send=send, receive=receive, send_locked=locked[0], receive_locked=locked[1])
    made = make_record(
        before.conn_id,
        before.family,
        before.state,
        snd_una,
        snd_nxt,
        send_queue,
        rcv_nxt,
        receive_queue,
        make_windows(snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup),
        before.negotiated,
        buffers,
        before.congestion,
        None if timestamps is None else make_timestamps(clock, timestamps.microseconds),
        before.local_fin,
        options,
        before.option_data,
        before.filter,
        before.filter_locked,
        before.reuse_address,
        make_soft(
            cwnd, ssthresh, srtt, rttvar, rto,
            None if soft.min_rtt is None else min_rtt,
            None if soft.reordering is None else reordering,
            None if soft.path_mtu is None else path_mtu,
            None if soft.advertised_mss is None else advertised_mss,
            None if soft.pacing_rate is None else pacing_rate,
        ),
        before.flow_info,
        before.scope,
        before.signing_keys,
        before.error,
        before.urgent_in,
        before.urgent_taken,
        before.urgent_out,
        before.required,
        before.version,
    )  # fmt: skip
    made.check()
    return made
