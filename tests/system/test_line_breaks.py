"""The line is cut, or `tcpmig receive` killed, around the commit: one running copy, or a doubt that recover settles.

All messages of the protocol, and stalls, are in the campaign (tests/campaign/breaks.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.workloads import breaks, deaths, scenes
from tests.workloads.breaks import Break

DONE, FAILED, IN_DOUBT = 0, 1, 5


@pytest.mark.parametrize(
    ("where", "status", "goes_on"),
    [
        (Break("target:prepared:1", "kill"), IN_DOUBT, "source"),
        (Break("target:started:1", "cut"), IN_DOUBT, "target"),
        (Break("source:commit:1", "kill", after=True), None, None),
    ],
    ids=str,
)
def test_a_break(hosts: ThreeHosts, tmp_path: Path, where: Break, status: int | None, goes_on: str | None) -> None:
    with scenes.echo(hosts, tmp_path) as stage:
        told, summary, reached = breaks.migrate(stage, tmp_path, where)
        assert reached
        assert told in (DONE, FAILED, IN_DOUBT)
        assert told == status or status is None, summary
        assert deaths.revive(stage, tmp_path) == []
        problems = deaths.judge(stage)
        assert problems == []
        assert stage.here.name == goes_on or goes_on is None
        assert stage.finish() == []


def test_a_host_that_is_gone_leaves_the_doubt_until_a_person_decides(hosts: ThreeHosts, tmp_path: Path) -> None:
    with scenes.echo(hosts, tmp_path) as stage:
        told, summary, _ = breaks.migrate(stage, tmp_path, Break("source:commit:1", "cut"))
        assert (told, summary["code"]) == (IN_DOUBT, "TM-0611")
        (tmp_path / "gone").mkdir()
        # the other host's name leads nowhere
        socket = hosts.net.directory / f"{hosts.target.name}.sock"
        socket.rename(tmp_path / "gone/sock")
        try:
            status, items = deaths.settle(hosts.source)
            assert status == IN_DOUBT
            assert (items[0]["code"], items[0]["settled"]) == ("TM-0636", False)
            assert deaths.copies(stage) == [], "nobody runs before somebody has decided"
            status, items = deaths.settle(hosts.source, items[0]["id"], "--assume", "here")
            assert (status, items[0]["settled"]) == (DONE, True)
        finally:
            (tmp_path / "gone/sock").rename(socket)
        assert deaths.revive(stage, tmp_path) == []
        assert deaths.judge(stage) == []
        assert stage.here is hosts.source
        assert stage.finish() == []
