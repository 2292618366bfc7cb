"""sshd with a live interactive session: moved there and back, again and again, while a job that reads the terminal is
in front and another one behind.

python -m tests.campaign.sessions [--seed N] [--moves N]

Before and after each move a line is typed, at a random moment, and comes back from the job.  Resumable, as the others.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.campaign.run import LEG, LONGEST_PAUSE, STATE, code
from tests.hosts import three_hosts
from tests.hosts.tcpmig import migrate
from tests.workloads.session import logged_in

__all__ = ["main", "run"]


def run(moves: int = 20, *, seed: int = 1) -> dict[str, Any]:
    """{name, seed, code, legs: [{moves, problems}]}, as campaigns of servers have."""
    file = STATE / f"sshd-{seed}.json"
    identity = {"name": "sshd", "moves": moves, "seed": seed, "code": code()}
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if {key: state.get(key) for key in identity} != identity:
        state = {**identity, "legs": []}
    file.parent.mkdir(parents=True, exist_ok=True)
    while (done := sum(len(leg["moves"]) for leg in state["legs"])) < moves:
        leg = _leg(f"{seed}/{len(state['legs'])}", min(LEG, moves - done))
        state["legs"].append(leg)
        file.write_text(json.dumps(state))
        print(f"sshd: {done + len(leg['moves'])} of {moves}; problems {leg['problems'] or 0}", flush=True)
        if leg["problems"]:
            break
    return state


def _leg(seed: str, moves: int) -> dict[str, Any]:
    chance = random.Random(seed)
    told: list[dict[str, Any]] = []
    with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as folder:
        here, there = hosts.source, hosts.target
        try:
            with logged_in(hosts, Path(folder) / "keys") as session:
                pid, person = session.pid, session.person
                person.type("cat\n", "cat\r\n")
                for number in range(moves):
                    person.type(f"before {number}\n", f"before {number}\r\nbefore {number}\r\n")
                    time.sleep(chance.uniform(0, LONGEST_PAUSE))
                    summary = migrate(here, pid, there)
                    told.append({**summary, "problems": []})
                    here, there, pid = there, here, int(summary["target_pid"])
                    person.type(f"after {number}\n", f"after {number}\r\nafter {number}\r\n")
                person.type("\x1a", r"Stopped\s+cat\s+ready> ")
                person.type("jobs\n", r"Running\s+sleep 1000 &\r\n.*Stopped\s+cat\r\n")
                person.type("echo it is $kept\n", "it is here\r\n")
                person.type("kill -9 %1 %2; exit 7\n", "exit")
                person.type("exit 7\n", "")  # bash says that there are stopped jobs, and stays
                assert session.client.wait(30) == 7
                here.kill(pid, 9)
        except (AssertionError, OSError, RuntimeError) as error:
            return {"seed": seed, "moves": told, "problems": [f"{type(error).__name__}: {error}"]}
    return {"seed": seed, "moves": told, "problems": []}


def main() -> int:
    """0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.sessions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--moves", type=int, default=20)
    given = parser.parse_args()
    return 1 if any(leg["problems"] for leg in run(given.moves, seed=given.seed)["legs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
