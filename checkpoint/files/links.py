"""Another hard link of a file whose name is gone: nothing but a search finds it.

It is most often beside the name that is gone (a rotated log), else near it: one directory after the other is left for
the one above, and all that is below it and on the same file system is looked through, as far as a bound.  The search
is made by the check before the stop, and what it found is only looked at again in the stop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

__all__ = ["find"]

#: directory entries that are looked at, at most
_MOST = 200_000
#: (device, inode) -> a path that led there
_known: dict[tuple[int, int], str] = {}


def find(gone: str, wanted: os.stat_result) -> str:
    """A path of the file that had the path ``gone``; empty if none is found."""
    key = wanted.st_dev, wanted.st_ino
    if _is(_known.get(key, ""), wanted):
        return _known[key]
    _known.pop(key, None)
    for path in _near(os.path.dirname(gone), wanted):
        if _is(path, wanted):
            _known[key] = path
            return path
    return ""


def _is(path: str, wanted: os.stat_result) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)


def _near(folder: str, wanted: os.stat_result) -> Iterator[str]:
    """Paths whose directory entries have the inode's number, the nearest first."""
    left = _MOST
    done = ""
    while True:
        heap = [folder]
        while heap and left > 0:
            here = heap.pop(0)
            if here == done or not _on(here, wanted.st_dev):
                continue
            found, below, looked = _entries(here, wanted.st_ino)
            left -= looked
            yield from sorted(found)
            heap += sorted(below)
        if left <= 0 or folder == "/":
            return
        done, folder = folder, os.path.dirname(folder)


def _on(folder: str, device: int) -> bool:
    try:
        return os.lstat(folder).st_dev == device
    except OSError:
        return False


def _entries(folder: str, inode: int) -> tuple[list[str], list[str], int]:
    """(paths in the directory with this inode number, its directories, how many entries were looked at)"""
    found: list[str] = []
    below: list[str] = []
    looked = 1
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                looked += 1
                if entry.inode() == inode:
                    found.append(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
    except OSError:
        return [], [], 1  # it has just been removed, or is nobody's to look into
    return found, below, looked
