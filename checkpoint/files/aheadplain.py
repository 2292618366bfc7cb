"""Plain files that are told before the stop, while their owners run: the source's half.

As connections are told (:mod:`checkpoint.files.ahead`, which see): each has one descriptor in the tree, and is captured
as in the stop.  There nothing is asked of any of them: two passes of the kernel's own over the descriptors of each
process (:mod:`checkpoint.kernel.filetable`, :mod:`checkpoint.kernel.filerows`) tell whether they are what they were,
and where they have got to.  A file with the same descriptor, flags, inode and path is the same as far as anybody can
see, even if it was closed and opened again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from checkpoint.files.base import FdView, OpenFile
from checkpoint.files.content import DELETED
from checkpoint.files.identity import Evidence
from checkpoint.files.kinds import kind_for
from checkpoint.files.plain import PLAIN, Numbers, is_plain, moved_on
from checkpoint.files.policy import Policy
from checkpoint.files.table import FileTable
from checkpoint.files.treefiles import AheadPlace, Numbered
from checkpoint.kernel import filerows, filetable
from checkpoint.kernel.difference import differing
from checkpoint.kernel.filerows import NUMBERS, FileRow
from checkpoint.namespaces.ways import way_of
from tcpstate.errors import TcpmigError
from tcpstate.slotted import dataclass

__all__ = ["AheadPlain", "PlainFile"]

_log = logging.getLogger(__name__)

#: a pass over so many descriptors takes as long as a file takes in the stop that was not told: a server of thousands of
#: connections does not tell its handful of files
_WORTH: Final = 200
#: descriptors that we have at a time: what their owners close meanwhile ends when we give it up
_PORTION: Final = 256


@dataclass(frozen=True, slots=True)
class PlainFile:
    """One that is told.

    row   of its descriptor
    now   of the file, as it was last
    """

    row: bytes
    now: bytes
    place: AheadPlace
    view: FdView
    record: OpenFile

    @property
    def key(self) -> tuple[int, int, str]:
        """Which file it is, as the file table has it."""
        return self.view.stat.st_dev, self.view.stat.st_ino, self.view.link


class AheadPlain:
    """See the module's docstring. ``first``: the index of the first of them among all that is told ahead."""

    def __init__(self, policy: Policy, evidence: Mapping[tuple[str, int, int, int], Evidence], first: int) -> None:
        self._policy = policy
        self._evidence = dict(evidence)
        self._first = first
        self.found: list[PlainFile] = []
        #: of each process: the rows of its files, joined, by descriptor; and their indexes
        self._rows: dict[int, bytes] = {}
        self._indexes: dict[int, dict[int, int]] = {}

    # -- while they run

    def read(self, pids: Sequence[int]) -> None:
        """Find them. KernelFeatureMissing, OSError."""
        if any(map(way_of, pids)):
            return  # by other mounts than the target's tool would open them
        filerows.prepare()
        keys: set[tuple[int, int, str]] = set()
        for pid, places in filetable.alone(pids).items():
            rows = {row.fd: (raw, row) for raw, row in places if not row.cookie}
            before = _by_number(pid)
            wanted = [fd for fd in rows if fd in before]
            captured = dict(self._capture(pid, wanted))
            now = {filetable.number_of(raw): raw for raw in filetable.read(pid)}
            if len(wanted) * _WORTH < len(now):
                continue
            after = _by_number(pid)
            for fd, (view, record) in captured.items():
                raw, row = rows[fd]
                # of one that was alone and has another descriptor since, that other one may have been captured
                if view.fd != fd or now.get(fd) != raw or fd not in after or not _same(before[fd][0], after[fd][0]):
                    continue
                # where two descriptions of one file are told, who is told from whom by kcmp: that is left to the stop
                place = AheadPlace(pid=pid, fd=fd, cloexec=row.cloexec)
                one = PlainFile(raw, after[fd][0], place, view, moved_on(record, _numbers(after[fd][1])))
                if one.key not in keys:
                    keys.add(one.key)
                    self.found.append(one)
        for index, one in enumerate(self.found, self._first):
            self._indexes.setdefault(one.view.pid, {})[one.view.fd] = index
        for pid, indexes in self._indexes.items():
            rows_of = (self.found[indexes[fd] - self._first].now for fd in sorted(indexes))
            self._rows[pid] = b"".join(rows_of)

    def _capture(self, pid: int, numbers: Sequence[int]) -> Iterator[tuple[int, tuple[FdView, OpenFile]]]:
        for at in range(0, len(numbers), _PORTION):
            with FileTable(live=True) as table:
                table.evidence = self._evidence
                for fd in numbers[at : at + _PORTION]:
                    try:
                        view = table.entries[table.add(Numbered(pid), fd)]
                        if self._policy.ship and self._policy.stays_behind(view.link):
                            continue  # its bytes travel, if anybody writes to it
                        kind = kind_for(view)
                        if kind in PLAIN and is_plain(record := kind.capture(view)):
                            yield fd, (view, record)
                    except (TcpmigError, OSError, ValueError) as error:
                        # closed since; or it is refused, and that is said in the stop
                        _log.debug("pid %d fd %d is not told ahead: %s", pid, fd, error)

    # -- in the stop

    def standing(self, pid: int, here: Mapping[int, object]) -> tuple[dict[int, Numbers], list[int]]:
        """Of those of a process that stands still whose descriptors are ``here`` as they were told: by index, those
        that have other numbers now; the descriptors of others that are not what was told. OSError."""
        told, indexes = self._rows.get(pid, b""), self._indexes.get(pid, {})
        if not told:
            return {}, []
        now = filerows.table(pid)
        gone, fresh = differing(told, now, filerows.SIZE, filerows.number_of)
        by_number = {row.fd: (raw, row) for raw, row in filerows.rows(b"".join(fresh))} if gone else {}
        moved: dict[int, Numbers] = {}
        others: list[int] = []
        for old in gone:
            fd = filerows.number_of(old)
            if fd not in here:
                continue
            raw, row = by_number.get(fd, (b"", None))
            if row is not None and _same(old, raw):
                moved[indexes[fd]] = _numbers(row)
            else:
                others.append(fd)
        return moved, others

    def keys(self, pid: int, here: Mapping[int, object]) -> dict[tuple[int, int, str], int]:
        """Which file each of those of a process is whose descriptors are ``here``: its index."""
        indexes = self._indexes.get(pid, {})
        return {self.found[at - self._first].key: at for fd, at in indexes.items() if fd in here}


def _by_number(pid: int) -> dict[int, tuple[bytes, FileRow]]:
    """The files of a process that have a path, by descriptor. OSError."""
    found = filerows.rows(filerows.table(pid))
    return {row.fd: (raw, row) for raw, row in found if row.path and not row.path.endswith(DELETED)}


def _same(old: bytes, new: bytes) -> bool:
    """Whether two rows are of one file, wherever it has got to."""
    return old[: NUMBERS.start] == new[: NUMBERS.start] and old[NUMBERS.stop :] == new[NUMBERS.stop :]


def _numbers(row: FileRow) -> Numbers:
    return Numbers(row.pos, row.size, row.mtime_ns)
