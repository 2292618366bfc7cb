"""Urgent data (TCP's out-of-band byte) of a rebuilt connection: the mark put back where it stood.

::

    receive queue   copied_seq ...... urgent byte ...... rcv_nxt
                       in repair     injected, URG      in repair, behind it

The kernel takes an urgent pointer only from a segment that arrives, and only one that does not point below rcv_nxt.  So
a queue with a mark is filled up to it when the connection is rebuilt (:func:`held_back`); the urgent byte is injected
at the release, when the address is local and nothing else gets in yet, and what stood behind it follows in repair.

On the way out it is simpler: the byte is written again with MSG_OOB, into the queue of what was sent or anew.

Source: net/ipv4/tcp_input.c tcp_check_urg, tcp_urg; net/ipv4/tcp.c tcp_recv_urg, tcp_mark_urg; RFC 6093.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tcpstate.capture import Injector
from tcpstate.errors import QueueNotRestored
from tcpstate.kernel import bpf
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TCP, RepairQueue, RepairWindow
from tcpstate.md5keys import signed
from tcpstate.record import ConnectionRecord
from tcpstate.refill import put
from tcpstate.segment import SEQ_MASK, Flag, Segment, before, timestamp_option
from tcpstate.tuplefilter import FROM_LOOPBACK

__all__ = ["held_back", "put_marks"]

#: an injected segment is usually processed before sendto() returns; if not, it is looked for, and sent again
_TRIES: Final = 50
_PAUSE: Final = 0.001
_WINDOW_MAX: Final = 0xFFFF
_STANDARD: Final = Path("/proc/sys/net/ipv4/tcp_stdurg")


def held_back(record: ConnectionRecord) -> ConnectionRecord:
    """What a connection is rebuilt as before its release: without what its urgent mark holds back."""
    mark = record.urgent_in
    if mark is None:
        return record
    back = len(record.receive_queue) - mark
    rcv_nxt = (record.rcv_nxt - back) & SEQ_MASK
    windows = record.windows
    wup = rcv_nxt if before(rcv_nxt, windows.rcv_wup) else windows.rcv_wup
    # the window's right edge stays where it is
    wnd = windows.rcv_wnd + ((windows.rcv_wup - wup) & SEQ_MASK)
    return dataclasses.replace(
        record,
        rcv_nxt=rcv_nxt,
        receive_queue=record.receive_queue[:mark],
        windows=dataclasses.replace(windows, rcv_wup=wup, rcv_wnd=wnd),
        urgent_in=None,
        urgent_taken=False,
    )


def put_marks(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    """Put back what :func:`held_back` left out. The connections are in repair, quiet, and their addresses local.

    May be repeated. QueueNotRestored.
    """
    marked = [(s, r, r.urgent_in) for s, r in zip(socks, records, strict=True) if r.urgent_in is not None]
    if not marked:
        return
    with Injector() as injector:
        for sock, record, mark in marked:
            present = _present(sock, record)
            if present == mark:
                bpf.attach(sock, FROM_LOOPBACK)
                _inject(sock, record, mark, injector)
                present = mark + 1
                if record.urgent_taken:
                    _take(sock, record)
            if present < len(record.receive_queue):
                sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.RECEIVE)
                put(sock, memoryview(record.receive_queue)[present:], record)
                sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
            _windows(sock, record)


def _present(sock: socket.socket, record: ConnectionRecord) -> int:
    """How many bytes of the record's queue are there."""
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.RECEIVE)
    rcv_nxt = sock.getsockopt(Level.TCP, TCP.QUEUE_SEQ)
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    return (rcv_nxt - record.copied_seq) & SEQ_MASK


def _inject(sock: socket.socket, record: ConnectionRecord, mark: int, injector: Injector) -> None:
    """The urgent byte, as the peer would send it again. QueueNotRestored."""
    conn = record.conn_id
    # the pointer names the byte behind the urgent one, or (RFC 1122, if the host was told so) the byte itself
    standard = _STANDARD.read_text(encoding="ascii").strip() != "0"
    segment = Segment(
        source=conn.peer.partition("%")[0],
        source_port=conn.peer_port,
        destination=conn.local.partition("%")[0],
        destination_port=conn.local_port,
        seq=(record.copied_seq + mark) & SEQ_MASK,
        ack=record.snd_una,
        flags=int(Flag.ACK | Flag.PSH | Flag.URG),
        window=min(_WINDOW_MAX, record.windows.snd_wnd >> (record.negotiated.snd_wscale or 0)),
        urgent=0 if standard else 1,
        # 0 passes as long as the connection has seen no timestamp of the peer, and makes it remember none
        options=timestamp_option(0, 0) if record.negotiated.timestamps else b"",
        payload=record.receive_queue[mark : mark + 1],
    )
    segment = signed(segment, record.signing_keys)
    for _ in range(_TRIES):
        injector.deliver(segment, record)
        if _present(sock, record) > mark:
            return
        time.sleep(_PAUSE)
    raise QueueNotRestored("the urgent byte was not taken in", object=str(conn))


def _take(sock: socket.socket, record: ConnectionRecord) -> None:
    """Read the urgent byte out of band, as its owner has done before. QueueNotRestored."""
    inline = sock.getsockopt(Level.SOCKET, SO.OOBINLINE)
    sock.setsockopt(Level.SOCKET, SO.OOBINLINE, 0)
    try:
        sock.recv(1, socket.MSG_OOB | socket.MSG_DONTWAIT)
    except OSError as error:
        raise QueueNotRestored(f"the urgent byte is not there: {error.strerror}", object=str(record.conn_id)) from None
    finally:
        sock.setsockopt(Level.SOCKET, SO.OOBINLINE, inline)


def _windows(sock: socket.socket, record: ConnectionRecord) -> None:
    w = record.windows
    window = RepairWindow(
        snd_wl1=w.snd_wl1, snd_wnd=w.snd_wnd, max_window=w.max_window, rcv_wnd=w.rcv_wnd, rcv_wup=w.rcv_wup
    )
    sock.setsockopt(Level.TCP, TCP.REPAIR_WINDOW, window.pack())
