"""Frames of an image that a release needs, kept outside the tool while it builds: should it die after the processes
are this host's, what was never sent must not be lost with it.

The file lies in the runtime directory (memory, on most hosts): it is of no use after a reboot, when the sockets are
gone.  It holds bytes of connections, is the owner's alone, and goes away with the migration.  One frame after the
other::

    kind (16 bytes)   record length u32   data length u32 (little endian)   record   data
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path

from checkpoint.image.frames import Buffer, Frame, Kind, Space
from checkpoint.traces import NoteWriter
from migrate.errors import KeptFramesLost
from tcpstate.frozen import runtime_dir
from tcpstate.slotted import dataclass

__all__ = ["NOTE", "KeptFrame", "KeptFrames", "read_kept"]

#: the name of the note that tells the path
NOTE = "kept"
_HEAD = struct.Struct("<16sII")
#: bytes of the record of a PAGES frame with one run, at most
_ONE_RUN = 96
_KEPT = frozenset({Kind.AHEAD, Kind.FILES, Kind.FILES_DELTA})


class KeptFrames:
    """The file, being written. OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    @classmethod
    def noted(cls, note: NoteWriter) -> KeptFrames:
        """A fresh one in the runtime directory, its path kept first. OSError."""
        path = runtime_dir() / "kept" / f"{secrets.token_hex(16)}.frames"
        note(NOTE, os.fsencode(path))
        return cls(path)

    def keep(self, frame: Frame) -> None:
        """Write a frame down, if it is of those that are needed. OSError."""
        if frame.kind in _KEPT or _is_sent(frame):
            head = _HEAD.pack(frame.kind.encode(), len(frame.record), len(frame.data))
            _write_all(self._fd, [head, frame.record, frame.data])

    def close(self) -> None:
        """Nothing more comes."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Nobody needs it any more."""
        self.close()
        self.path.unlink(missing_ok=True)


def _is_sent(frame: Frame) -> bool:
    # a piece of a queue is one run: the long records of memory need not be looked at
    return frame.kind == Kind.PAGES and len(frame.record) <= _ONE_RUN and frame.runs().space is Space.SENT


def _write_all(fd: int, buffers: list[Buffer]) -> None:
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            view = view[os.write(fd, view) :]


@dataclass(frozen=True, slots=True)
class KeptFrame:
    """One frame as it came."""

    kind: str
    record: bytes
    data: bytes


def read_kept(path: Path) -> Iterator[KeptFrame]:
    """The frames, in their order. KeptFramesLost if there is no such file, or it was cut short."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            content = file.read()
    except OSError as error:
        raise KeptFramesLost(f"{error.strerror}", object=str(path)) from error
    at = 0
    while at < len(content):
        body = at + _HEAD.size
        if body > len(content):
            raise KeptFramesLost("it was cut short", object=str(path))
        kind, record, data = _HEAD.unpack_from(content, at)
        at = body + record + data
        if at > len(content):
            raise KeptFramesLost("it was cut short", object=str(path))
        name = kind.rstrip(b"\0").decode("ascii", "replace")
        yield KeptFrame(name, content[body : body + record], content[body + record : at])
