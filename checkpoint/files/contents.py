"""The contents of a file table: files whose bytes travel along, found while its entries are captured, read for an
image."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator

from checkpoint.files.abi import Fcntl
from checkpoint.files.base import FdView
from checkpoint.files.content import Content, ContentKind, data_runs, nonzero_runs, reopened

__all__ = ["ContentTable"]


class ContentTable:
    """records  how an empty one of each is made, by index"""

    def __init__(self) -> None:
        self.records: list[Content] = []
        self._index: dict[tuple[int, int], int] = {}
        self._source: list[str] = []
        self._fds: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.records)

    def of(self, view: FdView, kind: ContentKind, name: str, huge: int) -> int:
        """The index of the content of a file, recorded when it is first asked for."""
        key = (view.stat.st_dev, view.stat.st_ino)
        index = self._index.get(key)
        if index is not None:
            return index
        found = view.stat
        self.records.append(
            Content(
                kind=kind,
                name=name,
                size=found.st_size,
                mode=stat.S_IMODE(found.st_mode),
                uid=found.st_uid,
                gid=found.st_gid,
                seals=_seals(view) if kind is ContentKind.MEMFD else 0,
                huge=huge,
            )
        )
        self._source.append(view.magic)
        self._index[key] = len(self.records) - 1
        return len(self.records) - 1

    @property
    def keys(self) -> dict[tuple[int, int], int]:
        """Device and inode of each: its index."""
        return dict(self._index)

    def fd(self, index: int) -> int:
        """A descriptor for reading a content; ours. OSError if it cannot be opened (any more)."""
        if index not in self._fds:
            self._fds[index] = os.open(self._source[index], os.O_RDONLY | os.O_CLOEXEC)
        return self._fds[index]

    def runs(self, index: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the data of a content, in ascending order, holes left out."""
        huge = self.records[index].huge
        return nonzero_runs(self.fd(index), 1 << huge) if huge else data_runs(self.fd(index))

    def read(self, index: int, offset: int, length: int) -> bytes:
        """Bytes of a content; short at its end only."""
        parts = []
        while length:
            part = os.pread(self.fd(index), length, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Our descriptors."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def _seals(view: FdView) -> int:
    with reopened(view.magic, view.stat) as fd:
        return fcntl.fcntl(fd, Fcntl.GET_SEALS)
