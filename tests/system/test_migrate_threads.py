"""Programs whose threads come and go all the time, and programs with many that stay, move again and again."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.tscnet import wait_until
from tests.workloads import scenes
from tests.workloads.move import Stage, outer_pid

pytestmark = pytest.mark.alone

SLEEPING, CHURNING, MOVES = 20, 8, 20
STAYING = 1 + SLEEPING + CHURNING


def names(stage: Stage) -> dict[str, str]:
    """Of the threads of the server, by their numbers."""
    found = {}
    for task in Path(f"/proc/{outer_pid(stage.here, stage.pid)}/task").iterdir():
        try:
            found[task.name] = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return found


def counts(stage: Stage) -> list[int]:
    """How far those are that make another thread each, again and again, which has the name that its mother had then."""
    found: dict[str, int] = {}
    for name in names(stage).values():
        match name.split():
            case ["churn", number, count]:
                found[number] = max(int(count), found.get(number, 0))
    return [found[number] for number in sorted(found)]


def test_threads_that_come_and_go_all_the_time(hosts: ThreeHosts, tmp_path: Path) -> None:
    with scenes.threads(hosts, tmp_path, sleeping=SLEEPING, churning=CHURNING) as stage:
        for number in range(MOVES):
            report = stage.move()
            assert report.problems == [], f"move {number + 1}: {report.problems}\n{report.log}"
            before, reached = set(names(stage)), counts(stage)
            assert len(reached) == CHURNING
            # each has the thread that it waits for, and goes on when that has ended
            wanted = [count + 3 for count in reached]
            wait_until(lambda wanted=wanted: all(map(operator.ge, counts(stage), wanted)))  # type: ignore[misc]
            # of those there were, the ones that stay are left: the first, those that sleep, those that churn; who joins
            # a thread goes on before that has left /proc, so there may be more for a moment
            wait_until(lambda before=before: len(before & set(names(stage))) == STAYING)  # type: ignore[misc]
        assert stage.finish() == []


def test_hundreds_that_stay(hosts: ThreeHosts, tmp_path: Path) -> None:
    with scenes.threads(hosts, tmp_path, sleeping=300) as stage:
        for _ in range(2):
            report = stage.move()
            assert report.problems == [], report.log
            assert len(names(stage)) == 301
        assert stage.finish() == []
