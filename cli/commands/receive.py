"""``tcpmig receive``: the target's half of a migration."""

from __future__ import annotations

from cli.command import command
from cli.session import Result, Session
from migrate.run import receive as take

__all__ = ["receive"]


@command("receive", json=False)
def receive(session: Session) -> Result | None:
    """Take a process tree in, on standard input and output; started by `tcpmig migrate` on the other host."""
    take()
    # the line is the only output: the source tells what came of it
    return None
