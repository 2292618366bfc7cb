"""From what a caller names a connection by (a conn-ID, its text, a socket) to a socket of ours for it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from tcpstate.access import check_user
from tcpstate.connid import ConnId
from tcpstate.errors import NoSuchConnection, TcpmigError, UnsupportedSocket
from tcpstate.kernel.sockets import is_v6
from tcpstate.locate import Located, Owner, find, take
from tcpstate.slotted import dataclass

__all__ = ["Attached", "Conn", "attached", "conn_id_of", "name_of"]

#: how a connection is named: its conn-ID, the text of it, or a socket
Conn = ConnId | str | socket.socket


@dataclass(frozen=True, slots=True)
class Attached:
    """A connection, and a socket for it.

    conn_id  its name
    sock     a descriptor of ours for the very same socket
    located  what sock_diag knows; None for a socket of the caller's that it does not list (it is closed)
    """

    conn_id: ConnId
    sock: socket.socket
    located: Located | None

    @property
    def other_owners(self) -> tuple[Owner, ...]:
        """Who else has it open, as far as this PID namespace shows."""
        owners = self.located.owners if self.located is not None else ()
        return tuple(owner for owner in owners if owner.pid != os.getpid())


def name_of(conn: Conn) -> ConnId:
    """The conn-ID. ConnIdSyntax; NoSuchConnection for a socket that is not connected, UnsupportedSocket."""
    if isinstance(conn, socket.socket):
        return conn_id_of(conn)
    return ConnId.parse(conn) if isinstance(conn, str) else conn


def conn_id_of(sock: socket.socket) -> ConnId:
    """The conn-ID of a socket. NoSuchConnection if it is not connected, UnsupportedSocket if it is not of TCP."""
    what = f"fd {sock.fileno()}"
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.proto not in (0, socket.IPPROTO_TCP):
        raise UnsupportedSocket("this is not a TCP socket", object=what)
    try:
        local, peer = sock.getsockname(), sock.getpeername()
    except OSError as error:
        raise NoSuchConnection(f"the socket is not connected: {error.strerror}", object=what) from None
    ends = [_scoped(*end) for end in (local, peer)]
    return ConnId.tcp(ends[0], local[1], ends[1], peer[1])


def _scoped(address: str, port: int, flow: int = 0, scope: int = 0) -> str:
    bare = address.partition("%")[0]
    return f"{bare}%{socket.if_indextoname(scope)}" if scope and is_v6(bare) else bare


@contextlib.contextmanager
def attached(conn: Conn) -> Iterator[Attached]:
    """A socket for the connection as long as the block lasts; a caller's own stays open behind it.

    ConnIdSyntax; NoSuchConnection (also: no process has it open); NotPermitted (another user's); UnsupportedSocket.
    """
    if isinstance(conn, socket.socket):
        conn_id = conn_id_of(conn)
        yield Attached(conn_id, conn, _known(conn_id))
        return
    conn_id = name_of(conn)
    located = find(conn_id)
    check_user(located.uid, str(conn_id))
    sock = _take(located)
    try:
        yield Attached(conn_id, sock, located)
    finally:
        sock.close()


def _known(conn_id: ConnId) -> Located | None:
    try:
        return find(conn_id)
    except NoSuchConnection:
        return None


def _take(located: Located) -> socket.socket:
    """A descriptor of one of the owners: any is as good as another."""
    failure: TcpmigError = NoSuchConnection("no process has this connection open", object=str(located.conn_id))
    for owner in located.owners:
        try:
            sock = take(owner.pid, owner.fd)
        except TcpmigError as error:
            failure = error
            continue
        try:
            if _bare(conn_id_of(sock)) == _bare(located.conn_id):
                return sock
        except NoSuchConnection as error:
            failure = error
        # the descriptor was given to something else since
        sock.close()
    raise failure


def _bare(conn_id: ConnId) -> tuple[str, int, str, int]:
    """Without the scope of link-local addresses, which sock_diag does not tell by name."""
    local, peer = (address.partition("%")[0] for address in (conn_id.local, conn_id.peer))
    return local, conn_id.local_port, peer, conn_id.peer_port
