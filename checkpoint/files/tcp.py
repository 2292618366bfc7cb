"""All TCP connections of a tree at once, at the source: frozen and exported, given back or ended.

Each step is one batch of :mod:`tcpstate` over all sockets. While sockets are frozen a rule in this network namespace
sends their packets into a blackhole (:mod:`tcpstate.silence`); it stands as long as the group needs it.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from checkpoint.errors import BadFileRecord, LocalPeer
from checkpoint.files.base import FdView, OpenFile
from checkpoint.files.held import HeldFile, HeldSocket
from checkpoint.files.inet import bound_devices
from checkpoint.files.listener import Listener, has_ended, is_closed, is_open, is_tcp, listens
from checkpoint.files.peers import RESETTING, Place, StandIn, alone, place_of
from checkpoint.files.policy import AcceptQueues, LocalPeers
from checkpoint.files.queues import apart, queue_runs
from checkpoint.files.tcpfile import TcpFile, is_cut
from checkpoint.image.frames import PageRun, Space
from tcpstate import acceptqueue, halfopen, options
from tcpstate.acceptqueue import Queue, keeps
from tcpstate.connid import ConnId
from tcpstate.discard import discard_connections
from tcpstate.early import Early, read_early
from tcpstate.export import export_connections
from tcpstate.freeze import QuietState, quiet, read_originals, thaw
from tcpstate.kernel.sockets import IPV6, SO, Level
from tcpstate.md5keys import SigningKey, keys_of
from tcpstate.record import ConnectionRecord, State
from tcpstate.rows import conn_id_of, describe
from tcpstate.segment import Segment
from tcpstate.shelf import Shelf
from tcpstate.silence import Blackhole
from tcpstate.slotted import dataclass
from tcpstate.uses.hold import ListeningEnd

if TYPE_CHECKING:
    from checkpoint.files.table import FileTable

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

__all__ = ["Original", "TcpGroup"]

#: how often receive queues are looked at before the freeze, and how much more must be there
_EARLY_ROUNDS: Final = 3
_EARLY_GROWTH: Final = 512 << 10
#: connections that are ended in one batch, when nobody waits any more
_AT_ONCE: Final = 1024
#: the other end is left to itself on this host
_STAYING: Final = (Place.OUTSIDE, Place.QUEUED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """One connection's socket as it was before the freeze: what giving it back by hand takes.

    places    every (pid, fd) that it has
    name      its conn-ID
    state     its own filter, mark and time-outs
    inline    SO_OOBINLINE
    peek_off  SO_PEEK_OFF, -1: off
    """

    places: list[tuple[int, int]]
    name: str
    state: QuietState
    inline: bool = False
    peek_off: int = -1


class TcpGroup:
    """The TCP sockets of a file table, through our duplicates. The table must stay open.

    blackhole  the rules that silence what is frozen, if they stand already: adding them takes milliseconds
    """

    def __init__(self, table: FileTable, blackhole: Blackhole | None = None) -> None:
        self._table = table
        self._listeners: list[socket.socket] = []
        #: what waited to be accepted, and by whose queue
        self._queues: list[tuple[socket.socket, Queue]] = []
        #: every (pid, fd) of each listener
        self.listener_places: list[list[tuple[int, int]]] = []
        self._listener_indexes: list[int] = []
        self._views: list[tuple[int, FdView]] = []
        self._ahead = table.ahead
        #: told ahead, and not what was told: known once they are frozen
        self._changed: set[int] = set()
        first = 0 if self._ahead is None else self._ahead.count
        for index, view in enumerate(table.entries[first:], first):
            listening = listens(view)
            if not (listening or is_tcp(view)) or table.policy.replaces(view.places) or is_cut(view):
                continue
            if listening:
                self._listeners.append(view.socket)
                self.listener_places.append(view.places)
                self._listener_indexes.append(index)
            elif not is_closed(view):
                self._views.append((index, view))
        self._originals: list[QuietState] | None = None
        self._options: list[options.Saved] | None = None
        self._keys: list[tuple[SigningKey, ...]] | None = None
        self._early: list[Early | None] = [None] * len(self._views)
        self._states: list[QuietState] = []
        self._records: dict[int, OpenFile] = {}
        self._runs: list[PageRun] = []
        self._places: dict[int, Place] = {}
        #: whose other ends wait in queues of the tree's own listeners that do not move
        self._let_go: set[int] = set()
        self._blackhole = Blackhole() if blackhole is None else blackhole

    @property
    def listeners(self) -> list[socket.socket]:
        """The listening sockets."""
        return list(self._listeners)

    def duplicates(self) -> list[socket.socket]:
        """Our own descriptors of the listening sockets. Of nothing else: a connection that the application closes while
        we have it would stay open. Not by socket.dup(): that sets a time-out, and with it O_NONBLOCK of the
        application's own socket."""
        return [socket.socket(fileno=os.dup(sock.fileno())) for sock in self._listeners]

    @property
    def established(self) -> list[socket.socket]:
        """The sockets that have a connection, in whatever state."""
        return [view.socket for _, view in self._views]

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._views) + self.ahead

    @property
    def ahead(self) -> int:
        """How many of them are as they were told before the stop."""
        return 0 if self._ahead is None else len(self._ahead.unchanged - self._changed)

    def find_peers(self, local: Collection[str]) -> None:
        """Look for other ends on this host; ``local`` are its addresses. LocalPeer for one that a process has which
        stays, unless the policy says what to do."""
        # what is not open has no other end yet, or any more
        conns = [conn_id_of(view.socket) if is_open(view.socket) else None for _, view in self._views]
        tree = {conn for conn in conns if conn is not None}
        lets_go = self._table.policy.accept_queue is AcceptQueues.RESET
        listening = {sock.getsockname()[1] for sock in self._listeners}
        for (index, view), conn in zip(self._views, conns, strict=True):
            place = Place.AWAY if conn is None else place_of(conn, tree, local)
            if place is Place.QUEUED and conn is not None and conn.peer_port in listening and lets_go:
                self._let_go.add(index)
            elif place in (Place.OUTSIDE, Place.QUEUED) and self._table.policy.local_peer is LocalPeers.REFUSE:
                raise LocalPeer(f"the other end is {place.value}", object=f"{view.object}, {conn}")
            if place is not Place.AWAY:
                self._places[index] = place

    def _stand_in(self, index: int) -> StandIn:
        place = self._places.get(index, Place.AWAY)
        if place in (Place.AWAY, Place.TREE):
            return StandIn.NONE
        if index in self._let_go:
            return StandIn.RESET
        if place is Place.CLOSED or self._table.policy.local_peer is not LocalPeers.RESET:
            return StandIn.CLOSE
        return StandIn.RESET

    @property
    def ports(self) -> set[int]:
        """The local ports of connections and listeners."""
        told = set() if self._ahead is None else self._ahead.ports
        return told | {sock.getsockname()[1] for sock in (*self._listeners, *self.established)}

    def originals(self) -> list[Original]:
        """What :meth:`early_runs`, :meth:`freeze` and :meth:`export` are about to change. The owners are stopped, so it
        stays true. What was told ahead is not touched before it is found changed (:meth:`find_changed`)."""
        self._originals = read_originals(self.established)
        self._options = options.save(self.established)
        return self._told_originals()

    def _told_originals(self) -> list[Original]:
        return [
            Original(
                places=view.places,
                name=self._name(index),
                state=state,
                inline=bool(own.numbers.get("so.oobinline", (0,))[0]),
                peek_off=own.numbers.get("so.peek_off", (-1,))[0],
            )
            for (index, view), state, own in zip(self._views, self._originals or (), self._options or (), strict=True)
        ]

    def _name(self, index: int) -> str:
        told = self._table.record(index)
        return told.conn_id if isinstance(told, TcpFile) else ""

    @property
    def local_addresses(self) -> set[str]:
        """The addresses of this host that the connections use; what has ended can do without."""
        told = set() if self._ahead is None else self._ahead.local_addresses
        return told | {_local(view.socket) for _, view in self._views if not has_ended(view.socket)} - {""}

    @property
    def devices(self) -> set[str]:
        """The interfaces that connections are bound to, by SO_BINDTODEVICE or by a link-local address."""
        return {name for sock in self.established for name in bound_devices(sock)}

    def early_runs(self) -> Iterator[PageRun]:
        """What large receive queues hold already, while the sockets still live; the owners are stopped. What else can
        be read before the freeze is read, too."""
        socks = self.established
        if self._options is None:
            self._options = options.save(socks)
        if self._ahead is None:
            self._keys = keys_of(socks, self._table.signing_keys) if socks else []
        for _ in range(_EARLY_ROUNDS):
            found = read_early(socks, self._early, _EARLY_GROWTH)
            for at, (early, data) in found.items():
                yield from queue_runs(Space.RECEIVED, self._views[at][0], data, early.count - len(data))
                self._early[at] = early
            if not found:
                return

    def find_changed(self) -> list[Original]:
        """First of the freeze: the gate before what was told ahead is shut, and what is not as it was told joins the
        others. Again all that is about to be changed, if that are more now; else nothing. OSError."""
        if self._ahead is None:
            return []
        self._ahead.shut()
        changed = self._ahead.changed()
        # whether anybody has some is told by the same look, for which nobody waited before
        self._keys = keys_of(self.established, self._table.signing_keys) if self._views else []
        if not changed:
            return []
        self._changed.update(changed)
        views = self._ahead.take(changed)
        socks = [view.socket for view in views]
        known = [self._ahead.own(index) for index in changed]
        if self._originals is not None:
            self._originals += _filled([one and one[0] for one in known], socks, read_originals)
        if self._options is not None:
            self._options += _filled([one and one[1] for one in known], socks, options.save)
        self._keys += keys_of(socks, self._table.signing_keys)
        self._early += [None] * len(views)
        self._views += zip(changed, views, strict=True)
        return [] if self._originals is None else self._told_originals()

    def freeze(self) -> None:
        """Nothing comes in or goes out any more; :meth:`find_changed` came before. All or none."""
        if not self._blackhole.priorities:
            self._blackhole.ensure()
        try:
            self._states = quiet(self.established, self._originals)
        except BaseException:
            self._blackhole.remove()
            raise

    def take_queues(self, *, handshakes: bool = True, shelf: Shelf | None = None) -> int:
        """After :meth:`freeze`: what waits to be accepted is taken out of the listeners' queues, and is part of their
        records, as are handshakes half done; how many waited. Nothing reaches the listeners any more.

        handshakes  False: it is known that none is half done (a look at all sockets of the host takes milliseconds)
        shelf       where it lies as well
        """
        kept = [(index, s) for index, s in zip(self._listener_indexes, self._listeners, strict=True) if keeps(s)]
        queues = acceptqueue.capture([sock for _, sock in kept], shelf)
        self._queues = [(sock, queue) for (_, sock), queue in zip(kept, queues, strict=True) if queue.records]
        look = handshakes and bool(kept)
        half_open = halfopen.capture({sock.getsockname()[1] for _, sock in kept}) if look else []
        for (index, _), queue in zip(kept, queues, strict=True):
            told = self._table.record(index)
            if isinstance(told, Listener):
                begun = [one for one in half_open if _is_of(one.conn_id, told)]
                half_open = [one for one in half_open if one not in begun]
                if queue.records or begun:
                    waiting = tuple(queue.records)
                    self._records[index] = dataclasses.replace(told, waiting=waiting, half_open=tuple(begun))
        return sum(len(queue.records) for queue in queues)

    def refill_queues(self, elapsed: float) -> None:
        """Everything is undone: what was taken out of the listeners' queues is put back. The listeners have their own
        filters again. ``elapsed``: seconds since it was taken, rather too much than too little. OSError."""
        queues, self._queues = self._queues, []
        for listener, queue in queues:
            lost = acceptqueue.refill(queue.records, listener, elapsed=elapsed, originals=queue.socks)
            for record, reason in lost:
                _log.warning("%s could not be put back into the queue of its listener: %s", record.conn_id, reason)

    def export(self) -> None:
        """Read the frozen connections; they are in repair afterwards. The owners must be stopped."""
        self._leave_out([is_closed(view) for _, view in self._views])
        exported = export_connections(
            self.established, self._states, saved_options=self._options, early=self._early, keys=self._keys
        )
        for (index, view), connection, early in zip(self._views, exported, self._early, strict=True):
            told = self._table.record(index)
            if not isinstance(told, TcpFile):
                raise BadFileRecord("a connection was captured as something else", object=view.object)
            received = 0 if early is None else early.count
            ended = connection.unopened or connection.state is State.CLOSED
            stand_in = StandIn.NONE if ended else self._stand_in(index)
            if stand_in is not StandIn.NONE:
                connection = alone(connection)
            whole = dataclasses.replace(told, connection=connection, received=received, stand_in=stand_in)
            self._records[index], runs = apart(whole, index)
            self._runs += runs

    def _leave_out(self, ended: Sequence[bool]) -> None:
        """Those that were reset between the capture and the freeze."""
        if not any(ended):
            return
        for (index, view), state, is_over in zip(self._views, self._states, ended, strict=True):
            if is_over:
                # its options are read as its owner knows them
                thaw([view.socket], [state])
                self._records[index] = TcpFile.without_connection(view)
        left = [not is_over for is_over in ended]
        self._views = list(itertools.compress(self._views, left))
        self._states = list(itertools.compress(self._states, left))
        self._early = list(itertools.compress(self._early, left))
        if self._options is not None:
            self._options = list(itertools.compress(self._options, left))
        if self._keys is not None:
            self._keys = list(itertools.compress(self._keys, left))

    def runs(self) -> list[PageRun]:
        """Large queues, after :meth:`export`; they come before :meth:`records`."""
        return self._runs

    def records(self) -> dict[int, OpenFile]:
        """The entries of FILES_DELTA, after :meth:`export`."""
        return dict(self._records)

    @property
    def told(self) -> Sequence[OpenFile]:
        """The first files, if of those that have changed only numbers may be told (:mod:`checkpoint.files.retold`)."""
        return self._ahead.files if self._ahead is not None and self._ahead.retold else ()

    @property
    def exported(self) -> list[ConnectionRecord]:
        """The connections as exported, those that wait to be accepted among them."""
        found = [r.connection for r in self._records.values() if isinstance(r, TcpFile) and r.connection is not None]
        return found + [record for _, queue in self._queues for record in queue.records]

    def exported_for(self, segments: Iterable[Segment]) -> list[ConnectionRecord]:
        """:attr:`exported`, and those that were told ahead, are unchanged, and some of the segments are for."""
        ahead = self._ahead
        if ahead is None:
            return self.exported
        told = {segment.conn_id: ahead.record_for(segment) for segment in segments}
        exported = self.exported
        mine = {record.conn_id for record in exported}
        return exported + [one for conn, one in told.items() if one is not None and conn not in mine]

    def thaw(self) -> None:
        """Give everything back as it was. Nothing if it was not frozen. May be repeated."""
        states, self._states = self._states, []
        try:
            if self._ahead is not None:
                self._ahead.open()
            if states:
                thaw(self.established, states)
        finally:
            self._blackhole.remove()
            self._table.go_on()

    def held(self) -> list[HeldSocket]:
        """The exported connections to other hosts, and the listeners, for somebody who keeps them when their owners
        end. What has its other end on this host is not held: the tree's pairs are rebuilt."""
        found = [
            HeldSocket(HeldFile(index=index, conn_id=describe(view.socket), quiet=state), view.socket)
            for (index, view), state in zip(self._views, self._states, strict=True)
            if self._places.get(index, Place.AWAY) is Place.AWAY
        ]
        for index, sock in zip(self._listener_indexes, self._listeners, strict=True):
            found.append(HeldSocket(HeldFile(index=index, listener=listening_end(sock)), sock))
        return found

    def give_away(self) -> None:
        """Somebody else keeps what :meth:`held` told, silent; the others end."""
        away = [self._places.get(index, Place.AWAY) is Place.AWAY for index, _ in self._views]
        others = [not one for one in away]
        self._views = list(itertools.compress(self._views, others))
        self._states = list(itertools.compress(self._states, others))
        self.discard()

    def discard(self) -> None:
        """End the connections without a packet, for their owners too. The addresses must have left this host.

        But the other end of a connection that stays on this host learns that its peer has gone: such a connection is
        given back, and ends with the process that has it."""
        if self._ahead is not None:
            told = sorted(self._ahead.unchanged - self._changed)
            for at in range(0, len(told), _AT_ONCE):
                views = [self._table.entries[index] for index in told[at : at + _AT_ONCE]]
                discard_connections([view.socket for view in views], close=False)
        staying = [self._places.get(index) in _STAYING and _at_home(view.socket) for index, view in self._views]
        silent = [view.socket for (_, view), stays in zip(self._views, staying, strict=True) if not stays]
        try:
            acceptqueue.discard([queue for _, queue in self._queues])
            discard_connections(silent, close=False)
            self._let_end(list(itertools.compress(self.established, staying)), staying)
        finally:
            self._states = []
            self._blackhole.remove()

    def _let_end(self, socks: Sequence[socket.socket], staying: Sequence[bool]) -> None:
        if not socks:
            return
        if self._states:
            thaw(socks, list(itertools.compress(self._states, staying)), probe=False)
        if self._table.policy.local_peer is LocalPeers.RESET:
            for sock in socks:
                sock.setsockopt(Level.SOCKET, SO.LINGER, RESETTING)


def _filled(
    known: Sequence[_T | None], socks: Sequence[socket.socket], read: Callable[[Sequence[socket.socket]], list[_T]]
) -> list[_T]:
    """What is known of sockets, and of the others what is read."""
    rest = iter(read([sock for sock, one in zip(socks, known, strict=True) if one is None]) if None in known else [])
    return [next(rest) if one is None else one for one in known]


def listening_end(sock: socket.socket) -> ListeningEnd:
    """Where a listening socket listens."""
    address, port = sock.getsockname()[:2]
    both = sock.family == socket.AF_INET6 and not sock.getsockopt(Level.IPV6, IPV6.V6ONLY)
    if address.startswith("::ffff:"):
        address = address.removeprefix("::ffff:")
    return ListeningEnd(address, port, both)


def _is_of(conn_id: ConnId, listener: Listener) -> bool:
    """Whether a connection can have begun at a listener."""
    address = listener.name.address.partition("%")[0].removeprefix("::ffff:")
    return conn_id.local_port == listener.name.port and address in ("0.0.0.0", "::", conn_id.local)


def _local(sock: socket.socket) -> str:
    name = describe(sock)
    return ConnId.parse(name).local if name.startswith("tcp:") else ""


def _at_home(sock: socket.socket) -> bool:
    """Whether the local address of a connection is (still) one of this host."""
    with socket.socket(sock.family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((sock.getsockname()[0], 0))
        except OSError:
            return False
    return True
