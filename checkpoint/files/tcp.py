"""All TCP connections of a tree at once: frozen and exported at the source, rebuilt and released at the target.

Each step is one batch of :mod:`tcpstate` over all sockets. While sockets are frozen a rule in this network namespace
sends their packets into a blackhole (:mod:`tcpstate.silence`); it stands as long as the group needs it.
"""

from __future__ import annotations

import dataclasses
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.errors import BadFileRecord
from checkpoint.files.base import FdView, OpenFile
from checkpoint.files.listener import is_closed, is_tcp
from checkpoint.files.tcpfile import TcpFile
from tcpstate import codec
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections
from tcpstate.freeze import QuietState, quiet, read_originals, thaw
from tcpstate.kernel.sockets import SO, Level
from tcpstate.rebuild import Difference, compare, read_back, rebuild_connections, release_connections
from tcpstate.record import ConnectionRecord
from tcpstate.rows import describe
from tcpstate.silence import Blackhole

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder
    from checkpoint.files.table import FileTable

__all__ = ["Original", "RebuiltTcp", "TcpGroup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """One connection's socket as it was before the freeze: what giving it back by hand takes.

    places  every (pid, fd) that it has
    state   its own filter, mark and time-outs
    """

    places: list[tuple[int, int]]
    state: QuietState


class TcpGroup:
    """The TCP sockets of a file table, through our duplicates. The table must stay open."""

    def __init__(self, table: FileTable) -> None:
        self._table = table
        self._listeners: list[socket.socket] = []
        self._views: list[tuple[int, FdView]] = []
        for index, view in enumerate(table.entries):
            if not is_tcp(view):
                continue
            if view.socket.getsockopt(Level.SOCKET, SO.ACCEPTCONN):
                self._listeners.append(view.socket)
            elif not is_closed(view):
                self._views.append((index, view))
        self._states: list[QuietState] = []
        self._records: dict[int, OpenFile] = {}
        self._blackhole = Blackhole()

    @property
    def listeners(self) -> list[socket.socket]:
        """The listening sockets."""
        return list(self._listeners)

    @property
    def established(self) -> list[socket.socket]:
        """The sockets that have a connection, in whatever state."""
        return [view.socket for _, view in self._views]

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._views)

    @property
    def ports(self) -> set[int]:
        """The local ports of connections and listeners."""
        return {sock.getsockname()[1] for sock in (*self._listeners, *self.established)}

    def originals(self) -> bytes:
        """What :meth:`freeze` is about to change, for a journal: by PID and descriptor, packed."""
        states = read_originals(self.established)
        places = [view.places for _, view in self._views]
        return codec.pack([Original(places=p, state=s) for p, s in zip(places, states, strict=True)])

    @property
    def local_addresses(self) -> set[str]:
        """The addresses of this host that the connections use."""
        return {_local(view.socket) for _, view in self._views} - {""}

    def freeze(self) -> None:
        """Nothing comes in or goes out any more. All or none."""
        self._blackhole.ensure()
        try:
            self._states = quiet(self.established)
        except BaseException:
            self._blackhole.remove()
            raise

    def export(self) -> None:
        """Read the frozen connections; they are in repair afterwards. The owners must be stopped."""
        ended = [is_closed(view) for _, view in self._views]
        for (index, view), state, is_over in zip(self._views, self._states, ended, strict=True):
            if is_over:
                # It was reset between the capture and the freeze. Its options are read as its owner knows them.
                thaw([view.socket], [state])
                self._records[index] = TcpFile.without_connection(view)
        self._views = [pair for pair, is_over in zip(self._views, ended, strict=True) if not is_over]
        self._states = [state for state, is_over in zip(self._states, ended, strict=True) if not is_over]
        exported = export_connections(self.established, self._states)
        for (index, view), connection in zip(self._views, exported, strict=True):
            early = self._table.record(index)
            if not isinstance(early, TcpFile):
                raise BadFileRecord("a connection was captured as something else", object=view.object)
            self._records[index] = dataclasses.replace(early, connection=connection)

    def records(self) -> dict[int, OpenFile]:
        """The entries of FILES_DELTA, after :meth:`export`."""
        return dict(self._records)

    @property
    def exported(self) -> list[ConnectionRecord]:
        """The connections as exported."""
        return [r.connection for r in self._records.values() if isinstance(r, TcpFile) and r.connection is not None]

    def thaw(self) -> None:
        """Give everything back as it was. Nothing if it was not frozen. May be repeated."""
        states, self._states = self._states, []
        try:
            if states:
                thaw(self.established, states)
        finally:
            self._blackhole.remove()
            self._table.go_on()

    def discard(self) -> None:
        """End the connections without a packet, for their owners too. The addresses must have left this host."""
        try:
            discard_connections(self.established, close=False)
        finally:
            self._states = []
            self._blackhole.remove()


def _local(sock: socket.socket) -> str:
    name = describe(sock)
    if not name.startswith("tcp:"):
        return ""
    from tcpstate.connid import ConnId

    return ConnId.parse(name).local


class RebuiltTcp:
    """The connections of a tree at the target, on descriptors that were made early."""

    def __init__(self, host: Rebuilder) -> None:
        self._host = host
        self._socks: list[socket.socket] = []
        self._records: list[ConnectionRecord] = []
        self._blackhole = Blackhole()

    def rebuild(self, elapsed: float) -> None:
        """All of them, in repair: nothing is sent, and what arrives is not answered."""
        if self._socks:
            raise RuntimeError("the connections were rebuilt already")
        for index, record in enumerate(self._host.files):
            if not isinstance(record, TcpFile) or not record.conn_id:
                continue
            if record.connection is None:
                if record.options is None:
                    raise BadFileRecord("a connection did not come", object=record.conn_id)
                continue
            self._socks.append(socket.socket(fileno=self._host.descriptor(index)))
            self._records.append(record.connection)
        if not self._socks:
            return
        self._blackhole.ensure()
        rebuild_connections(self._records, self._socks, elapsed=elapsed)

    def compare(self) -> list[tuple[str, Difference]]:
        """(conn-ID, difference) wherever the sockets read back otherwise than was told."""
        if not self._socks:
            return []
        found = read_back(self._socks, self._records)
        return [
            (str(told.conn_id), difference)
            for told, again in zip(self._records, found, strict=True)
            for difference in compare(told, again)
        ]

    @property
    def records(self) -> list[ConnectionRecord]:
        """The connections that were rebuilt."""
        return list(self._records)

    def release(self) -> None:
        """Let them live."""
        try:
            release_connections(self._socks, self._records)
        finally:
            self._blackhole.remove()

    def close(self) -> None:
        """Forget the sockets; their descriptors are the host's. Closed in repair they vanish without a packet."""
        for sock in self._socks:
            sock.detach()
        self._socks = []
        self._records = []
        self._blackhole.remove()
