"""``tcpmig checkpoint``: process trees, with their connections, into a file."""

from __future__ import annotations

from typing import Any

import click

from cli.command import command
from cli.fields import fields
from cli.filepolicy import file_policy, policy_of
from cli.session import Result, Session
from migrate.snapshot import checkpoint as dump
from migrate.takeover import AddressPolicy

__all__ = ["checkpoint"]


@command("checkpoint")
@click.argument("pids", metavar="PID...", nargs=-1, required=True, type=click.IntRange(1))
@click.option("-o", "--output", metavar="FILE", required=True, type=click.Path(), help="The image file.")
@click.option("-R", "--leave-running", is_flag=True, help="The processes run on.")
@click.option(
    "--address", metavar="auto|none|ADDR,...", default="auto", help="Which addresses go with it.  [default: auto]"
)
@click.option(
    "--address-policy",
    type=click.Choice([policy.value for policy in AddressPolicy]),
    default=AddressPolicy.REFUSE.value,
    help="What if others use such an address.  [default: refuse]",
)
@file_policy
@click.option("--unit-hook", metavar="CMD", default="", help="A program that deals with their supervisor.")
def checkpoint(
    session: Session,
    pids: tuple[int, ...],
    output: str,
    leave_running: bool,
    address: str,
    address_policy: str,
    unit_hook: str,
    **files: Any,
) -> Result:
    """Write the process trees PID and their connections into one image file.

    Without -R the processes end. Their addresses leave this host, so that nobody is reset; peers keep trying until
    `tcpmig restore` brings both back.
    """
    policy = AddressPolicy(address_policy)
    decided = policy_of(**files)
    summary = dump(
        pids,
        output,
        leave_running=leave_running,
        address=address,
        policy=policy,
        files=decided,
        unit_hook=unit_hook,
    )
    what = "runs on" if summary.running else "has ended"
    gone = f", {', '.join(summary.addresses)} left this host" if summary.addresses else ""
    lines = [
        f"{output}: {summary.bytes} bytes, {summary.connections} connections",
        f"pid {summary.pid} {what} after {summary.stop_ms:.1f} ms{gone}",
    ]
    return Result(data=fields(summary), body=lines)
