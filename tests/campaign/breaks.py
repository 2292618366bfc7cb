"""The line of a migration broken at every message in every way, and tcpmig killed before single calls of its batches.

python -m tests.campaign.breaks [--stalls] [--calls N] [--seconds N]    --stalls: a minute each
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.campaign.run import STATE, code
from tests.hosts import ThreeHosts, three_hosts
from tests.hosts.tcpmig import RSH, TCPMIG
from tests.workloads import breaks, deaths, scenes
from tests.workloads.breaks import MESSAGES, Break
from tests.workloads.move import Stage

__all__ = ["CALLS", "cases", "main", "run"]

KILLED_AT = [sys.executable, "-m", "tests.workloads.killed_at"]
#: how many calls the batches of the echo scene (two connections) make, at least
CALLS = {"freeze": 60, "rebuild": 60, "release": 20}
#: messages at which a stalled line is tried: each costs the time limit of the line
STALLS = ("source:image:1", "target:prepared:1", "source:commit:1", "target:started:1", "target:running:1")


def cases(*, stalls: bool, calls: int, seed: int) -> Iterator[str]:
    """Names of all cases, in their order."""
    for at in MESSAGES:
        for do in ("cut", "kill"):
            for after in (False, True):
                yield f"{do} {'after' if after else 'before'} {at}"
    if stalls:
        yield from (f"stall before {at}" for at in STALLS)
    chance = random.Random(seed)
    for moment, most in CALLS.items():
        numbers = range(1, most + 1) if calls >= most else sorted(chance.sample(range(1, most + 1), calls))
        yield from (f"call {moment} {number}" for number in numbers)


def run(names: list[str], file: Path, *, until: float = float("inf")) -> dict[str, Any]:
    """Do what is left of the cases; {name: what came of it}."""
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if state.get("code") != code():
        state = {"code": code(), "cases": {}}
    file.parent.mkdir(parents=True, exist_ok=True)
    left = [name for name in names if name not in state["cases"]]
    while left and time.monotonic() < until:
        with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as name:
            for case, found in _leg(hosts, Path(name), left[:10], until):
                state["cases"][case] = found
                print(f"{case}: {found}", flush=True)
                fresh = file.with_suffix(".new")
                fresh.write_text(json.dumps(state))
                fresh.replace(file)
        left = [name for name in names if name not in state["cases"]]
        if any(found["problems"] for found in state["cases"].values()):
            break
    return state


def _leg(hosts: ThreeHosts, folder: Path, names: list[str], until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    with scenes.echo(hosts, folder) as stage:
        for number, case in enumerate(names):
            status, reached = _one(stage, folder, case)
            problems = deaths.revive(stage, folder) + deaths.judge(stage)
            last = number == len(names) - 1 or time.monotonic() > until
            if last:
                problems += stage.finish()
            yield case, {"status": status, "reached": reached, "on": stage.here.name, "problems": problems}
            if problems or last:
                return


def _one(stage: Stage, folder: Path, case: str) -> tuple[int, bool]:
    """Exit status of `migrate`, and whether it came to the place."""
    do, when, where = case.split()
    if do != "call":
        status, _, reached = breaks.migrate(stage, folder, Break(where, do, when == "after"))
        return status, reached
    receive, migrate = [*TCPMIG, "receive"], [*TCPMIG, "migrate"]
    if when == "freeze":
        migrate = [*KILLED_AT, when, where, "migrate"]
    else:
        receive = [*KILLED_AT, when, where, "receive"]
    rsh = ["--rsh", shlex.join(RSH), "--remote-command", shlex.join(receive), "--json"]
    log = folder / "calls.log"
    log.unlink(missing_ok=True)
    tool = deaths.start(stage.here, [*migrate, stage.pid, stage.there.name, *rsh], log)
    status = tool.wait(deaths.WAIT * 4)
    # who is not killed says how many calls there were
    return status, status == -9 if when == "freeze" else "batched calls" not in log.read_text()


def main() -> int:
    """0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.breaks")
    parser.add_argument("--stalls", action="store_true")
    parser.add_argument("--calls", type=int, default=1000, help="of each batch, at random; default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("names", nargs="*", help="cases, as they are called in the output; default: all")
    given = parser.parse_args()
    names = given.names or list(cases(stalls=given.stalls, calls=given.calls, seed=given.seed))
    state = run(names, STATE / f"breaks-{given.seed}.json", until=time.monotonic() + given.seconds)
    done = [found for name, found in state["cases"].items() if name in names]
    bad = sum(1 for found in done if found["problems"])
    print(f"{len(done)} of {len(names)} cases, {sum(found['reached'] for found in done)} reached, {bad} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
