"""Rebuilt processes whose tool died between their survival and their release: what is left to do, from what it kept.

The processes stand still (state T), complete; their sockets are in repair, or some of them released.  What the
release needs is told by frames of the image (FILES, FILES_DELTA, send queues) and by the note of the stubs.  All may be
repeated and cut short at any moment.

What the user chose stands already, or is told: files of --map and --external are open, names are noted with their
places here, stand-ins (--local-peer) are in the records, and the note has the interfaces of --map-dev.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import socket
import time
from collections.abc import Sequence
from typing import Final

from checkpoint import procfs
from checkpoint.errors import FileRebuildFailed, NoSuchProcess
from checkpoint.files.peers import StandIn, stand_in
from checkpoint.files.queues import Queues
from checkpoint.files.rebuild import Rebuilder
from checkpoint.files.sysv import remove_noted as remove_segment
from checkpoint.files.table import TreeFiles
from checkpoint.files.tcpfile import TcpFile
from checkpoint.image.frames import PageRun
from checkpoint.ipc.table import remove_noted as remove_object
from checkpoint.namespaces.spaces import Kind, entered
from checkpoint.records import FilesDelta
from checkpoint.traces import Made, Stubs, Traced, alive
from checkpoint.undo import taken
from tcpstate.freeze import not_in_repair, thaw
from tcpstate.rebuild import rebuild_connections
from tcpstate.record import ConnectionRecord
from tcpstate.release import finish_release
from tcpstate.reopen import tell_windows

__all__ = ["Finish", "remove_made", "running"]

_log = logging.getLogger(__name__)

#: seconds in which a thread with a queued SIGSTOP comes to its stop
_STOP_WAIT: Final = 1.0
_PAUSE: Final = 0.002
_SIGSTOP_BIT: Final = 1 << 18


def running(processes: Sequence[Traced]) -> list[Traced]:
    """Those of them that run: they were let go."""
    deadline = time.monotonic() + _STOP_WAIT
    while True:
        states = {traced.pid: _state(traced.pid) for traced in alive(processes)}
        coming = [pid for pid, (letter, pending) in states.items() if letter != "T" and pending]
        if not coming or time.monotonic() > deadline:
            return [each for each in processes if each.pid in states and states[each.pid][0] != "T"]
        time.sleep(_PAUSE)


def _state(pid: int) -> tuple[str, bool]:
    """Its state letter, and whether a SIGSTOP waits for one of its threads."""
    try:
        letter = procfs.read_stat(pid).state
        pending = any(int(procfs.read_status(pid, tid)["SigPnd"], 16) & _SIGSTOP_BIT for tid in procfs.threads(pid))
    except NoSuchProcess:
        return "T", False
    return letter, pending


class Finish:
    """The release of what was rebuilt. Close it.

    files   of the tree, as they came last
    sent    pieces of send queues that came as pages
    stubs   the processes
    """

    def __init__(self, files: TreeFiles, delta: FilesDelta, sent: Sequence[PageRun], stubs: Stubs) -> None:
        self._stubs = stubs
        self._queues = Queues()
        for run in sent:
            self._queues.take(run)
        latest = [delta.files.get(index, record) for index, record in enumerate(files.files)]
        self._rebuilder = Rebuilder(dataclasses.replace(files, files=latest), devices=stubs.devices)
        self._ends = contextlib.ExitStack()
        places: dict[int, list[tuple[int, int]]] = {}
        for pid, table in files.tables.items():
            for fd, (index, _) in table.items():
                places.setdefault(index, []).append((stubs.numbers.get(pid, pid), fd))
        self._descriptors: dict[int, int] = {}
        for index, where in places.items():
            with taken(where, stubs.processes) as fd:
                if fd >= 0:
                    self._descriptors[index] = os.dup(fd)
        self._rebuilder.adopt(self._descriptors)

    def close(self) -> None:
        """Our descriptors."""
        self._rebuilder.close()

    @property
    def _connections(self) -> list[tuple[int, ConnectionRecord]]:
        """(index, record) of each that came."""
        found = []
        for index, record in enumerate(self._rebuilder.files):
            if isinstance(record, TcpFile) and index in self._descriptors:
                connection = self._queues.to_send(record, index)
                if connection is not None:
                    found.append((index, connection))
        return found

    def release(self) -> int:
        """The addresses are local: connections live, listeners listen, names appear. How many connections."""
        pairs = self._connections
        socks = {index: socket.socket(fileno=self._descriptors[index]) for index, _ in pairs}
        held = {index: state for index, state in self._stubs.held.items() if index in socks}
        rebuilt = [(socks[index], record) for index, record in pairs if index not in held]
        others: list[tuple[socket.socket, ConnectionRecord]] = []
        try:
            others += self._stand_ins({index: sock for index, sock in socks.items() if index not in held}, dict(pairs))
            if others:
                rebuild_connections([record for _, record in others], [sock for sock, _ in others], elapsed=0)
            both = rebuilt + others
            finish_release([sock for sock, _ in both], [record for _, record in both])
            # the very sockets: they need only be thawed
            thaw([socks[index] for index in held], list(held.values()))
        finally:
            for sock in socks.values():
                sock.detach()
            for sock, _ in others:
                sock.close()
        # System V objects are those of the processes' namespace
        alone = alive(self._stubs.processes)
        with entered(alone[0].pid, frozenset({Kind.IPC})) if alone else contextlib.nullcontext():
            self._rebuilder.release_files()
        for name in self._stubs.names:
            try:
                os.rename(name.staged, name.real)
            except FileNotFoundError:
                _log.debug("%s is at its place already", name.real)
            except OSError as error:
                raise FileRebuildFailed(f"rename: {error.strerror}", object=name.real) from error
        return len(pairs)

    def _stand_ins(
        self, socks: dict[int, socket.socket], records: dict[int, ConnectionRecord]
    ) -> list[tuple[socket.socket, ConnectionRecord]]:
        """Those that vanished with the tool, for other ends that do not exist any more: of connections that are still
        in repair. One that was released has done by its end what it was to do."""
        wanted = {index: does for index in socks if (does := self._stand_in(index)) is not StandIn.NONE}
        if not wanted:
            return []
        out = {id(sock) for sock in not_in_repair([socks[index] for index in wanted])}
        return [stand_in(records[index], does) for index, does in wanted.items() if id(socks[index]) not in out]

    def _stand_in(self, index: int) -> StandIn:
        file = self._rebuilder.files[index]
        return file.stand_in if isinstance(file, TcpFile) else StandIn.NONE

    def tell_windows(self) -> None:
        """The addresses are announced: peers that wait for room hear that there is some. OSError."""
        tell_windows([record for index, record in self._connections if self._stand_in(index) is StandIn.NONE])


def remove_made(made: Made) -> bool:
    """Take away a file or directory, or a System V object, that was not to stay. Whether there was one."""
    for remove in (remove_segment, remove_object):
        found = remove(made.path)
        if found is not None:
            return found
    if os.path.isdir(made.path) and not os.path.islink(made.path):
        shutil.rmtree(made.path, ignore_errors=True)
        return True
    try:
        os.unlink(made.path)
    except FileNotFoundError:
        return False
    return True
