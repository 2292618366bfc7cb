"""A wait with a time-out does not begin anew when the process goes on here after calls were made in it."""

from __future__ import annotations

import os
import select
import subprocess
import sys

from checkpoint.inject import Injection
from checkpoint.procfs import call_of
from checkpoint.throttle import Throttle
from checkpoint.tracee import Tree
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tests.tscnet import wait_until

PROGRAM = """
import os, select, sys
poll = select.epoll()
poll.register(0, select.EPOLLIN)
print(1, flush=True)
found = poll.poll(1000)
print(found[0][0], flush=True)
"""


def test_it_goes_on_with_what_was_left() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-ISc", PROGRAM], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        ends, times = [], []
        for _ in range(3):
            wait_until(lambda: (call_of(process.pid, process.pid) or [0])[0] == SYS.epoll_wait)
            with open(f"/proc/{process.pid}/syscall") as file:
                times.append(int(file.read().split()[4], 16))
            tree = Tree.stop([process.pid])
            (stopped,) = tree.processes
            ends.append(stopped.leader.until)
            with Injection(stopped) as injection:
                calls = CallTable()
                found = calls.call(SYS.getpid)
                injection.run({process.pid: calls})
            tree.resume()
            assert found.value == process.pid
        first = ends[0]
        assert first is not None
        for end in ends:
            assert end is not None
            assert abs(end - first) < 300_000_000, ends
        # what it was given, in milliseconds
        assert times[0] == 1_000_000
        assert times[0] > times[1] >= times[2] > 900_000
        # it still waits for what it waited for, and no EINTR has come in between
        os.write(process.stdin.fileno(), b"x")
        assert select.select([process.stdout], [], [], 30)[0]
        assert process.stdout.readline() == b"0\n"
        assert process.wait(30) == 0


def test_a_time_out_comes_to_a_process_that_is_stopped_all_the_time() -> None:
    program = "import select; poll = select.epoll(); print(1, flush=True); poll.poll(0.5); print(2, flush=True)"
    with subprocess.Popen([sys.executable, "-ISc", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        throttle = Throttle([process.pid])
        throttle.set(0.5)
        try:
            # every turn is far shorter than the time-out
            assert select.select([process.stdout], [], [], 60)[0]
        finally:
            throttle.end()
        assert throttle.stood > 0
        assert process.stdout.readline() == b"2\n"
        assert process.wait(30) == 0
