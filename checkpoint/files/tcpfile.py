"""TCP sockets that do not listen: connections, and sockets that are not connected (any more).

The descriptor is made early, as a fresh socket; its connection is exported when the sockets are frozen, arrives as a
FILES_DELTA and is rebuilt on the same descriptor, all connections of the tree together
(:mod:`checkpoint.files.tcp`). So is what is left of one that has ended: unread data, an error to be reported. A
socket that was never connected becomes a fresh one, bound if it was.
"""

from __future__ import annotations

import socket
import stat
from typing import TYPE_CHECKING, ClassVar, Final, Self

from checkpoint.errors import AddressTaken, FileRebuildFailed
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.inet import Endpoint
from checkpoint.files.listener import bind, has_ended, is_closed, is_tcp, new_socket
from checkpoint.files.peers import RESETTING, StandIn
from checkpoint.files.policy import LocalPeers
from checkpoint.files.sockopts import SocketOptions, before_bind, give_late, give_own_filter, save
from checkpoint.files.unix import held_outside
from tcpstate.closed import nearest, pending_error
from tcpstate.connid import ConnId
from tcpstate.export import refusal
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import INFO_SIZE, TCP, TcpInfo
from tcpstate.record import ConnectionRecord
from tcpstate.rows import describe
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["TcpFile"]

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)


@register("tcp", mode=stat.S_IFSOCK, match=is_tcp)
@dataclass(frozen=True, slots=True, kw_only=True)
class TcpFile(OpenFile):
    """One TCP socket.

    family      AF_INET or AF_INET6
    conn_id     its connection when it was captured first; empty: it has none
    connection  the connection's record, once it was frozen
    received    bytes of its receive queue, before those in the record, that came as pages (files/queues.py)
    to_send     bytes of its send queue that came as pages, instead of in the record
    sent        how many of those were sent before
    stand_in    the other end was on the same host and does not move: what a stand-in for it does (files/peers.py)
    name        without connection: what it is bound to
    options     without connection
    """

    in_group: ClassVar[bool] = True

    family: int
    conn_id: str = ""
    connection: ConnectionRecord | None = None
    received: int = 0
    to_send: int = 0
    sent: int = 0
    stand_in: StandIn = StandIn.NONE
    name: Endpoint | None = None
    options: SocketOptions | None = None

    def validate(self) -> None:
        if self.family not in _FAMILIES:
            raise ValueError("not an internet socket")
        if not self.conn_id and self.options is None:
            raise ValueError("a TCP socket with neither connection nor options")
        if not 0 <= self.sent <= self.to_send or self.received < 0:
            raise ValueError("impossible lengths of queues")
        if self.to_send and (self.connection is None or self.connection.send_queue):
            raise ValueError("a send queue in two places")

    @property
    def tcp_port(self) -> int:
        return ConnId.parse(self.conn_id).local_port if self.conn_id else 0

    @classmethod
    def examine(cls, view: FdView) -> str:
        cut = held_outside(view, connected=not is_closed(view))
        if cut or is_closed(view):
            return cut
        problem = refusal(view.socket)
        if problem is not None:
            problem.object = f"{view.object}, {problem.object}"
            raise problem
        return _ended(view.socket)

    @classmethod
    def capture(cls, view: FdView) -> Self:
        if is_closed(view):
            return cls.without_connection(view)
        if is_cut(view):
            reset = view.table.policy.local_peer is LocalPeers.RESET
            return cls(
                family=int(view.socket.family),
                options=save(view.socket, view.object),
                stand_in=StandIn.RESET if reset else StandIn.CLOSE,
                **view.common(),
            )
        return cls(family=int(view.socket.family), conn_id=describe(view.socket), **view.common())

    @classmethod
    def without_connection(cls, view: FdView) -> Self:
        """The record of a socket that has none (any more)."""
        sock = view.socket
        name = Endpoint.of(sock.getsockname())
        return cls(
            family=int(sock.family),
            name=name if name.port else None,
            options=save(sock, view.object),
            **view.common(),
        )

    def rebuild(self, host: Rebuilder) -> int:
        sock = new_socket(self.family, socket.SOCK_STREAM, self.conn_id or "tcp socket")
        if self.options is not None:
            before_bind(sock, self.options, str(self.name or "tcp socket"))
        if self.stand_in is not StandIn.NONE and not self.conn_id:
            _cut(sock, self.stand_in)
        set_flags(sock.fileno(), self.flags)
        return sock.detach()

    def complete(self, host: Rebuilder, fd: int) -> None:
        if self.name is None:
            return
        with socket.socket(fileno=host.duplicate(fd)) as sock:
            # After the listeners: a connection that was accepted from one and reset still shows its port. It cannot be
            # bound beside the listener, and nobody can tell whether it is.
            try:
                bind(sock, self.name)
            except AddressTaken:
                if not host.listens(self.name.port):
                    raise

    def release(self, host: Rebuilder, fd: int) -> None:
        if self.options is not None:
            with socket.socket(fileno=host.duplicate(fd)) as sock:
                give_late(sock, self.options, str(self.name or "tcp socket"))
                give_own_filter(sock, self.options)


def is_cut(view: FdView) -> bool:
    """Whether the connection stays with a process outside of the tree that has it too, by policy."""
    return view.table.policy.cuts and not view.table.live and bool(view.table.outside.holders(view.link))


def _cut(sock: socket.socket, does: StandIn) -> None:
    """Make the fresh socket one whose peer has closed or reset the connection."""
    loopback = "::1" if sock.family == socket.AF_INET6 else "127.0.0.1"
    try:
        with socket.create_server((loopback, 0), family=sock.family) as passing:
            sock.connect(passing.getsockname())
            with passing.accept()[0] as peer:
                if does is StandIn.RESET:
                    peer.setsockopt(Level.SOCKET, SO.LINGER, RESETTING)
    except OSError as error:
        raise FileRebuildFailed(f"a connection to be cut off: {error.strerror}", object="tcp socket") from error


def _ended(sock: socket.socket) -> str:
    """The warning for a connection that failed with an error that cannot be told, or not be given again."""
    if not has_ended(sock):
        return ""
    established = bool(TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE)).rtt)
    error, known = pending_error(sock, established=established)
    if not known:
        return f"its connection has failed; the error that is to be reported is taken for {error}"
    told = nearest(error, established=established)
    return "" if told == error else f"its connection has failed with {error}; {told} is what will be reported"
