"""The stop of each program that was moved in a campaign, and the share of each step in it: a table in Markdown.

python -m tests.campaign.figures [--seed N]

From the state files that are there (python -m tests.campaign NAME..., tests.campaign.sessions).  Of each step the
median, in milliseconds, and its share of the stop; they are the phases of `tcpmig migrate --json` while the processes
stand still.  The target restores from the beginning of ``copy`` to the end of ``rebuild``; they run after ``takeover``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from typing import Any

from tests.campaign.run import STATE

__all__ = ["STEPS", "main", "row", "table"]

#: phases between the first thread stopped and the last one released, in their order
STEPS = ("stop", "copy", "freeze", "rebuild", "commit", "takeover")


def row(state: dict[str, Any]) -> list[str]:
    """The cells of one campaign: name, moves, problems, median stop and its range, each step, the rest of the stop."""
    moves = [move for leg in state["legs"] for move in leg["moves"] if move.get("stop_ms") is not None]
    problems = sum(len(leg["problems"]) for leg in state["legs"])
    cells = [state["name"], str(len(moves)), str(problems)]
    if not moves:
        return [*cells, *["-"] * (len(STEPS) + 2)]
    stops = [move["stop_ms"] for move in moves]
    whole = statistics.median(stops)
    cells.append(f"{whole:.0f} ({min(stops):.0f}-{max(stops):.0f})")
    rest = [move["stop_ms"] - sum(move["phases"].get(step, 0.0) for step in STEPS) for move in moves]
    columns = [[move["phases"].get(step, 0.0) for move in moves] for step in STEPS] + [rest]
    for values in columns:
        middle = statistics.median(values)
        cells.append(f"{middle:.1f} ({100 * middle / whole:.0f} %)")
    return cells


def table(states: Iterable[dict[str, Any]]) -> str:
    """All of them."""
    head = ["program", "moves", "problems", "stop ms, median (range)", *STEPS, "rest"]
    rows = [head, ["---"] * len(head), *(row(state) for state in states)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> int:
    """Print it."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.figures")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    files = sorted(STATE.glob(f"*-{given.seed}.json"))
    states = [state for file in files if "legs" in (state := json.loads(file.read_text()))]
    print(table(states))
    return 0


if __name__ == "__main__":
    sys.exit(main())
