"""tcpmig killed while the process is stopped, or a stub: it goes on by itself, or `tcpmig recover` makes it go on.

Samples; three hundred moments are in the campaign (tests/campaign/deaths.py), every call in tests/campaign/breaks.py.
"""

from __future__ import annotations

import random
import shlex
import sys
from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.hosts.tcpmig import RSH, TCPMIG
from tests.workloads import deaths, scenes

SEED = random.randrange(1 << 32)
KILLED = -9
KILLED_AT = [sys.executable, "-m", "tests.workloads.killed_at"]


def test_killed_at_random_moments(hosts: ThreeHosts, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    with scenes.echo(hosts, tmp_path) as stage:
        for kind in ("migrate", "receive", "restore"):
            death = deaths.die(stage, tmp_path, kind, chance.uniform(0, deaths.KINDS[kind]))
            problems = deaths.revive(stage, tmp_path) + deaths.judge(stage)
            assert problems == [], (kind, death, (tmp_path / "tool.log").read_text()[-4000:])
        assert stage.finish() == []


@pytest.mark.parametrize(("moment", "number"), [("freeze", 20), ("release", 6)])
def test_killed_before_a_call_of_a_batch(hosts: ThreeHosts, tmp_path: Path, moment: str, number: int) -> None:
    """In the middle of what is done to all sockets: some are changed, some are not."""
    with scenes.echo(hosts, tmp_path) as stage:
        receive, migrate = [*TCPMIG, "receive"], [*TCPMIG, "migrate"]
        if moment == "freeze":
            migrate = [*KILLED_AT, moment, str(number), "migrate"]
        else:
            receive = [*KILLED_AT, moment, str(number), "receive"]
        rsh = ["--rsh", shlex.join(RSH), "--remote-command", shlex.join(receive)]
        log = tmp_path / "tool.log"
        tool = deaths.start(stage.here, [*migrate, stage.pid, stage.there.name, *rsh], log)
        assert tool.wait(60) == (KILLED if moment == "freeze" else 5), log.read_text()
        deaths.wait_until_none_runs(stage)
        assert deaths.revive(stage, tmp_path) == []
        assert deaths.judge(stage) == []
        assert stage.here.name == ("source" if moment == "freeze" else "target")
        assert stage.finish() == []
