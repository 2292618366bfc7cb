"""Listening TCP sockets.

Source: net/ipv4/inet_connection_sock.c. The backlog is TCP_INFO's ``tcpi_sacked`` of a listener. At the target a
listener is bound and listens early, also on an address that is not local yet, but drops SYNs until the release.
Connections that wait to be accepted are put into its queue then (:mod:`tcpstate.acceptqueue`).
"""

from __future__ import annotations

import errno
import socket
import stat
from typing import TYPE_CHECKING, ClassVar, Final, Self

from checkpoint.errors import AddressTaken, FileRebuildFailed, InterfaceMissing, UnsupportedProtocol
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.inet import Endpoint
from checkpoint.files.sockopts import IPPROTO_MPTCP, SocketOptions, before_bind, give_late, give_own_filter, save
from checkpoint.files.unix import held_outside
from tcpstate.acceptqueue import refill
from tcpstate.closed import peer_name
from tcpstate.errors import KeysNotRestored
from tcpstate.filters import drop_syns
from tcpstate.halfopen import HalfOpen
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import INFO_SIZE, TCP, TcpInfo, TcpState
from tcpstate.md5keys import SigningKey, give_keys, keys_of, supported
from tcpstate.record import ConnectionRecord, State
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Listener", "bind", "has_ended", "is_closed", "is_open", "is_tcp", "listens", "new_socket", "try_bind"]

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_TCP: Final = frozenset((int(f), int(socket.SOCK_STREAM), int(socket.IPPROTO_TCP)) for f in _FAMILIES)
_TAKEN: Final = (errno.EADDRINUSE,)
#: what a connection can be that nobody has accepted
_WAITING: Final = (State.ESTABLISHED, State.CLOSE_WAIT)


def is_tcp(view: FdView) -> bool:
    """Whether the file is a TCP socket of either family."""
    return view.protocol in _TCP


def is_closed(view: FdView) -> bool:
    """Whether a TCP socket never had a connection."""
    return has_ended(view.socket) and not peer_name(view.socket)


def has_ended(sock: socket.socket) -> bool:
    """Whether a TCP socket has no connection, any more or at all."""
    return _state(sock) == TcpState.CLOSE


def is_open(sock: socket.socket) -> bool:
    """Whether it has a connection: not still connecting, not ended."""
    return _state(sock) not in (TcpState.CLOSE, TcpState.SYN_SENT)


def _state(sock: socket.socket) -> int:
    # the first byte of TCP_INFO
    return sock.getsockopt(Level.TCP, TCP.INFO, 1)[0]


def listens(view: FdView) -> bool:
    """Whether the file is a listening TCP socket, also one that would take Multipath TCP connections."""
    return (is_tcp(view) or _is_multipath(view)) and bool(view.socket.getsockopt(Level.SOCKET, SO.ACCEPTCONN))


def _is_multipath(view: FdView) -> bool:
    return view.protocol[2] == IPPROTO_MPTCP


def new_socket(family: int, type: int, object: str, protocol: int = 0) -> socket.socket:
    """A fresh socket; FileRebuildFailed if this host has no such family."""
    try:
        return socket.socket(family, type, protocol)
    except OSError as error:
        raise FileRebuildFailed(f"socket: {error.strerror}", object=object) from error


def bind(sock: socket.socket, name: Endpoint) -> None:
    """Bind, with AddressTaken if somebody else has the address, InterfaceMissing if its interface is not here."""
    if name.scope and name.scope not in {known for _, known in socket.if_nameindex()}:
        raise InterfaceMissing(f"its address is one of interface {name.scope}, which is not here", object=str(name))
    try:
        sock.bind(name.sockaddr)
    except OSError as error:
        if error.errno in _TAKEN:
            raise AddressTaken("bind: the address is in use", object=str(name)) from error
        raise FileRebuildFailed(f"bind: {error.strerror}", object=str(name)) from error


def try_bind(family: int, type: int, name: Endpoint, options: SocketOptions, protocol: int = 0) -> None:
    """Whether the address could be bound now: AddressTaken or FileRebuildFailed if not. Nothing stays bound."""
    with new_socket(family, type, str(name), protocol) as sock:
        before_bind(sock, options, str(name))
        bind(sock, name)


@register("tcp listener", mode=stat.S_IFSOCK, match=listens)
@dataclass(frozen=True, slots=True, kw_only=True)
class Listener(OpenFile):
    """One listening TCP socket.

    family   AF_INET or AF_INET6
    name     what it is bound to
    backlog  the argument of listen(), as the kernel limited it
    waiting  connections that wait to be accepted, in the order of the queue
    half_open  handshakes whose last ACK has not come
    protocol IPPROTO_TCP, or IPPROTO_MPTCP: its plain connections are ordinary ones (Go listens so by default)
    signing_keys  TCP MD5 keys, which its connections inherit; secret
    """

    foreseeable: ClassVar[bool] = True

    family: int
    name: Endpoint
    backlog: int
    options: SocketOptions
    waiting: tuple[ConnectionRecord, ...] = ()
    half_open: tuple[HalfOpen, ...] = ()
    signing_keys: tuple[SigningKey, ...] = ()
    protocol: int = socket.IPPROTO_TCP

    def validate(self) -> None:
        if self.protocol not in (socket.IPPROTO_TCP, IPPROTO_MPTCP):
            raise ValueError("a listener of an unknown protocol")
        if any(one.conn_id.local_port != self.name.port for one in self.half_open):
            raise ValueError("a half-open connection cannot be the listener's")
        for record in self.waiting:
            if record.conn_id.local_port != self.name.port or record.send_queue or record.state not in _WAITING:
                raise ValueError("what waits to be accepted cannot be the listener's")
        if self.family not in _FAMILIES or not 0 <= self.backlog < 1 << 31:
            raise ValueError("family or backlog of a listener out of range")

    @property
    def tcp_port(self) -> int:
        return self.name.port

    @classmethod
    def examine(cls, view: FdView) -> str:
        held_outside(view)
        save(view.socket, view.object)
        ulp = view.socket.getsockopt(Level.TCP, TCP.ULP, 16)
        if ulp.strip(b"\0") and not _is_multipath(view):
            raise UnsupportedProtocol(f"listener with an upper-layer protocol ({ulp!r})", object=view.object)
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        sock = view.socket
        info = TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))
        return cls(
            family=int(sock.family),
            name=Endpoint.of(sock.getsockname()),
            backlog=info.sacked,
            options=save(sock, view.object),
            signing_keys=keys_of([sock], view.table.listeners_keys)[0],
            protocol=sock.proto,
            **view.common(),
        )

    def check(self, host: Rebuilder) -> str:
        if self.signing_keys and not supported():
            raise KeysNotRestored("this kernel has no TCP MD5 signatures", object=str(self.name))
        try_bind(self.family, socket.SOCK_STREAM, self.name, self.options, self.protocol)
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        sock = new_socket(self.family, socket.SOCK_STREAM, str(self.name), self.protocol)
        if self.protocol == IPPROTO_MPTCP and not host.blackhole.priorities:
            host.blackhole.ensure()
        before_bind(sock, self.options, str(self.name))
        give_keys(sock, self.signing_keys, str(self.name))
        # the filter comes first: no SYN may be answered before the connections are here
        drop_syns([sock])
        # connections that were built before have its port already, as they did when it was theirs alone
        shares = host.ahead is not None and self.name.port in host.ahead.ports
        if shares:
            sock.setsockopt(Level.SOCKET, SO.REUSEADDR, 1)
        bind(sock, self.name)
        try:
            sock.listen(self.backlog)
        except OSError as error:
            raise AddressTaken(f"listen: {error.strerror}", object=str(self.name)) from error
        if shares:
            sock.setsockopt(Level.SOCKET, SO.REUSEADDR, self.options.reuse_address)
        set_flags(sock.fileno(), self.flags)
        return sock.detach()

    def release(self, host: Rebuilder, fd: int) -> None:
        with socket.socket(fileno=host.duplicate(fd)) as sock:
            if self.protocol == IPPROTO_MPTCP:
                # it has the freeze's mark; its own, if there is one, comes with the other options
                sock.setsockopt(Level.SOCKET, SO.MARK, 0)
            give_late(sock, self.options, str(self.name))
            if self.protocol != IPPROTO_MPTCP:
                give_own_filter(sock, self.options)
            host.await_handshakes(self.half_open)
            for record, reason in refill(self.waiting, sock, elapsed=host.since_export):
                host.lose(str(record.conn_id), f"it waited to be accepted, and could not be put back: {reason}")
