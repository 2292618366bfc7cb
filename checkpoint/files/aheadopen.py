"""Plain files that are opened before the stop: the target's half.

They are opened as they would be in the stop, and what is told of them there is only where they have got to.  One that
cannot be opened, since it is gone by then, is no error yet: the stop says whether it is still wanted, and opens it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence

from checkpoint.errors import BadFileRecord, FileRebuildFailed
from checkpoint.files.base import OpenFile
from checkpoint.files.descriptors import ensure_descriptors
from checkpoint.files.plain import is_plain
from checkpoint.files.treefiles import TreeFiles
from tcpstate.errors import TcpmigError

__all__ = ["OpenedAhead"]

_log = logging.getLogger(__name__)


class OpenedAhead:
    """Plain files, opened. BadFileRecord for others, TooManyDescriptors.

    first  the index of the first of them among all that is told ahead
    path   maps a path of the source to one here
    """

    def __init__(self, files: Sequence[OpenFile], first: int, path: Callable[[str], str]) -> None:
        from checkpoint.files.rebuild import Rebuilder

        for index, file in enumerate(files, first):
            if not is_plain(file):
                raise BadFileRecord("such a file is not told ahead of the stop", object=f"file {index}")
        ensure_descriptors(len(files))
        self._first = first
        #: by index; -1: it is not open
        self.fds: list[int] = []
        host = Rebuilder(TreeFiles(files=list(files), contents=[], tables={}), path=path)
        for file in files:
            try:
                self.fds.append(file.rebuild(host))
            except (TcpmigError, OSError) as error:
                _log.debug("not opened ahead of the stop: %s", error)
                self.fds.append(-1)

    def lacking(self, gone: Collection[int]) -> list[int]:
        """Indexes of those that are wanted and not open."""
        return [at for at, fd in enumerate(self.fds, self._first) if fd < 0 and at not in gone]

    def seek(self, index: int, pos: int) -> None:
        """It is at another position now. FileRebuildFailed."""
        fd = self.fds[index - self._first]
        if fd < 0:
            return
        try:
            os.lseek(fd, pos, os.SEEK_SET)
        except OSError as error:
            raise FileRebuildFailed(f"file position {pos}: {error.strerror}", object=f"file {index}") from error

    def forget(self, index: int) -> None:
        """It is not open at the source any more."""
        fd, self.fds[index - self._first] = self.fds[index - self._first], -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Give up what is open. May be repeated."""
        for index in range(self._first, self._first + len(self.fds)):
            self.forget(index)
