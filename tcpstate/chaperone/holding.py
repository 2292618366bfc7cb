"""The connections that the chaperone holds: frozen ones, and rebuilt ones that are not released.

::

    freeze    journalled, captured, quiet                       the client's process may run on
    export    in repair for a moment, quiet again afterwards
    resume    given back; what was captured is replayed
    discard   dissolved without a word
    rebuild   a socket of ours, given to the user, quiet and in repair; nobody else has it
    release   alive; what was captured is replayed; the client gets it

Whoever has a socket in repair mode may make another connection, or a listener on another's port, of it without a
capability (net/ipv4/tcp.c TCP_QUEUE_SEQ, tcp_connect; inet_csk_get_port, SK_FORCE_REUSE).  So nobody has one but for
the moment of an export, and after that moment the socket is looked at again, before anything it sends leaves this host.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import field

from tcpstate.capture import Capture, replay
from tcpstate.chaperone.identity import Holder, Peer, conn_id_of, cookie_of, found
from tcpstate.chaperone.journal import Journal, Note
from tcpstate.chaperone.policy import ROOT
from tcpstate.connid import ConnId
from tcpstate.errors import ConnectionCallFailed, NoSuchConnection, NotFrozen, TamperedConnection, TcpmigError
from tcpstate.export import export_connections
from tcpstate.freeze import (
    Blackhole,
    QuietState,
    enter_repair,
    leave_repair,
    not_in_repair,
    quiet,
    read_originals,
    thaw,
)
from tcpstate.kernel import batch
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.route import is_local
from tcpstate.kernel.sockets import UNSPECIFIED_ADDRESS
from tcpstate.preflight import refusal
from tcpstate.rebuild import rebuild_connections, release_connections
from tcpstate.record import ConnectionRecord, Family
from tcpstate.rows import describe
from tcpstate.segment import Flag, Segment
from tcpstate.slotted import dataclass

__all__ = ["Held", "Holding"]

_log = logging.getLogger(__name__)

#: segments of one connection that are kept; the peer sends again what is beyond them
_SEGMENTS_MAX = 512
_DISSOLVE_TRIES = 100


@dataclass(slots=True, kw_only=True)
class Held:
    """One connection.

    conn_id, uid, pid  which, whose, and of which process
    session   the client for which it is held
    until     when it is given back by itself (monotonic seconds)
    sock      our descriptor
    state     the originals, of a frozen one; None: rebuilt
    refused   why it cannot be exported, as it was before it was frozen
    record    of a rebuilt one
    exported  whether its record is out: it may live elsewhere
    arrived   what its peer has sent meanwhile
    """

    conn_id: ConnId
    uid: int
    pid: int
    session: int
    until: float
    sock: socket.socket
    state: QuietState | None = None
    refused: TcpmigError | None = None
    record: ConnectionRecord | None = None
    exported: bool = False
    arrived: list[Segment] = field(default_factory=list)


class Holding:
    """What is held, by conn-ID. The rules that silence it stand from :meth:`open` to :meth:`close`."""

    def __init__(self, journal: Journal) -> None:
        self.held: dict[ConnId, Held] = {}
        self._journal = journal
        self._rules = Blackhole()
        self._capture: Capture | None = None
        self._ports: frozenset[int] = frozenset()

    def open(self) -> None:
        """Add the rules, and give back what an earlier chaperone has left. OSError."""
        self._rules.ensure()
        left: dict[tuple[int, int], None] = {}
        for note in self._journal.leftovers():
            left |= dict.fromkeys(note.rules.items())
            self._give_back(note)
        for family, priority in left:
            rules = Blackhole()
            rules.priorities = {family: priority}
            if self._rules.priorities.get(family) != priority:
                rules.remove()

    def _give_back(self, note: Note) -> None:
        try:
            holder = found(note.conn_id, Peer(os.getpid(), ROOT, ROOT))
            with holder.sock as sock:
                if cookie_of(sock) != note.cookie:
                    raise NoSuchConnection("another connection has its name now", object=str(note.conn_id))
                if not not_in_repair([sock]):
                    leave_repair([sock], [note.state.reuse_address], probe=False)
                if conn_id_of(sock) == note.conn_id:
                    thaw([sock], [note.state])
            _log.info("%s, left frozen by an earlier chaperone, flows again", note.conn_id)
        except NoSuchConnection:
            _log.info("%s, left frozen by an earlier chaperone, is gone", note.conn_id)
        except TcpmigError as error:
            # the others must not wait for this one; its note stays for another try
            _log.warning("%s, left frozen by an earlier chaperone, was not given back: %s", note.conn_id, error)
            return
        self._journal.forget(note.cookie)

    def close(self) -> None:
        """Give everything back, and take the rules away."""
        for held in list(self.held.values()):
            self.let_go(held)
        self._rules.remove()

    def of_user(self, uid: int) -> int:
        """How many are held for a user."""
        return sum(held.uid == uid for held in self.held.values())

    # ---- frozen ones

    def freeze(self, holder: Holder, session: int, until: float) -> Held:
        """Take a connection that flows; its descriptor is ours from here on. ForeignFilter, ConnectionCallFailed."""
        sock = holder.sock
        cookie = cookie_of(sock)
        (state,) = read_originals([sock])
        self._journal.write(
            Note(
                conn_id=holder.conn_id,
                uid=holder.uid,
                cookie=cookie,
                state=state,
                rules=dict(self._rules.priorities),
                host=self._journal.host,
            )
        )
        held = Held(
            conn_id=holder.conn_id,
            uid=holder.uid,
            pid=holder.pid,
            session=session,
            until=until,
            sock=sock,
            state=state,
            refused=refusal(sock),
        )
        try:
            self._add(held)
            quiet([sock], [state])
        except BaseException:
            self._journal.forget(cookie)
            self._remove(held)
            raise
        return held

    def export(self, held: Held) -> ConnectionRecord:
        """Its record; it is quiet as before.

        What :func:`tcpstate.preflight.refusal` said before it was frozen; the errors of export_connections;
        TamperedConnection: it is no more.
        """
        state = _state(held)
        if held.refused is not None:
            raise held.refused
        try:
            (record,) = export_connections([held.sock], [state])
            leave_repair([held.sock], [state.reuse_address], probe=False)
        except (TcpmigError, OSError) as error:
            # a connection that is what it was has left repair mode
            if conn_id_of(held.sock) != held.conn_id:
                raise self._tampered(held) from error
            raise
        if not record.conn_id == held.conn_id == conn_id_of(held.sock):
            raise self._tampered(held)
        held.exported = True
        return record

    def resume(self, held: Held) -> None:
        """Give a frozen connection back. ConnectionCallFailed: it stays held."""
        thaw([held.sock], [_state(held)])
        arrived = self._arrived(held)
        name = held.conn_id
        self._forget(held)
        if arrived and is_local(name.local):
            # the stack of a connection that lives judges by itself what it knows already
            replay(arrived, [], unknown=lambda segment: not segment.flags & Flag.SYN)

    def discard(self, held: Held) -> None:
        """End it without a word, for every process that has it. ConnectionCallFailed: it stays held."""
        _dissolve(held.sock)
        self._forget(held)

    def _tampered(self, held: Held) -> TamperedConnection:
        self.discard(held)
        return TamperedConnection("the socket became another connection", object=str(held.conn_id))

    # ---- rebuilt ones

    def rebuild(
        self, record: ConnectionRecord, uid: int, pid: int, session: int, *, until: float, elapsed: float
    ) -> Held:
        """Build a connection that belongs to the user, silent until released. The errors of rebuild_connections."""
        family = socket.AF_INET if record.family is Family.IPV4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        name = record.conn_id
        held = Held(conn_id=name, uid=uid, pid=pid, session=session, until=until, sock=sock, record=record)
        try:
            # before anything else: sock_diag, packet filters and we ourselves tell by it whose it is
            os.fchown(sock.fileno(), uid, -1)
            self._add(held)
            rebuild_connections([record], [sock], elapsed=elapsed)
        except BaseException:
            # in repair mode closing sends nothing
            self._remove(held)
            raise
        return held

    def release(self, held: Held) -> socket.socket:
        """Let a rebuilt one live; the socket is the caller's. The errors of release_connections: it stays held."""
        record = _record(held)
        release_connections([held.sock], [record])
        replay(self._arrived(held), [record])
        sock = held.sock.dup()
        self._remove(held)
        return sock

    # ---- ends

    def let_go(self, held: Held) -> None:
        """Nobody asks for it any more: a frozen one flows again, what was moved away or never lived ends silently."""
        name = str(held.conn_id)
        try:
            if held.state is None:
                self._remove(held)
                _log.info("%s was rebuilt and not released: ended", name)
            elif held.exported and not is_local(held.conn_id.local):
                self.discard(held)
                _log.info("%s was exported and its address has gone: ended", name)
            else:
                self.resume(held)
                _log.info("%s flows again", name)
        except (TcpmigError, OSError) as error:
            _log.warning("%s was not given back: %s", name, error)
            # another chaperone may try: the note stays
            self._remove(held)

    def _forget(self, held: Held) -> None:
        self._journal.forget(cookie_of(held.sock))
        self._remove(held)

    # ---- what arrives meanwhile

    def drain(self) -> None:
        """Fetch what was captured, before there is no room for more."""
        if self._capture is not None:
            self._sort(self._capture.segments())

    def _sort(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            held = self.held.get(segment.conn_id)
            if held is not None and len(held.arrived) < _SEGMENTS_MAX:
                held.arrived.append(segment)

    def _arrived(self, held: Held) -> list[Segment]:
        self.drain()
        return held.arrived

    def _add(self, held: Held) -> None:
        self.held[held.conn_id] = held
        self._watch()

    def _remove(self, held: Held) -> None:
        try:
            if self.held.get(held.conn_id) is held:
                del self.held[held.conn_id]
                self._watch()
        finally:
            held.sock.close()

    def _watch(self) -> None:
        """Capture what arrives for the ports of those that are held."""
        ports = frozenset(conn_id.local_port for conn_id in self.held)
        if ports == self._ports:
            return
        old, self._capture = self._capture, None
        if ports:
            capture = Capture(ports=ports)
            try:
                # before the old one ends: what both have is replayed once
                capture.start()
            except OSError:
                self._capture = old
                raise
            self._capture = capture
        self._ports = ports
        if old is not None:
            self._sort(old.segments())
            old.close()


def _state(held: Held) -> QuietState:
    if held.state is None:
        raise NotFrozen("the connection is being rebuilt", object=str(held.conn_id))
    return held.state


def _record(held: Held) -> ConnectionRecord:
    if held.record is None:
        raise NoSuchConnection("the connection is frozen, not rebuilt", object=str(held.conn_id))
    return held.record


def _dissolve(sock: socket.socket) -> None:
    """End the connection, or whatever its process has made of it, and leave repair mode. ConnectionCallFailed."""
    nowhere = ctypes.create_string_buffer(UNSPECIFIED_ADDRESS)
    # who made something else of it may go on trying; between these two calls there is no time for it
    for _ in range(_DISSOLVE_TRIES):
        if conn_id_of(sock) is not None:
            with contextlib.suppress(ConnectionCallFailed):
                enter_repair([sock])
        batch.syscall(SYS.connect, sock.fileno(), ctypes.addressof(nowhere), len(UNSPECIFIED_ADDRESS))
        with contextlib.suppress(ConnectionCallFailed):
            leave_repair([sock], [False], probe=False)
            return
    raise ConnectionCallFailed("its process does not let go of it", object=describe(sock))
