"""nginx, a master and two workers, moves to another host and back under keep-alive clients, IPv4 and IPv6."""

from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.system.moves import there_and_back
from tests.workloads import scenes

pytestmark = pytest.mark.alone


def test_nginx_there_and_back(hosts: ThreeHosts, tmp_path: Path) -> None:
    with scenes.nginx(hosts, tmp_path) as stage:
        there_and_back(stage)
        running = stage.here.processes()
    assert sorted(running.values()).count("nginx") == 3
