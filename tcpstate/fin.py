"""Half-closed connections: the FINs put back, each into its place, once a rebuilt connection lives.

A rebuilt socket begins as an established connection without either FIN.  What is missing is made so that the kernel
itself walks through its states (RFC 9293 figure 5)::

    FIN_WAIT_1     shutdown: our FIN goes out (again), behind the data
    FIN_WAIT_2     the same; the peer, who has it, acknowledges at once
    CLOSE_WAIT     the peer's FIN is injected: the application reads end-of-file
    CLOSING        shutdown, then the peer's FIN
    LAST_ACK       the peer's FIN, then shutdown

The peer sees at most a FIN or an ACK that it has seen before.

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
from tcpstate.kernel.tcp import INFO_SIZE, TCP, TcpInfo, TcpState
from tcpstate.record import ConnectionRecord, LocalFin, State
from tcpstate.segment import Flag, Segment, timestamp_option

__all__ = ["put_fins"]

#: an injected segment is usually processed before sendto() returns; if not, it is looked for, and sent again
_TRIES: Final = 50
_PAUSE: Final = 0.001
_WINDOW_MAX: Final = 0xFFFF
#: states in which the peer's FIN has been taken in
_TAKEN: Final = frozenset(
    {TcpState.CLOSE_WAIT, TcpState.LAST_ACK, TcpState.CLOSING, TcpState.TIME_WAIT, TcpState.CLOSE}
)


def put_fins(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    """Bring released connections to the states of their records; those that are established are left alone.

    Their addresses are local, their filters their own, and all their data is in the send queue. FinNotRestored.
    """
    closing = [(s, r) for s, r in zip(socks, records, strict=True) if r.state is not State.ESTABLISHED]
    if not closing:
        return
    with Injector() as injector:
        for sock, record in closing:
            if record.state is State.LAST_ACK:
                _peers(sock, record, injector)
                _ours(sock, record)
                continue
            if record.local_fin is not LocalFin.NONE:
                _ours(sock, record)
            if record.peer_fin:
                _peers(sock, record, injector)


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
