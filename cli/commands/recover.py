"""``tcpmig recover``: what a crash has left unsettled is finished or undone."""

from __future__ import annotations

import time

import click

from cli.command import command
from cli.errors import UsageMistake
from cli.fields import fields
from cli.session import Result, Session
from migrate.recover import Assume, Item, State
from migrate.recover import recover as settle

__all__ = ["recover"]


@command("recover")
@click.argument("name", metavar="[ID]", default="")
@click.option("--dry-run", is_flag=True, help="Only tell what is not settled.")
@click.option(
    "--assume",
    type=click.Choice([each.value for each in Assume]),
    help="Decide where the one copy that counts is; for an ID whose other host is gone for good.",
)
def recover(session: Session, name: str, dry_run: bool, assume: str | None) -> Result:
    """Finish or undo what a crash of tcpmig, or a line that was cut, has left unsettled on this host.

    Lists what is not settled, then acts, on all of it or on the one whose ID begins so. A migration in doubt is settled
    with its other host, over the same channel. May be run again at any time.
    """
    if assume is not None and (dry_run or not name):
        raise UsageMistake("--assume decides one thing: give its ID, and not --dry-run")
    report = settle(name, dry_run=dry_run, assume=None if assume is None else Assume(assume))
    lines = [line for item in report.items for line in _lines(item)] or ["nothing is unsettled on this host"]
    data = fields(report)
    failed = next((item for item in report.items if item.outcome is report.status and item.code), None)
    if failed is not None:
        # what a caller finds in any failure
        data |= {"code": failed.code, "message": failed.error, "object": failed.id, "fix": failed.fix}
    return Result(data=data, body=lines, outcome=report.status)


def _lines(item: Item) -> list[str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item.since))
    pids = f", pid {' '.join(map(str, item.roots))}" if item.roots else ""
    other = f", {item.host}" if item.host else ""
    lines = [f"{item.id}: {item.role.value} of {when}{pids}{other}: {item.state.value}"]
    lines += [f"  there may be: {found}" for found in item.found]
    if item.state is State.FOREIGN:
        lines.append("  of another boot or namespace: left alone")
    if item.state is State.BUSY:
        lines.append("  its program is at work: left alone")
    if item.done:
        lines.append(f"  {item.done}")
    if item.error:
        lines.append(f"  {item.code}: {item.error}. {item.fix}")
    return lines
