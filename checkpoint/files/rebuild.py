"""The open files of a tree made again, in our process; the new processes take them from here.

::

    rebuild()           a descriptor per record; queues, names, locks.  The new processes' PIDs exist already: records
                        refer to them (receivers of signals, senders of messages, /proc/PID)
    write_content(..)   bytes of files that travel along
    take(..)            records told again (FILES_DELTA)
    complete(..)        contents sealed, connections rebuilt in repair
    compare()           what the rebuilt connections read back as
    release()           the addresses are local, the original is gone: connections live, listeners listen, names appear
    connect(..)         the addresses are announced: sockets that were connecting go on
    tell_windows()      the addresses are announced: peers that wait for room in a receive window hear of it
    close()             our descriptors; the processes keep theirs

``abort`` instead of ``release`` takes everything away; nothing has been changed that somebody else could see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from checkpoint.errors import BadFileRecord, FileRebuildFailed
from checkpoint.files.abi import REOPEN_FLAGS, Fcntl, FileFlag
from checkpoint.files.aheadbuild import BuiltAhead
from checkpoint.files.base import OpenFile, kind_name
from checkpoint.files.content import ContentKind, punch, put
from checkpoint.files.descriptors import ensure_descriptors
from checkpoint.files.external import External
from checkpoint.files.held import HeldSocket
from checkpoint.files.listener import Listener
from checkpoint.files.locks import Locks
from checkpoint.files.peercred import Stub
from checkpoint.files.peers import StandIn
from checkpoint.files.policy import External as ExternalRule
from checkpoint.files.policy import rule_for
from checkpoint.files.queues import Queues
from checkpoint.files.rebuilttcp import RebuiltTcp
from checkpoint.files.regular import RegularFile
from checkpoint.files.shipped import Shipment
from checkpoint.files.standing import Standing
from checkpoint.files.table import TreeFiles
from checkpoint.files.tcpfile import TcpFile
from checkpoint.files.terminal import Pair
from checkpoint.files.unixbuild import Builder
from checkpoint.image.frames import PageRun
from checkpoint.namespaces.here import number_here
from checkpoint.namespaces.ways import Ways
from tcpstate.connid import ConnId
from tcpstate.errors import KernelFeatureMissing
from tcpstate.halfopen import HalfOpen, expect
from tcpstate.kernel.bpf.handshake import Vouching
from tcpstate.rebuild import Difference
from tcpstate.record import ConnectionRecord
from tcpstate.segment import Segment
from tcpstate.silence import Blackhole

__all__ = ["Rebuilder"]

_log = logging.getLogger(__name__)

_OWNER: Final = struct.Struct("<ii")  # struct f_owner_ex
_NOBODY: Final = 1 << 22  # a number that no process has (PID_MAX_LIMIT)


def _has_another(record: OpenFile) -> bool:
    """Whether a file may take a second descriptor until all are made. A connection, of which there may be thousands,
    does not, unless a stand-in for its other end is made beside it."""
    return not isinstance(record, TcpFile) or record.stand_in is not StandIn.NONE


class Rebuilder:
    """The open files of one tree on their way. See the module's docstring for the order of calls.

    records  what TreeFiles holds
    path     maps a path of the source to one here; a :class:`Ways` of a tree with mounts of its own, told its root
    devices  interface names of the source to those here
    warn     told, in one sentence, of whatever will differ from the original
    blackhole  rules that silence connections until their release, if they stand already; removed by ``close``
    note_path  told the path of whatever is made beside its place, before it is made
    overwrite  shipped files replace differing ones
    external   what this host's user puts in the place of files that did not follow; closing takes the descriptor away
    ship, beacons  for a check before the stop of the source: files that are not shared can travel; by what directories
               of the source are known here (files/identity.py), None: the source is not there to tell
    held     sockets that were kept on this host, by index: they are taken instead of being made, and ours from then on
    ahead      connections that were built before the stop: the first of the files
    stubs      the new processes, by the PIDs of the source: what is to be theirs from the beginning is made in them
    own_ipc    the tree has an IPC namespace of its own, and we are in it: nothing is taken in there, nor outlasts it
    terminals  pseudo terminals that are somebody's controlling terminal already, by number; they stay the caller's

    Kinds use: ``files`` (all records), ``descriptor``, ``content``, ``shared`` (things that several descriptions have
    in common while they are made), ``at_end`` and ``on_abort``; ``travelling`` are files that a check wants shipped.
    """

    def __init__(
        self,
        records: TreeFiles,
        *,
        path: Callable[[str], str] = lambda path: path,
        warn: Callable[[str], None] = _log.warning,
        blackhole: Blackhole | None = None,
        note_path: Callable[[str], None] | None = None,
        overwrite: bool = False,
        external: Sequence[ExternalRule] = (),
        ship: bool = False,
        beacons: Mapping[str, str] | None = None,
        held: Mapping[int, HeldSocket] | None = None,
        terminals: Mapping[int, Pair] | None = None,
        devices: Mapping[str, str] | None = None,
        stubs: Mapping[int, Stub] | None = None,
        ahead: BuiltAhead | None = None,
    ) -> None:
        self.ahead = ahead
        self.first = 0 if ahead is None else ahead.count  #: where those begin that are built now
        self.stubs: Mapping[int, Stub] = {} if stubs is None else stubs
        self.held = dict(held or {})
        # filled in while the tree grows
        self.terminals: Mapping[int, Pair] = {} if terminals is None else terminals
        self._devices = dict(devices or {})
        self.files: list[OpenFile] = [] if ahead is None else list(ahead.files)
        self.files += [file.on_devices(self._devices) for file in records.files[self.first :]]
        #: what the new processes have already
        self.standing = Standing(ahead, self.files, records.tables, self.stubs)
        self.external = tuple(external)
        self.records = self._without_closed(records)
        self.overwrite = overwrite
        self.ship = ship
        self.beacons = beacons
        self.travelling: set[str] = set()
        #: files that some description is open for writing of
        self.written = {f.path for f in self.later if isinstance(f, RegularFile) and f.written}
        self.shipments: list[Shipment] = []
        self.path = path if isinstance(path, Ways) else Ways(path)
        self.own_ipc = False
        self.warn = warn
        self.note_path = note_path
        self.blackhole = Blackhole() if blackhole is None else blackhole
        self.queues = Queues()
        self.shared: dict[tuple[str, object], object] = {}
        self.retold: set[int] = set()  #: indexes of records that were told again
        self._descriptors: list[int | None] = [None] * len(self.files)
        if ahead is not None:
            self._descriptors[: self.first] = ahead.hand_over()
        self._building: set[int] = set()
        self._contents: list[int | None] = [None] * len(records.contents)
        self._at_end: list[Callable[[], None]] = []
        self._on_abort: list[Callable[[], None]] = []
        self._locks = Locks()
        #: a release of them may have been cut short
        self.adopted = False
        self._tcp: RebuiltTcp | None = None
        self._exported = time.monotonic()
        self._vouching: list[Vouching] = []
        self._first: dict[int, tuple[int, int]] | None = None  #: (pid, fd) of each file, once one is asked for
        #: connections whose handshakes are half done: segments for them are to be replayed, too
        self.half_open: set[ConnId] = set()
        #: (conn-ID, reason) of connections that could not be brought back
        self.lost: list[tuple[str, str]] = []

    def _without_closed(self, records: TreeFiles) -> TreeFiles:
        closing = [rule for rule in self.external if rule.closes]
        if not closing:
            return records
        tables = {
            pid: {
                fd: place
                for fd, place in table.items()
                if not (isinstance(self.files[place[0]], External) and rule_for(closing, [(pid, fd)]))
            }
            for pid, table in records.tables.items()
        }
        return dataclasses.replace(records, tables=tables)

    # ---- what kinds ask for

    @property
    def since_export(self) -> float:
        """Seconds since the connections were exported, rather too much than too little."""
        return time.monotonic() - self._exported

    def await_handshakes(self, half_open: Sequence[HalfOpen]) -> None:
        """Half-open connections are completed by the last ACKs of their peers, as long as this object is open."""
        if half_open:
            try:
                self._vouching.append(expect(half_open))
            except KernelFeatureMissing as error:
                self.warn(f"{len(half_open)} half-open connections are lost: {error.message}")
                return
            self.half_open |= {one.conn_id for one in half_open}

    def lose(self, connection: str, reason: str) -> None:
        """A connection cannot be brought back, and the rest goes on without it."""
        self.warn(f"{connection} is lost: {reason}")
        self.lost.append((connection, reason))

    def places(self, record: OpenFile) -> list[tuple[int, int]]:
        """(pid, fd) of every descriptor of a file, by the source's numbers."""
        return [
            (pid, fd)
            for pid, table in self.records.tables.items()
            for fd, (index, _) in table.items()
            if self.files[index] is record
        ]

    def descriptor(self, index: int) -> int:
        """Our descriptor of a file of the tree; it is made now if it is not there yet."""
        if not 0 <= index < len(self.files):
            raise BadFileRecord(f"file {index} of {len(self.files)} is referred to", object=f"file {index}")
        made = self._descriptors[index]
        if made is not None:
            return made
        if index in self._building:
            raise BadFileRecord("a file needs itself to be made", object=f"file {index}")
        self._building.add(index)
        record = self.files[index]
        held = self.held.get(index)
        try:
            fd = record.rebuild(self) if held is None else held.sock.detach()
        except OSError as error:
            raise FileRebuildFailed(f"{kind_name(type(record))}: {error}", object=self.name(index)) from error
        self._building.discard(index)
        self._descriptors[index] = fd
        return fd

    def content(self, index: int) -> int:
        """Our descriptor, for reading and writing, of a file that travels along."""
        made = self._contents[self._checked(index)]
        if made is None:
            content = self.records.contents[index]
            # one that has no name is made inside; another gets its name later, and must be found if that fails
            path = self.place if content.kind is ContentKind.DELETED else self.path
            made = self._contents[index] = content.make(path, self.note_path)
        return made

    def provide_content(self, index: int, fd: int) -> None:
        """Here is the file whose bytes travel as this content. BadFileRecord if there is one already."""
        if self._contents[self._checked(index)] is not None:
            os.close(fd)
            raise BadFileRecord("two files have the same content", object=f"content {index}")
        self._contents[index] = fd

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self._contents):
            raise BadFileRecord(f"content {index} of {len(self._contents)} is referred to", object=f"content {index}")
        return index

    def reopen(self, fd: int, flags: int) -> int:
        """Another description of the same file, opened with ``flags``."""
        # O_NOFOLLOW, as Python's tempfile has it, would refuse the link in /proc; it changes nothing later on
        flags &= REOPEN_FLAGS & ~(FileFlag.DIRECTORY | FileFlag.NOFOLLOW)
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)

    def duplicate(self, fd: int) -> int:
        """A duplicate, close-on-exec."""
        return fcntl.fcntl(fd, Fcntl.DUPFD_CLOEXEC, 0)

    def seek(self, fd: int, pos: int) -> None:
        """Give a description its file position."""
        if pos:
            os.lseek(fd, pos, os.SEEK_SET)

    def place(self, path: str) -> str:
        """Where we open a file of the tree: by the mounts that are its own, if it has some."""
        return self.path.place(path)

    def number(self, pid: int) -> int:
        """What we call a process, thread, group or session of the tree; 0: it has no number, or is not there."""
        return number_here(self.stubs, pid)

    @property
    def later(self) -> list[OpenFile]:
        """The files that were not built ahead."""
        return self.files[self.first :]

    def listens(self, port: int) -> bool:
        """Whether a listener of the tree has this port."""
        return any(isinstance(f, Listener) and f.name.port == port for f in self.later)

    def at_end(self, action: Callable[[], None]) -> None:
        """To be done when every descriptor has been made."""
        self._at_end.append(action)

    def on_abort(self, action: Callable[[], None]) -> None:
        """To be done if the rebuild is given up."""
        self._on_abort.append(action)

    def name(self, index: int) -> str:
        """The file in the words of errors: a process and descriptor that has it."""
        if self.ahead is not None and index < self.first:
            return self.ahead.tables.name(index)
        if self._first is None:
            self._first = {}
            for pid, table in (self.records.tables if self.ahead is None else self.ahead.tables.since).items():
                for fd, (file, _) in table.items():
                    self._first.setdefault(file, (pid, fd))
        if index in self._first:
            return "pid {} fd {}".format(*self._first[index])
        return f"file {index} ({kind_name(type(self.files[index]))})"

    # ---- the stages

    def check(self) -> list[str]:
        """Look, before anything is built, for what would stand in the way. Warnings; the first obstacle is raised."""
        warnings = [
            warning
            for index, record in enumerate(self.later, self.first)
            # what is held is there, and in nobody's way; what is in the tree's own file systems comes later
            if index not in self.held and not self.path.carried_file(record) and (warning := record.check(self))
        ]
        for content in self.records.contents:
            if not self.path.carried(content.name):
                content.check(self.path)
        return warnings

    def rebuild(self) -> None:
        """Every descriptor, and all that does not change any more. Nothing is left if it fails."""
        ensure_descriptors(len(self.files) + len(self._contents) + sum(map(_has_another, self.later)))
        try:
            # what was built ahead needs nothing more
            for index in range(self.first, len(self.files)):
                self.descriptor(index)
            self._do_at_end()
            for index, record in enumerate(self.later, self.first):
                fd = self.descriptor(index)
                try:
                    record.complete(self, fd)
                    # a lease makes us the receiver of its signal (fs/locks.c, lease_setup): the owner comes after it
                    self._locks.take(fd, record.locks, self.name(index))
                    self._own(fd, record)
                except OSError as error:
                    raise FileRebuildFailed(f"{kind_name(type(record))}: {error}", object=self.name(index)) from error
            self._tcp = RebuiltTcp(self)
        except BaseException:
            self.abort()
            raise

    def _do_at_end(self) -> None:
        actions, self._at_end = self._at_end, []
        for action in actions:
            action()

    def _own(self, fd: int, record: OpenFile) -> None:
        """The receiver of signals of readiness; only then O_ASYNC, else the first signal would go to nobody."""
        owner = record.owner
        if owner is None:
            return
        if owner.pid:
            try:
                fcntl.fcntl(fd, Fcntl.SETOWN_EX, _OWNER.pack(owner.type, self.number(owner.pid) or _NOBODY))
            except ProcessLookupError:
                self.warn(f"pid {owner.pid}, who was told of a file's readiness by signal, does not exist")
        if owner.signal:
            fcntl.fcntl(fd, Fcntl.SETSIG, owner.signal)
        if record.flags & FileFlag.ASYNC:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | FileFlag.ASYNC)

    def write_content(self, index: int, runs: Sequence[tuple[int, int]], data: bytes | memoryview) -> None:
        """Bytes of a content: ``runs`` are (offset, length), ``data`` what belongs there, one after the other."""
        fd, content = self.content(index), self.records.contents[index]
        put(content, fd, runs, data, size=content.size, name=f"content {index}")

    def drop_content(self, index: int, runs: Sequence[tuple[int, int]]) -> None:
        """Holes of a content, where bytes were told before."""
        punch(self.content(index), runs, f"content {index}")

    def take_queue(self, run: PageRun) -> bool:
        """Bytes of a connection's queue; whether their memory is needed from now on. BadFileRecord."""
        if not 0 <= run.id < len(self.files) or not isinstance(self.files[run.id], TcpFile):
            raise BadFileRecord("bytes of a queue for what is no connection", object=f"file {run.id}")
        return self.queues.take(run)

    def take(self, delta: Mapping[int, OpenFile]) -> None:
        """Records that replace earlier ones."""
        for index, record in delta.items():
            if not 0 <= index < len(self.files) or type(record) is not type(self.files[index]):
                raise BadFileRecord("a record that is told again is of another kind", object=f"file {index}")
            record = self.files[index] = record.on_devices(self._devices)
            self.retold.add(index)
            record.late(self, self.descriptor(index))

    def complete(self, *, elapsed: float = 0.0) -> None:
        """Contents are written, connections have come: seal the ones, rebuild the others (in repair, silent).

        elapsed  seconds since the connections were exported
        """
        for index, fd in enumerate(self._contents):
            if fd is not None:
                self.records.contents[index].seal(fd)
        for shipment in self.shipments:
            shipment.complete()
        self._exported = time.monotonic() - elapsed
        self._connections.rebuild(elapsed)

    @property
    def tcp_ports(self) -> set[int]:
        """The local ports of all TCP connections and listeners that were told."""
        told = set() if self.ahead is None else self.ahead.ports
        return told | {port for file in self.later if (port := file.tcp_port)}

    @property
    def connections(self) -> list[ConnectionRecord]:
        """The connections, once they are rebuilt, and those that the release puts into the queues of listeners: what a
        replay must know."""
        listeners = (file for file in self.later if isinstance(file, Listener))
        return self._connections.records + [record for file in listeners for record in file.waiting]

    @property
    def built_ahead(self) -> int:
        """How many connections more stand, as they were built before the stop."""
        return self._connections.ahead

    @property
    def taken(self) -> int:
        """How many connections were held, and taken back."""
        return self._connections.taken

    def compare(self) -> list[tuple[str, Difference]]:
        """(conn-ID, difference) where the rebuilt connections read back otherwise than was told; none, normally."""
        return self._connections.compare()

    def adopt(self, descriptors: Mapping[int, int]) -> None:
        """Take over files that an earlier rebuild has made, by descriptors of ours, so that they can be released;
        those that are missing are left out."""
        for index, fd in descriptors.items():
            self._descriptors[index] = fd
            self._locks.take(fd, self.files[index].locks, self.name(index))
        self.shared["unix", 0] = Builder.released(self)
        self.adopted = True

    def release_files(self) -> None:
        """The release of all but the connections. FileRebuildFailed."""
        changed = () if self.ahead is None else self.ahead.changed
        for index in (*changed, *range(self.first, len(self.files))):
            record, fd = self.files[index], self._descriptors[index]
            if fd is None:
                continue
            try:
                record.release(self, fd)
            except OSError as error:
                raise FileRebuildFailed(f"{kind_name(type(record))}: {error}", object=self.name(index)) from error
        self._locks.insist(self.warn)

    @property
    def staged(self) -> list[tuple[str, str]]:
        """(where it waits, its place) of each name of a local socket or shipped file that the release publishes."""
        builder = self.shared.get(("unix", 0))
        names = builder.staged if isinstance(builder, Builder) else []
        return names + [(shipment.staged, shipment.place) for shipment in self.shipments]

    def release(self) -> None:
        """The addresses are local and the original is gone. Connections first: their peers wait."""
        self._connections.release()
        self.release_files()

    def connect(self, arrived: Sequence[Segment] = ()) -> None:
        """The addresses are announced: sockets that were connecting go on. ``arrived``: what was captured."""
        self._connections.connect(arrived)

    def replay(self, arrived: Sequence[Segment]) -> None:
        """The connections, and handshakes that are half done, get what was captured for them. OSError."""
        self._connections.replay(arrived, unknown=lambda segment: segment.conn_id in self.half_open)

    def tell_windows(self) -> None:
        """The addresses are announced: peers that wait for room hear that there is some. OSError."""
        self._connections.tell_windows()

    @property
    def _connections(self) -> RebuiltTcp:
        if self._tcp is None:
            raise RuntimeError("rebuild() comes first")
        return self._tcp

    def abort(self) -> None:
        """Take everything away. May be repeated."""
        actions, self._on_abort = self._on_abort, []
        for action in actions:
            action()
        self.close()

    def close(self) -> None:
        """Give up our descriptors; the processes that took them have their own. May be repeated."""
        with contextlib.suppress(OSError):
            self._do_at_end()
        if self._tcp is not None:
            self._tcp.close()
        while self._vouching:
            self._vouching.pop().close()
        for descriptors in (self._descriptors, self._contents):
            for index, fd in enumerate(descriptors):
                if fd is not None:
                    descriptors[index] = None
                    os.close(fd)
