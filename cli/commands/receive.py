"""``tcpmig receive``: the target's half of a migration."""

from __future__ import annotations

import logging

import click

from cli.command import command
from cli.session import Result, Session
from migrate.run import receive as take
from tcpstate.errors import TcpmigError

__all__ = ["receive"]

_log = logging.getLogger(__name__)


@command("receive", json=False)
@click.option("--unit-hook", metavar="CMD", default="", help="A program that deals with supervisors on this host.")
def receive(session: Session, unit_hook: str) -> Result | None:
    """Take a process tree in, on standard input and output; started by `tcpmig migrate` on the other host."""
    try:
        take(unit_hook=unit_hook)
    except TcpmigError as error:
        if not error.told:
            raise
        # what is printed here is printed there: nobody is to read the same twice
        _log.debug("told the source: %s", error)
        return Result(data={}, outcome=error.outcome)
    # the line is the only output: the source tells what came of it
    return None
