"""The first data of a full receive queue arrives as a segment, so that the kernel does not overrate its buffer.

How much of a receive buffer may be promised as window, the kernel judges by the first full segment that comes: how much
of the memory of its packet was data.  For a connection whose first data comes slowly, packet by packet, that is
half to two thirds.  A rebuilt connection is in full flow: what comes first is merged packets of 64 KiB, which are
nearly all data.  The kernel would promise nearly its whole buffer from then on; less dense packets would fill it
before the window is used up, the last of them would be dropped, and the peer would run into its time-out.

So a queue that is so long that its owner can be behind again gets its first bytes by injection, in a segment as the
peer's are, and the rest in repair as ever.  If it does not arrive nothing is lost: the queue is filled from there on.

Source: net/ipv4/tcp_input.c tcp_measure_rcv_mss (scaling_ratio, since 6.6), tcp_prune_queue.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from typing import Final

from tcpstate.capture import Injector, segment_size
from tcpstate.freeze import shut
from tcpstate.inward import MARK as INWARD
from tcpstate.inward import inward
from tcpstate.kernel.sockets import Level, is_v6
from tcpstate.kernel.tcp import TCP, RepairQueue
from tcpstate.md5keys import signed
from tcpstate.record import ConnectionRecord, State
from tcpstate.segment import SEQ_MASK, Flag, Segment, timestamp_option

__all__ = ["LONG", "put_first"]

_log = logging.getLogger(__name__)

#: bytes of a receive queue from which on it is done
LONG: Final = 256 << 10
#: the largest segment: it must fit any loopback interface
_LARGEST: Final = 16 << 10
_WINDOW: Final = 0xFFFF


def put_first(
    socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], heads: Sequence[Sequence[memoryview]]
) -> dict[int, int]:
    """Of each long queue the beginning, by injection; how many bytes each of these connections took, by its place.

    heads  of each, pieces of its queue that come before what is in its record

    They are in repair, quiet, their receive queues empty. ConnectionCallFailed, OSError.
    """
    counts = [sum(map(len, head)) + len(r.receive_queue) for r, head in zip(records, heads, strict=True)]
    chosen = [i for i, n in enumerate(counts) if n >= LONG and records[i].state is not State.CLOSED]
    if not chosen:
        return {}
    shut([socks[i] for i in chosen], but=INWARD)
    families = frozenset(socket.AF_INET6 if is_v6(records[i].conn_id.local) else socket.AF_INET for i in chosen)
    found = {}
    with inward(families) as anew, Injector(INWARD) as injector:
        for i in chosen:
            start = (records[i].rcv_nxt - counts[i]) & SEQ_MASK
            data = heads[i][0] if heads[i] else memoryview(records[i].receive_queue)
            segment = signed(_segment(records[i], start, data), records[i].signing_keys)
            injector.deliver(segment, records[i])
            found[i] = _received(socks[i], start)
            if not found[i]:
                # another process may have taken the way in away
                anew()
                injector.deliver(segment, records[i])
                found[i] = _received(socks[i], start)
            if not found[i]:
                _log.debug("the first data of %s did not arrive by injection", records[i].conn_id)
    return found


def _received(sock: socket.socket, start: int) -> int:
    """Bytes in the receive queue."""
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.RECEIVE)
    end = sock.getsockopt(Level.TCP, TCP.QUEUE_SEQ)
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    return (end - start) & SEQ_MASK


def _segment(record: ConnectionRecord, start: int, data: memoryview) -> Segment:
    conn = record.conn_id
    return Segment(
        source=conn.peer.partition("%")[0],
        source_port=conn.peer_port,
        destination=conn.local.partition("%")[0],
        destination_port=conn.local_port,
        seq=start,
        ack=record.snd_una,
        flags=Flag.ACK | Flag.PSH,
        window=_WINDOW,
        urgent=0,
        # 0 passes as long as the connection has seen no timestamp of the peer, and makes it remember none
        options=timestamp_option(0, 0) if record.negotiated.timestamps else b"",
        payload=bytes(data[: min(segment_size(record), _LARGEST)]),
    )
