"""``tcpmig get``: the items of one connection."""

from __future__ import annotations

import click

from cli.command import command
from cli.session import Result, Session, Table
from tcpstate.keywords import KEYWORDS
from tcpstate.stateitem import StateFlag, StateItem
from tcpstate.transport import ALL, ALL_HARD, ALL_SOFT, transport_progress, transport_state_get

__all__ = ["get"]

_WILD = {"all": ALL, "hard": ALL_HARD, "soft": ALL_SOFT}
_WIDTH = 60


@command("get")
@click.argument("conn")
@click.argument("keywords", metavar="[KEYWORD]...", nargs=-1)
def get(session: Session, conn: str, keywords: tuple[str, ...]) -> Result:
    """Show the state of the connection CONN, item by item, without disturbing it.

    KEYWORD is one of docs/reference/keywords.md, or `hard`, `soft` or `all`, which is the default. Items that have no
    value are left out, unless they are asked for by name.
    """
    asked = [_WILD.get(keyword, keyword) for keyword in keywords or ("all",)]
    items = transport_state_get(conn, asked)
    shown = [item for item in items if item.value is not None or item.keyword in keywords]
    rows = [[item.keyword, _text(item), KEYWORDS[item.keyword].unit, _flags(item)] for item in shown]
    return Result(
        data={
            "connection": conn,
            "progress": transport_progress(conn).value,
            "items": {item.keyword: _plain(item) for item in items},
        },
        body=[Table(columns=["keyword", "value", "unit", "flags"], rows=rows)],
    )


def _text(item: StateItem) -> str:
    if item.value is None:
        return "-"
    if isinstance(item.value, bytes):
        shown = item.value[:_WIDTH].hex()
        return f"{len(item.value)} bytes {shown}" + ("..." if len(item.value) > _WIDTH else "")
    return ",".join(map(str, item.value)) if isinstance(item.value, tuple) else str(item.value)


def _flags(item: StateItem) -> str:
    hidden = StateFlag.INITIALIZED
    return " ".join((flag.name or "").lower() for flag in StateFlag if flag & item.flags and flag is not hidden)


def _plain(item: StateItem) -> dict[str, object]:
    return {
        "value": item.value,
        "datatype": item.datatype.value,
        "unit": KEYWORDS[item.keyword].unit,
        "flags": [(flag.name or "").lower() for flag in StateFlag if flag & item.flags],
    }
