"""``tcpmig set``: items of one connection are written."""

from __future__ import annotations

import click

from cli.command import command
from cli.errors import UsageMistake
from cli.session import Result, Session
from tcpstate.connid import ConnId
from tcpstate.errors import UnknownStateKeyword
from tcpstate.keywords import KEYWORDS
from tcpstate.stateitem import Datatype, StateItem, Value
from tcpstate.transport import transport_state_set

__all__ = ["set"]


@command("set")
@click.argument("conn")
@click.argument("assignments", metavar="KEYWORD=VALUE...", nargs=-1, required=True)
def set(session: Session, conn: str, assignments: tuple[str, ...]) -> Result:  # noqa: A001 - the command's name
    """Write items of the state of the connection CONN: all of them, or none.

    VALUE is a number (0x for hexadecimal), numbers with commas, text, or bytes in hexadecimal, as
    docs/reference/keywords.md says for KEYWORD. Hard state is written in repair mode: the process is stopped for that
    moment, and the connection frozen, if it is not.
    """
    name = str(ConnId.parse(conn))
    items = [_item(text) for text in assignments]
    transport_state_set(name, items)
    return Result(
        data={"connection": name, "set": {item.keyword: item.value for item in items}},
        body=[f"{len(items)} item{'s' if len(items) > 1 else ''} of {name} set"],
    )


def _item(text: str) -> StateItem:
    keyword, equals, value = text.partition("=")
    if not equals:
        raise UsageMistake(f"{text!r} is not KEYWORD=VALUE", object=text)
    known = KEYWORDS.get(keyword)
    if known is None:
        raise UnknownStateKeyword("there is no such keyword", object=keyword)
    try:
        return StateItem(keyword, known.datatype, _value(known.datatype, value))
    except ValueError:
        raise UsageMistake(f"{value!r} is not a {known.datatype.value}", object=keyword) from None


def _value(datatype: Datatype, text: str) -> Value:
    """ValueError."""
    if datatype is Datatype.TEXT:
        return text
    if datatype is Datatype.BYTES:
        return bytes.fromhex(text)
    if datatype is Datatype.NUMBERS:
        return tuple(int(part, 0) for part in text.split(","))
    return int(text, 0)
