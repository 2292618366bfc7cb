"""Write docs/reference/errors.md out of the error classes: ``python scripts/errors_reference.py [FILE]``."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.errors import every_error
from tcpstate.errors import Outcome, TcpmigError

RANGES = {
    "01": "General and command line",
    "02": "Connections",
    "03": "Refused before a process is touched",
    "04": "Image",
    "05": "Process engine",
    "06": "Migration and protocol",
    "07": "Addresses",
    "08": "Machines, and what other facilities are used for",
}

STATUSES = {
    Outcome.DONE: "done",
    Outcome.FAILED: "failed, nothing lost: the process runs where it ran",
    Outcome.USAGE: "usage",
    Outcome.REFUSED: "refused before anything was stopped or built",
    Outcome.PARTIAL: "done, but some connections were lost (they are listed)",
    Outcome.IN_DOUBT: "outcome unknown: both sides hold",
}


def page() -> str:
    """The whole page."""
    lines = [
        "# Errors",
        "",
        "<!-- Written by `make docs` from the error classes. Change the class, not this page. -->",
        "",
        "An error is one line on stderr: `TM-nnnn: what happened (object). What to do.` With `--json` it is also one",
        "object on stdout. `tcpmig explain CODE` prints what stands here.",
        "",
        "| exit status | meaning |",
        "|---|---|",
        *(f"| {int(outcome)} | {meaning} |" for outcome, meaning in STATUSES.items()),
    ]
    section = ""
    for code, error in every_error().items():
        if (group := code[3:5]) != section:
            section = group
            lines += ["", f"## TM-{group}xx: {RANGES[group]}"]
        lines += ["", *_entry(code, error)]
    return "\n".join(lines) + "\n"


def _entry(code: str, error: type[TcpmigError]) -> list[str]:
    return [
        f"### {code} {error.__name__}",
        "",
        inspect.cleandoc(error.__doc__ or ""),
        "",
        f"*Exit status {int(error.outcome)}. What to do:* {error.fix}",
    ]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
