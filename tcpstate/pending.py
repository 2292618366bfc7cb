"""Data that waits in a connection's buffers (paper, 5.4): read, put back, purged.

::

    offset 0 ............ in order .............|   hole   |....... arrived, out of order .......
             receive queue: acknowledged         (nothing)   captured since the freeze

Offsets count from the first byte that the owner has not read.  What the kernel itself holds out of order has no
interface; dropping it is safe, since the peer keeps what was not acknowledged in order (RFC 2018, 8).  What arrives
*while the connection is frozen* is captured, and told here as extents behind holes.
"""

from __future__ import annotations

import dataclasses
import itertools
import socket
from collections.abc import Iterable, Sequence
from typing import Any, Final

from tcpstate import frozen
from tcpstate.errors import BadExtents
from tcpstate.frozen import FrozenConnection
from tcpstate.record import ConnectionRecord
from tcpstate.replacement import replace
from tcpstate.segment import SEQ_MASK, Flag, Segment
from tcpstate.slotted import dataclass
from tcpstate.stateread import frozen_record

__all__ = ["Extent", "Purged", "purge", "read_pending", "restore_pending"]

_HALF: Final = 1 << 31
#: data bytes of a segment that is made here: what every IPv6 path carries, less the headers (RFC 8200 5)
_SEGMENT: Final = 1220
_WINDOW_MAX: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of the stream.

    offset  of the first, from the first byte that the owner has not read
    data    the bytes
    """

    offset: int
    data: bytes

    @property
    def end(self) -> int:
        """Offset behind the last."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Purged:
    """What a purge did.

    unread  bytes that the owner will not read
    unsent  bytes that the peer will not get: it was told nothing of them
    kept    bytes that were sent and not acknowledged: the peer may still need them
    """

    unread: int
    unsent: int
    kept: int


def read_pending(sock: socket.socket, entry: FrozenConnection) -> list[Extent]:
    """The unread data of a frozen connection, and behind it, with holes, what has arrived since the freeze.

    OwnerNotStill, and what :func:`~tcpstate.stateread.frozen_record` raises.
    """
    record = frozen_record(sock, entry)
    found = [Extent(0, record.receive_queue)] if record.receive_queue else []
    return found + _behind(record, frozen.arrived(entry))


def _behind(record: ConnectionRecord, segments: Iterable[Segment]) -> list[Extent]:
    """The data of the segments behind rcv_nxt, in order, each byte once."""
    start = len(record.receive_queue)
    pieces = []
    for segment in segments:
        offset = (segment.seq - record.copied_seq) & SEQ_MASK
        if segment.payload and not segment.flags & (Flag.SYN | Flag.RST):
            pieces.append((offset - (1 << 32) if offset >= _HALF else offset, segment.payload))
    extents: list[Extent] = []
    for offset, data in sorted(pieces, key=lambda piece: piece[0]):
        known = extents[-1].end if extents else start
        new = data[max(0, known - offset) :]
        if not new:
            continue
        offset = max(offset, known)
        if extents and extents[-1].end == offset:
            extents[-1] = Extent(extents[-1].offset, extents[-1].data + new)
        else:
            extents.append(Extent(offset, new))
    return extents


def restore_pending(sock: socket.socket, entry: FrozenConnection, extents: Sequence[Extent]) -> None:
    """Put data back where the owner will read it next: that at offset 0 before what is unread, acknowledged as it is;
    the others behind what is unread, as if they arrived anew at the resume.

    BadExtents, and what :func:`~tcpstate.replacement.replace` raises.
    """
    given = [extent for extent in extents if extent.data]
    for first, second in itertools.pairwise(given):
        if second.offset < first.end:
            raise BadExtents("two of them overlap, or they are not in order", object=f"offset {second.offset}")
    if given and given[0].offset < 0:
        raise BadExtents("one begins before the first unread byte", object=f"offset {given[0].offset}")
    head = given.pop(0).data if given and given[0].offset == 0 else b""
    record = frozen_record(sock, entry)
    whole = head + record.receive_queue
    if given and given[0].offset < len(whole):
        raise BadExtents("one lies where there is unread data already", object=f"offset {given[0].offset}")
    window = record.windows.rcv_wnd
    if given and given[-1].end - len(whole) > window:
        raise BadExtents(f"they reach beyond the receive window of {window} bytes", object=f"offset {given[-1].offset}")
    if head:
        entry = replace(sock, entry, lambda now: _headed(now, head))
    start = (record.rcv_nxt - len(whole)) & SEQ_MASK
    frozen.arrives(entry, [s for extent in given for s in _segments(record, start, extent)])


def _headed(record: ConnectionRecord, head: bytes) -> ConnectionRecord:
    mark = None if record.urgent_in is None else record.urgent_in + len(head)
    return dataclasses.replace(record, receive_queue=head + record.receive_queue, urgent_in=mark)


def _segments(record: ConnectionRecord, start: int, extent: Extent) -> list[Segment]:
    """As the peer would send it again."""
    conn = record.conn_id
    return [
        Segment(
            source=conn.peer.partition("%")[0],
            source_port=conn.peer_port,
            destination=conn.local.partition("%")[0],
            destination_port=conn.local_port,
            seq=(start + extent.offset + at) & SEQ_MASK,
            ack=record.snd_una,
            flags=int(Flag.ACK),
            window=min(_WINDOW_MAX, record.windows.snd_wnd >> (record.negotiated.snd_wscale or 0)),
            payload=extent.data[at : at + _SEGMENT],
        )
        for at in range(0, len(extent.data), _SEGMENT)
    ]


def purge(sock: socket.socket, entry: FrozenConnection) -> Purged:
    """Forget what is unread and what was never sent. What the peer may already have cannot be taken back: those bytes
    leave the buffer when they are acknowledged. What :func:`~tcpstate.replacement.replace` raises."""
    found: list[Purged] = []

    def edit(record: ConnectionRecord) -> ConnectionRecord:
        kept = record.sent
        found.append(Purged(unread=len(record.receive_queue), unsent=len(record.send_queue) - kept, kept=kept))
        return dataclasses.replace(
            record, receive_queue=b"", send_queue=record.send_queue[:kept], **_no_mark(kept, record)
        )

    replace(sock, entry, edit)
    return found[-1]


def _no_mark(kept: int, record: ConnectionRecord) -> dict[str, Any]:
    """Without the marks of what is purged."""
    out = record.urgent_out
    return {
        "urgent_in": None,
        "urgent_taken": False,
        "required": (),
        "urgent_out": out if out is not None and out <= kept else None,
    }
