"""The line is cut, or `tcpmig receive` killed, around the commit: one running copy, or a doubt that recover settles.

All messages of the protocol, and stalls, are in the campaign (tests/campaign/breaks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import three_hosts, warm
from tests.workloads import breaks, deaths, scenes
from tests.workloads.breaks import Break
from tests.workloads.move import Stage

DONE, FAILED, IN_DOUBT = 0, 1, 5


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One server, which goes through all of it."""
    with three_hosts() as hosts, scenes.echo(hosts, tmp_path_factory.mktemp("breaks")) as stage:
        yield stage
        assert stage.finish() == []


@pytest.mark.parametrize(
    ("where", "status", "moves"),
    [
        (Break("target:prepared:1", "kill"), IN_DOUBT, False),
        (Break("target:started:1", "cut"), IN_DOUBT, True),
        (Break("source:commit:1", "kill", after=True), None, None),
    ],
    ids=str,
)
def test_a_break(stage: Stage, tmp_path: Path, where: Break, status: int | None, moves: bool | None) -> None:
    goes_on = stage.there if moves else stage.here
    told, summary, reached = breaks.migrate(stage, tmp_path, where)
    assert reached
    assert told in (DONE, FAILED, IN_DOUBT)
    assert told == status or status is None, summary
    assert deaths.revive(stage, tmp_path) == []
    problems = deaths.judge(stage)
    assert problems == []
    assert stage.here is goes_on or moves is None


def test_a_host_that_is_gone_leaves_the_doubt_until_a_person_decides(stage: Stage, tmp_path: Path) -> None:
    here = stage.here
    told, summary, _ = breaks.migrate(stage, tmp_path, Break("source:commit:1", "cut"))
    assert (told, summary["code"]) == (IN_DOUBT, "TM-0611")
    # the other host's name leads nowhere
    socket = Path(warm.ready(stage.there))
    socket.rename(tmp_path / "gone")
    try:
        status, items = deaths.settle(here)
        assert status == IN_DOUBT
        assert (items[0]["code"], items[0]["settled"]) == ("TM-0636", False)
        assert deaths.copies(stage) == [], "nobody runs before somebody has decided"
        status, items = deaths.settle(here, items[0]["id"], "--assume", "here")
        assert (status, items[0]["settled"]) == (DONE, True)
    finally:
        (tmp_path / "gone").rename(socket)
    assert deaths.revive(stage, tmp_path) == []
    assert deaths.judge(stage) == []
    assert stage.here is here
