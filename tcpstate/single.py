"""One connection to a record and back: the batches of :mod:`tcpstate.export` and :mod:`tcpstate.rebuild` for one.

::

    transport_freeze(conn)                        # at the source
    record = export_connection(conn)
    ...                                           # record.to_bytes(), to the other host: from_bytes()
    sock = rebuild_connection(record, elapsed=seconds_since_export)
    ...                                           # the address moves
    transport_resume(sock)                        # at the target
    discard_connection(conn)                      # at the source
    # or, instead of moving: transport_resume(conn) at the source
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from tcpstate import frozen
from tcpstate.attach import Conn, attached
from tcpstate.frozen import FrozenConnection
from tcpstate.rebuild import rebuild_connections
from tcpstate.record import ConnectionRecord, Family
from tcpstate.replacement import originals
from tcpstate.stateread import frozen_record

__all__ = ["discard_connection", "export_connection", "rebuild_connection"]


def export_connection(conn: Conn) -> ConnectionRecord:
    """The record of a frozen connection, which stays frozen.

    Its timestamps are those of the moment of return. NotFrozen, NoSuchConnection, NotPermitted, OwnerNotStill,
    UnsupportedState, UrgentData, StillMoving, ConnectionCallFailed.
    """
    with attached(conn) as found:
        return frozen_record(found.sock, frozen.entry_of(found.conn_id))


def rebuild_connection(
    record: ConnectionRecord,
    sock: socket.socket | None = None,
    *,
    elapsed: float = 0.0,
    devices: Mapping[str, str] | None = None,
) -> socket.socket:
    """A socket that continues the connection: frozen, until :func:`~tcpstate.transport.transport_resume` lets it live,
    once its address is local.

    sock     a fresh TCP socket of the right family that becomes it; made here if None
    elapsed  seconds since the export returned, measured by one clock, rather too much than too little
    devices  interface names of the source and what they are called here

    UnsupportedState, UnknownHardState, AlreadyFrozen, AddressInUse, QueueNotRestored, ConnectionCallFailed: nothing is
    left of it; a given socket is in repair mode, to be closed.
    """
    record = record.on_devices(devices or {})
    family = socket.AF_INET if record.family is Family.IPV4 else socket.AF_INET6
    made = sock if sock is not None else socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)

    def build() -> None:
        rebuild_connections([record], [made], elapsed=elapsed)

    try:
        frozen.adopt(made, record, originals(record), build)
    except BaseException:
        if sock is None:
            # in repair closing sends nothing
            made.close()
        raise
    return made


def discard_connection(conn: Conn) -> FrozenConnection:
    """End a frozen connection without a word to its peer, whoever has it open: it lives elsewhere now, and its address
    has left this host. NotFrozen, NoSuchConnection, ConnectionCallFailed."""
    return frozen.discard(conn)
