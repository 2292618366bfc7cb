"""``tcpmig holds``: what of ours stands on this host."""

from __future__ import annotations

import click

from cli.command import command
from cli.fields import fields
from cli.session import Result, Session, Table
from migrate.holdlist import Forwarding, Hold, survey
from migrate.lazystore import Lazy

__all__ = ["holds"]


@command("holds")
def holds(session: Session) -> Result:
    """What checkpoints hold here, and everything else of ours that stands: drop rules, routing rules, frozen
    connections, forwarded ones, processes whose memory still comes (--lazy).
    """
    found = survey()
    body: list[str | Table] = []
    if found.holds:
        rows = [_row(hold) for hold in found.holds]
        styles = {"dead": "red", "partial": "yellow", "unfinished": "yellow"}
        columns = ["HOLD", "STATE", "AGE", "LEFT", "CONNECTIONS", "LISTENERS", "PIDS", "IMAGE"]
        body.append(Table(columns=columns, rows=rows, styles=styles))
    if found.rules:
        body.append(Table(columns=["RULE", "NAME", "OF"], rows=[[r.kind, r.name, r.owner or "-"] for r in found.rules]))
    if found.forwards:
        columns = ["FORWARDING", "ROLE", "STATE", "AGE", "OTHER END", "ADDRESSES", "CONNECTIONS", "PORTS"]
        styles = {"broken": "red", "unfinished": "yellow", "off": "yellow"}
        body.append(Table(columns=columns, rows=[_forward_row(one) for one in found.forwards], styles=styles))
    if found.frozen:
        rows = [[f.connection, str(f.pid), _span(f.age), "" if f.here else "elsewhere"] for f in found.frozen]
        body.append(Table(columns=["FROZEN", "PID", "AGE", ""], rows=rows))
    if found.lazy:
        columns = ["LAZY", "STATE", "AGE", "MISSING", "OF", "PIDS", "FROM", ""]
        styles = {"dead": "red", "waiting": "yellow"}
        body.append(Table(columns=columns, rows=[_lazy_row(one) for one in found.lazy], styles=styles))
    return Result(data=fields(found), body=body or ["nothing is held here"])


def _forward_row(one: Forwarding) -> list[str]:
    other = f"{one.host} {one.far}".strip()
    home = one.role == "home"
    left = [str(len(one.connections)) if home else "-", " ".join(one.ports) or "-"]
    return [one.forward, one.role, one.state, _span(one.age), other, " ".join(one.addresses), *left]


def _row(hold: Hold) -> list[str]:
    left = "-" if hold.left is None else _span(hold.left)
    pids = " ".join(map(str, hold.roots))
    return [
        hold.hold,
        hold.state.value,
        _span(hold.age),
        left,
        str(hold.connections),
        str(len(hold.listeners)),
        pids,
        click.format_filename(hold.image),
    ]


def _lazy_row(one: Lazy) -> list[str]:
    return [
        one.lazy,
        one.state.value,
        _span(one.age),
        f"{one.missing >> 10} KiB",
        f"{one.total >> 10} KiB",
        " ".join(map(str, one.processes)),
        click.format_filename(one.source),
        one.reason,
    ]


def _span(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
