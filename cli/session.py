"""One run of a command: how it speaks to its caller.

stdout has the result and nothing else; stderr has progress, warnings and errors. With ``--json`` the result is exactly
one JSON object on one line, also when the command failed (JSON lines where a command goes on, as ``conns --watch``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any

from tcpstate.errors import Outcome, TcpmigError
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    # `tcpmig --help` passes through here: what only a running command needs is imported there
    from pathlib import Path

__all__ = ["Result", "Session", "Table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows for a person: a box on a terminal, aligned columns elsewhere.

    styles  the colour of a cell by its text, on a terminal: ``{"refuse": "red"}``
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    styles: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a command found or did.

    data     the fields of the JSON object beside ``outcome``; any recordable value (:mod:`tcpstate.codec`)
    body     what a person reads in its place
    outcome  the exit status
    """

    data: dict[str, Any]
    body: Sequence[str | Table] = ()
    outcome: Outcome = Outcome.DONE


@dataclass(slots=True)
class Session:
    """How this run speaks.

    json      the result is one JSON object
    verbose   detail on stderr, and the traceback of a failure
    log_path  the log of this run, once it is open
    prefix    of its lines on stderr, where several runs share it
    """

    json: bool = False
    verbose: bool = False
    log_path: Path | None = None
    prefix: str = ""

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Session:
        """The session that a command line asks for, read before it is parsed: a usage error is told in JSON too."""
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        return cls(json="--json" in options)

    @property
    def terminal(self) -> bool:
        """Whether the result goes to a terminal."""
        return sys.stdout.isatty()

    def say(self, text: str) -> None:
        """One line of progress or warning on stderr."""
        print(self.prefix + _printable(text), file=sys.stderr, flush=True)

    def emit(self, result: Result) -> int:
        """Write a result and return the exit status that belongs to it."""
        if self.json:
            self._write(_one_line({"outcome": _name(result.outcome), **result.data}))
        else:
            for part in result.body:
                self._write(_printable(part) if isinstance(part, str) else _table(part))
        return int(result.outcome)

    def fail(self, error: BaseException) -> int:
        """Tell what went wrong, and return the exit status."""
        told = self.known(error)
        if self.json:
            self._write(_one_line({"outcome": _name(told.outcome), **told.as_dict()}))
        print(_printable(" ".join(str(told).split())), file=sys.stderr, flush=True)
        if self.verbose:
            self._detail(error)
        return int(told.outcome)

    def known(self, error: BaseException) -> TcpmigError:
        """The error as the user is told of it."""
        if isinstance(error, TcpmigError):
            return error
        proof = f"the log {self.log_path}" if self.log_path else "the output of -v"
        return TcpmigError(f"unexpected {type(error).__name__}: {error}".rstrip(". "), fix=f"Report it with {proof}.")

    def _detail(self, error: BaseException) -> None:
        import inspect
        import traceback

        if isinstance(error, TcpmigError):
            print("\n" + inspect.cleandoc(type(error).__doc__ or ""), file=sys.stderr)
        print("\n" + "".join(traceback.format_exception(error)).rstrip(), file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            # The reader has what it wanted (`| head`). Python would complain once more when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _name(outcome: Outcome) -> str:
    return outcome.name.lower()


def _one_line(data: dict[str, Any]) -> str:
    import json

    from tcpstate.codec import to_plain

    # ensure_ascii keeps a hostile name (a file called "\u2028..") on one line
    return json.dumps(to_plain(data), default=bytes.hex)


def _table(table: Table) -> str:
    if sys.stdout.isatty():
        return _rich_table(table)
    rows = [[_printable(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _rich_table(table: Table) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    # rich itself heeds NO_COLOR
    console = Console()
    drawn = RichTable(*table.columns, box=box.SIMPLE_HEAD)
    for row in table.rows:
        drawn.add_row(*(Text(_printable(cell), style=table.styles.get(cell, "")) for cell in row))
    with console.capture() as capture:
        console.print(drawn)
    return capture.get().rstrip("\n")


def _printable(text: str) -> str:
    # names of processes and files come from others: no control character of theirs reaches the terminal
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
