"""redis-server moves to another host and back; its clients notice nothing.

Pipelined SET, GET and INCR with every value checked, a half-sent request, a backlog of megabytes unread, an idle
connection, new connections all the time; IPv4 and IPv6. Also with --lazy: memory comes when it is touched.
"""

from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.system.moves import there_and_back
from tests.workloads import scenes
from tests.workloads.move import by_tcpmig

pytestmark = pytest.mark.alone


def test_redis_there_and_back(hosts: ThreeHosts, tmp_path: Path) -> None:
    with scenes.redis(hosts, tmp_path, megabytes=10) as stage:
        there_and_back(stage)


@pytest.mark.long
def test_redis_there_and_back_before_its_memory(hosts: ThreeHosts, tmp_path: Path) -> None:
    with scenes.redis(hosts, tmp_path, megabytes=40, mover=by_tcpmig("--lazy")) as stage:
        there_and_back(stage)
