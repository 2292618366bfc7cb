"""``tcpmig handover``: the holding host's half of ``restore --from``."""

from __future__ import annotations

from cli.command import command
from cli.session import Result, Session
from migrate.handover import hand_over

__all__ = ["handover"]


@command("handover", json=False)
def handover(session: Session) -> Result | None:
    """Give up a hold, on standard input and output; started by `tcpmig restore --from` on the other host."""
    hand_over()
    # the line is the only output: the restore tells what came of it
    return None
