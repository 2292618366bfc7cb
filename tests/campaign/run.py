"""One campaign: many migrations of a server under load: of one with random streams both ways, every byte checked, or of
a real program.

A campaign is cut into legs.  A leg starts fresh hosts, a server and its clients, moves the server a number of times at
random moments, lets the clients finish (every byte of both directions accounted for), and is then written to the state
file.  A campaign that was interrupted goes on with the next leg; one of other code or another seed begins anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hosts import CommandFailed, ThreeHosts, three_hosts
from tests.hosts.host import ROOT
from tests.workloads import scenes
from tests.workloads.move import Mover, MoveReport, Stage
from tests.workloads.servers import PROGRAMS

__all__ = ["CAMPAIGNS", "STATE", "Campaign", "code", "run"]

STATE = ROOT / "build/campaign"
LEG = 10  # migrations with one server
MOST_BAD = 3  # bad legs after which a campaign is given up
LONGEST_PAUSE = 0.5  # seconds between two migrations, at most


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """name; how many migrations; of streams over which families, with how many percent of loss each way; or of a real
    program (a scene, or one of servers.PROGRAMS)."""

    name: str
    moves: int
    families: tuple[int, ...] = ()
    loss: int = 0
    program: str = ""


CAMPAIGNS = (
    Campaign(name="both", moves=100, families=(4, 6)),
    Campaign(name="ipv4", moves=50, families=(4,)),
    Campaign(name="ipv6", moves=50, families=(6,)),
    Campaign(name="loss", moves=50, families=(4, 6), loss=2),
    *(Campaign(name=name, moves=20, program=name) for name in ("redis", "nginx", *PROGRAMS)),
)


def code() -> str:
    """Git's hash of what is tested, as committed: commits of documents or tests do not begin a campaign anew."""
    rooms = [f"HEAD:{room}" for room in ("tcpstate", "checkpoint", "migrate", "cli")]
    done = subprocess.run(["git", "rev-parse", *rooms], cwd=ROOT, capture_output=True, text=True, check=False)
    return hashlib.sha256(done.stdout.encode()).hexdigest()[:16] if done.returncode == 0 else "unknown"


def run(
    campaign: Campaign, *, seed: int, rate: float = 0, mover: Mover | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Do what is left of a campaign; its state: {name, seed, code, legs: [{moves, problems}, ...]}."""
    file = STATE / f"{campaign.name}-{seed}.json"
    identity = {"name": campaign.name, "moves": campaign.moves, "seed": seed, "rate": rate, "code": code()}
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if {key: state.get(key) for key in identity} != identity:
        state = {**identity, "legs": []}
    file.parent.mkdir(parents=True, exist_ok=True)
    while (done := sum(len(leg["moves"]) for leg in state["legs"])) < campaign.moves:
        if sum(1 for leg in state["legs"] if leg["problems"]) >= MOST_BAD:
            break
        leg = _leg(
            campaign, f"{seed}/{campaign.name}/{len(state['legs'])}", min(LEG, campaign.moves - done), rate, mover
        )
        if not leg["moves"] and not leg["problems"]:
            raise CommandFailed(f"campaign {campaign.name}: a leg did nothing")
        state["legs"].append(leg)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(state))
        fresh.replace(file)
        say(f"{campaign.name}: {done + len(leg['moves'])} of {campaign.moves}; {summary(leg)}")
    return state


def _leg(campaign: Campaign, seed: str, moves: int, rate: float, mover: Mover | None) -> dict[str, Any]:
    """Some migrations of one server, and the clients' last word."""
    chance = random.Random(seed)
    reports: list[MoveReport] = []
    problems: list[str] = []
    with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as folder:
        try:
            with _scene(campaign, hosts, Path(folder), rate, chance.getrandbits(48), mover) as stage:
                at = [[0, 0]] * len(campaign.families)
                for number in range(moves):
                    time.sleep(chance.uniform(0, LONGEST_PAUSE))
                    report = stage.move()
                    reports.append(report)
                    problems += [f"move {number + 1}: {problem}" for problem in report.problems]
                    if campaign.program:
                        continue
                    last, at = at, report.answers["stream during"]["positions"]
                    stands = [i for i, (a, b) in enumerate(zip(last, at, strict=True)) if a[0] == b[0] or a[1] == b[1]]
                    problems += [f"move {number + 1}: stream {i} stands still at {at[i]}" for i in stands]
                problems += [f"at the end: {problem}" for problem in stage.finish()]
        except CommandFailed as error:
            problems.append(str(error))
    return {
        "seed": seed,
        "moves": [report.json() for report in reports],
        "bytes": [sum(pair) for pair in at] if reports else [],
        "problems": problems,
        "log": "\n".join(report.log for report in reports if report.log),
    }


def _scene(
    campaign: Campaign, hosts: ThreeHosts, folder: Path, rate: float, seed: int, mover: Mover | None
) -> contextlib.AbstractContextManager[Stage]:
    if campaign.program in PROGRAMS:
        return scenes.program(hosts, folder, campaign.program, mover=mover)
    if campaign.program:
        return {"redis": scenes.redis, "nginx": scenes.nginx}[campaign.program](hosts, folder, mover=mover)
    return scenes.stream(
        hosts, folder, families=campaign.families, rate=rate, seed=seed, loss=campaign.loss, mover=mover
    )


def summary(leg: dict[str, Any]) -> str:
    """A leg in a line."""
    gaps = sorted(move["gap_ms"] for move in leg["moves"])
    figures = f"gap median {gaps[len(gaps) // 2]:.1f} largest {gaps[-1]:.1f} ms, " if gaps else ""
    stops = sorted(move["stop_ms"] for move in leg["moves"] if move["stop_ms"] is not None)
    figures += f"stop median {stops[len(stops) // 2]:.1f} ms, " if stops else ""
    rsts = sum(move["rsts"] for move in leg["moves"])
    return f"{figures}{sum(leg['bytes']) / 1e6:.0f} MB checked, RST {rsts}, problems {leg['problems'] or 0}"
