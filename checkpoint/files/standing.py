"""What new processes have already when the last of their files are built: what was told ahead of the stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from checkpoint.files.aheadbuild import BuiltAhead
from checkpoint.files.base import OpenFile
from checkpoint.files.epoll import Epoll, fired
from checkpoint.files.peercred import Stub

__all__ = ["Standing"]

Tables = Mapping[int, Mapping[int, tuple[int, bool]]]


class Standing:
    """What ``stubs`` keep of what was built ``ahead``; ``files`` and ``tables`` are how it is to be.

    An epoll entry that must be made while its number leads elsewhere needs an empty table: then nothing is kept, and
    epoll instances are made anew, with all their entries: their records in ``files`` are replaced.
    """

    def __init__(
        self, ahead: BuiltAhead | None, files: list[OpenFile], tables: Tables, stubs: Mapping[int, Stub]
    ) -> None:
        self._tables = tables
        self._files_of: dict[int, set[int]] = {}
        first = 0 if ahead is None else ahead.count
        epolls = {at: one for at, one in enumerate(files[first:], first) if isinstance(one, Epoll)}
        if ahead is not None:
            ahead.check(epolls.values())
        keeps = ahead is not None and ahead.installed(stubs) and all(self._usual(*pair) for pair in epolls.items())
        if ahead is not None and not keeps:
            for at, epoll in epolls.items():
                files[at] = ahead.whole(epoll)
        self._ahead = ahead if keeps else None
        self._epolls = {at: one for at, one in epolls.items() if keeps and one.told >= 0}

    def _usual(self, index: int, epoll: Epoll) -> bool:
        """Whether its entries can be made when everything is at its number."""
        for watch in epoll.watches:
            at = self._tables.get(watch.pid, {}).get(watch.number)
            if at is None or at[0] != watch.file or fired(watch) or index not in self._had(watch.pid):
                return False
        return True

    def _had(self, pid: int) -> set[int]:
        """The files that a process has some descriptor of."""
        if pid not in self._files_of:
            self._files_of[pid] = {index for index, _ in self._tables[pid].values()}
        return self._files_of[pid]

    def kept(self, pid: int) -> dict[int, int]:
        """Descriptors that the new process has already, and what they lead to."""
        if self._ahead is None:
            return {}
        table = self._tables.get(pid, {})
        found = self._ahead.tables.kept(pid)
        for index, epoll in self._epolls.items():
            told = self._ahead.told.epolls[epoll.told]
            if told.pid == pid and table.get(told.fd) == (index, told.cloexec):
                found[told.fd] = index
        return found

    def epolls(self, pid: int) -> Iterator[tuple[Epoll, int]]:
        """Epoll instances that the new process has already, by which number."""
        if self._ahead is None:
            return
        for epoll in self._epolls.values():
            told = self._ahead.told.epolls[epoll.told]
            if told.pid == pid:
                yield epoll, told.fd
