"""A tree whose children end at any moment: what is read of it while it runs must never trip over one that has gone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from checkpoint import preflight
from checkpoint.errors import TreeUnsteady
from checkpoint.live import LiveCopy
from checkpoint.verdict import refusals

#: three descendants that make and await a child each, without a pause: one of them ends every millisecond or so
CHURN = """
import os, random, time
for number in range(3):
    if os.fork() == 0:
        random.seed(number)
        while True:
            if os.fork() == 0:
                time.sleep(random.random() * 0.01)
                os._exit(0)
            os.wait()
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def root() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", CHURN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        for one in family:
            one.kill()


def test_check(root: int) -> None:
    for _ in range(100):
        assert refusals(preflight.check([root])) == []


def test_rounds_go_on_or_say_that_the_tree_is_unsteady(root: int) -> None:
    for _ in range(20):
        copy = LiveCopy([root])
        try:
            copy.begin()
            for _ in range(3):
                assert all(len(run.data) > 0 for run in copy.round().runs)
                copy.written()
        except TreeUnsteady:
            continue
        finally:
            copy.close()


ONE_CHILD = """
import os, signal, sys
child = os.fork()
if child == 0:
    signal.pause()
print(child, flush=True)
sys.stdin.readline()
os.kill(child, signal.SIGKILL)
os.wait()
print("gone", flush=True)
sys.stdin.readline()
"""


def test_what_a_child_has_written_that_has_just_ended_is_not_asked_for() -> None:
    argv = [sys.executable, "-c", ONE_CHILD]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        child = int(process.stdout.readline())
        copy = LiveCopy([process.pid])
        try:
            copy.begin()
            list(copy.round().runs)
            assert copy.written().keys() == {process.pid, child}
            process.stdin.write("\n")
            assert process.stdout.readline() == "gone\n"
            assert copy.written().keys() == {process.pid}
            list(copy.round().runs)
            assert copy.written().keys() == {process.pid}
        finally:
            copy.close()
