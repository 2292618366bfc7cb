"""The suite of states whole: every case alone in its tree, three cycles at random moments, every byte compared.

python -m tests.campaign.states [--seed N] [CASE...]

Goes on where it was interrupted; begins anew when the code or the seed is another.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from tests.campaign.run import STATE, code
from tests.hosts import three_hosts
from tests.system.state.case import load_all
from tests.system.state.suite import Bench, bench

__all__ = ["go_on", "main", "only_known", "run"]

#: so many are done in one host
LEG = 20

Work = Callable[[Bench, str], Any]


def go_on(file: Path, names: Sequence[str], work: Work, *, whole: bool) -> dict[str, Any]:
    """Do what is left of ``names``; {name: what ``work`` gave}, kept in the file after each."""
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if state.get("code") != code():
        state = {"code": code(), "done": {}}
    file.parent.mkdir(parents=True, exist_ok=True)
    done = state["done"]
    left = [name for name in names if name not in done]
    while left:
        leg, left = left[:LEG], left[LEG:]
        with three_hosts() as hosts, bench(hosts.source, whole=whole) as place:
            for name in leg:
                done[name] = work(place, name)
                fresh = file.with_suffix(".new")
                fresh.write_text(json.dumps(state, indent=1))
                fresh.replace(file)
    return {name: done[name] for name in names}


def run(names: Sequence[str] = (), *, seed: int = 1) -> dict[str, list[str]]:
    """Problems of each case."""
    cases = load_all()

    def alone(place: Bench, name: str) -> list[str]:
        problems = place.run([cases[name]], seed=f"{seed}/{name}")[name]
        print(f"{name}: {'; '.join(problems) or 'ok'}", flush=True)
        return problems

    return go_on(STATE / f"states-{seed}.json", names or sorted(cases), alone, whole=True)


def only_known(parser: argparse.ArgumentParser, names: Sequence[str], known: Collection[str]) -> None:
    """Usage error for names that are not there."""
    unknown = sorted({*names} - {*known})
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}; there are: {' '.join(sorted(known))}")


def main() -> int:
    """0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.states")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    only_known(parser, given.names, load_all())
    found = run(given.names, seed=given.seed)
    bad = sorted(name for name, problems in found.items() if problems)
    print(f"{len(found)} cases, {len(bad)} with problems: {' '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
