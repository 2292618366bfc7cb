"""The silent end of a connection, for every process that holds it.

``connect(AF_UNSPEC)`` in repair mode dissolves the connection without a word to the peer.  Do it only once the address
has left this host (or the blackhole and the filter stand): a segment that arrives for a connection that is no more is
answered with a RST.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from tcpstate.freeze import enter_repair
from tcpstate.kernel.columns import Column, Reusable, Rows
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import UNSPECIFIED_ADDRESS
from tcpstate.rows import failures

__all__ = ["discard_connections"]


def _build(rows: Rows) -> Column:
    fd = rows.column()
    unspecified = rows.shared(UNSPECIFIED_ADDRESS)
    rows.call(SYS.connect, fd, unspecified, len(UNSPECIFIED_ADDRESS), label="dissolving the connection")
    return fd


_dissolving = Reusable(_build)


def discard_connections(socks: Sequence[socket.socket], *, close: bool = True) -> None:
    """End connections silently, whoever else holds them; ``close``: close our descriptors, too.

    They need not be in repair mode.  ConnectionCallFailed (of the first that failed; those before it are gone).
    """
    enter_repair(socks)
    rows, fd = _dissolving.of(len(socks))
    fd.set(s.fileno() for s in socks)
    with failures(socks):
        rows.run()
    if close:
        for sock in socks:
            sock.close()
