"""What the user decided about open files that cannot simply follow their process.

A policy is given to the :class:`~checkpoint.files.table.FileTable` of the source. What it decides is written into the
records: who restores the image repeats nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["NO_POLICY", "LocalPeers", "Policy"]


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

    local_peer  connections to processes of this host that stay
    """

    local_peer: LocalPeers = LocalPeers.REFUSE


NO_POLICY = Policy()
