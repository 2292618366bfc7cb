"""An echo server moves to another host and back under ping-pong every millisecond: how long is the gap?"""

from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.system.moves import there_and_back
from tests.workloads import scenes

pytestmark = pytest.mark.alone

SLACK = 1000.0  # ms that a gap may be longer than the stop: a busy machine; retransmission time-outs are counted


def test_echo_there_and_back(hosts: ThreeHosts, tmp_path: Path) -> None:
    with scenes.echo(hosts, tmp_path) as stage:
        for report in there_and_back(stage, 4):
            assert report.largest_gap < report.summary["stop_ms"] + SLACK
