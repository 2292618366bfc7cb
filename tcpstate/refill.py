"""Bytes into the queues of a socket, in repair mode or out of it."""

from __future__ import annotations

import ctypes
import errno
import socket
from array import array
from collections.abc import Sequence

from tcpstate.errors import QueueNotRestored
from tcpstate.kernel.columns import Column, Reusable, RowResult, Rows, numbers_of
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import Level
from tcpstate.kernel.tcp import TCP, RepairQueue
from tcpstate.record import ConnectionRecord
from tcpstate.rows import portions

__all__ = ["SMALL", "put", "put_sent", "put_small"]

#: bytes of a queue up to which receive queues are filled in one batch
SMALL = 64 << 10

_CHUNK_FIRST = 1 << 20
_CHUNK_LEAST = 1 << 10
#: what send() says once the peer has reset the connection
_ENDED = frozenset({errno.EPIPE, errno.ECONNRESET})


def put_sent(sock: socket.socket, record: ConnectionRecord, start: int, end: int) -> None:
    """Write these bytes of the record's send queue, the urgent one among them as urgent. QueueNotRestored."""
    view, urgent = memoryview(record.send_queue), record.urgent_out
    if urgent is not None and start < urgent <= end:
        # the kernel's urgent pointer is where a write with MSG_OOB ends (net/ipv4/tcp.c tcp_mark_urg)
        put(sock, view[start : urgent - 1], record)
        put(sock, view[urgent - 1 : urgent], record, socket.MSG_OOB)
        start = urgent
    put(sock, view[start:end], record)


def put(sock: socket.socket, data: bytes | memoryview, record: ConnectionRecord, flags: int = 0) -> None:
    """Write all of ``data``, in pieces as large as the kernel takes; QueueNotRestored."""
    view, at, chunk = memoryview(data), 0, _CHUNK_FIRST
    while at < len(view):
        try:
            at += sock.send(view[at : at + chunk], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL | flags)
        except OSError as error:
            # memory comes in powers of two: a smaller piece may still fit
            if error.errno in (errno.ENOMEM, errno.ENOBUFS, errno.EMSGSIZE) and chunk > _CHUNK_LEAST:
                chunk //= 2
                continue
            if error.errno in _ENDED:
                # The peer reset it just now. Its owner will see that, as it would have without us.
                return
            raise QueueNotRestored(
                f"the kernel took {at} of {len(view)} bytes: {error.strerror}", object=str(record.conn_id)
            ) from None


def _build_filling(rows: Rows) -> tuple[Column, Column, Column, RowResult]:
    fd, at, size = rows.column(), rows.column(), rows.column()
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.RECEIVE)
    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    put_in = rows.call(SYS.sendto, fd, at, size, flags, 0, 0, ignore=True, label="filling the receive queue")
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    return fd, at, size, put_in


_filling = Reusable(_build_filling)


def put_small(socks: Sequence[socket.socket], queues: Sequence[bytes]) -> list[int]:
    """Fill receive queues of sockets in repair mode, all in one batch; how many bytes the kernel took of each.

    RowError. What it did not take is for :func:`put`, which tries smaller pieces, and knows what a failure means.
    """
    taken: list[int] = []
    for part in portions(list(map(len, queues))):
        taken += _put_portion(socks[part], queues[part])
    return taken


def _put_portion(socks: Sequence[socket.socket], queues: Sequence[bytes]) -> list[int]:
    # pointers to the bytes where they are
    addresses = (ctypes.c_char_p * len(queues))(*queues)
    rows, (fd, at, size, put_in) = _filling.of(len(socks))
    fd.set(numbers_of(socks))
    at.set(array("Q", bytes(addresses)))
    size.set(list(map(len, queues)))
    rows.run()
    return [max(0, count) for count in put_in.values()]
