"""File locks that belong to a description: flock(2), open file description locks, leases.

Sources: fs/locks.c; flock(2), fcntl(2). On a shared file system the original still holds them when the new descriptions
are made: what cannot be had then is taken at the release. For that the source gives its locks up when it tells its last
changes (``FileTable.recapture``), and takes them back if the processes go on there.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Sequence
from typing import Final

from checkpoint.errors import LockTaken
from checkpoint.files.abi import Fcntl, Flock, LockType
from checkpoint.files.base import FileLock

__all__ = ["Locks", "release", "take"]

_HELD: Final = (errno.EWOULDBLOCK, errno.EACCES)


class Locks:
    """The locks of a tree; some may still be to be had."""

    def __init__(self) -> None:
        self._open: list[tuple[int, FileLock, str]] = []

    def take(self, fd: int, locks: Sequence[FileLock], object: str) -> None:
        """Lock, or remember what is held by somebody else."""
        self._open += [(fd, lock, object) for lock in locks if not take(fd, lock)]

    def insist(self, warn: Callable[[str], None]) -> None:
        """Take what could not be had before. The original has given it up: who holds a lock now is a stranger, and a
        warning says so (the processes are past the point where giving up would help)."""
        for fd, lock, name in self._open:
            if not take(fd, lock):
                warn(str(LockTaken("a file lock could not be taken", object=name)))
        self._open.clear()


def take(fd: int, lock: FileLock) -> bool:
    """Lock; False if somebody else holds it."""
    shared = lock.type is LockType.READ
    try:
        if lock.lease:
            fcntl.fcntl(fd, Fcntl.SETLEASE, lock.type)
        elif lock.whole:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:
            fcntl.fcntl(fd, Fcntl.OFD_SETLK, Flock(type=lock.type, start=lock.start, length=lock.length).pack())
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True


def release(fd: int, lock: FileLock) -> None:
    """Give a lock up, for every process that has the description."""
    if lock.lease:
        fcntl.fcntl(fd, Fcntl.SETLEASE, LockType.NONE)
    elif lock.whole:
        fcntl.flock(fd, fcntl.LOCK_UN)
    else:
        fcntl.fcntl(fd, Fcntl.OFD_SETLK, Flock(type=LockType.NONE, start=lock.start, length=lock.length).pack())
