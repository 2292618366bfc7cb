"""``tcpmig check``: what would become of it? Nothing is stopped or changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from checkpoint import hostcheck, preflight, supervisors
from checkpoint.files.policy import Policy
from checkpoint.verdict import Status, Verdict, refusals
from cli.about import about, table
from cli.command import command
from cli.cpu import cpu_unused, patterns
from cli.errors import UsageMistake
from cli.filepolicy import file_places, file_policy, places_of, policy_of, require
from cli.session import Result, Session, Table
from migrate.forecast import Forecast
from migrate.summary import Checked, SourceOptions
from tcpstate.errors import Outcome

__all__ = ["check", "report"]

_STYLES = {"ok": "green", "warn": "yellow", "refuse": "bold red"}


@command("check")
@click.argument("pids", metavar="[PID]...", nargs=-1, type=click.IntRange(1))
@click.option("--to", "host", metavar="HOST", help="Ask the target of a migration, too.")
@click.option("--rsh", metavar="CMD", help="With --to: the remote shell.  [default: ssh]")
@click.option("--remote-command", metavar="CMD", help="With --to: what it runs there.  [default: tcpmig receive]")
@click.option("--address", metavar="auto|none|ADDR,...", default="auto", help="With --to: which addresses would move.")
@cpu_unused
@file_policy
@click.option("--unit-hook", metavar="CMD", default="", help="As given to migrate or checkpoint; it is not run.")
@file_places
def check(
    session: Session,
    pids: tuple[int, ...],
    host: str | None,
    rsh: str | None,
    remote_command: str | None,
    address: str,
    cpu_unused: tuple[str, ...],
    unit_hook: str,
    **files: Any,
) -> Result:
    """Can this host do it, and can the process trees PID be moved? One verdict per item, those that are fine with -v.

    Nothing is stopped or changed. Exit status 3 if anything is refused.
    """
    if host is not None and not pids:
        raise UsageMistake("--to wants the PID of what would move")
    if host is None:
        of_there = {"--rsh": rsh, "--remote-command": remote_command, "--address": address != "auto"}
        of_there |= {"--map": files["path_map"], "--map-dev": files["map_dev"], "--overwrite": files["overwrite"]}
        of_there |= {"--cpu-unused": bool(cpu_unused)}
        of_there |= {"--veth": files["veth"]}
        require("--to HOST", of_there)
    if not files["ship"]:
        require("--ship", {"--overwrite": files["overwrite"]})
    found = hostcheck.check()
    predicted: list[Forecast] = []
    policy = policy_of(**files)
    places = places_of(**files)
    options = SourceOptions(
        address=address,
        map_dev=places.devices,
        cpu_unused=patterns(cpu_unused),
        unit_hook=unit_hook,
        forwarded=places.texts(),
    )
    if pids:
        found += preflight.check(pids, policy)
        if not refusals(found):
            found += supervisors.verdicts(pids, preflight.pids(pids), hook=bool(unit_hook))
    if host is not None and not refusals(found):
        checked = _of_target(pids, host, rsh, remote_command, options, policy)
        found += [*checked.here, *checked.there]
        predicted = [checked.forecast] if checked.forecast is not None else []
    result = report(found, predicted, every=session.verbose)
    processes = about(pids)
    if not processes:
        return result
    return replace(result, data=result.data | {"processes": processes}, body=[table(processes), *result.body])


def _of_target(
    pids: Sequence[int],
    host: str,
    rsh: str | None,
    remote_command: str | None,
    options: SourceOptions,
    policy: Policy,
) -> Checked:
    """What the addresses and the target have to say; raises the first refusal."""
    from migrate.run import check as ask
    from migrate.transport import DEFAULT_REMOTE_COMMAND, DEFAULT_RSH

    return ask(
        pids,
        host,
        rsh=rsh or DEFAULT_RSH,
        remote_command=remote_command or DEFAULT_REMOTE_COMMAND,
        options=options,
        policy=policy,
    )


def report(found: Sequence[Verdict], predicted: Sequence[Forecast] = (), *, every: bool) -> Result:
    """The verdicts, and what each migration would take, as the result of a command; ``every``: those that are fine,
    too."""
    refused = refusals(found)
    data: dict[str, object] = {"verdicts": list(found)}
    if refused:
        # what a caller finds in any failure
        first = refused[0]
        data |= {"code": first.code, "message": first.text, "object": first.subject, "fix": first.fix}
    if predicted:
        data["predicted"] = list(predicted)
    count = Counter(verdict.status for verdict in found)
    summary = f"{count[Status.OK]} ok, {count[Status.WARN]} with a warning, {count[Status.REFUSE]} refused"
    shown = [verdict for verdict in found if every or verdict.status is not Status.OK]
    rows = [[v.status.value, v.subject, v.kind, v.code, ". ".join(filter(None, [v.text, v.fix]))] for v in shown]
    table = Table(columns=["verdict", "what", "kind", "code", ""], rows=rows, styles=_STYLES)
    return Result(
        data=data,
        body=[*([table] if rows else []), summary, *map(_in_words, predicted)],
        outcome=Outcome.REFUSED if refused else Outcome.DONE,
    )


def _in_words(predicted: Forecast) -> str:
    rounds, last = predicted.rounds[:-1], predicted.rounds[-1]
    before = f"{len(rounds)} rounds with {sum(one.bytes for one in rounds) / 1e6:.1f} MB, then " if rounds else ""
    busy = ", for they write too fast" if predicted.busy else ""
    stop = f"{before}{last.bytes / 1e6:.1f} MB in a stop of {predicted.stop_ms:.0f} ms{busy}"
    rates = f"the line carries {predicted.line_rate / 1e6:.0f} MB/s, they write {predicted.write_rate / 1e6:.1f}"
    return f"about: {stop}; {predicted.total_ms:.0f} ms in all ({rates})"
