"""Moves every cell of the table state x family x queues, and writes the table into docs/reference/states.md (root)."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.cells import CELLS, FAMILIES, QUEUES, Case, net_for_cells, run

PAGE = Path(__file__).resolve().parent.parent / "docs/reference/states.md"
BEGIN, END = "<!-- table: written by python -m tests.states -->\n", "<!-- end of table -->\n"
_ALL = ("", "r", "s", "rs")


def rows() -> list[tuple[Case, str]]:
    """(case, queues), in the table's order."""
    return [(case, queues) for case in Case for queues in QUEUES.get(case, _ALL)]


def head(case: Case, queues: str) -> str:
    return f"| {case.value} | {' '.join(queues) or 'empty'} |"


def main() -> int:
    found: dict[tuple[Case, str, str], str] = {}
    with net_for_cells() as hosts:
        for cell in CELLS:
            try:
                found[cell] = run(hosts, *cell)
            except AssertionError as error:
                found[cell] = f"failed: {str(error).splitlines()[0][:60]}"
    lines = ["| state | queues | IPv4 | IPv6 | v4-mapped |\n", "|---|---|---|---|---|\n"]
    for case, queues in rows():
        lines.append(f"{head(case, queues)} {' | '.join(found[case, f, queues] for f in FAMILIES)} |\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + "".join(lines) + "\n" + END + rest.split(END)[1])
    print("".join(lines))
    return 0 if set(found.values()) == {"moved"} else 1


if __name__ == "__main__":
    sys.exit(main())
