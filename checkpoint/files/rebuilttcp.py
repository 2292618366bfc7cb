"""All TCP connections of a tree at the target: rebuilt on descriptors that were made early, compared, and released.

Those that were built ahead of the stop (:mod:`checkpoint.files.aheadbuild`) stand already: of them only what has
changed since is rebuilt, on the same descriptors.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from checkpoint.errors import BadFileRecord
from checkpoint.files.peers import StandIn, stand_in
from checkpoint.files.tcpfile import TcpFile
from tcpstate.capture import replay
from tcpstate.connid import ConnId
from tcpstate.freeze import QuietState, thaw
from tcpstate.rebuild import Difference, differences, rebuild_connections
from tcpstate.record import ConnectionRecord
from tcpstate.release import open_connections, release_connections
from tcpstate.reopen import tell_windows
from tcpstate.segment import Segment

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["RebuiltTcp"]


class RebuiltTcp:
    """The connections of a tree at the target, on descriptors that were made early.

    Those that were held on this host are the very sockets: they need no rebuild, only to be thawed.
    """

    def __init__(self, host: Rebuilder) -> None:
        self._host = host
        self._socks: list[socket.socket] = []
        self._records: list[ConnectionRecord] = []
        self._early: dict[int, list[memoryview]] = {}
        # for other ends that do not exist any more: the last of the sockets above
        self._stand_ins: list[socket.socket] = []
        self._alone: set[ConnId] = set()
        self._held: list[tuple[socket.socket, QuietState]] = []
        self._held_records: list[ConnectionRecord] = []
        self._blackhole = host.blackhole
        self._ahead = host.ahead

    def rebuild(self, elapsed: float) -> None:
        """All of them, in repair: nothing is sent, and what arrives is not answered."""
        if self._socks or self._held:
            raise RuntimeError("the connections were rebuilt already")
        others: list[tuple[socket.socket, ConnectionRecord]] = []
        changed = [] if self._ahead is None else self._ahead.dissolve_changed(self._host.retold, self._host.files)
        bound = 0
        for index in (*changed, *range(self._host.first, len(self._host.files))):
            record = self._host.files[index]
            if not isinstance(record, TcpFile) or not record.conn_id:
                continue
            if record.connection is None:
                if record.options is None:
                    raise BadFileRecord("a connection did not come", object=record.conn_id)
                continue
            whole, early = self._host.queues.whole(record, index)
            if whole.connection is None:
                continue
            held = self._host.held.get(index)
            if held is not None and held.file.quiet is not None:
                self._held.append((socket.socket(fileno=self._host.descriptor(index)), held.file.quiet))
                self._held_records.append(whole.connection)
                continue
            # those that had been built before come first; of them one may have ended meanwhile
            bound += index < self._host.first
            if early:
                self._early[len(self._socks)] = early
            self._socks.append(socket.socket(fileno=self._host.descriptor(index)))
            self._records.append(whole.connection)
            if record.stand_in is not StandIn.NONE:
                others.append(stand_in(whole.connection, record.stand_in))
                self._alone.add(whole.connection.conn_id)
        for sock, mirror in others:
            self._stand_ins.append(sock)
            self._socks.append(sock)
            self._records.append(mirror)
        if not self._socks:
            return
        if not self._blackhole.priorities:
            self._blackhole.ensure()
        rebuild_connections(self._records, self._socks, elapsed=elapsed, early=self._early, bound=bound)

    def compare(self) -> list[tuple[str, Difference]]:
        """(conn-ID, difference) wherever the sockets read back otherwise than was told."""
        found = differences(self._socks, self._records, self._early)
        told = [] if self._ahead is None else self._ahead.differences()
        return told + [(str(self._records[at].conn_id), difference) for at, difference in found]

    @property
    def records(self) -> list[ConnectionRecord]:
        """The connections that were rebuilt, without stand-ins, and those that were taken back."""
        return self._records[: len(self._records) - len(self._stand_ins)] + self._held_records

    @property
    def ahead(self) -> int:
        """How many stand as they were built before the stop."""
        return 0 if self._ahead is None else self._ahead.standing

    @property
    def taken(self) -> int:
        """How many were held."""
        return len(self._held)

    def release(self) -> None:
        """Let them live. The blackhole stays until :meth:`close`: nothing carries its mark any more, and removing it
        takes milliseconds."""
        # the thousands that were built ahead are begun beside the others
        ahead = None if self._ahead is None else self._ahead.release()
        try:
            release_connections(self._socks, self._records, tell=False, connect=False)
        finally:
            if ahead is not None:
                ahead.finish()
        if self._held:
            thaw([sock for sock, _ in self._held], [state for _, state in self._held])
        for sock in self._stand_ins:
            sock.close()

    def connect(self, arrived: Sequence[Segment] = ()) -> None:
        """After the release, once the addresses are announced: those that were connecting go on.

        arrived  what was captured since the freeze: their peers may have answered. ConnectNotRepeated"""
        # those that were held have gone on connecting by themselves
        made = len(self._socks) - len(self._stand_ins)
        open_connections(self._socks[:made], self._records[:made], arrived)

    def replay(self, arrived: Iterable[Segment], *, unknown: Callable[[Segment], bool]) -> None:
        """After the release: the connections get what was captured for them; ``unknown`` as in
        :func:`tcpstate.capture.replay`. OSError."""
        socks = self._socks[: len(self._socks) - len(self._stand_ins)] + [sock for sock, _ in self._held]
        records, arrived = self.records, list(arrived)
        if self._ahead is not None:
            for sock, record in self._ahead.connections_for(arrived):
                socks.append(sock)
                records.append(record)
        replay(arrived, records, socks=socks, unknown=unknown)

    def tell_windows(self) -> None:
        """After the release, once the addresses are announced: peers that wait for room hear that there is some."""
        tell_windows([record for record in self.records if record.conn_id not in self._alone])

    def close(self) -> None:
        """Forget the sockets; their descriptors are the host's. Closed in repair they vanish without a packet."""
        for sock in self._stand_ins:
            sock.close()
        for sock in self._socks[: len(self._socks) - len(self._stand_ins)]:
            sock.detach()
        for sock, _ in self._held:
            sock.detach()
        self._stand_ins = []
        self._socks = []
        self._records = []
        self._held = []
        self._held_records = []
        self._early = {}
        self._host.queues.clear()
        self._blackhole.remove()
