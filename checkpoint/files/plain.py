"""Open files that have no state but their place: they can be told, and opened at the target, before the stop.

Regular files and directories that have a path, and devices without a state.  Not what somebody has locked, or is told
of by signals.
"""

from __future__ import annotations

import dataclasses
from typing import Final, NamedTuple

from checkpoint.files.base import OpenFile
from checkpoint.files.device import Device
from checkpoint.files.regular import Directory, RegularFile

__all__ = ["PLAIN", "Numbers", "is_plain", "moved_on"]

PLAIN: Final = (RegularFile, Directory, Device)


class Numbers(NamedTuple):
    """What changes while a file is only read and written.

    pos       position of the description
    size      bytes of the file
    mtime_ns  time of its modification
    """

    pos: int
    size: int
    mtime_ns: int


def is_plain(file: OpenFile) -> bool:
    """Whether a record is one of those."""
    return isinstance(file, PLAIN) and file.owner is None and not file.locks


def moved_on(file: OpenFile, now: Numbers) -> OpenFile:
    """The record with other numbers. ValueError if they are out of range."""
    if not isinstance(file, RegularFile):
        return dataclasses.replace(file, pos=now.pos)
    # what was known of the content is known no more, if it is another
    same = (file.size, file.mtime_ns) == (now.size, now.mtime_ns)
    evidence = file.evidence if same else None
    return dataclasses.replace(file, pos=now.pos, size=now.size, mtime_ns=now.mtime_ns, evidence=evidence)
