"""What each real program's moves and restores took in a campaign, and the share of each step: tables in Markdown.

python -m tests.campaign.figures [--seed N]

From the state files that are there: python -m tests.campaign NAME..., tests.campaign.sessions, tests.campaign.restores.
Of each step the median, in milliseconds, and its share.  A move: the phases of `tcpmig migrate --json` while the
processes stand still; the target restores from the beginning of ``copy`` to the end of ``rebuild``; they run after
``takeover``.  A restore: those of `checkpoint --json` while they stand still, and of `restore --json` until they run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tests.campaign.run import STATE

__all__ = ["CHECKPOINT", "RESTORE", "STEPS", "main", "restore_row", "restores", "row", "table"]

#: phases between the first thread stopped and the last one released, in their order
STEPS = ("stop", "copy", "freeze", "rebuild", "commit", "takeover")
#: the same of a checkpoint that ends them; and what a restore does until they run
CHECKPOINT = ("stop", "write", "hold")
RESTORE = ("check", "build", "connections", "start", "release")


def _cells(times: Sequence[float], phases: Sequence[dict[str, float]], steps: Sequence[str]) -> list[str]:
    """The median and range of what it took, each step, and what is in none of them."""
    whole = statistics.median(times)
    cells = [f"{whole:.0f} ({min(times):.0f}-{max(times):.0f})"]
    columns = [[one.get(step, 0.0) for one in phases] for step in steps]
    columns.append([took - sum(one) for took, one in zip(times, zip(*columns, strict=True), strict=True)])
    for values in columns:
        middle = statistics.median(values)
        cells.append(f"{middle:.1f} ({100 * middle / whole:.0f} %)")
    return cells


def row(state: dict[str, Any]) -> list[str]:
    """The cells of one campaign: name, moves, problems, median stop and its range, each step, the rest of the stop."""
    moves = [move for leg in state["legs"] for move in leg["moves"] if move.get("stop_ms") is not None]
    problems = sum(len(leg["problems"]) for leg in state["legs"])
    cells = [state["name"], str(len(moves)), str(problems)]
    if not moves:
        return [*cells, *["-"] * (len(STEPS) + 2)]
    return cells + _cells([move["stop_ms"] for move in moves], [move["phases"] for move in moves], STEPS)


def restore_row(state: dict[str, Any]) -> list[str]:
    """Name, restores, problems, megabytes of the image; the stop and its steps; the restore and its steps."""
    done = [one for leg in state["legs"] for one in leg["restores"]]
    problems = sum(len(leg["problems"]) for leg in state["legs"])
    cells = [state["name"], str(len(done)), str(problems)]
    if not done:
        return [*cells, *["-"] * (len(CHECKPOINT) + len(RESTORE) + 3)]
    made, back = [one["checkpoint"] for one in done], [one["restore"] for one in done]
    cells.append(f"{statistics.median(one['bytes'] for one in made) / 1e6:.0f}")
    # both are made of their steps alone (that of a checkpoint's stop begins a moment before the first thread stands)
    cells += _cells([one["stop_ms"] for one in made], [one["phases"] for one in made], CHECKPOINT)[:-1]
    return cells + _cells([one["run_ms"] for one in back], [one["phases"] for one in back], RESTORE)[:-1]


def _markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def table(states: Iterable[dict[str, Any]]) -> str:
    """All moves."""
    head = ["program", "moves", "problems", "stop ms, median (range)", *STEPS, "rest"]
    return _markdown(head, map(row, states))


def restores(states: Iterable[dict[str, Any]]) -> str:
    """All restores."""
    head = ["program", "restores", "problems", "image MB", "stop ms, median (range)", *CHECKPOINT]
    return _markdown([*head, "restore ms, median (range)", *RESTORE], map(restore_row, states))


def main() -> int:
    """Print them."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.figures")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    files = sorted(STATE.glob(f"*-{given.seed}.json"))
    states = [state for file in files if "legs" in (state := json.loads(file.read_text()))]
    through_files = [state for state in states if any("restores" in leg for leg in state["legs"])]
    print(table(state for state in states if state not in through_files))
    if through_files:
        print(f"\n{restores(through_files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
