"""``tcpmig explain``: what an error code means."""

from __future__ import annotations

import inspect
import re
import textwrap

import click

from cli.command import command
from cli.errors import UnknownCode, every_error
from cli.session import Result, Session, Table
from tcpstate.errors import TcpmigError

__all__ = ["explain"]

_WIDTH = 100


@command("explain", logged=False)
@click.argument("code", required=False)
def explain(session: Session, code: str | None) -> Result:
    """What the error CODE means, why it happens, what to do. Without CODE: all codes.

    CODE is the first word of an error message, as TM-0312; 312 will do.
    """
    errors = every_error()
    if code is None:
        rows = [[each, _kind(error), error.__name__] for each, error in errors.items()]
        return Result(
            data={"codes": {each: error.__name__ for each, error in errors.items()}},
            body=[Table(columns=["code", "exit status", "name"], rows=rows)],
        )
    found = errors.get(_full(code))
    if found is None:
        raise UnknownCode("there is no such error code", object=code)
    why = " ".join(inspect.cleandoc(found.__doc__ or "").split())
    data = {
        "code": found.code,
        "name": found.__name__,
        "error_outcome": found.outcome.name.lower(),
        "status": int(found.outcome),
        "why": why,
        "fix": found.fix,
    }
    body = [
        f"{found.code} {found.__name__}, {_kind(found)}",
        "",
        *textwrap.wrap(why, _WIDTH),
        "",
        *textwrap.wrap(f"What to do: {found.fix}", _WIDTH),
    ]
    return Result(data=data, body=body)


def _kind(error: type[TcpmigError]) -> str:
    return f"{int(error.outcome)} {error.outcome.name.lower()}"


def _full(code: str) -> str:
    digits = re.fullmatch(r"(?:TM-?)?(\d{1,4})", code, re.IGNORECASE | re.ASCII)
    return f"TM-{int(digits[1]):04}" if digits else code
