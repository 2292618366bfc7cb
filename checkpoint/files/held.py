"""TCP sockets that outlive their processes: given to somebody who keeps them, and taken back when the tree is rebuilt.

A held connection is quiet and in repair mode (:mod:`tcpstate.freeze`), a held listener drops SYNs; so nobody need do
anything while they are kept.  The number of a file in the image's table (FILES) says which socket is whose.
"""

from __future__ import annotations

import socket

from tcpstate.freeze import QuietState
from tcpstate.slotted import dataclass
from tcpstate.uses.hold import ListeningEnd

__all__ = ["HeldFile", "HeldSocket"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFile:
    """What a held socket is.

    index     its number in FILES
    conn_id   of a connection; empty for a listener
    quiet     of a connection: what the freeze has changed
    listener  where a listener listens
    """

    index: int
    conn_id: str = ""
    quiet: QuietState | None = None
    listener: ListeningEnd | None = None

    def __post_init__(self) -> None:
        if (
            self.index < 0
            or bool(self.conn_id) != (self.quiet is not None)
            or bool(self.conn_id) == bool(self.listener)
        ):
            raise ValueError("neither a held connection nor a held listener")


@dataclass(frozen=True, slots=True)
class HeldSocket:
    """A held socket of ours."""

    file: HeldFile
    sock: socket.socket
