"""New connections are held off before the stop, so that none is caught half-way.

A connection whose handshake is going on, or that waits in an accept queue, has no descriptor yet.  So, while the
application still runs, its listeners drop SYNs unanswered (the peer's kernel keeps them, and our capture does too, so
that they can be replayed), handshakes that have begun complete, and the application accepts what waits.  Then it is
stopped.  What a busy application has not accepted by then moves in the queue, where the kernels of both hosts can
(:mod:`tcpstate.acceptqueue`); else it is a reason not to move.  So is in any case one whose other end a process of this
host has, of the tree or not: in a queue elsewhere it would be without that end.

After the stop a second kind of leftovers may be there: connections that the application has closed and whose last
segments are on their way (FIN_WAIT1, CLOSING, LAST_ACK without an owner).  They are given a moment as well.  Those
whose peers are further away than that are told to the target (:class:`checkpoint.records.Ended`), where the last ACK
would draw a RST else.  Of a connection that was closed with data under way, what the peer has not got by then is lost:
nobody has a descriptor of it.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from checkpoint.errors import BacklogNotDrained
from checkpoint.files.peers import Place, place_of
from checkpoint.records import ENDED_MAX
from checkpoint.traces import NoteWriter, Trace, write
from tcpstate import locate
from tcpstate.acceptqueue import keeps
from tcpstate.connid import ConnId
from tcpstate.filters import ListenerState, drop_syns, undo_drop_syns
from tcpstate.kernel.beside import Beside
from tcpstate.kernel.tcp import TcpState
from tcpstate.shelf import Shelf

__all__ = ["DRAIN_TIMEOUT", "KEEPING_TIMEOUT", "Holdoff", "LastSegments"]

_log = logging.getLogger(__name__)

#: seconds that the application gets to accept what waits
DRAIN_TIMEOUT: Final = 1.0
#: the same where what is left can be moved in the queue: handshakes that have begun get a few round trips
KEEPING_TIMEOUT: Final = 0.2
#: seconds that closed connections get for their last segments: a few round trips of a network without loss
LAST_SEGMENTS_TIMEOUT: Final = 0.05
_POLL: Final = 0.0005
#: what a send queue counts that has all but its FIN acknowledged
_FIN: Final = 1
#: so many looks in a row without a half-done handshake show that there will be none
_QUIET_LOOKS: Final = 2
_CLOSING: Final = frozenset({TcpState.FIN_WAIT1, TcpState.CLOSING, TcpState.LAST_ACK})


class Holdoff:
    """Listeners that take no new connections until :meth:`end`. The listening sockets are ours (duplicates)."""

    def __init__(self, listeners: Sequence[socket.socket]) -> None:
        self._listeners = list(listeners)
        self._states: list[ListenerState] | None = None
        self._quiet_looks = 0
        #: where lies what is taken out of the listeners' queues; None: nothing will be
        self.shelf: Shelf | None = None

    def shelve(self, note: NoteWriter | None) -> None:
        """Something will be taken out of the listeners' queues: see to it that our death does not lose it. OSError."""
        if note is not None and self.shelf is None:
            self.shelf = Shelf.make(lambda shelved: write(note, Trace.SHELF, shelved))

    def unshelve(self) -> None:
        """What was taken is back, or lives elsewhere. May be repeated."""
        shelf, self.shelf = self.shelf, None
        if shelf is not None:
            shelf.end()

    def begin(self) -> None:
        """Drop SYNs from now on. ListenerFilterRefused, ForeignFilter: nothing has changed then."""
        if self._listeners:
            self._states = drop_syns(self._listeners)

    @property
    def drained(self) -> bool:
        """Whether no connection waits on any listener."""
        if not self._listeners:
            return True
        while not self.handshakes_ended:
            # A dump of all sockets takes milliseconds.  No handshake begins any more but of a SYN that was past the
            # filter already, so the second look is the last.
            if any(b.half_open for b in locate.listener_backlog(self._listeners)):
                self._quiet_looks = 0
                return False
            self._quiet_looks += 1
        return not any(locate.accept_queues(self._listeners))

    @property
    def handshakes_ended(self) -> bool:
        """Whether it is known that no handshake is half done: none begins any more."""
        return not self._listeners or self._quiet_looks >= _QUIET_LOOKS

    def drain(self, timeout: float = DRAIN_TIMEOUT) -> None:
        """Wait until nothing waits to be accepted. BacklogNotDrained after ``timeout`` seconds."""
        if not _until(lambda: self.drained, timeout):
            self.complain()

    def settle(self, timeout: float = KEEPING_TIMEOUT) -> bool:
        """Wait, but not for long, until nothing waits to be accepted; whether nothing does. BacklogNotDrained if
        something is left that cannot be moved in the queue."""
        if _until(lambda: self.drained, timeout):
            return True
        stuck = [listener for listener in self._listeners if not keeps(listener)]
        if any(locate.accept_queues(stuck)):
            self.complain()
        return False

    def neighbours(self, local: Collection[str]) -> list[ConnId]:
        """Connections that wait to be accepted and whose other end a process of this host has; ``local`` are its
        addresses."""
        if self.handshakes_ended and not any(locate.accept_queues(self._listeners)):
            return []
        return [conn for conn in locate.unaccepted(self._listeners) if place_of(conn, (), local) is Place.OUTSIDE]

    def drain_neighbours(self, local: Collection[str], timeout: float = DRAIN_TIMEOUT) -> None:
        """Wait until none of :meth:`neighbours` waits. BacklogNotDrained after ``timeout`` seconds."""
        if not _until(lambda: not self.neighbours(local), timeout) and (left := self.neighbours(local)):
            raise BacklogNotDrained(
                f"{len(left)} connections of processes of this host wait to be accepted: they cannot move in the queue",
                object=str(left[0]),
            )

    def complain(self) -> None:
        """Raise BacklogNotDrained, naming the first listener with a queue."""
        for listener, backlog in zip(self._listeners, locate.listener_backlog(self._listeners), strict=True):
            if not backlog.empty:
                address, port = listener.getsockname()[:2]
                raise BacklogNotDrained(
                    f"{backlog.accepted} connections wait to be accepted, {backlog.half_open} are half open",
                    object=f"listener {address}:{port}",
                )
        raise BacklogNotDrained("connections waited to be accepted when the process stopped")

    def end(self) -> None:
        """Let the listeners take connections again, as before. Nothing if it has not begun. May be repeated."""
        if self._states is not None:
            undo_drop_syns(self._listeners, self._states)
            self._states = None


class LastSegments:
    """Looks, in a thread of its own, for closed connections of these local addresses whose segments are under way.

    Made when the application stands still: from then on no connection is closed, so none joins them.

    nobody  somebody looks at all connections anyway, in the stop: whether there are certainly none.  To look for them
            goes through all sockets of the host
    """

    def __init__(self, addresses: Collection[str], nobody: Callable[[], bool] | None = None) -> None:
        self._addresses = frozenset(addresses)
        self._nobody = nobody
        #: those that lacked nothing but the peer's last ACK after :meth:`wait`
        self.ended: tuple[ConnId, ...] = ()
        self._first = Beside(self._look) if addresses and nobody is None else None

    def _look(self) -> list[locate.Located]:
        return [c for c in locate.orphans(_CLOSING) if c.conn_id.local in self._addresses]

    def wait(self, timeout: float = LAST_SEGMENTS_TIMEOUT) -> None:
        """Wait until they are gone, ``timeout`` seconds at most; :attr:`ended` tells what is left."""
        first, self._first = self._first, None
        if self._nobody is not None and self._addresses:
            there = not self._nobody() and self._look()
        else:
            there = first is not None and first.result()
        if not there or _until(lambda: not self._look(), timeout):
            return
        left = self._look()
        self.ended = tuple(c.conn_id for c in left if c.send_queue <= _FIN)[:ENDED_MAX]
        if cut := sum(c.send_queue > _FIN for c in left):
            _log.warning("%d connections were closed with data that has not arrived", cut)


def _until(condition: Callable[[], bool], timeout: float) -> bool:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        # sleeping, not spinning: on a machine with few cores the application needs them to accept
        time.sleep(_POLL)
    return True
