"""Epoll instances that watch what is told ahead of the stop: told with it, and in the stop only what is otherwise.

An entry is known by the address of the description that it watches.  Of a connection whose descriptor has the same row
in the stop as when it was told (:mod:`checkpoint.kernel.filetable`), that address was its own all the time in between,
and so every entry with it is an entry of that connection.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from checkpoint.files.epoll import EPOLL_LINK, EpollWatch, fired
from checkpoint.files.treefiles import AheadEpoll
from checkpoint.kernel import epolltree, filetable
from checkpoint.kernel.difference import differing
from checkpoint.kernel.epolltree import Reader, Watched
from checkpoint.kernel.filetable import Row
from tcpstate.errors import KernelFeatureMissing
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.base import FdView

__all__ = ["AheadEpolls", "Kept", "Watchable"]

_log = logging.getLogger(__name__)

#: room for entries besides one for each connection: others may be watched, too
_MORE = 4096


class Watchable(NamedTuple):
    """A connection that was told: its index among the files, its descriptor."""

    file: int
    fd: int


@dataclass(frozen=True, slots=True)
class Kept:
    """What the stop tells of an instance that was told.

    told     its number
    watches  entries that were not told, or otherwise
    dropped  numbers of entries that do not hold any more
    """

    told: int
    watches: tuple[EpollWatch, ...]
    dropped: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Told:
    """An instance: its number among those told; the rows of its entries that were told, joined, and by number."""

    number: int
    rows: bytes
    by_number: Mapping[int, bytes]


class AheadEpolls:
    """See the module's docstring. Close it."""

    def __init__(self) -> None:
        self._reader: Reader | None = None
        self._told: dict[tuple[int, int], _Told] = {}
        self._files: Mapping[int, Mapping[int, Watchable]] = {}
        #: in the stop, by process: rows of the descriptors that are not as they were told
        self._rows: dict[int, dict[int, Row]] = {}

    def read(self, files: Mapping[int, Mapping[int, Watchable]]) -> list[AheadEpoll]:
        """The instances of processes, as far as they watch what is told: ``files``, by process and by the address of
        the description. Each entry by itself, unless two of one instance have one number. OSError."""
        self._files = files
        try:
            self._reader = Reader(2 * sum(map(len, files.values())) + _MORE)
        except KernelFeatureMissing as error:
            _log.info("epoll instances are told in the stop: %s", error)
            return []
        found: list[AheadEpoll] = []
        for pid, known in files.items():
            for row in filetable.rows(filetable.read(pid)):
                if row.cookie or not _is_epoll(pid, row.fd):
                    continue
                rows: list[bytes] = []
                watches: list[EpollWatch] = []
                for raw, one in epolltree.pairs(self._reader.read(pid, row.fd) or b""):
                    place = known.get(one.file)
                    if place is None or place.fd != one.number:
                        continue
                    watch = _watch(pid, place.file, one)
                    if not fired(watch):
                        rows.append(raw)
                        watches.append(watch)
                by_number = {watch.number: raw for watch, raw in zip(watches, rows, strict=True)}
                if watches and len(by_number) == len(watches):
                    self._told[pid, row.fd] = _Told(len(self._told), b"".join(rows), by_number)
                    found.append(AheadEpoll(pid=pid, fd=row.fd, cloexec=row.cloexec, watches=tuple(watches)))
        return found

    # -- in the stop

    def stand(self, pid: int, others: Iterable[Row]) -> None:
        """A process stands still; these are its descriptors that are not as they were told."""
        self._rows[pid] = {row.fd: row for row in others}

    def row(self, pid: int, fd: int) -> Row | None:
        """The row of an epoll instance that was told, if all that fdinfo would tell besides are its entries."""
        row = self._rows.get(pid, {}).get(fd)
        return row if row is not None and (pid, fd) in self._told and not row.locks else None

    def capture(self, view: FdView, gone: Collection[int]) -> Kept | None:
        """What is to be told of an instance; None if it was not told, or all of it has to be told again. ``gone``: the
        connections that are not as they were told."""
        for pid, fd in view.places:
            told = self._told.get((pid, fd))
            now = None if told is None or self._reader is None else self._reader.read(pid, fd)
            if told is None or now is None:
                continue
            old, fresh = differing(told.rows, now, epolltree.SIZE, epolltree.key_of)
            dropped = {one.number for one in epolltree.rows(b"".join(old))}
            for index in gone:
                # its entry may be the same, and is to watch what is told of its connection now
                lost = view.table.entries[index]
                if lost.pid == pid and lost.fd in told.by_number and lost.fd not in dropped:
                    dropped.add(lost.fd)
                    fresh.append(told.by_number[lost.fd])
            entries = [
                one
                for one in epolltree.rows(b"".join(fresh))
                if not any((process, one.number) in view.table.closed for process, _ in view.places)
            ]
            watches = [self._resolved(view, pid, one) for one in entries]
            whole = [watch for watch in watches if watch is not None]
            if len(whole) < len(watches) or any(w.number in told.by_number and w.number not in dropped for w in whole):
                # Its number leads elsewhere; or there is one more entry by the same number: which is which is told by
                # all of them.
                return None
            return Kept(told.number, tuple(whole), tuple(sorted(dropped)))
        return None

    def _resolved(self, view: FdView, pid: int, one: Watched) -> EpollWatch | None:
        """An entry that watches what its number leads to in that process."""
        place = view.table.tables.get(pid, {}).get(one.number)
        row = self._rows.get(pid, {}).get(one.number)
        known = self._files.get(pid, {}).get(one.file)
        same = row.file == one.file if row is not None else known is not None and known.fd == one.number
        return _watch(pid, place[0], one) if place is not None and same else None

    def close(self) -> None:
        """What reads them. May be repeated."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()


def _is_epoll(pid: int, fd: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}") == EPOLL_LINK
    except OSError:
        return False  # closed since


def _watch(pid: int, index: int, one: Watched) -> EpollWatch:
    return EpollWatch(number=one.number, pid=pid, file=index, events=one.events, data=one.data)
