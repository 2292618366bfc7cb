"""``tcpmig get``: the items of one connection."""

from __future__ import annotations

import click

from cli.command import command
from cli.errors import UnknownKeyword
from cli.outline import outline
from cli.session import Result, Session
from tcpstate.codec import to_plain
from tcpstate.connid import ConnId
from tcpstate.observe import observe

__all__ = ["get"]


@command("get")
@click.argument("conn")
@click.argument("keywords", metavar="[KEYWORD]...", nargs=-1)
def get(session: Session, conn: str, keywords: tuple[str, ...]) -> Result:
    """Show what can be read of the connection CONN while it flows; only the items KEYWORD, if any are given."""
    items = observe(ConnId.parse(conn), keywords)
    for keyword in keywords:
        if keyword not in items:
            raise UnknownKeyword("the connection has no such item", object=keyword)
    shown = to_plain({keyword: items[keyword] for keyword in keywords} if keywords else items)
    return Result(data={"items": shown}, body=list(outline(shown)))
