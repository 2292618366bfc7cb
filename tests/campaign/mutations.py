"""Each module that captures and rebuilds something is made to do nothing in turn: the cases that name it must fail.

python -m tests.campaign.mutations [--seed N] [--case NAME]... [MODULE...]

Prints a table: module, cases that name it, those that failed without it.  A module whose loss nobody notices is a
module that is not tested, and a case that passes without its module tests something else.  Resumable, as the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence

from tests.campaign.run import STATE
from tests.campaign.states import go_on, only_known
from tests.system.state.case import load_all
from tests.system.state.suite import Bench
from tests.system.state.without import beyond_this_machine, modules

__all__ = ["main", "run", "table"]


def run(wanted: Sequence[str] = (), *, only: Collection[str] = (), seed: int = 1) -> dict[str, dict[str, str]]:
    """module -> {case that names it: how its loss showed; empty if it did not}.

    wanted, only  modules and cases; none: all
    """
    cases = load_all()
    beyond = beyond_this_machine()
    if beyond:
        print(f"nothing here can show the loss of {', '.join(sorted(beyond))}", flush=True)
    names = [name for name in modules() if (not wanted or name in wanted) and name not in beyond]
    pairs = [
        f"{module} {case.name}"
        for module in names
        for case in cases.values()
        if module in case.exercises and (not only or case.name in only)
    ]

    def lost(place: Bench, pair: str) -> str:
        module, name = pair.split(" ")
        # once is enough, and the view of /proc may not be what notices: the program itself must
        problems = place.run([cases[name]], seed=f"{seed}/{pair}", cycles=1, without=[module], compare=False)[name]
        found = problems[0].strip().splitlines()[0] if problems else ""
        print(f"{pair}: {found or 'NOT NOTICED'}", flush=True)
        return found

    done = go_on(STATE / f"mutations-{seed}.json", pairs, lost, whole=False)
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for pair, how in done.items():
        module, name = pair.split(" ")
        found[module][name] = how
    return found


def table(found: dict[str, dict[str, str]]) -> str:
    """A line per module, the unnoticed first."""
    lines = []
    for module, cases in found.items():
        noticed = sum(1 for how in cases.values() if how)
        silent = " ".join(name for name, how in cases.items() if not how)
        mark = "NOT NOTICED" if not noticed else f"passes without it: {silent}" if silent else ""
        lines.append((bool(noticed), f"{module:42} {noticed:3} of {len(cases):3}  {mark}".rstrip()))
    return "\n".join(line for _, line in sorted(lines))


def main() -> int:
    """0 if every loss is noticed by every case that names the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.mutations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", action="append", default=[], help="only this case, and others that are named so")
    parser.add_argument("names", nargs="*", help="modules, as tests/system/state/without.py calls them")
    given = parser.parse_args()
    only_known(parser, given.names, modules())
    only_known(parser, given.case, load_all())
    found = run(given.names, only=given.case, seed=given.seed)
    print(table(found))
    return 0 if all(cases and all(cases.values()) for cases in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
