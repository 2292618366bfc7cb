"""``tcpmig checkpoint``: process trees, with their connections, into a file."""

from __future__ import annotations

from typing import Any

import click

from cli.command import command
from cli.fields import fields
from cli.filepolicy import file_policy, policy_of
from cli.session import Result, Session
from migrate.hold import DEFAULT_TIMEOUT
from migrate.snapshot import checkpoint as dump

__all__ = ["checkpoint"]


@command("checkpoint")
@click.argument("pids", metavar="PID...", nargs=-1, required=True, type=click.IntRange(1))
@click.option("-o", "--output", metavar="FILE", required=True, type=click.Path(), help="The image file.")
@click.option("-R", "--leave-running", is_flag=True, help="The processes run on.")
@click.option(
    "--address", metavar="auto|none|ADDR,...", default="auto", help="Which addresses go with it.  [default: auto]"
)
@click.option(
    "--hold-timeout",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=DEFAULT_TIMEOUT,
    help=f"When the hold ends by itself; 0: never.  [default: {DEFAULT_TIMEOUT:g}]",
)
@file_policy
@click.option("--unit-hook", metavar="CMD", default="", help="A program that deals with their supervisor.")
def checkpoint(
    session: Session,
    pids: tuple[int, ...],
    output: str,
    leave_running: bool,
    address: str,
    hold_timeout: float,
    unit_hook: str,
    **files: Any,
) -> Result:
    """Write the process trees PID and their connections into one image file.

    Without -R the processes end, and their connections are held: nobody is answered and nobody is reset until
    `tcpmig restore` brings the processes back, here or (--from) elsewhere, or the hold ends. See `tcpmig holds`.
    """
    decided = policy_of(**files)
    summary = dump(
        pids,
        output,
        leave_running=leave_running,
        address=address,
        files=decided,
        unit_hook=unit_hook,
        timeout=hold_timeout,
    )
    what = "runs on" if summary.running else "has ended"
    kept = f"; hold {summary.hold}" if summary.hold else ""
    lines = [
        f"{output}: {summary.bytes} bytes, {summary.connections} connections",
        f"pid {summary.pid} {what} after {summary.stop_ms:.1f} ms{kept}",
    ]
    return Result(data=fields(summary), body=lines)
