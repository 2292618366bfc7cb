"""A closed receive window opens again: the peer is told as soon as a rebuilt connection is released.

The window probe that leaves repair mode carries the new window, but in a segment below the peer's window: the peer
answers it and does not look at the window (RFC 9293 3.10.7.4).  The kernel takes the window for announced, and a peer
that had stopped for want of room would wait for its persist timer, which backs off to minutes.

So the connection is made to send an ACK that counts: it is given a byte again that it has had already, and the kernel
answers that at once with the next sequence number and the window of now.

Source: net/ipv4/tcp_input.c tcp_validate_incoming, tcp_send_dupack (a segment with data is not rate-limited).
"""

from __future__ import annotations

from collections.abc import Sequence

from tcpstate.capture import Injector
from tcpstate.md5keys import signed
from tcpstate.record import ConnectionRecord, State
from tcpstate.segment import SEQ_MASK, Flag, Segment, timestamp_option

__all__ = ["tell_windows"]

#: a peer sends into a window of two segments without waiting for more (RFC 1122 4.2.3.4)
_SEGMENTS = 2


def tell_windows(records: Sequence[ConnectionRecord]) -> int:
    """Let those of the released connections whose peers may be waiting for room tell their window; how many that were.

    Their buffers have their sizes again, and what was captured is not replayed yet. OSError.
    """
    narrow = [
        r
        for r in records
        if not (r.peer_fin or r.unopened or r.state is State.CLOSED)
        and r.windows.rcv_wnd < _SEGMENTS * r.negotiated.mss
    ]
    if not narrow:
        return 0
    with Injector() as injector:
        for record in narrow:
            injector.deliver(signed(_old_byte(record), record.signing_keys), record)
    return len(narrow)


def _old_byte(record: ConnectionRecord) -> Segment:
    conn = record.conn_id
    return Segment(
        source=conn.peer.partition("%")[0],
        source_port=conn.peer_port,
        destination=conn.local.partition("%")[0],
        destination_port=conn.local_port,
        seq=(record.rcv_nxt - 1) & SEQ_MASK,
        ack=record.snd_una,
        flags=Flag.ACK,
        window=0,  # below our window as well: it is not looked at
        urgent=0,
        # 0 passes as long as the connection has seen no timestamp of the peer, and makes it remember none
        options=timestamp_option(0, 0) if record.negotiated.timestamps else b"",
        payload=b"\0",
    )
