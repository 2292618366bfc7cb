"""TCP connections whose other end is on this host as well: over loopback, or over an address of this host.

Four cases, told by the kernel's socket table::

    TREE     both ends move: they are frozen, exported, rebuilt and released together
    CLOSED   nobody has the other end any more: what is left of it is an end of the stream that was, or is to be, read
    OUTSIDE  a process that stays has it: refused, or by policy the moved end sees it closed or reset
    AWAY     none of these: an ordinary connection to another host

A rebuilt end without an other end could not live: its first segment over loopback would find nobody and be answered
with a RST. So a *stand-in* is made for the other end, from the same record seen from the other side, and closed or
reset as soon as both live: the application sees just what it would have seen.
"""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import socket
import struct
from collections.abc import Collection
from typing import Final

from checkpoint.errors import BadFileRecord
from tcpstate import locate
from tcpstate.connid import ConnId
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TcpState
from tcpstate.rebuild import record_family
from tcpstate.record import ConnectionRecord, LocalFin, State, Windows
from tcpstate.segment import SEQ_MASK

__all__ = ["RESETTING", "Place", "StandIn", "alone", "is_loopback", "mirrored", "place_of", "stand_in"]

#: SO_LINGER with which close() resets
RESETTING: Final = struct.pack("ii", 1, 0)


class Place(enum.Enum):
    """Where the other end of a connection is."""

    AWAY = "on another host"
    TREE = "in the tree"
    QUEUED = "in the accept queue of a listener"
    CLOSED = "closed"
    OUTSIDE = "on this host, outside of the tree"


class StandIn(enum.Enum):
    """What the stand-in for the other end does as soon as the connection lives; NONE: there is none."""

    NONE = "none"
    CLOSE = "close"
    RESET = "reset"


#: a connection that its owner has closed and that has nothing more to say
_SPENT: Final = frozenset({TcpState.TIME_WAIT, TcpState.FIN_WAIT2, TcpState.CLOSE})
#: a complete connection that nobody has accepted
_WAITING: Final = frozenset({TcpState.ESTABLISHED, TcpState.CLOSE_WAIT, TcpState.SYN_RECV, TcpState.NEW_SYN_RECV})


def is_loopback(address: str) -> bool:
    """Whether the address is one of those that every host has for itself."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def place_of(conn: ConnId, tree: Collection[ConnId], local: Collection[str]) -> Place:
    """Where the other end of ``conn`` is.

    tree   the conn-IDs of the tree's own connections
    local  the addresses of this host
    """
    other = conn.reversed()
    if other in tree:
        return Place.TREE
    if not is_loopback(conn.peer) and conn.peer not in local:
        return Place.AWAY
    found = locate.look_up(other)
    if found is None:
        return Place.CLOSED
    if found.inode:
        return Place.OUTSIDE
    if found.state in _WAITING:
        return Place.QUEUED
    # closed by its owner with bytes still to come: they would be lost
    return Place.CLOSED if found.state in _SPENT else Place.OUTSIDE


def alone(record: ConnectionRecord) -> ConnectionRecord:
    """The record of a connection whose other end takes nothing any more: what was still to be sent is dropped, and our
    FIN, if there is one, has arrived."""
    state, fin = record.state, record.local_fin
    if state is State.FIN_WAIT_1:
        state, fin = State.FIN_WAIT_2, LocalFin.ACKED
    elif state in (State.CLOSING, State.LAST_ACK):
        # the stand-in acknowledges it
        state, fin = State.LAST_ACK, LocalFin.QUEUED
    return dataclasses.replace(record, state=state, local_fin=fin, send_queue=b"", snd_nxt=record.snd_una)


#: state of one end -> of the other
_OTHER: Final = {
    State.ESTABLISHED: State.ESTABLISHED,
    State.FIN_WAIT_2: State.CLOSE_WAIT,
    State.CLOSE_WAIT: State.FIN_WAIT_2,
    State.LAST_ACK: State.FIN_WAIT_2,
}


def mirrored(record: ConnectionRecord) -> ConnectionRecord:
    """The stand-in for the other end of ``record``, which is :func:`alone`. Its queues are empty."""
    windows, agreed = record.windows, record.negotiated
    state = _OTHER[record.state]
    offered = (windows.rcv_wup + windows.rcv_wnd - record.rcv_nxt) & SEQ_MASK
    return ConnectionRecord(
        conn_id=record.conn_id.reversed(),
        family=record.family,
        state=state,
        snd_una=record.rcv_nxt,
        snd_nxt=record.rcv_nxt,
        send_queue=b"",
        rcv_nxt=record.snd_una,
        receive_queue=b"",
        windows=Windows(
            snd_wl1=record.snd_una,
            snd_wnd=offered,
            max_window=max(offered, 1),
            rcv_wnd=windows.snd_wnd,
            rcv_wup=record.snd_una,
        ),
        negotiated=dataclasses.replace(agreed, snd_wscale=agreed.rcv_wscale, rcv_wscale=agreed.snd_wscale),
        buffers=dataclasses.replace(record.buffers, send_locked=False, receive_locked=False),
        congestion=record.congestion,
        timestamps=record.timestamps,
        local_fin=LocalFin.ACKED if state is State.FIN_WAIT_2 else LocalFin.NONE,
        flow_info=record.flow_info,
        scope=record.scope,
    )


def stand_in(record: ConnectionRecord, does: StandIn) -> tuple[socket.socket, ConnectionRecord]:
    """The stand-in for the other end of ``record``, to be rebuilt and released together with it: a fresh socket, which
    does what it shall when it is closed, and its record. BadFileRecord if there cannot be one."""
    if record.state not in _OTHER:
        raise BadFileRecord(f"{record.state.value}, and a stand-in is wanted for its peer", object=str(record.conn_id))
    mirror = mirrored(record)
    sock = socket.socket(record_family(mirror), socket.SOCK_STREAM)
    if does is StandIn.RESET:
        # now: the death of the tool after the release must do the same
        sock.setsockopt(Level.SOCKET, SO.LINGER, RESETTING)
    return sock, mirror
