"""Half-closed connections: the FINs put back, each into its place, once a rebuilt connection lives.

A rebuilt socket begins as an established connection without either FIN.  What is missing is made so that the kernel
itself walks through its states (RFC 9293 figure 5)::

                   still in repair                             released, behind the data
    FIN_WAIT_1                                                 shutdown: our FIN goes out (again)
    FIN_WAIT_2                                                 the same; the peer has it and acknowledges at once
    CLOSE_WAIT     the peer's FIN is injected
    LAST_ACK       the peer's FIN is injected                  shutdown
    CLOSING        shutdown, queued as sent; the peer's FIN

The peer sees at most a FIN or an ACK that it has seen before.  Its own FIN is injected while the socket is in repair:
as soon as anything else of the peer was heard, its clock is known, and a FIN without the right timestamp is dropped.

Source: net/ipv4/tcp_input.c tcp_fin, tcp_rcv_state_process; net/ipv4/tcp.c tcp_shutdown.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Sequence
from typing import Final

from tcpstate.capture import Injector
from tcpstate.errors import FinNotRestored
from tcpstate.kernel.sockets import Level
from tcpstate.kernel.tcp import INFO_SIZE, TCP, RepairQueue, TcpInfo, TcpState
from tcpstate.record import ConnectionRecord, LocalFin, State
from tcpstate.segment import Flag, Segment, timestamp_option

__all__ = ["put_own_fins", "take_peer_fins"]

#: an injected segment is usually processed before sendto() returns; if not, it is looked for, and sent again
_TRIES: Final = 50
_PAUSE: Final = 0.001
_WINDOW_MAX: Final = 0xFFFF
#: states in which the peer's FIN has been taken in
_TAKEN: Final = frozenset(
    {TcpState.CLOSE_WAIT, TcpState.LAST_ACK, TcpState.CLOSING, TcpState.TIME_WAIT, TcpState.CLOSE}
)


def take_peer_fins(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    """What is done in repair, before the release; connections that it does not concern are left alone.

    Their addresses are local, their filters their own; they carry the freeze's mark, so that nothing is answered.
    FinNotRestored.
    """
    closing = [(s, r) for s, r in zip(socks, records, strict=True) if r.peer_fin]
    if not closing:
        return
    with Injector() as injector:
        for sock, record in closing:
            if record.state is State.CLOSING:
                sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
                _ours(sock, record)
                sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
            _peers(sock, record, injector)


def put_own_fins(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    """Our FINs, once the connections are released and all their data is in the send queue. FinNotRestored."""
    for sock, record in zip(socks, records, strict=True):
        if record.local_fin is not LocalFin.NONE and record.state is not State.CLOSING:
            _ours(sock, record)


def _ours(sock: socket.socket, record: ConnectionRecord) -> None:
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        # the peer reset it just now: that is where it would have gone anyway
        if error.errno == errno.ENOTCONN:
            return
        raise FinNotRestored(f"our end could not be closed: {error.strerror}", object=str(record.conn_id)) from error


def _peers(sock: socket.socket, record: ConnectionRecord, injector: Injector) -> None:
    """The peer's FIN, as the peer would send it again."""
    conn = record.conn_id
    segment = Segment(
        source=conn.peer.partition("%")[0],
        source_port=conn.peer_port,
        destination=conn.local.partition("%")[0],
        destination_port=conn.local_port,
        seq=record.rcv_nxt,
        ack=record.snd_una,
        flags=Flag.FIN | Flag.ACK,
        window=min(_WINDOW_MAX, record.windows.snd_wnd >> (record.negotiated.snd_wscale or 0)),
        urgent=0,
        # 0 passes as long as the connection has seen no timestamp of the peer, and makes it remember none
        options=timestamp_option(0, 0) if record.negotiated.timestamps else b"",
        payload=b"",
    )
    scope = socket.if_nametoindex(record.scope) if record.scope else 0
    for _ in range(_TRIES):
        injector.send(segment, scope)
        if _state(sock) in _TAKEN:
            return
        time.sleep(_PAUSE)
    raise FinNotRestored(
        f"the peer's FIN was not taken in, its state is {_state(sock).name}", object=str(record.conn_id)
    )


def _state(sock: socket.socket) -> TcpState:
    return TcpState(TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE)).state)
