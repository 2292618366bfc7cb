"""``tcpmig freeze``: one connection falls silent."""

from __future__ import annotations

import click

from cli.command import command
from cli.session import Result, Session
from tcpstate import frozen
from tcpstate.connid import ConnId

__all__ = ["freeze"]


@command("freeze")
@click.argument("conn")
def freeze(session: Session, conn: str) -> Result:
    """Freeze the connection CONN: nothing comes in, nothing goes out, until `tcpmig resume CONN`.

    It stays frozen after this command has ended. Its process runs on, and only waits if it reads from the connection or
    fills its buffer.
    """
    entry = frozen.freeze(ConnId.parse(conn))
    data = {"connection": str(entry.conn_id), "pid": entry.pid, "fd": entry.fd}
    return Result(data=data, body=[f"{entry.conn_id} of pid {entry.pid} is frozen"])
