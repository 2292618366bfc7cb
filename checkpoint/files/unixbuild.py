"""Making the AF_UNIX sockets of a tree again, all of them together.

In this order: connected pairs (of an accepted socket with its listener's name by a passing listener of that name),
then the sockets with names of their own, then, once every descriptor is there, connections by name, queued messages,
shutdowns and the closing of peers that are gone. Names in the file system are published at the release
(:mod:`checkpoint.files.unixname`).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from checkpoint.errors import BadFileRecord, FileRebuildFailed
from checkpoint.files import unixqueue
from checkpoint.files.base import set_flags
from checkpoint.files.peercred import Actors
from checkpoint.files.sockopts import before_bind, give_late, give_own_filter, set_buffers
from checkpoint.files.unix import GONE, UnixFile
from checkpoint.files.unixname import BoundName, Stage, UnixName
from checkpoint.files.unixqueue import Message
from tcpstate.kernel.sockets import SO, Level
from tcpstate.record import Buffers

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Builder", "builder_of"]

#: while queues are filled: room for anything that was queued (the kernel doubles it)
_ROOM: Final = Buffers(send=1 << 30, receive=1 << 30, send_locked=True, receive_locked=True)


def builder_of(host: Rebuilder) -> Builder:
    """The one builder of a rebuild."""
    builder = host.shared.get(("unix", 0))
    if builder is None:
        builder = Builder(host)
        host.shared["unix", 0] = builder
        builder.make()
    if not isinstance(builder, Builder):
        raise BadFileRecord("two things want to make the local sockets", object="unix sockets")
    return builder


class Builder:
    """All AF_UNIX sockets of a tree, on their way."""

    def __init__(self, host: Rebuilder) -> None:
        self._host = host
        self._records: dict[int, UnixFile] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._bound: dict[int, BoundName] = {}
        self._gone: dict[int, socket.socket] = {}  # the closed peer of a socket, kept until its queue is filled
        self._passing: dict[tuple[int, bytes], tuple[socket.socket, BoundName]] = {}
        self._actors = Actors(host.stubs)
        self._stage = Stage(note=host.note_path)
        self._completed = False
        self._released = False
        for record in host.files:
            if isinstance(record, UnixFile):
                if record.socket in self._records:
                    raise BadFileRecord("two records of one local socket", object=f"socket {record.socket}")
                self._records[record.socket] = record
        host.on_abort(self._stage.remove)

    def take(self, record: UnixFile) -> int:
        """The descriptor of a socket, given up to the caller."""
        fd = self._host.duplicate(self._sockets[record.socket].fileno())
        set_flags(fd, record.flags)
        return fd

    # ---- making

    def make(self) -> None:
        """Every socket, connected where a pair is, bound where a name is."""
        for number, record in self._records.items():
            if number in self._sockets:
                continue
            peer = self._records.get(record.peer) if record.peer else None
            if peer is not None and peer.peer == number and peer.type == record.type and peer is not record:
                self._pair(record, peer)
            elif record.peer == GONE and record.waits_at is None:
                if record.accepted:
                    self._gone[number], self._sockets[number] = self._by_listener(record, None)
                else:
                    self._sockets[number], self._gone[number] = self._socketpair(record)
            elif record.peer is not None and not record.datagrams:
                raise BadFileRecord("a connected local socket without its other end", object=f"socket {number}")
        # the passing listeners free their names before the real ones are bound
        for listener, _ in self._passing.values():
            listener.close()
        self._passing.clear()
        for number, record in self._records.items():
            if number not in self._sockets:
                self._sockets[number] = socket.socket(socket.AF_UNIX, record.type)
        for number, sock in self._sockets.items():
            record = self._records[number]
            before_bind(sock, record.options, f"socket {number}")
            set_buffers(sock, _ROOM)
            if record.name is not None and not record.accepted and number not in self._bound:
                self._bind(sock, record)
            if record.backlog is not None:
                self._actors.listen(sock, record.backlog, record.shows, self._holder(record))

    def _bind(self, sock: socket.socket, record: UnixFile) -> None:
        if record.name is not None:
            real = self._host.path(record.name.path) if record.name.path else ""
            self._bound[record.socket] = self._stage.bind(sock, record.name, real)

    def _socketpair(self, record: UnixFile) -> tuple[socket.socket, socket.socket]:
        try:
            return self._actors.socketpair(record.type, record.shows, self._holder(record))
        except OSError as error:
            raise FileRebuildFailed(f"socketpair: {error.strerror}", object=f"socket {record.socket}") from error

    def _pair(self, first: UnixFile, second: UnixFile) -> None:
        if first.accepted and second.accepted:
            raise BadFileRecord("both ends of a local connection were accepted", object=f"socket {first.socket}")
        if second.accepted:
            first, second = second, first
        if first.accepted:
            connector, accepted = self._by_listener(first, second)
            self._sockets[first.socket], self._sockets[second.socket] = accepted, connector
        else:
            self._sockets[first.socket], self._sockets[second.socket] = self._socketpair(first)

    def _by_listener(self, accepted: UnixFile, connector: UnixFile | None) -> tuple[socket.socket, socket.socket]:
        """(connector, accepted): a connection made through a listener that has the accepted socket's name."""
        if accepted.name is None:
            raise BadFileRecord("an accepted local socket without a name", object=f"socket {accepted.socket}")
        listener, bound = self._listener(accepted.type, accepted.name)
        shown = None if connector is None else connector.shows
        # whoever listened is shown to the one, whoever connects to the other
        self._actors.listen(listener, 1, shown, self._holder(accepted))
        sock = socket.socket(socket.AF_UNIX, accepted.type)
        if connector is not None and connector.name is not None:
            self._bind(sock, connector)
        self._actors.connect(sock, *bound.way, accepted.shows, self._holder(connector or accepted))
        made, _ = listener.accept()
        return sock, made

    def _holder(self, record: UnixFile) -> int:
        """A process of the source that has the socket; 0: it is in flight."""
        return next((pid for pid, _ in self._host.places(record)), 0)

    def _listener(self, type: int, name: UnixName) -> tuple[socket.socket, BoundName]:
        known = self._passing.get((type, name.address))
        if known is None:
            listener = socket.socket(socket.AF_UNIX, type)
            # its file is only passing as well: it stays in the stage and vanishes with it
            nowhere = UnixName(address=name.address, mode=0o600, uid=os.geteuid(), gid=os.getegid())
            bound = self._stage.bind_for_now(listener, nowhere)
            known = self._passing[type, name.address] = (listener, bound)
        return known

    # ---- completing

    def complete(self) -> None:
        """Connections by name, queues, shutdowns. Every descriptor of the tree exists, also those in flight."""
        if self._completed:
            return
        self._completed = True
        for number, record in self._records.items():
            self._connect(number, record)
        for record in self._records.values():
            for message in record.queue:
                self._resend(record, message)
        for number, peer in self._gone.items():
            if self._records[number].reset:
                # closed with something unread it resets its other end
                self._sockets[number].send(b"\0", socket.MSG_DONTWAIT)
            peer.close()
        for number, record in self._records.items():
            self._finish(self._sockets[number], record)
        for sock in self._sockets.values():
            sock.close()

    def _connect(self, number: int, record: UnixFile) -> None:
        sock = self._sockets[number]
        to = b""
        if record.waits_at is not None:
            self._wait_at(sock, record, record.waits_at)
        elif record.remote:
            to = record.remote
            if not to.startswith(b"\0"):
                to = os.fsencode(self._host.path(os.fsdecode(to)))
        elif record.datagrams and record.peer:
            with contextlib.suppress(OSError):
                sock.getpeername()
                return  # a pair
            to = self._address_of(record.peer)
        if not to:
            return
        try:
            sock.connect(to)
        except OSError as error:
            raise FileRebuildFailed(f"connect: {error.strerror}", object=os.fsdecode(to)) from error

    def _wait_at(self, sock: socket.socket, record: UnixFile, listener: int) -> None:
        """Connect to a listener that will accept it later."""
        address = self._address_of(listener)
        bound = self._bound.get(listener)
        way = (address, -1) if bound is None else bound.way
        try:
            self._actors.connect(sock, *way, record.from_, self._holder(record))
        except OSError as error:
            raise FileRebuildFailed(f"connect: {error.strerror}", object=os.fsdecode(address)) from error

    def _address_of(self, number: int) -> bytes:
        record = self._records.get(number)
        if record is None or record.name is None:
            raise BadFileRecord("connected to a local socket that has no name", object=f"socket {number}")
        bound = self._bound.get(number)
        return record.name.address if bound is None else bound.address

    def _resend(self, record: UnixFile, message: Message) -> None:
        host = self._host
        message = message.renumbered(host.number)
        where = f"local socket {record.socket}"
        peer = self._gone.get(record.socket)
        if peer is None and record.peer and self._records[record.peer].peer == record.socket:
            peer = self._sockets[record.peer]
        if peer is not None:
            unixqueue.send(peer, message, b"", host.descriptor, host.warn, where)
            return
        if not record.datagrams:
            raise BadFileRecord("unread data in a local socket that has no peer", object=where)
        with self._sender(message.sender) as sender:
            unixqueue.send(sender, message, self._address_of(record.socket), host.descriptor, host.warn, where)

    @contextlib.contextmanager
    def _sender(self, address: bytes) -> Iterator[socket.socket]:
        """A datagram socket that has this address."""
        for number, record in self._records.items():
            if address and record.datagrams and record.name is not None and record.name.address == address:
                yield self._sockets[number]
                return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as passing:
            set_buffers(passing, _ROOM)
            if address:
                self._stage.bind_for_now(passing, UnixName(address=address))
            yield passing

    def _finish(self, sock: socket.socket, record: UnixFile) -> None:
        # (closing the peer shut both sides of a socket whose peer is gone)
        if record.shutdown and record.peer != GONE:
            sock.shutdown(record.shutdown - 1)  # SHUT_RD is 0, SHUT_WR 1, both 2
        give_late(sock, record.options, f"local socket {record.socket}")
        set_buffers(sock, record.options.buffers)
        give_own_filter(sock, record.options)
        sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, record.peek_off)

    # ---- releasing

    @classmethod
    def released(cls, host: Rebuilder) -> Builder:
        """One that has nothing to make or to publish any more."""
        builder = cls(host)
        builder._completed = builder._released = True
        return builder

    @property
    def staged(self) -> list[tuple[str, str]]:
        """(where it waits, its place) of each name that :meth:`release` publishes."""
        return self._stage.names

    def release(self) -> None:
        """The original is gone: publish the names."""
        if not self._released:
            self._released = True
            self._stage.publish()
