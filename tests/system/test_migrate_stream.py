"""Random streams both ways at full speed, every byte checked, through migrations at random moments; also with loss.

A sample; the long runs are in tests/campaign.
"""

import random
import time
from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.workloads import scenes

pytestmark = pytest.mark.alone


@pytest.mark.parametrize(("family", "loss"), [(4, 0), (6, 0), (4, 2), (6, 2)])
def test_stream_there_and_back(hosts: ThreeHosts, tmp_path: Path, family: int, loss: int) -> None:
    moment = random.Random(10 * family + loss)
    with scenes.stream(hosts, tmp_path, families=(family,), loss=loss, seed=family) as stage:
        for number in range(4):
            time.sleep(moment.uniform(0, 0.3))
            report = stage.move()
            assert report.problems == [], f"move {number + 1}: {report.problems}\n{report.log}"
        assert stage.finish() == []
