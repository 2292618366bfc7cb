"""AF_UNIX sockets: pairs, listeners, datagram sockets, with what is queued in them.

The record of a socket holds its own receive queue, and names its peer by the peer's inode number at the source; at the
target :mod:`checkpoint.files.unixbuild` makes all sockets of the tree together.

Source: net/unix/af_unix.c, net/unix/diag.c. Not kept: the pending error of a socket whose peer closed with unread
data, and, if a capture of the same queue came before (``checkpoint -R``), datagrams of no bytes that were unread then
already: the kernel does not show them twice.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING, Final, Self

from checkpoint.errors import (
    FileCaptureFailed,
    FileMissing,
    PeerOutsideTree,
    PendingLocalConnection,
    SocketHeldOutside,
    UnsupportedProtocol,
)
from checkpoint.files import unixqueue
from checkpoint.files.base import FdView, OpenFile, register
from checkpoint.files.outside import holders_text
from checkpoint.files.peercred import PeerCredentials
from checkpoint.files.policy import LocalPeers
from checkpoint.files.sockopts import SocketOptions, save
from checkpoint.files.unixdiag import SocketState, UnixSocket
from checkpoint.files.unixname import UnixName, name_of
from checkpoint.files.unixqueue import Message
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["UnixFile", "held_outside"]

_TYPES: Final = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
#: peer of a socket whose peer has closed
GONE: Final = 0


def _is_unix(view: FdView) -> bool:
    return view.dup >= 0 and view.socket.family == socket.AF_UNIX


def held_outside(view: FdView, *, connected: bool = False) -> str:
    """SocketHeldOutside if a process outside of the tree has the socket, too; a warning where the policy says what to
    do with a connection.

    connected  it is the end of a connection
    """
    holders = view.table.outside.holders(view.link)
    if not holders:
        return ""
    text = f"{view.link} is also held by {holders_text(holders)}"
    if not connected or not view.table.policy.cuts:
        raise SocketHeldOutside(text, object=view.object)
    return f"{text}, who is left behind"


@register("unix socket", mode=stat.S_IFSOCK, match=_is_unix)
@dataclass(frozen=True, slots=True, kw_only=True)
class UnixFile(OpenFile):
    """One AF_UNIX socket.

    socket    its number (inode at the source), by which the others refer to it
    type      SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET
    peer      number of the socket that it is connected to; 0: that one has closed; None: not connected
    waits_at  number of the listener that has not accepted it yet
    remote    a datagram socket: path or abstract name of a socket outside of the tree that it is connected to
    name      what it is bound to; of an accepted socket: the listener's name
    accepted  made by accept(): the name is not its own
    backlog   of a listener: the argument of listen(), else None
    shutdown  1 no more reading, 2 no more writing, added
    queue     unread messages
    reset     peer is 0 since its process stays behind, and reading tells ECONNRESET
    peek_off  SO_PEEK_OFF, -1: off
    shows     SO_PEERCRED; of a listener: what those who connect are shown
    from_     of one that is not accepted yet: what its other end will show
    """

    socket: int
    type: int
    peer: int | None
    waits_at: int | None
    remote: bytes
    name: UnixName | None
    accepted: bool
    backlog: int | None
    shutdown: int
    queue: tuple[Message, ...]
    options: SocketOptions
    peek_off: int
    reset: bool = False
    shows: PeerCredentials | None = None
    from_: PeerCredentials | None = None

    def validate(self) -> None:
        if self.type not in _TYPES or not 0 <= self.shutdown <= 3 or len(self.remote) > 108:
            raise ValueError("type, shutdown or address of a local socket out of range")
        if self.backlog is not None and self.name is None:
            raise ValueError("a listener without a name")

    @property
    def datagrams(self) -> bool:
        """Whether it is of type SOCK_DGRAM."""
        return self.type == socket.SOCK_DGRAM

    @classmethod
    def examine(cls, view: FdView) -> str:
        cut = held_outside(view, connected=_is_connected(view))
        if cut:
            return cut
        state = _state(view)
        if state is None:
            # made since the list was read: another look is taken in the stop
            return ""
        if state.state != SocketState.LISTEN and not view.table.live:
            _connection(view, state)
        elif state.peer and view.table.index_of_socket(state.peer) is None:
            if _is_cut(view, state):
                return "its other end is outside of the tree, and is cut off"
            remote = _remote(view, state)
            return f"it will be connected to the target's {_text(remote)}"
        return ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        sock = view.socket
        state = _state(view)
        if state is None:
            raise FileCaptureFailed("sock_diag does not know this local socket", object=view.object)
        listens = state.state == SocketState.LISTEN
        peer, waits_at, remote = (None, None, b"") if listens else _connection(view, state)
        if listens:
            _backlog(view, state)
        name = name_of(sock, state.vfs, [pid for pid, _ in view.places])
        # a stream socket that was never connected has no queue (and says EINVAL)
        queued = not listens and (state.peer is not None or sock.type == socket.SOCK_DGRAM)
        queue = () if not queued else unixqueue.read(sock, state.shutdown, view.table.add_in_flight, view.object)
        if listens and name is None:
            raise UnsupportedProtocol("a listening local socket without a name", object=view.object)
        accepted = not listens and name is not None and _accepted(view, state)
        if accepted and name is not None:
            # the file belongs to the listener
            name = UnixName(address=name.address)
        return cls(
            socket=view.stat.st_ino,
            type=sock.type,
            peer=peer,
            waits_at=waits_at,
            remote=remote,
            name=name,
            accepted=accepted,
            backlog=state.wqueue if listens else None,
            shutdown=state.shutdown,
            queue=queue,
            options=save(sock, view.object),
            peek_off=sock.getsockopt(Level.SOCKET, SO.PEEK_OFF),
            reset=peer == GONE and view.table.policy.local_peer is LocalPeers.RESET and _is_cut(view, state),
            shows=PeerCredentials.of(sock),
            from_=None if waits_at is None or not view.places else PeerCredentials.of_process(view.places[0][0]),
            **view.common(),
        )

    def check(self, host: Rebuilder) -> str:
        if self.name is not None and self.name.path:
            folder = os.path.dirname(host.path(self.name.path))
            if not host.path.carried(self.name.path) and not os.path.isdir(folder):
                raise FileMissing("the directory of a local socket is not here", object=folder)
        if (
            self.remote
            and not self.remote.startswith(b"\0")
            and not host.path.carried(os.fsdecode(self.remote))
            and not os.path.exists(host.path(os.fsdecode(self.remote)))
        ):
            raise FileMissing(
                "the local socket that a datagram socket is connected to is not here", object=_text(self.remote)
            )
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        from checkpoint.files.unixbuild import builder_of

        return builder_of(host).take(self)

    def complete(self, host: Rebuilder, fd: int) -> None:
        from checkpoint.files.unixbuild import builder_of

        builder_of(host).complete()

    def release(self, host: Rebuilder, fd: int) -> None:
        from checkpoint.files.unixbuild import builder_of

        builder_of(host).release()


def _state(view: FdView) -> UnixSocket | None:
    return view.table.unix_sockets.get(view.stat.st_ino)


def _text(address: bytes) -> str:
    return "@" + os.fsdecode(address[1:]) if address.startswith(b"\0") else os.fsdecode(address)


def _connection(view: FdView, state: UnixSocket) -> tuple[int | None, int | None, bytes]:
    """(peer, waits_at, remote) of a socket that does not listen."""
    if state.peer is None:
        return None, None, b""
    if state.peer == 0:
        # The peer has no inode: it was closed, or it waits in a listener's queue and was never accepted.
        listener = next((s for s in view.table.unix_sockets.values() if state.inode in s.icons), None)
        if listener is None:
            return GONE, None, b""
        if view.table.index_of_socket(listener.inode) is None:
            if view.table.policy.cuts:
                return GONE, None, b""
            raise PeerOutsideTree("connected to a listener outside of the tree, not accepted yet", object=view.object)
        if ioctl_int(view.dup, Ioctl.SIOCOUTQ):
            raise PendingLocalConnection("data was sent on a connection that nobody accepted yet", object=view.object)
        return None, listener.inode, b""
    if _is_cut(view, state):
        return GONE, None, b""
    if view.table.index_of_socket(state.peer) is None:
        return None, None, _remote(view, state)
    return state.peer, None, b""


def _is_connected(view: FdView) -> bool:
    state = _state(view)
    return state is not None and state.peer is not None


def _is_cut(view: FdView, state: UnixSocket) -> bool:
    """Whether the other end stays behind, by policy, and cannot be found again by its name."""
    if not view.table.policy.cuts or not state.peer:
        return False
    return view.table.index_of_socket(state.peer) is None and not _address(view, state)


def _address(view: FdView, state: UnixSocket) -> bytes:
    """The name by which a datagram socket can be connected to its peer outside of the tree again; empty: there is
    none."""
    peer = view.table.unix_sockets.get(state.peer or 0)
    name = b"" if peer is None else peer.name
    if view.socket.type != socket.SOCK_DGRAM or (peer is not None and peer.peer == state.inode):
        return b""
    return name if name.startswith(b"\0") else name.rstrip(b"\0")


def _remote(view: FdView, state: UnixSocket) -> bytes:
    """The name of a datagram peer outside of the tree; PeerOutsideTree if it cannot be found again by its name."""
    address = _address(view, state)
    if not address:
        peer = view.table.unix_sockets.get(state.peer or 0)
        name = b"" if peer is None else peer.name.rstrip(b"\0")
        holders = view.table.outside.holders_of(f"socket:[{state.peer}]")
        at = f" ({holders_text(holders)})" if holders else ""
        shown = f" {_text(name)}" if name else ""
        raise PeerOutsideTree(f"local socket whose other end{shown} is outside of the tree{at}", object=view.object)
    return address


def _backlog(view: FdView, state: UnixSocket) -> None:
    for inode in state.icons:
        if inode == 0 or view.table.index_of_socket(inode) is None:
            raise PendingLocalConnection(
                "a connection from outside of the tree waits to be accepted", object=view.object
            )


def _accepted(view: FdView, state: UnixSocket) -> bool:
    """Whether a connected socket shows its listener's name instead of one of its own."""
    if not state.peer or view.socket.type == socket.SOCK_DGRAM:
        return False
    others = view.table.unix_sockets
    if any(s.state == SocketState.LISTEN and s.name == state.name for s in others.values()):
        return True
    peer = others.get(state.peer)
    # The listener is gone. If both ends have names: accept() made its end after connect() had made the other.
    return peer is None or not peer.name or peer.inode < state.inode
