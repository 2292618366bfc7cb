"""Connections that are built before the stop: the target's half of their pre-copy. Behind them come plain files, which
are opened (:mod:`checkpoint.files.aheadopen`).

They stand in repair mode, behind the filter and the mark of :mod:`tcpstate.rebuild`, on the descriptors that the new
processes will have: nothing of them can be heard, and if we end they vanish without a packet.  All that is left for the
release is done in one batch.  What the freeze found changed is dissolved and rebuilt on the same descriptor.

Their keepalive begins with the release: a socket that probes its peer before it may hear the answer would reset it.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import select
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from checkpoint.errors import BadFileRecord
from checkpoint.files.aheadinstall import install_ahead
from checkpoint.files.aheadopen import OpenedAhead
from checkpoint.files.base import OpenFile, set_flags
from checkpoint.files.descriptors import ensure_descriptors
from checkpoint.files.epoll import Epoll
from checkpoint.files.listener import new_socket
from checkpoint.files.peercred import Stub
from checkpoint.files.tcpfile import TcpFile
from checkpoint.files.told import Told
from checkpoint.files.treefiles import AheadFiles, TreeFiles
from tcpstate import rebuild
from tcpstate.discard import discard_connections
from tcpstate.kernel.lanes import Together
from tcpstate.kernel.sockets import SO, Level
from tcpstate.options import take_back
from tcpstate.rebuild import Difference, rebuild_connections
from tcpstate.record import ConnectionRecord, State
from tcpstate.release import Ready, retire
from tcpstate.segment import Segment

__all__ = ["BuiltAhead"]


class BuiltAhead:
    """The files of ``told``, built. BadFileRecord, TooManyDescriptors, and what
    :func:`~tcpstate.rebuild.rebuild_connections` raises; nothing is left then.

    devices  interface names of the source to those here
    path     maps a path of the source to one here
    """

    def __init__(self, told: AheadFiles, devices: Mapping[str, str], path: Callable[[str], str]) -> None:
        self.told = told
        self.files = [file.on_devices(devices) if devices else file for file in told.files]
        self._records = [_idle(file) for file in itertools.takewhile(_is_connection, self.files)]
        self._by_conn = {record.conn_id: index for index, record in enumerate(self._records)}
        #: their local ports
        self.ports = {record.conn_id.local_port for record in self._records}
        self._gone: set[int] = set()
        self._changed: list[int] = []
        #: their descriptors in the new processes
        self.tables = Told(told)
        self._handed_over = False
        ensure_descriptors(len(self._records))
        self._socks: list[socket.socket] = []
        self._plain: OpenedAhead | None = None
        self._epolls: list[int] = []
        #: processes that have their descriptors already
        self._stubs: Mapping[int, Stub] = {}
        try:
            for record, file in zip(self._records, self.files[: len(self._records)], strict=True):
                sock = new_socket(rebuild.record_family(record), socket.SOCK_STREAM, str(record.conn_id))
                self._socks.append(sock)
                set_flags(sock.fileno(), file.flags)
            elapsed = max(0.0, (time.monotonic_ns() - told.read_at) / 1e9) if told.read_at else 0.0
            rebuild_connections(self._records, self._socks, elapsed=elapsed)
            self._differences = rebuild.differences(self._socks, self._records)
            self._ready = Ready(self._socks, self._records)
            self._plain = OpenedAhead(self.files[len(self._records) :], len(self._records), path)
            for _ in told.epolls:
                self._epolls.append(_new_epoll())
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """How many files were told."""
        return len(self.files)

    @property
    def standing(self) -> int:
        """How many connections are as they were told."""
        return len(self._records) - len(self._out)

    @property
    def _out(self) -> set[int]:
        """Indexes of connections that are not."""
        return {index for index in self._gone if index < len(self._records)} | set(self._changed)

    @property
    def _fds(self) -> list[int]:
        return [sock.fileno() for sock in self._socks] + ([] if self._plain is None else self._plain.fds)

    @property
    def changed(self) -> Sequence[int]:
        """Indexes of connections that were told again."""
        return self._changed

    def install(self, stubs: Mapping[int, Stub]) -> None:
        """Give the new processes their descriptors, and the epoll instances what they watch. CallError,
        TooManyDescriptors."""
        self._stubs = install_ahead(self.told, self._fds, self._epolls, stubs)

    def uninstall(self) -> None:
        """The new processes are others."""
        self._stubs = {}

    def installed(self, stubs: Mapping[int, Stub]) -> bool:
        """Whether these processes have them."""
        return bool(self._stubs) and all(stubs.get(pid) is stub for pid, stub in self._stubs.items())

    def go_on(self, files: TreeFiles) -> TreeFiles:
        """The files of the tree, now that it stands still; those that are gone are forgotten. ValueError."""
        whole = self.tables.go_on(files)
        self._forget(files.gone)
        if self._plain is not None:
            for index in files.moved_on:
                self.files[index] = whole.files[index]
                self._plain.seek(index, whole.files[index].pos)
            for index in self._plain.lacking(self._gone):
                self.tables.lack(index)
        return whole

    def take_epoll(self, at: int) -> int:
        """A descriptor of ours of an instance that stands."""
        return os.dup(self._epolls[at])

    def check(self, epolls: Iterable[Epoll]) -> None:
        """BadFileRecord if one of them goes on from an instance that was not told."""
        for epoll in epolls:
            if epoll.told >= len(self.told.epolls):
                raise BadFileRecord(f"epoll instance {epoll.told} is referred to, and was not told", object="AHEAD")

    def whole(self, epoll: Epoll) -> Epoll:
        """An epoll instance that is to be made anew, with all that it watches."""
        if epoll.told < 0:
            return epoll
        dropped = set(epoll.dropped)
        kept = tuple(watch for watch in self.told.epolls[epoll.told].watches if watch.number not in dropped)
        return dataclasses.replace(epoll, watches=kept + epoll.watches, told=-1, dropped=())

    def _forget(self, gone: Iterable[int]) -> None:
        """The source has them no more, or tells them otherwise."""
        for index in gone:
            self._gone.add(index)
            if index < len(self._socks):
                # in repair mode: without a packet
                self._socks[index].close()
            elif self._plain is not None:
                self._plain.forget(index)

    def hand_over(self) -> list[int | None]:
        """Their descriptors, which are the caller's from now on; None of those that are gone, or not open."""
        self._handed_over = True
        return [None if fd < 0 else fd for fd in self._fds]

    # -- the connections are frozen

    def dissolve_changed(self, again: Collection[int], now: Sequence[OpenFile]) -> list[int]:
        """Make room on the descriptors of those that were told ``again``; ``now``: all files, the first of which are
        ours. Their indexes. ConnectionCallFailed."""
        self._changed = sorted(i for i in again if i < len(self._records) and i not in self._gone)
        if not self._changed:
            return []
        socks = [self._socks[i] for i in self._changed]
        discard_connections(socks, close=False)
        for sock in socks:
            # the next connect() chooses a route by it, and that of our mark leads nowhere
            sock.setsockopt(Level.SOCKET, SO.MARK, 0)
        for i, sock in zip(self._changed, socks, strict=True):
            record, before = now[i], self._records[i]
            if not isinstance(record, TcpFile) or record.connection is None:
                # it has ended: its socket is one without a connection
                take_back(sock, {*before.options, *before.option_data})
                retire([sock])
            else:
                after = record.connection
                take_back(sock, {*before.options, *before.option_data} - {*after.options, *after.option_data})
        return self._changed

    def differences(self) -> list[tuple[str, Difference]]:
        """(conn-ID, difference) of those that stand as they were told, and read back otherwise."""
        out = self._out
        return [(str(self._records[at].conn_id), one) for at, one in self._differences if at not in out]

    def release(self) -> Together:
        """They live: their addresses are local. Begun now; ConnectionCallFailed when it is finished."""
        return self._ready.release(self._out)

    def connections_for(self, segments: Iterable[Segment]) -> list[tuple[socket.socket, ConnectionRecord]]:
        """Those that stand as they were told, and some of the segments are for."""
        out = self._out
        found = {self._by_conn.get(segment.conn_id, -1) for segment in segments} - out - {-1}
        return [(self._socks[index], self._records[index]) for index in sorted(found)]

    def close(self) -> None:
        """Give up the descriptors that are ours: in repair mode they vanish without a packet. May be repeated."""
        for sock in self._socks:
            if self._handed_over:
                sock.detach()
            else:
                sock.close()
        self._socks = []
        plain, self._plain = self._plain, None
        if plain is not None and not self._handed_over:
            plain.close()
        while self._epolls:
            os.close(self._epolls.pop())


def _new_epoll() -> int:
    with select.epoll() as instance:
        return os.dup(instance.fileno())


def _is_connection(file: OpenFile) -> bool:
    return isinstance(file, TcpFile)


def _idle(file: OpenFile) -> ConnectionRecord:
    """The connection of a file that is told ahead. BadFileRecord if it is not such a one."""
    if not isinstance(file, TcpFile) or file.connection is None:
        raise BadFileRecord("what is told ahead of the stop is no connection", object="AHEAD")
    record = file.connection
    if record.state is not State.ESTABLISHED or record.send_queue or record.receive_queue or record.filter:
        raise BadFileRecord("a connection that is told ahead of the stop is not idle", object=str(record.conn_id))
    plain = TcpFile(flags=file.flags, family=rebuild.record_family(record), conn_id=file.conn_id, connection=record)
    if file != plain:
        raise BadFileRecord("a connection is told ahead of the stop with more than it can have", object=file.conn_id)
    return record
