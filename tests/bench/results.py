"""The rows that the measurements of one run have: kept as they come, so that a run that was ended goes on.

``TCPMIG_BENCH``: the file that rows are appended to, one JSON object a line; without it nothing is kept, and everything
is measured.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["VARIABLE", "Row", "measured", "note", "read", "spread"]

VARIABLE = "TCPMIG_BENCH"

#: what was measured, and what was found
Row = dict[str, Any]


def measured(table: str, what: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]) -> Row:
    """The row of ``table`` that is told apart by ``what``: the one that is there, or what ``work`` finds."""
    path = os.environ.get(VARIABLE)
    known = read(Path(path)).get(table, ()) if path else ()
    for row in known:
        if all(row.get(key) == value for key, value in what.items()):
            return row
    row = {**what, **work()}
    note(table, **row)
    return row


def note(table: str, **row: Any) -> None:
    """Keep one row of what cannot be measured by itself."""
    path = os.environ.get(VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"table": table, **row}) + "\n")


def read(path: Path) -> dict[str, list[Row]]:
    """The rows by table, in their order. A line that was cut short is none."""
    found: dict[str, list[Row]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.setdefault(row.pop("table"), []).append(row)
    return found


def spread(figures: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}
