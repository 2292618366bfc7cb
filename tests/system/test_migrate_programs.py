"""Programs of other sorts move to another host and back, and their clients notice nothing: node with timers, a thread
pool and a child; threads of C with POSIX timers, condition variables and sleeps; processes with a segment of System V
shared memory.

The others, and twenty moves of each, are campaigns: python -m tests.campaign c static shm go java node pool
"""

from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.system.moves import there_and_back
from tests.workloads import scenes

pytestmark = pytest.mark.alone


@pytest.mark.parametrize("name", ["c", "node", "shm"])
def test_program_there_and_back(hosts: ThreeHosts, tmp_path: Path, name: str) -> None:
    with scenes.program(hosts, tmp_path, name) as stage:
        there_and_back(stage)
