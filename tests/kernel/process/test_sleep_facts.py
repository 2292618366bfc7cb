"""What the kernel tells by a BPF iterator of one thread: when an interrupted sleep for a relative time will end."""

from __future__ import annotations

import pytest

from checkpoint.arch import sleep_of
from checkpoint.kernel import restart_block
from checkpoint.procfs import read_stat
from checkpoint.tracee import Tree
from tests.system.engine.sleeps import NS, SLEEPS, sleeping
from tests.tscnet import wait_until


def left(pid: int) -> int:
    """Nanoseconds, of a process that is stopped for a look."""
    tree = Tree.stop([pid])
    try:
        thread = tree.processes[0].leader
        sleep = sleep_of(thread.registers, thread.call)
        assert sleep is not None
        found = restart_block.left(pid, sleep.note)
        assert found is not None
        return found
    finally:
        tree.resume()
        wait_until(lambda: read_stat(pid).state == "S")


@pytest.mark.parametrize("kind", SLEEPS)
def test_the_time_that_is_left_is_known(kind: str) -> None:
    with sleeping(SLEEPS[kind]) as pid:
        first = left(pid)
        second = left(pid)
        assert 900 * NS < second < first < 1000 * NS
