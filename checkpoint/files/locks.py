"""File locks that belong to a description: flock(2) and open file description locks.

Sources: fs/locks.c; flock(2), fcntl(2). On a shared file system the original may still hold them when the new
descriptions are made: what cannot be had then is tried again at the release, when the original is gone.
"""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Callable, Sequence
from typing import Final

from checkpoint.errors import LockTaken
from checkpoint.files.abi import Fcntl, Flock, LockType
from checkpoint.files.base import FileLock

__all__ = ["Locks"]

#: seconds that the original gets to vanish
_PATIENCE: Final = 2.0
_PAUSE: Final = 0.01
_HELD: Final = (errno.EWOULDBLOCK, errno.EACCES)


class Locks:
    """The locks of a tree; some may still be to be had."""

    def __init__(self) -> None:
        self._open: list[tuple[int, FileLock, str]] = []

    def take(self, fd: int, locks: Sequence[FileLock], object: str) -> None:
        """Lock, or remember what is held by somebody else."""
        for lock in locks:
            if not _lock(fd, lock):
                self._open.append((fd, lock, object))

    def insist(self, warn: Callable[[str], None]) -> None:
        """Take what could not be had before. The original is gone: who holds a lock now is a stranger, and a warning
        says so (the processes are past the point where giving up would help)."""
        end = time.monotonic() + _PATIENCE
        for fd, lock, name in self._open:
            while not _lock(fd, lock):
                if time.monotonic() > end:
                    warn(str(LockTaken("a file lock could not be taken", object=name)))
                    break
                time.sleep(_PAUSE)
        self._open.clear()


def _lock(fd: int, lock: FileLock) -> bool:
    try:
        if lock.whole:
            fcntl.flock(fd, (fcntl.LOCK_SH if lock.type is LockType.READ else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:
            region = Flock(type=lock.type, start=lock.start, length=lock.length)
            fcntl.fcntl(fd, Fcntl.OFD_SETLK, region.pack())
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True
