"""How a hold ends: sockets reset, rules lifted, files gone. Every step may be repeated."""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence

from checkpoint.files.held import HeldSocket
from migrate import holdstore
from migrate.holdstore import HoldRecord
from tcpstate.errors import ConnectionCallFailed
from tcpstate.freeze import leave_repair
from tcpstate.kernel.sockets import SO, Level
from tcpstate.silence import Blackhole
from tcpstate.uses.hold import DropRule

__all__ = ["dismantle", "lift", "reset"]

_log = logging.getLogger(__name__)

_AT_ONCE = struct.pack("ii", 1, 0)  # struct linger: closing sends a RST


def reset(sockets: Sequence[HeldSocket]) -> None:
    """Close held sockets so that the peers are told, by a RST; nobody else must have them any more."""
    for one in sockets:
        quiet = one.file.quiet
        if quiet is not None:
            try:
                one.sock.setsockopt(Level.SOCKET, SO.LINGER, _AT_ONCE)
                # it is still silent, and deaf, when it leaves repair
                leave_repair([one.sock], [quiet.reuse_address], probe=False)
                one.sock.setsockopt(Level.SOCKET, SO.MARK, quiet.mark)
            except (OSError, ConnectionCallFailed) as error:
                _log.warning("%s is ended without a reset: %s", one.file.conn_id, error)
        one.sock.close()


def lift(record: HoldRecord) -> None:
    """From now on this host answers again for what was held. OSError."""
    if not DropRule(record.hold).lift():
        _log.debug("the drop rule of hold %s did not stand any more", record.hold)


def dismantle(record: HoldRecord) -> None:
    """Take everything of the hold away: rules, files, control groups. The sockets are gone, or others have them.

    Only of a hold of this host; of another's only the files. OSError.
    """
    if record.here:
        lift(record)
        blackhole = Blackhole()
        blackhole.priorities = dict(record.rules or {})
        blackhole.remove()
    holdstore.forget(record)
