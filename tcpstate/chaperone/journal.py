"""What the chaperone writes down before it changes a socket, so that its own death leaves nothing frozen.

One file per connection, 0600, in a directory of its own; the next chaperone gives back what it finds there.  A
file is of this host if boot and network namespace are the same, and of the same connection if the socket's cookie is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path

from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.errors import BadRecord
from tcpstate.freeze import QuietState
from tcpstate.slotted import dataclass

__all__ = ["Journal", "Note"]

_log = logging.getLogger(__name__)

_SUFFIX = ".frozen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One frozen connection.

    conn_id, uid  which, and whose
    cookie        SO_COOKIE of its socket
    state         the originals
    rules         priorities of the blackhole rules, by address family
    host          boot ID and network namespace
    """

    conn_id: ConnId
    uid: int
    cookie: int
    state: QuietState
    rules: dict[int, int] = field(default_factory=dict)
    host: str = ""


def this_host() -> str:
    """Boot ID and network namespace, as text."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    status = os.stat("/proc/thread-self/ns/net")
    return f"{boot} {status.st_dev}:{status.st_ino}"


class Journal:
    """The directory. OSError from each method where the file system refuses."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host = this_host()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, note: Note) -> None:
        """Keep a note until :meth:`forget`."""
        path = self._path(note.cookie)
        temporary = path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(codec.pack(note))
        temporary.rename(path)

    def forget(self, cookie: int) -> None:
        """The connection is as it was, or gone."""
        self._path(cookie).unlink(missing_ok=True)

    def leftovers(self) -> Iterator[Note]:
        """What an earlier chaperone of this boot and network namespace has left; what is of others is removed."""
        for path in sorted(self.directory.glob(f"*{_SUFFIX}")):
            try:
                note = codec.unpack(Note, path.read_bytes())
            except BadRecord as error:
                _log.warning("%s is no note of a frozen connection: %s", path, error.message)
                continue
            if note.host == self.host:
                yield note
            else:
                path.unlink()

    def _path(self, cookie: int) -> Path:
        return self.directory / f"{cookie:x}{_SUFFIX}"
