"""Can this connection be moved? Told before anything is changed, and by name if not."""

from __future__ import annotations

import socket

from tcpstate.closed import peer_name
from tcpstate.errors import RepairNotPermitted, TcpmigError, UnsupportedSocket, UnsupportedState
from tcpstate.filters import read_filters
from tcpstate.kernel.sockets import Level
from tcpstate.kernel.tcp import INFO_SIZE, TCP, Repair, TcpInfo, TcpState
from tcpstate.record import State
from tcpstate.rows import describe

__all__ = ["NOT_CONNECTED", "STATES", "refusal", "repair_permitted", "state_of", "supported"]

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
#: the others have no owner: half open, or TIME_WAIT
_SUPPORTED = frozenset(State) - {State.SYN_RECEIVED, State.TIME_WAIT}
#: in these the socket has no connection, and getpeername() no answer
NOT_CONNECTED = frozenset({State.SYN_SENT, State.CLOSED})


def state_of(sock: socket.socket) -> State | None:
    """The connection's state; None for a listener."""
    info = TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))
    return STATES.get(TcpState(info.state))


def supported(state: State) -> bool:
    """Whether connections in this state can be exported and rebuilt."""
    return state in _SUPPORTED


def repair_permitted() -> bool:
    """Whether we may put TCP sockets of this network namespace in repair mode: tried on a fresh one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as fresh:
        try:
            fresh.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
        except PermissionError:
            return False
    return True


def refusal(sock: socket.socket) -> TcpmigError | None:
    """Why this connection cannot be moved, told before anything is changed; None if it can.

    Its state may change until it is frozen; :func:`~tcpstate.export.export_connections` looks again.
    """
    name = describe(sock)
    if not repair_permitted():
        return RepairNotPermitted("the kernel does not let us put a socket in repair mode", object=name)
    state = state_of(sock)
    if state is None:
        return UnsupportedState("it is a listening socket, not a connection", object=name)
    if not supported(state):
        return UnsupportedState(f"its state is {state.value}", object=name)
    if state is State.CLOSED and not peer_name(sock):
        return UnsupportedState("it was never connected", object=name)
    if state is State.SYN_SENT and sock.getsockopt(Level.TCP, TCP.FASTOPEN_CONNECT):
        return UnsupportedState("it connects with TCP Fast Open", object=name)
    for option, what in ((TCP.ULP, "an upper-layer protocol"), (TCP.AO_INFO, "TCP-AO keys")):
        try:
            value = sock.getsockopt(Level.TCP, option, 256)
        except OSError:
            # this kernel has none of it, or (AO) the socket has no key
            continue
        if value.strip(b"\0"):
            which = f" ({_protocol_name(value)})" if option is TCP.ULP else ""
            return UnsupportedSocket(f"it carries {what}{which}", object=name)
    if _is_mptcp(sock):
        return UnsupportedSocket("it is a Multipath TCP connection", object=name)
    try:
        read_filters([sock])
    except TcpmigError as error:
        return error
    return None


def _protocol_name(value: bytes) -> str:
    name = value.rstrip(b"\0").decode("ascii", "replace")
    return "kTLS" if name == "tls" else name


def _is_mptcp(sock: socket.socket) -> bool:
    try:
        return bool(sock.getsockopt(Level.TCP, TCP.IS_MPTCP))
    except OSError:
        # a kernel without the option, or without Multipath TCP
        return False
