"""``tcpmig checkpoint``: process trees, with their connections, into a file."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import click

from checkpoint.errors import NoSuchProcess
from cli import rounds
from cli.command import command
from cli.errors import UsageMistake
from cli.fields import fields
from cli.filepolicy import file_policy, policy_of, require
from cli.session import Result, Session
from migrate.hold import DEFAULT_TIMEOUT
from migrate.rotating import FULL, KEEP, Plan, Rotation
from migrate.snapshot import checkpoint as dump
from migrate.snapsummary import CheckpointSummary
from tcpstate.errors import TcpmigError

__all__ = ["checkpoint"]

_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Duration(click.ParamType):  # type: ignore[type-arg]
    """A time as people write it, in seconds: 30, 30s, 1.5m, 2h."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|[smhd]?)", str(value))
        if not match or not float(match[1]):
            self.fail(f"{value!r} is no time like 30s, 5m or 1h", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


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
@click.option(
    "--parent",
    metavar="FILE",
    default="",
    type=click.Path(),
    help="An earlier image: what is there already is not written again.",
)
@click.option(
    "--every",
    metavar="TIME",
    type=Duration(),
    default=None,
    help="Again and again (30s, 5m, 1h), into FILE.000001 and so on, each building on the one before; implies -R.",
)
@click.option(
    "--keep", metavar="N", type=click.IntRange(1), default=None, help=f"With --every: how many stay.  [default: {KEEP}]"
)
@click.option(
    "--full",
    metavar="N",
    type=click.IntRange(1),
    default=None,
    help=f"With --every: how often one builds on none.  [default: {FULL}]",
)
@rounds.max_downtime
@rounds.stop_and_copy
@file_policy
@click.option("--unit-hook", metavar="CMD", default="", help="A program that deals with their supervisor.")
def checkpoint(
    session: Session,
    pids: tuple[int, ...],
    output: str,
    leave_running: bool,
    address: str,
    hold_timeout: float,
    parent: str,
    every: float | None,
    keep: int | None,
    full: int | None,
    max_downtime: float,
    stop_and_copy: bool,
    unit_hook: str,
    **files: Any,
) -> Result | None:
    """Write the process trees PID and their connections into one image file.

    Without -R the processes end, and their connections are held: nobody is answered and nobody is reset until
    `tcpmig restore` brings the processes back, here or (--from) elsewhere, or the hold ends. See `tcpmig holds`.
    """
    if parent and stop_and_copy:
        raise UsageMistake("--parent needs the rounds: what has not changed is found while the processes run")
    if every is None:
        require("--every", {"--keep": keep is not None, "--full": full is not None})
    elif parent or unit_hook:
        raise UsageMistake("--every finds the parents itself, and ends no process: no --parent and no --unit-hook")
    decided = policy_of(**files)

    def make(file: str, older: str) -> CheckpointSummary:
        return dump(
            pids,
            file,
            leave_running=leave_running or every is not None,
            address=address,
            files=decided,
            unit_hook=unit_hook,
            timeout=hold_timeout,
            max_downtime_ms=None if stop_and_copy else max_downtime,
            parent=older,
        )

    if every is None:
        return _told(make(output, parent))
    _rotate(session, make, Rotation(output, Plan(keep or KEEP, full or FULL)), every)
    return None


def _told(summary: CheckpointSummary) -> Result:
    what = "runs on" if summary.running else "has ended"
    kept = f"; hold {summary.hold}" if summary.hold else ""
    older = f" (and {summary.inherited} in earlier images)" if summary.inherited else ""
    lines = [
        f"{summary.file}: {summary.bytes} bytes{older}, {summary.connections} connections",
        f"pid {summary.pid} {what} after {summary.stop_ms:.1f} ms{kept}",
    ]
    return Result(data=fields(summary), body=lines)


def _rotate(session: Session, make: Callable[[str, str], CheckpointSummary], rotation: Rotation, every: float) -> None:
    """Until Ctrl-C or SIGTERM, or until the processes have ended. What goes wrong once there has been an image is told,
    and tried again when the next one is due."""
    began, done = time.monotonic(), 0
    try:
        while True:
            try:
                session.emit(_told(rotation.another(make)))
                done += 1
            except NoSuchProcess:
                if not done:
                    raise
                session.say("the processes have ended")
                return
            except TcpmigError as error:
                if not done:
                    raise
                session.say(f"no image this time: {error}")
            time.sleep(every - (time.monotonic() - began) % every)
    except KeyboardInterrupt:
        # the way to end it
        return
