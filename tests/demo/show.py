"""The demo's words: tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests.workloads.move import MoveReport

__all__ = ["COLUMNS", "row", "say", "show"]

# heading, what it means
COLUMNS = (
    ("move", ""),
    ("stop ms", "from the first thread stopped to the last thread released"),
    ("gap ms", "the largest time between two successive replies that any client saw"),
    ("usual ms", "the same in the calm before the move: what this machine does to its clients by itself"),
    ("MB", "bytes sent from host to host"),
    ("conns", "connections that moved"),
    ("RST", "resets on the client's wire"),
    ("wrong", "wrong, missing or cut-off replies"),
    ("timeouts", "retransmission timers that ran out at the clients"),
)


def row(report: MoveReport) -> list[str]:
    """The figures of one move, in the order of `COLUMNS`."""
    summary = report.summary
    connections = summary.get("connections", 0)
    return [
        report.way,
        _number(summary.get("stop_ms")),
        _number(report.largest_gap),
        _number(max(report.before_gaps.values(), default=0.0)),
        _number((summary.get("bytes_sent") or 0) / 1e6),
        str(len(connections) if isinstance(connections, list) else connections),
        str(len(report.packets.rsts)),
        str(report.wrong),
        str(report.timeouts),
    ]


def _number(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "?"


def say(text: str) -> None:
    """One line for the reader."""
    print(text, flush=True)


def show(title: str, reports: Sequence[MoveReport], problems: Sequence[str]) -> None:
    """The table of one part, and its problems."""
    verdict = "nobody noticed" if not problems else f"{len(problems)} problems"
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{title}: {verdict}", title_style="green" if not problems else "red", title_justify="left")
        for heading, _ in COLUMNS:
            table.add_column(heading, justify="left" if heading == "move" else "right")
        for report in reports:
            table.add_row(*row(report))
        Console().print(table)
    else:
        say(f"\n{title}: {verdict}")
        rows = [[heading for heading, _ in COLUMNS], *map(row, reports)]
        widths = [max(len(line[i]) for line in rows) for i in range(len(COLUMNS))]
        for line in rows:
            cells = [
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ]
            say("  " + "  ".join(cells))
    for problem in problems:
        say(f"  ! {problem}")
