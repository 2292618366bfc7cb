"""Half-closed connections: the FINs put back, each into its place, once a rebuilt connection lives.

A rebuilt socket begins as an established connection without either FIN.  What is missing is made so that the kernel
itself walks through its states (RFC 9293 figure 5)::

                   still in repair                             released, behind the data
    FIN_WAIT_1                                                 shutdown: our FIN goes out (again)
    FIN_WAIT_2                                                 the same; the peer has it and acknowledges at once
    CLOSE_WAIT     the peer's FIN is injected
    LAST_ACK       the peer's FIN is injected                  shutdown
    CLOSING        shutdown, queued as sent; the peer's FIN
    CLOSED         the same, and the ACK of ours: ended; with an error: the peer's RST (:mod:`tcpstate.closed`)

The peer sees at most a FIN or an ACK that it has seen before.  Its own FIN is injected while the socket is in repair:
as soon as anything else of the peer was heard, its clock is known, and a FIN without the right timestamp is dropped.

Source: net/ipv4/tcp_input.c tcp_fin, tcp_rcv_state_process; net/ipv4/tcp.c tcp_shutdown.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Sequence
from typing import Final

from tcpstate.capture import Injector
from tcpstate.closed import error_to_set
from tcpstate.discard import discard_connections
from tcpstate.errors import FinNotRestored
from tcpstate.kernel.route import is_local
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import INFO_SIZE, TCP, RepairQueue, TcpInfo, TcpState
from tcpstate.md5keys import signed
from tcpstate.record import ConnectionRecord, LocalFin, State
from tcpstate.segment import SEQ_MASK, Flag, Segment, timestamp_option

__all__ = ["put_own_fins", "take_peer_fins"]

log = logging.getLogger(__name__)

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
    closing = [(s, r) for s, r in zip(socks, records, strict=True) if r.peer_fin or r.state is State.CLOSED]
    if not closing:
        return
    with Injector() as injector:
        for sock, record in closing:
            if record.state is State.CLOSED and not is_local(record.conn_id.local.partition("%")[0]):
                _forsake(sock, record)
                continue
            error = error_to_set(record)
            if record.state in (State.CLOSING, State.CLOSED) and not error:
                sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
                _ours(sock, record)
                sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
            if error != "ECONNRESET":
                _peers(sock, record, injector, Flag.FIN, acknowledged=record.state is State.CLOSED and not error)
            if error:
                _peers(sock, record, injector, Flag.RST, after_fin=error == "EPIPE")
            elif record.state is State.CLOSED:
                # what it tried to send met the blackhole, which SO_ERROR would tell
                sock.getsockopt(Level.SOCKET, SO.ERROR)


def put_own_fins(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    """Our FINs, once the connections are released and all their data is in the send queue. FinNotRestored."""
    for sock, record in zip(socks, records, strict=True):
        if record.local_fin is not LocalFin.NONE and record.state is not State.CLOSING:
            _ours(sock, record)


def _forsake(sock: socket.socket, record: ConnectionRecord) -> None:
    """End a connection that had ended, where nothing can be injected into it: its address has not come along."""
    discard_connections([sock], close=False)
    if record.receive_queue:
        log.warning("%d unread bytes of %s are lost", len(record.receive_queue), record.conn_id)
    if not record.error:
        sock.getsockopt(Level.SOCKET, SO.ERROR)


def _ours(sock: socket.socket, record: ConnectionRecord) -> None:
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        # the peer reset it just now: that is where it would have gone anyway
        if error.errno == errno.ENOTCONN:
            return
        raise FinNotRestored(f"our end could not be closed: {error.strerror}", object=str(record.conn_id)) from error


def _peers(
    sock: socket.socket,
    record: ConnectionRecord,
    injector: Injector,
    flag: Flag,
    *,
    acknowledged: bool = False,
    after_fin: bool = False,
) -> None:
    """The peer's FIN or RST, as the peer would send it again.

    acknowledged  it acknowledges our FIN, too
    after_fin     its FIN came before
    """
    conn = record.conn_id
    segment = Segment(
        source=conn.peer.partition("%")[0],
        source_port=conn.peer_port,
        destination=conn.local.partition("%")[0],
        destination_port=conn.local_port,
        seq=(record.rcv_nxt + after_fin) & SEQ_MASK,
        ack=(record.snd_una + acknowledged) & SEQ_MASK,
        flags=flag | Flag.ACK,
        window=min(_WINDOW_MAX, record.windows.snd_wnd >> (record.negotiated.snd_wscale or 0)),
        urgent=0,
        # 0 passes as long as the connection has seen no timestamp of the peer, and makes it remember none
        options=timestamp_option(0, 0) if record.negotiated.timestamps else b"",
        payload=b"",
    )
    if record.state is not State.CLOSED:
        segment = signed(segment, record.signing_keys)
    ended = acknowledged or flag is Flag.RST
    for _ in range(_TRIES):
        injector.deliver(segment, record)
        state = _state(sock)
        if state is TcpState.CLOSE or (state in _TAKEN and not ended):
            return
        time.sleep(_PAUSE)
    raise FinNotRestored(
        f"the peer's {flag.name} was not taken in, its state is {_state(sock).name}", object=str(record.conn_id)
    )


def _state(sock: socket.socket) -> TcpState:
    return TcpState(TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE)).state)
