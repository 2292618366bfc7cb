"""tcpmig killed at hundreds of random moments inside the stop, and its line broken at every message.

A campaign is cut into legs with fresh hosts and a fresh server; each leg is written to the state file when it is over.
One that was interrupted goes on with the next leg.  Each leg begins with a run that nobody kills: how long the process
is stopped in it is how late it may be killed, whatever else the machine has to do.

python -m tests.campaign.deaths [--kind KIND] [--count N] [--seed N] [--seconds N]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign.run import STATE, code
from tests.hosts import CommandFailed, three_hosts
from tests.workloads import deaths, scenes, steps

__all__ = ["COUNTS", "main", "run"]

#: how many deaths of each kind `make campaign` wants
COUNTS = {
    "migrate": 80,
    "precopy": 40,
    "receive": 40,
    "checkpoint": 50,
    "checkpoint-R": 40,
    "restore": 50,
    "migrate-frozen": 40,
    "receive-frozen": 40,
    "checkpoint-frozen": 40,
    "recover": 40,
}
LEG = 10


def run(
    kind: str, count: int, seed: int, *, until: float = float("inf"), say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Do what is left of one kind, or as much as fits before ``until`` (time.monotonic()); its state."""
    file = STATE / f"deaths-{kind}-{seed}.json"
    identity = {"kind": kind, "seed": seed, "code": code()}
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if {key: state.get(key) for key in identity} != identity:
        state = {**identity, "deaths": []}
    file.parent.mkdir(parents=True, exist_ok=True)
    while len(state["deaths"]) < count and time.monotonic() < until:
        done = len(state["deaths"])
        leg = _leg(kind, f"{seed}/{kind}/{done}", min(LEG, count - done))
        state["deaths"] += leg
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(state))
        fresh.replace(file)
        say(f"{kind}: {done + len(leg)} of {count}; {summary(leg)}")
        if any(death["problems"] for death in leg):
            break
    return state


def _leg(kind: str, seed: str, count: int) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    found: list[dict[str, Any]] = []
    with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as name:
        folder = Path(name)
        with scenes.echo(hosts, folder) as stage:
            longest = deaths.KINDS[kind]
            if kind != "recover":
                longest = deaths.die(stage, folder, kind, math.inf).after
                problems = deaths.goes_on_alone(stage)[1] + deaths.revive(stage, folder) + deaths.judge(stage)
                if not longest or problems:
                    raise CommandFailed(f"{kind}: a run to the end stopped it for {longest} s: {problems}")
            for _ in range(count):
                delay = chance.uniform(0, longest)
                if kind == "recover":
                    death = steps.die_recovering(stage, folder, delay)
                else:
                    death = deaths.die(stage, folder, kind, delay)
                alone, problems = deaths.goes_on_alone(stage)
                problems += deaths.revive(stage, folder)
                problems += deaths.judge(stage)
                log = (folder / "tool.log").read_text()[-4000:] if problems else ""
                found.append(
                    {
                        "delay": delay,
                        "killed": death.status < 0,
                        "inside": death.inside,
                        "state": death.state,
                        "alone": alone,
                        "on": stage.here.name,
                        "problems": problems,
                        "log": log,
                    }
                )
                if problems:
                    return found
            wrong = stage.finish()
            if wrong:
                found[-1]["problems"] += wrong
    return found


def summary(leg: list[dict[str, Any]]) -> str:
    """A leg in a line."""
    killed, inside = (sum(death[what] for death in leg) for what in ("killed", "inside"))
    alone = sum(death["alone"] for death in leg)
    problems = [problem for death in leg for problem in death["problems"]]
    return f"killed {killed}, inside the stop {inside}, went on alone {alone}, problems {problems or 0}"


def main() -> int:
    """0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.deaths")
    parser.add_argument("--kind", choices=COUNTS, action="append")
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no leg after so long")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    bad = 0
    for kind in given.kind or COUNTS:
        try:
            state = run(kind, given.count or COUNTS[kind], given.seed, until=until)
        except CommandFailed as error:
            print(f"{kind}: {error}", file=sys.stderr)
            return 1
        bad += sum(1 for death in state["deaths"] if death["problems"])
        print(f"{kind} in all: {summary(state['deaths'])}")
        for death in state["deaths"]:
            if death["problems"]:
                print(json.dumps({**death, "log": ""}, indent=1), death["log"])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
