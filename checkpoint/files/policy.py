"""What the user decided about open files that cannot simply follow their process.

A policy is given to the :class:`~checkpoint.files.table.FileTable` of the source. What it decides is written into the
records: who restores the image repeats nothing.
"""

from __future__ import annotations

import enum
import posixpath
from dataclasses import dataclass

from tcpstate.acceptqueue import Policy as AcceptQueues

__all__ = ["NO_POLICY", "AcceptQueues", "LocalPeers", "Policy"]


class LocalPeers(enum.Enum):
    """``--local-peer``: what becomes of a connection whose other end is held by a process of this host that stays.

    REFUSE  nothing is moved
    CLOSE   the moved process sees that the other end has closed: what had arrived, then the end of the stream
    RESET   it sees that the other end has reset the connection: ECONNRESET
    """

    REFUSE = "refuse"
    CLOSE = "close"
    RESET = "reset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Decisions of the user; the default is to refuse whatever would be left behind.

    local_peer    connections to processes of this host that stay
    accept_queue  ``--accept-queue``: connections that wait to be accepted when the processes stop
    ship        files that are open for writing travel along, unless the target has the very same ones
    shared      directories whose files are the very same at the target; None: there is no target to ask
    apart       files of those that are not
    """

    local_peer: LocalPeers = LocalPeers.REFUSE
    accept_queue: AcceptQueues = AcceptQueues.KEEP
    ship: bool = False
    shared: frozenset[str] | None = None
    apart: frozenset[str] = frozenset()

    def stays_behind(self, path: str) -> bool:
        """Whether a file that is open for writing would be left behind, as far as the target has told."""
        if self.shared is None:
            return self.ship
        return path in self.apart or posixpath.dirname(path) not in self.shared


NO_POLICY = Policy()
