"""Who else holds a socket, a pipe or a fifo: the processes outside of the tree.

Only /proc knows; it is read once, and only if a kind asks. Processes that are hidden from this PID namespace are not
seen: what the kernel tells about a file itself (POLLHUP of a pipe, the peer of a local socket) is asked first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from checkpoint import procfs
from checkpoint.errors import NoSuchProcess

if TYPE_CHECKING:
    from checkpoint.files.table import FileTable

__all__ = ["Outside", "holders_text"]


def holders_text(holders: Sequence[tuple[int, int]]) -> str:
    """``pid 7 fd 3`` and so on, shortened."""
    names = [f"pid {pid} fd {fd}" for pid, fd in holders[:3]]
    return ", ".join(names) + (" and others" if len(holders) > 3 else "")


class Outside:
    """Holders of files outside of a tree."""

    def __init__(self, table: FileTable) -> None:
        self._table = table
        self._found: dict[str, list[tuple[int, int]]] | None = None

    def holders(self, link: str) -> list[tuple[int, int]]:
        """(pid, fd) of every descriptor outside of the tree with this link: ``socket:[7]``, ``pipe:[9]``, a path."""
        if self._found is None:
            self._found = self._scan()
        return self._found.get(link, [])

    def holders_of(self, link: str) -> list[tuple[int, int]]:
        """The same for a file that the tree does not have itself; always looks anew."""
        return self._scan({link}).get(link, [])

    def _scan(self, only: set[str] | None = None) -> dict[str, list[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = {}
        table = self._table
        wanted = {view.link for view in table.entries} if only is None else only
        inside = set(table.pids)
        ours = {view.dup for view in table.entries}
        me = os.getpid()
        for name in os.listdir("/proc"):
            if not name.isdecimal() or int(name) in inside:
                continue
            pid = int(name)
            try:
                numbers = os.listdir(f"/proc/{pid}/fd")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                # it ended, or is not ours to look at (a kernel thread's list is empty)
                continue
            hits = []
            for number in numbers:
                fd = int(number)
                if pid == me and fd in ours:
                    continue
                try:
                    link = os.readlink(f"/proc/{pid}/fd/{fd}")
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
                if link in wanted:
                    hits.append((link, (pid, fd)))
            if hits and not _born_since(pid, inside):
                for link, place in hits:
                    found.setdefault(link, []).append(place)
        return found


def _born_since(pid: int, inside: set[int]) -> bool:
    """Whether a process is of the tree after all: a child that was not there when the tree was listed. What has ended
    holds nothing any more."""
    try:
        return not inside.isdisjoint(procfs.parents(pid))
    except NoSuchProcess:
        return True
