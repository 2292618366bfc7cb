"""The line of a migration broken at every message in every way, and tcpmig killed before single steps of its work.

python -m tests.campaign.breaks [--stalls] [--calls N] [--lines | --place PLACE...] [--program NAME] [--seconds N]
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.campaign.run import STATE, code
from tests.hosts import CommandFailed, ThreeHosts, three_hosts
from tests.workloads import breaks, deaths, scenes
from tests.workloads import steps as small_steps
from tests.workloads.breaks import HANDOVER, MESSAGES, Break
from tests.workloads.move import Stage
from tests.workloads.servers import PROGRAMS

__all__ = ["breaks_of_line", "deaths_at_steps", "main", "run"]

#: cases with one server and its clients
LEG = 40
#: messages at which a stalled line is tried: each costs the time limit of the line
STALLS = ("source:image:1", "target:prepared:1", "source:commit:1", "target:started:1", "target:running:1")
#: the same of `restore --from`, whose cases are called so
FROM, FROM_STALLS = "from-", ("source:ask_hold:1", "source:give_up:1", "target:given_up:1")


def breaks_of_line(*, stalls: bool) -> Iterator[str]:
    """Names of these cases, in their order."""
    for at in MESSAGES:
        for do in ("cut", "kill"):
            for after in (False, True):
                yield f"{do} {'after' if after else 'before'} {at}"
    for at in HANDOVER:
        for do in ("cut", "kill"):
            for after in (False, True):
                yield f"{FROM}{do} {'after' if after else 'before'} {at}"
    if stalls:
        yield from (f"stall before {at}" for at in STALLS)
        yield from (f"{FROM}stall before {at}" for at in FROM_STALLS)


def scene(program: str) -> Callable[[ThreeHosts, Path], AbstractContextManager[Stage]]:
    """The server that is moved: the plain one (empty), or one of servers.PROGRAMS."""
    return functools.partial(scenes.program, name=program) if program else scenes.echo


def deaths_at_steps(places: Sequence[str], *, most: int, seed: int, program: str = "") -> Iterator[str]:
    """The same: every step of each place, or that many at random. How many there are is counted in a run to the end."""
    chance = random.Random(seed)
    for place in places:
        with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as name:
            with scene(program)(hosts, Path(name)) as stage:
                status, count = small_steps.run(stage, Path(name), place, 0)
                if not count:
                    raise CommandFailed(f"{place}: ended with {status} and counted nothing")
        print(f"{place}: {count} steps")
        numbers = range(1, count + 1) if most >= count else sorted(chance.sample(range(1, count + 1), most))
        yield from (f"call {place} {number}" for number in numbers)


def run(names: list[str], file: Path, *, until: float = float("inf"), program: str = "") -> dict[str, Any]:
    """Do what is left of the cases; {name: what came of it}."""
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if state.get("code") != code():
        state = {"code": code(), "cases": {}}
    file.parent.mkdir(parents=True, exist_ok=True)
    left = [name for name in names if name not in state["cases"]]
    while left and time.monotonic() < until:
        with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as name:
            for case, found in _leg(hosts, Path(name), left[:LEG], until, program):
                state["cases"][case] = found
                print(f"{case}: {found}", flush=True)
                fresh = file.with_suffix(".new")
                fresh.write_text(json.dumps(state))
                fresh.replace(file)
        left = [name for name in names if name not in state["cases"]]
        if any(found["problems"] for found in state["cases"].values()):
            break
    return state


def _leg(
    hosts: ThreeHosts, folder: Path, names: list[str], until: float, program: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    with scene(program)(hosts, folder) as stage:
        for number, case in enumerate(names):
            status, reached = _one(stage, folder, case)
            alone, problems = deaths.goes_on_alone(stage)
            again = functools.partial(breaks.restore_again, stage, folder) if case.startswith(FROM) else None
            problems += deaths.revive(stage, folder, again) + deaths.judge(stage)
            last = number == len(names) - 1 or time.monotonic() > until
            if last:
                problems += stage.finish()
            found = {"status": status, "reached": reached, "alone": alone, "on": stage.here.name, "problems": problems}
            yield case, found
            if problems or last:
                return


def _one(stage: Stage, folder: Path, case: str) -> tuple[int, bool]:
    """Exit status of `migrate`, and whether it came to the place."""
    do, when, where = case.split()
    if do == "call":
        status, steps = small_steps.run(stage, folder, when, int(where))
        return status, steps == 0
    if do.startswith(FROM):
        breaks.hold(stage, folder)
        status, _, reached = breaks.restore(stage, folder, Break(where, do.removeprefix(FROM), when == "after"))
        return status, reached
    status, _, reached = breaks.migrate(stage, folder, Break(where, do, when == "after"))
    return status, reached


def main() -> int:
    """0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.breaks")
    parser.add_argument("--stalls", action="store_true", help="a minute each")
    parser.add_argument("--calls", type=int, default=1000, help="steps of each place, at random; default: all")
    parser.add_argument("--lines", action="store_true", help="broken lines only")
    parser.add_argument("--place", action="append", choices=small_steps.PLACES, help="only these, and no broken line")
    parser.add_argument("--program", default="", choices=["", *PROGRAMS], help="the server; default: a plain one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("names", nargs="*", help="cases, as they are called in the output; default: all")
    given = parser.parse_args()
    names = given.names
    if not names:
        names = [] if given.place else list(breaks_of_line(stalls=given.stalls))
        if not given.lines:
            places = given.place or list(small_steps.PLACES)
            names += deaths_at_steps(places, most=given.calls, seed=given.seed, program=given.program)
    what = [*(given.place or ["lines" if given.lines else "all"]), *filter(None, [given.program])]
    file = STATE / f"breaks-{'-'.join(what)}-{given.seed}.json"
    state = run(names, file, until=time.monotonic() + given.seconds, program=given.program)
    done = [found for name, found in state["cases"].items() if name in names]
    bad = sum(1 for found in done if found["problems"])
    reached, alone = (sum(found[what] for found in done) for what in ("reached", "alone"))
    print(f"{len(done)} of {len(names)} cases, {reached} reached, went on alone {alone}, {bad} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
