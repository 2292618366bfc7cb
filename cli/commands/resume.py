"""``tcpmig resume``: a frozen connection flows again."""

from __future__ import annotations

import time

import click

from cli.command import command
from cli.session import Result, Session
from tcpstate import frozen
from tcpstate.connid import ConnId

__all__ = ["resume"]


@command("resume")
@click.argument("conn")
def resume(session: Session, conn: str) -> Result:
    """Let the connection CONN, frozen by `tcpmig freeze`, flow again, with all its options as they were."""
    entry = frozen.resume(ConnId.parse(conn))
    seconds = max(0.0, time.time() - entry.since)
    data = {"connection": str(entry.conn_id), "frozen_seconds": round(seconds, 3)}
    return Result(data=data, body=[f"{entry.conn_id} flows again, after {seconds:.1f} s"])
