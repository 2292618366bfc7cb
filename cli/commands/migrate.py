"""``tcpmig migrate``: a running process tree moves to another host."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from cli import rounds
from cli.command import command
from cli.commands.check import report
from cli.cpu import cpu_unused, patterns
from cli.errors import UsageMistake
from cli.fields import fields
from cli.filepolicy import file_places, file_policy, places_of, policy_of, require
from cli.session import Result, Session
from migrate.forwarding import OPTION as FORWARD
from migrate.rounds import IfBusy
from migrate.run import check as check_with
from migrate.run import migrate as move
from migrate.summary import SourceOptions, Summary
from migrate.takeover import AddressPolicy
from migrate.transport import DEFAULT_REMOTE_COMMAND, DEFAULT_RSH
from migrate.unithook import LIMIT

__all__ = ["carry_out", "expressions", "migrate"]

#: moves at a time: each takes a processor while it copies
AT_ONCE = 2


@command("migrate")
@click.argument("pids", metavar="[PID]...", nargs=-1, type=click.IntRange(1))
@click.argument("host")
@click.option(
    "--all-matching",
    metavar="PATTERN",
    multiple=True,
    help="All trees whose command line has this regular expression in it, each for itself. May be repeated.",
)
@click.option(
    "--at-once",
    metavar="N",
    type=click.IntRange(1),
    default=AT_ONCE,
    help=f"How many of them move at a time.  [default: {AT_ONCE}]",
)
@click.option("--rsh", metavar="CMD", default=DEFAULT_RSH, help=f"The remote shell.  [default: {DEFAULT_RSH}]")
@click.option(
    "--remote-command",
    metavar="CMD",
    default=DEFAULT_REMOTE_COMMAND,
    help=f"What it runs on HOST.  [default: {DEFAULT_REMOTE_COMMAND}]",
)
@click.option(
    "--address",
    metavar="auto|none|forward|ADDR,...",
    default="auto",
    help="Which addresses move; forward: none, this host forwards the connections.  [default: auto]",
)
@click.option("--forward-to", metavar="ADDR", default="", help="With --address forward: an address of HOST.")
@click.option(
    "--address-policy",
    type=click.Choice([policy.value for policy in AddressPolicy]),
    default=AddressPolicy.REFUSE.value,
    help="What if others use such an address.  [default: refuse]",
)
@file_policy
@cpu_unused
@click.option("--unit-hook", metavar="CMD", default="", help="A program that deals with their supervisor here.")
@click.option("--takeover-hook", metavar="CMD", default="", help="A program that moves the addresses by an API.")
@click.option(
    "--takeover-limit",
    metavar="SECONDS",
    type=click.FloatRange(1, 600),
    default=LIMIT,
    help=f"How long it may take each time.  [default: {LIMIT:g}]",
)
@file_places
@rounds.max_downtime
@click.option(
    "--if-busy",
    type=click.Choice([what.value for what in IfBusy]),
    default=IfBusy.STOP.value,
    help="What if the process writes too fast for that: stop and copy the rest, leave it, let it run there before the "
    "rest has come, or slow it down.  [default: stop]",
)
@click.option("--lazy", is_flag=True, help="No rounds: they run there at once, and memory comes when it is needed.")
@click.option(
    "--compress",
    type=click.Choice(["auto", "never"]),
    default="auto",
    help="Compress memory (zstd) where the line is so slow that it pays.  [default: auto]",
)
@rounds.stop_and_copy
@click.option("--dry-run", is_flag=True, help="Only ask both hosts whether it can be done, and foretell what it takes.")
def migrate(
    session: Session, pids: tuple[int, ...], host: str, all_matching: tuple[str, ...], address: str, **given: Any
) -> Result:
    """Move the process trees PID to HOST, with their connections and addresses; those of --all-matching at the same
    time, but each for itself.

    Nobody who is connected to them is disconnected. Whatever goes wrong before the very last step leaves everything as
    it was.
    """
    if all_matching:
        from migrate.matching import find, together

        if pids:
            raise UsageMistake("--all-matching finds the processes: name no PID beside it")
        chosen = together(find(expressions(all_matching)), address=address)
    elif pids:
        chosen = [pids]
    else:
        raise UsageMistake("which processes? Name a PID, or --all-matching PATTERN")
    return carry_out(session, chosen, host, several=bool(all_matching), address=address, **given)


def carry_out(
    session: Session,
    chosen: Sequence[tuple[int, ...]],
    host: str,
    *,
    several: bool,
    at_once: int,
    rsh: str,
    remote_command: str,
    address: str,
    forward_to: str,
    address_policy: str,
    cpu_unused: tuple[str, ...],
    unit_hook: str,
    takeover_hook: str,
    takeover_limit: float,
    max_downtime: float,
    if_busy: str,
    lazy: bool,
    compress: str,
    stop_and_copy: bool,
    dry_run: bool,
    label: Mapping[str, str] | None = None,
    **files: Any,
) -> Result:
    """What the options of `migrate` say, done for these roots.

    chosen   the roots of each move
    several  each is a move of its own, and there is one summary
    label    told to the target, beside the options
    """
    if address != FORWARD:
        require("--address forward", {"--forward-to": forward_to})
    if not files["ship"]:
        require("--ship", {"--overwrite": files["overwrite"]})
    if lazy and stop_and_copy:
        raise UsageMistake("--lazy copies memory after the stop, --stop-and-copy in it: name one of them")
    places = places_of(**files)
    options = SourceOptions(
        address=address,
        forward_to=forward_to,
        policy=AddressPolicy(address_policy),
        map_dev=places.devices,
        cpu_unused=patterns(cpu_unused),
        unit_hook=unit_hook,
        takeover_hook=takeover_hook,
        takeover_limit=takeover_limit,
        forwarded=places.texts() | dict(label or {}),
        precopy=not stop_and_copy,
        max_downtime_ms=max_downtime,
        if_busy=IfBusy(if_busy),
        lazy=lazy,
        compress=compress == "auto",
        rsh=rsh,
        remote_command=remote_command,
    )
    decided = policy_of(**files)
    if any(rule.inherit for rule in decided.external):
        raise UsageMistake("--external FD=inherit is for checkpoint and restore: HOST has nothing to be inherited from")
    if dry_run:
        checked = [
            check_with(one, host, rsh=rsh, remote_command=remote_command, options=options, policy=decided)
            for one in chosen
        ]
        found = [verdict for one in checked for verdict in (*one.here, *one.there)]
        return report(found, [one.forecast for one in checked if one.forecast], every=session.verbose)
    if several:
        from cli.several import Move, all_of, gathered

        moves = [
            Move(pids=one, host=host, rsh=rsh, remote_command=remote_command, options=options, policy=decided)
            for one in chosen
        ]
        begun = time.monotonic()
        moved = all_of(moves, at_once=at_once, verbose=session.verbose)
        return gathered(moved, seconds=time.monotonic() - begun)
    (pids,) = chosen
    summary = move(pids, host, rsh=rsh, remote_command=remote_command, options=options, policy=decided)
    return Result(data=fields(summary), body=list(_lines(summary, host)), outcome=summary.status)


def expressions(texts: Sequence[str]) -> list[re.Pattern[str]]:
    """Regular expressions of the command line. UsageMistake."""
    try:
        return [re.compile(text) for text in texts]
    except re.error as error:
        raise UsageMistake(f"not a regular expression: {error}", object=str(error.pattern)) from None


def _lines(summary: Summary, host: str) -> list[str]:
    where = f" with {', '.join(summary.addresses)}" if summary.addresses else ""
    moved = f"{summary.connections} connections, stopped for {summary.stop_ms:.1f} ms"
    lines = [
        f"pid {summary.pid} runs on {host}{where}: {moved}",
        f"{summary.bytes_sent} bytes in {summary.total_ms:.0f} ms",
    ]
    if summary.forward:
        lines.append(f"forwarding {summary.forward}: `tcpmig holds` shows it")
    if summary.not_taken:
        lines.append(f"their clients do not reach them: {summary.not_taken}; then `tcpmig recover {summary.migration}`")
    if summary.later:
        lines.append(f"{summary.later} bytes of memory came while it ran there")
    return lines + [f"lost: {lost.connection}: {lost.reason}" for lost in summary.lost]
