"""Can this connection be moved? Told before anything is changed, and by name if not."""

from __future__ import annotations

import socket

from tcpstate.connid import ConnId
from tcpstate.errors import TcpmigError, UnsupportedSocket, UnsupportedState
from tcpstate.filters import read_filters
from tcpstate.kernel import diag
from tcpstate.kernel.sockets import Level
from tcpstate.kernel.tcp import INFO_SIZE, TCP, TcpInfo, TcpState
from tcpstate.record import State
from tcpstate.rows import describe

__all__ = ["STATES", "refusal", "state_of", "supported"]

#: the kernel's states in the record's words; a listener is no connection
STATES = {
    TcpState.ESTABLISHED: State.ESTABLISHED,
    TcpState.SYN_SENT: State.SYN_SENT,
    TcpState.SYN_RECV: State.SYN_RECEIVED,
    TcpState.NEW_SYN_RECV: State.SYN_RECEIVED,
    TcpState.FIN_WAIT1: State.FIN_WAIT_1,
    TcpState.FIN_WAIT2: State.FIN_WAIT_2,
    TcpState.TIME_WAIT: State.TIME_WAIT,
    TcpState.CLOSE: State.CLOSED,
    TcpState.CLOSE_WAIT: State.CLOSE_WAIT,
    TcpState.LAST_ACK: State.LAST_ACK,
    TcpState.CLOSING: State.CLOSING,
}
_SUPPORTED = frozenset(
    {State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSE_WAIT, State.CLOSING, State.LAST_ACK}
)


def state_of(sock: socket.socket) -> State | None:
    """The connection's state; None for a listener."""
    info = TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))
    return STATES.get(TcpState(info.state))


def supported(state: State) -> bool:
    """Whether connections in this state can be exported and rebuilt."""
    return state in _SUPPORTED


def refusal(sock: socket.socket) -> TcpmigError | None:
    """Why this connection cannot be moved, told before anything is changed; None if it can.

    Its state may change until it is frozen; :func:`~tcpstate.export.export_connections` looks again.
    """
    name = describe(sock)
    state = state_of(sock)
    if state is None:
        return UnsupportedState("it is a listening socket, not a connection", object=name)
    if not supported(state):
        return UnsupportedState(f"its state is {state.value}", object=name)
    for option, what in ((TCP.ULP, "an upper-layer protocol (kTLS)"), (TCP.AO_INFO, "TCP-AO keys")):
        try:
            value = sock.getsockopt(Level.TCP, option, 256)
        except OSError:
            # this kernel has none of it, or (AO) the socket has no key
            continue
        if value.strip(b"\0"):
            return UnsupportedSocket(f"it carries {what}", object=name)
    if _is_mptcp(sock):
        return UnsupportedSocket("it is a Multipath TCP connection", object=name)
    try:
        read_filters([sock])
    except TcpmigError as error:
        return error
    try:
        known = diag.get(ConnId.parse(name)) if name.startswith("tcp:") else None
    except OSError as error:
        return UnsupportedSocket(f"sock_diag does not tell its state: {error.strerror}", object=name)
    if known is not None and known.md5:
        return UnsupportedSocket("it carries MD5 keys", object=name)
    return None


def _is_mptcp(sock: socket.socket) -> bool:
    try:
        return bool(sock.getsockopt(Level.TCP, TCP.IS_MPTCP))
    except OSError:
        # a kernel without the option, or without Multipath TCP
        return False
