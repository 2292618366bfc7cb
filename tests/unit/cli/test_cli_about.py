"""What is shown of a process, in the fields of a result and to a person."""

from __future__ import annotations

import os
import subprocess
import sys

from cli.about import about, table


def test_our_own_process() -> None:
    [found] = about([os.getpid(), os.getpid()])
    assert found["pid"] == os.getpid()
    assert found["name"]
    assert found["memory"] > 1 << 20
    assert found["threads"] >= 1
    assert found["age"] >= 0


def test_a_process_that_ended_is_left_out_and_a_zombie_shown_as_far_as_it_goes() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        [zombie] = about([child.pid])
        assert zombie["pid"] == child.pid
        assert len(table([zombie]).rows) == 1
    assert about([child.pid]) == []


def test_a_person_reads_one_short_line() -> None:
    process = {
        "pid": 7, "name": "server", "command": ["server", "\x1b[2J", "x" * 80], "user": None, "memory": 3 << 20,
        "threads": 2, "age": 7300.0,
    }  # fmt: skip
    [row] = table([process]).rows
    assert row[:6] == ["7", "server", "-", "3.0", "2", "2h"]
    assert row[6].startswith("server ?[2J xx")
    assert len(row[6]) == 60
    [row] = table([process | {"age": 59.0, "command": None, "memory": None}]).rows
    assert row[3:] == ["-", "2", "59s", ""]
