"""A thousand checkpoints of one program at random moments of all that it does at once: threads that begin and end,
memory that comes and goes, signals of which none may be lost, children, timers (tests/system/state/programs/stress.c).

python -m tests.campaign.stress [--seed N] [--checkpoints N]

Each is written to an image, the program ends and goes on from it.  It is cut into legs, each with a program of its own
that lives through all of them and checks itself as it runs; the last word is its own.  Resumable, as the others.
"""

from __future__ import annotations

import argparse
import sys

from tests.campaign.run import STATE
from tests.campaign.states import go_on
from tests.system.state.case import load
from tests.system.state.suite import Bench

__all__ = ["CHECKPOINTS", "main", "run"]

CHECKPOINTS = 1000
#: checkpoints that one program lives through
LEG = 20
_CASE = "stress.everything_at_once"


def run(checkpoints: int = CHECKPOINTS, *, seed: int = 1) -> dict[str, list[str]]:
    """Problems of each leg, by name: its number and how many checkpoints it has."""
    case = load(_CASE)
    counts = [min(LEG, checkpoints - at) for at in range(0, checkpoints, LEG)]

    def leg(place: Bench, name: str) -> list[str]:
        # what the program shows differs from moment to moment: two looks in one stop are the same, and so they compare
        problems = place.run([case], seed=f"{seed}/{name}", cycles=int(name.split()[-1]))[case.name]
        print(f"{name}: {'; '.join(problems) or 'ok'}", flush=True)
        return problems

    names = [f"leg {number} of {count}" for number, count in enumerate(counts)]
    return go_on(STATE / f"stress-{seed}.json", names, leg, whole=False)


def main() -> int:
    """0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.stress")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoints", type=int, default=CHECKPOINTS)
    given = parser.parse_args()
    found = run(given.checkpoints, seed=given.seed)
    bad = sorted(name for name, problems in found.items() if problems)
    print(f"{sum(int(name.split()[-1]) for name in found)} checkpoints, legs with problems: {', '.join(bad) or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
