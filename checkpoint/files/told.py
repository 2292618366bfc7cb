"""The tables of a tree's processes, of which most was told ahead of the stop: what goes on from that.

Whatever there is for each of thousands of connections is made when they are told; in the stop it is only copied, as a
whole, and what the stop tells otherwise is put into it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from checkpoint.files.base import OpenFile
from checkpoint.files.plain import Numbers, is_plain, moved_on
from checkpoint.files.treefiles import AheadFiles, TreeFiles

__all__ = ["Told", "whole"]

Table = dict[int, tuple[int, bool]]


class Told:
    """The tables of what was told ahead."""

    def __init__(self, told: AheadFiles) -> None:
        self._told = told
        self._tables: dict[int, Table] = {}
        self._indexes: dict[int, dict[int, int]] = {}
        for index, place in enumerate(told.places):
            self._tables.setdefault(place.pid, {})[place.fd] = index, place.cloexec
            self._indexes.setdefault(place.pid, {})[place.fd] = index
        #: by process: descriptors that are not what they were told to be, or are told again
        self._again: dict[int, set[int]] = {}
        #: the tables as the stop told them
        self.since: Mapping[int, Mapping[int, tuple[int, bool]]] = {}

    def go_on(self, files: TreeFiles) -> TreeFiles:
        """The files of the tree, now that it stands still: ``files`` and what was told. ValueError if they do not go on
        from that."""
        told = self._told
        if files.ahead != len(told.files):
            raise ValueError(f"{files.ahead} files are to have been told ahead")
        self.since = files.tables
        self._again = {pid: set(table) for pid, table in files.tables.items()}
        tables = dict(files.tables)
        for pid, table in self._tables.items():
            tables[pid] = table.copy()
        for place in map(told.places.__getitem__, set(files.gone)):
            del tables[place.pid][place.fd]
            self._again.setdefault(place.pid, set()).add(place.fd)
        for pid in self._tables.keys() & files.tables.keys():
            tables[pid].update(files.tables[pid])
        first = list(told.files)
        for index, now in files.moved_on.items():
            first[index] = self._moved_on(index, Numbers(*now))
        return dataclasses.replace(files, files=[*first, *files.files], tables=tables, ahead=0, gone=(), moved_on={})

    def _moved_on(self, index: int, now: Numbers) -> OpenFile:
        before = self._told.files[index]
        if not is_plain(before):
            raise ValueError(f"file {index} is not one that can move on")
        return moved_on(before, now)

    def lack(self, index: int) -> None:
        """The processes do not have what was told as this, after all. After :meth:`go_on`."""
        place = self._told.places[index]
        self._again.setdefault(place.pid, set()).add(place.fd)

    def kept(self, pid: int) -> dict[int, int]:
        """Of a process that has the descriptors that were told: those that are as they are to be, and what they lead
        to. After :meth:`go_on`."""
        found = self._indexes.get(pid, {}).copy()
        for fd in self._again.get(pid, ()):
            found.pop(fd, None)
        return found

    def name(self, index: int) -> str:
        """A file in the words of errors."""
        place = self._told.places[index]
        return f"pid {place.pid} fd {place.fd}"


def whole(files: TreeFiles, told: AheadFiles | None) -> TreeFiles:
    """All files of a tree. ValueError if they do not go on from what was told."""
    return Told(AheadFiles(files=[], places=[], read_at=0) if told is None else told).go_on(files)
