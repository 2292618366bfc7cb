"""python3 -m http.server moves to another host and back while curl gets a big file from it."""

from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.system.moves import there_and_back
from tests.workloads import scenes

pytestmark = pytest.mark.alone


def test_http_server_there_and_back(hosts: ThreeHosts, tmp_path: Path) -> None:
    with scenes.http(hosts, tmp_path, megabytes=180, rate=12) as stage:
        reports = there_and_back(stage)
    # Otherwise the moves would have come after the download.
    assert not reports[-1].answers["curl during"]["done"]
