"""``tcpmig conns``: the TCP connections of this host."""

from __future__ import annotations

import time
from typing import Any

import click

from cli.about import about, table
from cli.command import command
from cli.session import Result, Session, Table
from tcpstate.locate import Located, connections

__all__ = ["conns"]

_MICROSECONDS_PER_MS = 1000
_CLEAR = "\x1b[H\x1b[2J"


@command("conns")
@click.argument("pids", metavar="[PID]...", nargs=-1, type=click.IntRange(1))
@click.option("--watch", is_flag=True, help="Again and again, until Ctrl-C.")
@click.option("--interval", metavar="SECONDS", type=click.FloatRange(0.1), default=1.0, help="How often, with --watch.")
def conns(session: Session, pids: tuple[int, ...], watch: bool, interval: float) -> Result | None:
    """List the TCP connections of this network namespace, or those of the processes PID.

    Queues in bytes: recv is what the process has not read, send what the peer has not acknowledged.
    """
    if not watch:
        return _listing(pids)
    try:
        while True:
            if session.terminal and not session.json:
                click.echo(_CLEAR, nl=False)
            session.emit(_listing(pids))
            time.sleep(interval)
    except KeyboardInterrupt:
        # the way to end it
        return None


def _listing(pids: tuple[int, ...]) -> Result:
    found = sorted(connections(pids or None, info=True), key=lambda each: str(each.conn_id))
    columns = ["connection", "state", "owner", "recv", "send", "rtt ms", "cwnd"]
    rows = [_row(each) for each in found]
    listing = Table(columns=columns, rows=rows, styles={"FROZEN": "bold yellow"})
    processes = about(owner.pid for each in found for owner in each.owners)
    return Result(
        data={"connections": [_plain(each) for each in found], "processes": processes},
        body=[each for each in (listing, table(processes)) if each.rows],
    )


def _row(each: Located) -> list[str]:
    info = each.info
    return [
        str(each.conn_id),
        "FROZEN" if each.frozen else each.state.name,
        " ".join(f"{owner.pid}/{owner.fd}" for owner in each.owners) or "-",
        str(each.receive_queue),
        str(each.send_queue),
        f"{info.rtt / _MICROSECONDS_PER_MS:.3f}" if info else "-",
        str(info.snd_cwnd) if info else "-",
    ]


def _plain(each: Located) -> dict[str, Any]:
    return {
        "connection": str(each.conn_id),
        "state": each.state.name,
        "frozen": each.frozen,
        "owners": list(each.owners),
        "receive_queue": each.receive_queue,
        "send_queue": each.send_queue,
        "rtt_us": each.info.rtt if each.info else None,
        "cwnd": each.info.snd_cwnd if each.info else None,
    }
