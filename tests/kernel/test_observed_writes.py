"""Reading the memory of a running process twice shows how much of it is written; nothing of it is changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from checkpoint.memory.forecast import observe

MB = 1 << 20
#: writes to a quarter of its memory over and over, and maps some that others share
PROGRAM = f"""
import mmap, time
memory = mmap.mmap(-1, 64 * {MB}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.write(b"x" * (64 * {MB}))
shared = mmap.mmap(-1, 8 * {MB})
shared.write(b"y" * (4 * {MB}))
print("up", flush=True)
number = 0
while True:
    number += 1
    for page in range(0, 16 * {MB}, 4096):
        memory[page] = number % 256
    time.sleep(0.005)
"""


@pytest.fixture
def writer() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-IS", "-c", PROGRAM], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        yield process.pid
        process.kill()


def test_the_written_part_is_seen(writer: int) -> None:
    (seen,) = observe([writer], seed=1)
    assert 64 * MB < seen.bytes < 100 * MB
    assert seen.still == 4 * MB
    (_, last) = seen.writes[-1]
    assert 10 * MB < last < 24 * MB


def test_who_has_ended_is_left_out(writer: int) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert [seen.pid for seen in observe([gone.pid, writer, os.getpid()])] == [writer, os.getpid()]
