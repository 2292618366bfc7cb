"""Connections that are told before the stop, while their owners run: the source's half of their pre-copy. Behind them
come plain files (:mod:`checkpoint.files.aheadplain`), for which the same holds.

::

    read(pids)        idle connections, their records and descriptors; an AheadFiles is told to the target
    standing(pid)     in the stop: which of the process's descriptors are what they were; the others are captured anew
    shut()            at the freeze: nothing comes in or goes out any more, by one flag
    changed()         which connections are not what was told
    open(), close()   the processes go on, or end

They come first in the file table, so that an index of the one is an index of the other.  Nothing is done to their
sockets, and none of them is looked at in the stop but by two passes of the kernel's own: over the descriptors of each
process, and over all connections.  What is not provably as it was told is captured, frozen and exported like any other.

Source: issue 6; the experiment in design/TCP.md 8.  Decisions: docs/design/connection-precopy.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from typing import Final, NamedTuple

from checkpoint.errors import FileCaptureFailed
from checkpoint.files.abi import CAPTURED_FLAGS, pidfd_getfd
from checkpoint.files.aheadepoll import AheadEpolls, Watchable
from checkpoint.files.aheadplain import AheadPlain, PlainFile
from checkpoint.files.base import FdView, OpenFile
from checkpoint.files.peers import is_loopback
from checkpoint.files.plain import Numbers
from checkpoint.files.table import FileTable
from checkpoint.files.tcpfile import TcpFile
from checkpoint.files.treefiles import AheadFiles, AheadPlace
from checkpoint.kernel import filetable
from checkpoint.kernel.difference import differing
from checkpoint.kernel.filetable import Row
from checkpoint.kernel.tablereader import TableReader
from tcpstate import options
from tcpstate.connid import ConnId
from tcpstate.errors import KernelFeatureMissing, TcpmigError
from tcpstate.freeze import QuietState
from tcpstate.kernel.beside import Beside
from tcpstate.kernel.bpf.census import census
from tcpstate.kernel.bpf.gate import Gate
from tcpstate.kernel.bpf.recount import Counted, Recount, Same
from tcpstate.options import in_force, number
from tcpstate.record import ConnectionRecord, Family
from tcpstate.segment import Segment
from tcpstate.slotted import dataclass
from tcpstate.standing import Standing, read_standing, supposed

__all__ = ["Ahead", "AheadView", "Stand", "lasts"]

_log = logging.getLogger(__name__)

#: how often they are read that something has happened to meanwhile
_LOOKS: Final = 4
#: descriptors that a process may have besides those of connections
_MORE: Final = 4096
#: connections whose descriptors we have at a time: what their owners close meanwhile ends when we give it up
_PORTION: Final = 256
#: of bytes that tell how much of a connection is the same: 1 where it is not all
_CHANGED: Final = bytes(byte != Same.WHOLLY for byte in range(256))
#: seconds for which probes must go unanswered before they end a connection, so that a doubt can be settled
_DOUBT: Final = 300


class AheadView(FdView):
    """A socket that was told ahead. Our duplicate is only taken when somebody asks for it."""

    __slots__ = ()

    @property
    def socket(self) -> socket.socket:
        """The duplicate. FileCaptureFailed if it cannot be had (any more)."""
        if self.dup < 0:
            _take(self.pid, [self])
        return super().socket


def _take(pid: int, views: Iterable[FdView]) -> None:
    """Our duplicates of a process's. FileCaptureFailed."""
    with contextlib.ExitStack() as ends:
        view: FdView | None = None
        try:
            pidfd = os.pidfd_open(pid)
            ends.callback(os.close, pidfd)
            for view in views:
                if view.dup < 0:
                    view.dup = pidfd_getfd(pidfd, view.fd)
        except OSError as error:
            place = f"pid {pid}" if view is None else view.object
            raise FileCaptureFailed(f"taking it: {error.strerror}", object=place) from error


@dataclass(slots=True)
class _Member:
    """What is looked at in the stop, of one process: prepared before it, since there may be thousands.

    rows     of the connections, joined, by descriptor
    table    what its table has of them
    inodes   which they are, by inode
    indexes  all of them
    files    what epoll instances may watch, by the address of the description
    """

    rows: bytes = b""
    table: dict[int, tuple[int, bool]] = field(default_factory=dict)
    inodes: dict[int, int] = field(default_factory=dict)
    indexes: set[int] = field(default_factory=set)
    files: dict[int, Watchable] = field(default_factory=dict)
    _rows: list[tuple[int, bytes]] = field(default_factory=list)

    def add_plain(self, index: int, one: PlainFile) -> None:
        """One of its plain files."""
        self._rows.append((one.view.fd, one.row))
        self.table[one.view.fd] = index, one.place.cloexec
        self.indexes.add(index)

    def add(self, index: int, one: _Found) -> None:
        """One of its connections."""
        fd = one.view.fd
        self._rows.append((fd, one.row))
        self.table[fd] = index, one.place.cloexec
        self.inodes[one.view.stat.st_ino] = index
        self.indexes.add(index)
        self.files[one.place.file] = Watchable(index, fd)

    def sort(self) -> None:
        """All are there."""
        self.rows = b"".join(row for _, row in sorted(self._rows))


@dataclass(frozen=True, slots=True)
class _Found:
    """One connection."""

    row: bytes
    place: Row
    view: AheadView
    standing: Standing


class Stand(NamedTuple):
    """Of a process that stands still: what there is of what was told.

    table   its descriptors that are what was told, as a table has them
    inodes  which of the connections these are, by inode
    files   which of the plain files, by device, inode and path
    others  the numbers of all other descriptors
    """

    table: dict[int, tuple[int, bool]]
    inodes: dict[int, int]
    files: dict[tuple[int, int, str], int]
    others: list[int]


class Ahead:
    """See the module's docstring. ``moved``: the addresses that will leave this host; connections of others are left to
    the stop, since after it only the address's absence keeps them silent. ``retold``: the target knows
    :mod:`checkpoint.files.retold`."""

    def __init__(self, moved: Collection[str], *, retold: bool = False) -> None:
        self._moved = frozenset(moved)
        self.retold = retold
        self._gate: Gate | None = None
        self._recount: Recount | None = None
        self._tables: TableReader | None = None
        self._look: Beside[Counted] | None = None
        self._found: list[_Found] = []
        self._plain: AheadPlain | None = None
        self._members: dict[int, _Member] = {}
        self._by_conn: dict[ConnId, int] = {}
        #: what the last look at them told, of each
        self._same = b""
        self._saved: dict[tuple[int, int], options.Saved] = {}
        #: their records in the file table
        self.files: list[OpenFile] = []
        #: their local ports and addresses
        self.ports: set[int] = set()
        self.local_addresses: set[str] = set()
        #: the entries of the file table
        self.views: list[FdView] = []
        #: indexes of those that are what they were, as far as is known
        self.here: set[int] = set()
        #: where plain files have got to that are not where they were, by index
        self.moved_on: dict[int, Numbers] = {}
        self.epolls = AheadEpolls()

    # -- while they run

    def read(self, pids: Sequence[int], local: Collection[str]) -> AheadFiles:
        """What the target is to know; ``local``: the addresses of this host. KernelFeatureMissing, OSError."""
        counts = census()
        filetable.prepare()
        before = counts.take()
        # rather too early: the clocks of connections may be ahead of what they were, never behind
        read_at = time.monotonic_ns()
        # The rows second: by the first every socket has a cookie.
        chosen = {
            pid: [(raw, row) for raw, row in places if row.cookie in before]
            for pid, places in filetable.alone(pids).items()
        }
        with FileTable(live=True) as table:
            for _ in range(_LOOKS):
                found: list[_Found] = []
                for pid, places in chosen.items():
                    for at in range(0, len(places), _PORTION):
                        found += _read(table, pid, places[at : at + _PORTION], before)
                after = counts.take()
                self._found += [one for one in found if self._fits(one, after, local)]
                # What was busy meanwhile may rest for a shorter while, as they are few: if it is changed in the stop,
                # it has its descriptor and is watched, and only the connection is told again.
                busy = {cookie for cookie, was in before.items() if after.get(cookie, was) != was}
                chosen = {pid: [one for one in places if one[1].cookie in busy] for pid, places in chosen.items()}
                before = after
        self.views += [one.view for one in self._found]
        for index, one in enumerate(self._found):
            self._by_conn[one.standing.record.conn_id] = index
            self._members.setdefault(one.view.pid, _Member()).add(index, one)
        if self._found:
            self._gate = Gate(one.standing.record.conn_id for one in self._found)
            standing = [one.standing for one in self._found]
            self._recount = Recount([one.cookie for one in standing], [one.census for one in standing])
        self.files += map(_file, self._found)
        self.ports |= {conn.local_port for conn in self._by_conn}
        self.local_addresses |= {conn.local for conn in self._by_conn}
        epolls = self.epolls.read({pid: member.files for pid, member in self._members.items()})
        return AheadFiles(
            files=list(self.files),
            places=[AheadPlace(pid=one.view.pid, fd=one.view.fd, cloexec=one.place.cloexec) for one in self._found],
            read_at=read_at,
            epolls=epolls,
        )

    def add_plain(self, plain: AheadPlain) -> list[AheadPlace]:
        """Plain files that are told as well; where they are. Last."""
        self._plain = plain
        for index, one in enumerate(plain.found, len(self._found)):
            self._members.setdefault(one.view.pid, _Member()).add_plain(index, one)
        self.views += [one.view for one in plain.found]
        self.files += [one.record for one in plain.found]
        return [one.place for one in plain.found]

    def make_ready(self) -> None:
        """All is told. KernelFeatureMissing."""
        for member in self._members.values():
            member.sort()
        if self.files:
            self._tables = TableReader(2 * len(self.files) + _MORE)

    def _fits(self, one: _Found, after: Mapping[int, bytes], local: Collection[str]) -> bool:
        conn = one.standing.record.conn_id
        return (
            after.get(one.standing.cookie) == one.standing.census
            and conn.local in self._moved
            and lasts(one.standing.record)
            and not is_loopback(conn.peer)
            and conn.peer not in local
        )

    # -- in the stop

    @property
    def count(self) -> int:
        """How many files were told."""
        return len(self.files)

    @property
    def connections(self) -> int:
        """How many of them, the first, are connections."""
        return len(self._found)

    @property
    def unchanged(self) -> set[int]:
        """Indexes of connections whose descriptors are what they were."""
        return self.here.difference(range(len(self._found), len(self.files))) if self._plain else self.here

    @property
    def gone(self) -> list[int]:
        """Indexes of those that the target is to forget: their descriptors lead elsewhere by now."""
        if len(self.here) == len(self.files):
            return []
        return sorted(set(range(len(self.files))) - self.here)

    def standing(self, pid: int) -> Stand:
        """What there is of a process that stands still. OSError."""
        member = self._members.get(pid, _Member())
        now = filetable.table(pid) if self._tables is None else self._tables.read(pid)
        gone, fresh = differing(member.rows, now, filetable.SIZE, filetable.number_of)
        table, inodes = member.table.copy(), member.inodes.copy()
        self.here |= member.indexes
        for row in gone:
            index, _ = table.pop(filetable.number_of(row))
            if index < len(self._found):
                del inodes[self.views[index].stat.st_ino]
            self.here.discard(index)
        others = list(filetable.rows(fresh))
        self.epolls.stand(pid, others)
        stand = Stand(table, inodes, {}, [row.fd for row in others])
        if self._plain is not None:
            moved, lost = self._plain.standing(pid, table)
            self.moved_on |= moved
            for fd in lost:
                self.leave(stand, table[fd][0])
            stand.files.update(self._plain.keys(pid, table))
        return stand

    def leave(self, stand: Stand, index: int) -> None:
        """One of them is captured anew."""
        fd = self.views[index].fd
        self.here.discard(index)
        self.moved_on.pop(index, None)
        stand.others.append(fd)
        del stand.table[fd]

    def look(self) -> None:
        """First of the stop: the connections are looked at, beside whatever else is done, and from now on the gate
        notes what passes."""
        if self._gate is not None and self._recount is not None:
            self._gate.note()
            self._look = Beside(self._recount.take)

    @property
    def nobody_signs(self) -> bool:
        """Whether it is certain that no socket of this network namespace has a key. OSError."""
        return self._look is not None and not self._look.result().signs

    @property
    def nobody_closes(self) -> bool:
        """Whether it is certain that every FIN of this network namespace was acknowledged at the look. OSError."""
        return self._look is not None and not self._look.result().closes

    def shut(self) -> None:
        """From now on nothing of these connections comes in or goes out."""
        if self._gate is not None:
            self._gate.shut()

    def changed(self) -> list[int]:
        """Indexes, in order, of those that are here and not what was told. OSError.

        Their owners stand still since before they were looked at: what has changed since was sent or arrived, and has
        passed the gate. After :meth:`shut`."""
        if self._gate is None or self._recount is None:
            return []
        passed = self._gate.seen() if self._look is not None else None
        if passed is None or self._look is None:
            same = self._recount.take().same
            passed = bytes(len(same))
        else:
            same = self._look.result().same
        self._same = same
        # there may be thousands: as numbers they are compared at once
        changed = int.from_bytes(same.translate(_CHANGED), "little") | int.from_bytes(passed, "little")
        places = changed.to_bytes(len(same), "little")
        found, at = [], places.find(1)
        while at >= 0:
            if at in self.here:
                found.append(at)
            at = places.find(1, at + 1)
        return found

    def take(self, indexes: Iterable[int]) -> list[FdView]:
        """The views of some, with our duplicates. FileCaptureFailed."""
        views = [self.views[index] for index in indexes]
        for pid in {view.pid for view in views}:
            _take(pid, [view for view in views if view.pid == pid])
        return views

    def own(self, index: int) -> tuple[QuietState, options.Saved] | None:
        """What freezing it would change, and its options, if they are what was told; after :meth:`changed`."""
        if not self._same[index]:
            return None
        standing = self._found[index].standing
        record = standing.record
        key = id(record.options), id(record.option_data)
        saved = self._saved.get(key)
        if saved is None:
            # of those that are alike it is one
            saved = self._saved[key] = options.Saved(record.options, record.option_data)
        return standing.state, saved

    def record_for(self, segment: Segment) -> ConnectionRecord | None:
        """Of a connection that is as it was told."""
        index = self._by_conn.get(segment.conn_id)
        return self._found[index].standing.record if index is not None and index in self.here else None

    def open(self) -> None:
        """They go on."""
        if self._gate is not None:
            self._gate.open()

    def close(self) -> None:
        """Take the gate away, and what looks at them."""
        self.epolls.close()
        look, self._look = self._look, None
        if look is not None:
            look.wait()
        for one in (self._gate, self._recount, self._tables):
            if one is not None:
                one.close()
        self._gate = self._recount = self._tables = None


def lasts(record: ConnectionRecord) -> bool:
    """Whether it stays what it is if nobody holds it any more: we have died after COMMIT, and its address is gone. Of
    IPv4 probes cannot leave without their address, and unanswered ones end it in time; of IPv6 they can."""
    if not number(record, "so.keepalive"):
        return True
    lasts = in_force(record, "tcp.keepintvl") * in_force(record, "tcp.keepcnt")
    return record.family is not Family.IPV6 and lasts >= _DOUBT


def _read(
    table: FileTable, pid: int, places: Sequence[tuple[bytes, Row]], before: Mapping[int, bytes]
) -> Iterator[_Found]:
    """Those of some descriptors that are idle connections, if the next census says so too: one for all portions, as it
    passes all sockets of the host."""
    with contextlib.ExitStack() as ends:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        ends.callback(os.close, pidfd)
        taken: list[tuple[bytes, Row, socket.socket]] = []
        for raw, row in places:
            try:
                taken.append((raw, row, ends.enter_context(socket.socket(fileno=pidfd_getfd(pidfd, row.fd)))))
            except OSError as error:
                # closed since, or no socket any more
                _log.debug("pid %d fd %d: %s", pid, row.fd, error)
        socks = [sock for _, _, sock in taken]
        try:
            found = supposed(read_standing(socks, before), before)
        except KernelFeatureMissing:
            raise
        except (TcpmigError, OSError, ValueError) as error:
            # What it is about is said in the stop; the others of the portion are told then, too.  What was read of one
            # that ended meanwhile may contradict itself.
            _log.debug("%d connections of pid %d are not told ahead: %s", len(socks), pid, error)
            return
        for (raw, row, sock), one in zip(taken, found, strict=True):
            if one is not None and one.cookie == row.cookie:
                yield _Found(raw, row, _view(table, pid, row, sock), one)


def _view(table: FileTable, pid: int, row: Row, sock: socket.socket) -> AheadView:
    stat = os.fstat(sock.fileno())
    view = AheadView(
        pid=pid,
        fd=row.fd,
        dup=-1,
        magic=f"/proc/{pid}/fd/{row.fd}",
        link=f"socket:[{stat.st_ino}]",
        flags=row.status & CAPTURED_FLAGS,
        pos=0,
        info={},
        lines=(),
        stat=stat,
        table=table,
        places=[(pid, row.fd)],
    )
    view._protocol = int(sock.family), int(sock.type), sock.proto
    return view


def _file(one: _Found) -> TcpFile:
    family, _, _ = one.view.protocol
    record = one.standing.record
    return TcpFile(flags=one.view.flags, family=family, conn_id=str(record.conn_id), connection=record)
