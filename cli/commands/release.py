"""``tcpmig release``: a hold ends."""

from __future__ import annotations

import click

from cli.command import command
from cli.session import Result, Session
from migrate import holdstore
from migrate.hold import release as end

__all__ = ["release"]


@command("release")
@click.argument("hold", metavar="ID")
@click.option("--reset/--silent", default=True, help="Tell the peers at once, by a reset, or say nothing.  [reset]")
def release(session: Session, hold: str, reset: bool) -> Result:
    """End the hold ID (its beginning will do): the connections that it keeps are given up.

    The image stays. With --silent each peer finds out when it next sends something: this host then answers with a
    reset.
    """
    record = holdstore.named(hold)
    end(record, reset=reset)
    how = "reset" if reset else "given up silently"
    data = {"hold": record.hold, "connections": record.connections, "reset": reset}
    return Result(data=data, body=[f"hold {record.hold} has ended: {record.connections} connections {how}"])
