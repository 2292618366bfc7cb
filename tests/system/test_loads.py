"""The loads and judges of the migration tests, tried without a migration.

Nothing moves: the server is stopped for a while at most. No client may complain then, and those that are asked for a
gap must see one as long as the stop: so what the migration tests find is the migration's.
"""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts import CommandFailed, ThreeHosts
from tests.workloads import scenes
from tests.workloads.move import Stage, outer_pid, pretend

pytestmark = pytest.mark.alone

Scene = Callable[..., contextlib.AbstractContextManager[Stage]]
STOP = 60.0  # ms


@pytest.mark.parametrize("scene", [scenes.redis, scenes.http, scenes.nginx, scenes.echo], ids=lambda s: s.__name__)
def test_no_client_complains_when_nothing_happens(hosts: ThreeHosts, tmp_path: Path, scene: Scene) -> None:
    with scene(hosts, tmp_path, mover=pretend(0)) as stage:
        report = stage.move()
        assert report.problems == [], report.log
        assert report.timeouts == 0
        assert stage.finish() == []


@pytest.mark.parametrize("loss", [0, 2])
@pytest.mark.parametrize("family", [4, 6])
def test_streams_are_whole_when_nothing_happens(hosts: ThreeHosts, tmp_path: Path, family: int, loss: int) -> None:
    with scenes.stream(hosts, tmp_path, families=(family,), loss=loss, mover=pretend(20)) as stage:
        report = stage.move()
        assert report.problems == [], report.log
        positions = report.answers["stream during"]["positions"]
        assert all(min(pair) > 1 << 16 for pair in positions)
        assert stage.finish() == []


@pytest.mark.parametrize("scene", [scenes.redis, scenes.nginx, scenes.echo], ids=lambda s: s.__name__)
def test_a_stop_is_seen_as_a_gap(hosts: ThreeHosts, tmp_path: Path, scene: Scene) -> None:
    with scene(hosts, tmp_path, mover=pretend(STOP)) as stage:
        report = stage.move()
        assert report.problems == [], report.log
        assert report.largest_gap > STOP * 0.7
        assert stage.finish() == []


@pytest.mark.parametrize(
    "scene", [scenes.redis, scenes.http, scenes.nginx, scenes.echo, scenes.stream], ids=lambda s: s.__name__
)
def test_every_client_complains_when_the_server_dies(hosts: ThreeHosts, tmp_path: Path, scene: Scene) -> None:
    with scene(hosts, tmp_path, mover=pretend(0)) as stage:
        for pid in hosts.source.processes():
            if pid >= stage.pid:
                os.kill(outer_pid(hosts.source, pid), signal.SIGKILL)
        with contextlib.suppress(CommandFailed):  # a client that waited for the dead server may not answer in time
            stage.move()
            stage.finish()
        assert all(load.wrongs for load in stage.loads)
