"""Bytes into the queues of a socket, in repair mode or out of it."""

from __future__ import annotations

import errno
import socket

from tcpstate.errors import QueueNotRestored
from tcpstate.record import ConnectionRecord

__all__ = ["put"]

_CHUNK_FIRST = 1 << 20
_CHUNK_LEAST = 1 << 10
#: what send() says once the peer has reset the connection
_ENDED = frozenset({errno.EPIPE, errno.ECONNRESET})


def put(sock: socket.socket, data: bytes | memoryview, record: ConnectionRecord) -> None:
    """Write all of ``data``, in pieces as large as the kernel takes; QueueNotRestored."""
    view, at, chunk = memoryview(data), 0, _CHUNK_FIRST
    while at < len(view):
        try:
            at += sock.send(view[at : at + chunk], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
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
