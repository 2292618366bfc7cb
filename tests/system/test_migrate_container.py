"""A container as runc makes it, with redis and a Python server in it, moved under load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.workloads.contained import CONTAINER, PYTHON, Contained, in_container, make_root, networked
from tests.workloads.load import Load
from tests.workloads.move import Stage

pytestmark = pytest.mark.alone

PORT = 7032
REDIS = (
    f"redis-server --port {PORT} --protected-mode no --bind {{address}} --save '' --enable-debug-command yes"
    " --unixsocket /run/redis.sock --logfile /var/log/redis.log --dir /tmp >/dev/null 2>&1 &"
)
#: what a container has, but for its mounts, which its maker makes
KINDS = tuple(one for one in CONTAINER if one != "--mount-proc")


@contextmanager
def loaded(hosts: ThreeHosts, root: Path, *options: str) -> Iterator[tuple[Contained, Stage]]:
    """A container that is served by redis, with clients of it."""
    service = hosts.net.service4
    unshare = (*KINDS, *map(str, in_container(root, *options)))
    wait = "while ! redis-cli -s /run/redis.sock ping >/dev/null 2>&1; do sleep 0.05; done"
    fill = "redis-cli -s /run/redis.sock debug populate 5000 data 1000 >/dev/null"
    script = f"{REDIS.format(address=service)}\n{wait}\n{fill}\nexec"
    with (
        networked(
            hosts, *unshare, script=script, names=("inside", ""), python=PYTHON, program="/srv/contained.py"
        ) as server,
        ExitStack() as ends,
    ):
        loads = [
            Load(hosts.client, "pipeline", "redis_pipeline", PORT, service, service),
            Load(hosts.client, "waiting", "redis_waiting", PORT, service),
        ]
        for load in loads:
            ends.callback(load.close)
        with Stage(hosts, server.pid, loads, port=PORT) as stage:
            yield server, stage


@pytest.mark.parametrize("moves", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_container_with_redis_moves(hosts: ThreeHosts, tmp_path: Path, moves: int) -> None:
    """Under load, there, or there and back; and into a file and out of it, with its connections held meanwhile."""
    root = make_root(tmp_path / "root")
    with loaded(hosts, root) as (server, stage):
        before = server.ask()
        assert [line for line in before["me"]["mounts"] if line.startswith("/ /dev/pts ")]
        for _ in range(moves):
            report = stage.move()
            assert not report.problems, report
            server.host, server.pid = stage.here, stage.pid
            assert server.ask() == before
        server.rest(tmp_path / "image")
        assert server.ask() == before
        assert not stage.finish()
        assert not list(tmp_path.rglob(".tcpmig-*"))
