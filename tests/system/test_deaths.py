"""tcpmig killed while the process is stopped, or a stub: it goes on by itself, or `tcpmig recover` makes it go on.

Samples; three hundred moments are in the campaign (tests/campaign/deaths.py), every step in tests/campaign/breaks.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import three_hosts
from tests.workloads import deaths, scenes, steps
from tests.workloads.move import Stage

SEED = random.randrange(1 << 32)
KILLED, IN_DOUBT = -9, 5


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One server, which goes through all of it."""
    with three_hosts() as hosts, scenes.echo(hosts, tmp_path_factory.mktemp("deaths")) as stage:
        yield stage
        assert stage.finish() == []


def settled(stage: Stage, folder: Path) -> None:
    alone, problems = deaths.goes_on_alone(stage)
    problems += deaths.revive(stage, folder) + deaths.judge(stage)
    log = folder / "tool.log"
    assert problems == [], (alone, log.read_text()[-4000:] if log.exists() else "")


@pytest.mark.parametrize("kind", ["migrate", "receive", "restore"])
def test_killed_at_a_random_moment(stage: Stage, tmp_path: Path, kind: str) -> None:
    print(f"seed {SEED}")
    death = deaths.die(stage, tmp_path, kind, random.Random(SEED).uniform(0, deaths.KINDS[kind]))
    print(death)
    settled(stage, tmp_path)


def test_recover_killed_itself(stage: Stage, tmp_path: Path) -> None:
    """At a random moment while it settles what another death has left; run again, it ends that."""
    print(f"seed {SEED}")
    print(steps.die_recovering(stage, tmp_path, random.Random(SEED).random()))
    settled(stage, tmp_path)


@pytest.mark.parametrize(
    ("place", "number", "status", "moves"), [("freeze", 20, KILLED, False), ("release", 6, IN_DOUBT, True)]
)
def test_killed_before_a_call_of_a_batch(
    stage: Stage, tmp_path: Path, place: str, number: int, status: int, moves: bool
) -> None:
    """In the middle of what is done to all sockets: some are changed, some are not."""
    goes_on = stage.there if moves else stage.here
    assert steps.run(stage, tmp_path, place, number) == (status, 0)
    assert not deaths.goes_on_alone(stage)[0]
    settled(stage, tmp_path)
    assert stage.here is goes_on


def test_killed_at_an_entry_that_the_process_itself_runs(stage: Stage, tmp_path: Path) -> None:
    """It ends the table, undoes it and goes on, with nobody's help."""
    print(f"seed {SEED}")
    # how many there are follows from the code: counted in a move that nobody kills
    status, count = steps.run(stage, tmp_path, "inject", 0)
    assert status == 0
    settled(stage, tmp_path)
    here = stage.here
    # one that finds a thread elsewhere makes a few more or less
    assert steps.run(stage, tmp_path, "inject", random.Random(SEED).randrange(1, count * 9 // 10)) == (KILLED, 0)
    assert deaths.goes_on_alone(stage) == (True, [])
    settled(stage, tmp_path)
    assert stage.here is here
