"""``tcpmig drain``: all that serves here moves to another host, and back again."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import click

from cli.command import command
from cli.commands.migrate import carry_out, expressions, migrate
from cli.errors import UsageMistake
from cli.session import Result, Session, Table
from migrate.errors import NothingDrained

__all__ = ["drain"]

#: options of `migrate` that choose what moves
_CHOICE = frozenset({"pids", "host", "all_matching", "verbose", "json"})


@command("drain")
@click.argument("host", required=False, default="")
@click.option("--also", metavar="PATTERN", multiple=True, help="Trees with such a command line, too. May be repeated.")
@click.option("--keep", metavar="PATTERN", multiple=True, help="They stay, whatever they use. May be repeated.")
@click.option("--back", metavar="ID", default="", help="Move what came here by the drain ID and still runs.")
@click.option("--list", "listed", is_flag=True, help="List the drains that brought here what still runs here.")
def drain(
    session: Session,
    host: str,
    also: tuple[str, ...],
    keep: tuple[str, ...],
    back: str,
    listed: bool,
    address: str,
    **given: Any,
) -> Result:
    """Move to HOST every process tree that has a connection, or listens, on an address of this host, each for itself.

    Those trees stay that only use the address that HOST is reached from, or none; with --dry-run it is told what
    would move. The way back: `tcpmig drain ORIGIN --back ID`, on HOST.
    """
    if listed:
        if host or back:
            raise UsageMistake("--list takes no HOST, and goes with nothing else")
        return _list()
    if not host:
        raise UsageMistake("where to? Name a HOST, or --list")
    from migrate import drains
    from migrate.matching import Root, serving, together, tree

    stay: list[Root] = []
    if back:
        if also or keep:
            raise UsageMistake("--back says what moves: --also and --keep do not go with it")
        found = [tree(pid) for pid in drains.back(back).roots]
    else:
        from migrate.rtnetlink import Netlink
        from migrate.takeover import control_addresses, movable

        with Netlink() as netlink:
            addresses = movable(netlink, control_addresses(netlink, os.getpid(), host))
        found, stay = serving(addresses, expressions(also), expressions(keep))
        if not found:
            raise NothingDrained("nothing that could move serves here", object=", ".join(addresses))
    for root in stay:
        session.say(f"pid {root.pid} stays, it only listens on every address (--also moves it): {root.command}")
    identity = drains.new_id()
    chosen = together(found, address=address)
    label = drains.label(identity)
    result = carry_out(session, chosen, host, several=True, address=address, label=label, **given)
    body, data = (
        list(result.body),
        result.data | {"stay": [{"pid": root.pid, "command": root.command} for root in stay]},
    )
    commands = {root.pid: root.command for root in found}
    if given["dry_run"]:
        body[:0] = [f"pid {pid} would move: {commands[pid]}" for pids in chosen for pid in pids]
        data["would_move"] = [{"pids": pids, "commands": [commands[pid] for pid in pids]} for pids in chosen]
    else:
        data["drain"] = identity
        if data["moved"]:
            body.append(f"the way back, on {host}: tcpmig drain {os.uname().nodename} --back {identity}")
    return dataclasses.replace(result, data=data, body=body)


# all that `migrate` knows of how to move something
drain.params += [one for one in migrate.params if one.name not in _CHOICE]


def _list() -> Result:
    from migrate.drains import here

    found = here()
    rows = [
        [one.drain, one.host, time.strftime("%F %T", time.localtime(one.wall)), " ".join(map(str, one.roots))]
        for one in found
    ]
    table = Table(columns=["drain", "from", "since", "pids"], rows=rows)
    return Result(data={"drains": found}, body=[table] if rows else ["nothing came here by a drain"])
