"""``tcpmig receive``: the target's half of a migration."""

from __future__ import annotations

import click

from cli.command import command
from cli.session import Result, Session
from migrate.run import receive as take

__all__ = ["receive"]


@command("receive", json=False)
@click.option("--unit-hook", metavar="CMD", default="", help="A program that deals with supervisors on this host.")
def receive(session: Session, unit_hook: str) -> Result | None:
    """Take a process tree in, on standard input and output; started by `tcpmig migrate` on the other host."""
    take(unit_hook=unit_hook)
    # the line is the only output: the source tells what came of it
    return None
