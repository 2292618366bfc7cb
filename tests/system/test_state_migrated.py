"""A process with state of every kind moves between two hosts by tcpmig itself; its state is compared on both."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from pathlib import Path

import pytest
from state_moves import TIMES, differences, shown

from checkpoint.kernel.timers import NS
from checkpoint.state.posix_timers import PosixTimers
from checkpoint.state.table import ProcessState
from tcpstate.codec import unpack
from tcpstate.kernel.machine import SYS
from tests.hosts import Host, ThreeHosts, tcpmig

PROGRAM = Path(__file__).parent / "programs" / "all_state.c"

LOOK = """
import base64, sys
from checkpoint.inject import Injection
from checkpoint.state import table
from checkpoint.tracee import Tree
from tcpstate.codec import pack
tree = Tree.stop([int(sys.argv[1])])
try:
    with Injection(tree.processes[0]) as injection:
        state = table.capture(tree.processes[0], injection)
finally:
    tree.resume()
print(base64.b64encode(pack(state)).decode())
"""


def state_of(host: Host, pid: int) -> ProcessState:
    text = host.run([sys.executable, "-c", LOOK, pid]).stdout
    return unpack(ProcessState, base64.b64decode(text))


@pytest.mark.parametrize("variant", ["root", "user", "container"])
def test_everything_moves(hosts: ThreeHosts, tmp_path: Path, variant: str) -> None:
    program, ready, place = tmp_path / "all_state", tmp_path / "ready", tmp_path / "place"
    place.mkdir()
    subprocess.run(["gcc", "-O1", "-pthread", "-o", program, PROGRAM], check=True)
    with ready.open("wb") as out, hosts.source.popen([program, variant, place], stdout=out, stderr=out) as process:
        deadline = time.monotonic() + 10
        while ready.read_bytes() != b"ready\n":
            assert time.monotonic() < deadline, ready.read_text()
            time.sleep(0.01)
        start = time.monotonic_ns()
        before = state_of(hosts.source, process.pid)
        summary = tcpmig.migrate(hosts.source, process.pid, hosts.target)
        after = state_of(hosts.target, process.pid)
        passed = time.monotonic_ns() - start
        hosts.target.kill(process.pid, 9)
    print(f"{variant}: stop {summary['stop_ms']:.1f} ms")
    assert not (found := differences(before.states, after.states)), shown(found)
    for old, new in zip(before.threads, after.threads, strict=True):
        assert not (found := differences(old.states, new.states)), shown(found)
    # the hosts were booted at different times, and nobody noticed
    assert 0 < after.clocks.monotonic - before.clocks.monotonic <= passed
    assert 0 < after.clocks.boottime - before.clocks.boottime <= passed
    for kind in TIMES:
        assert len(before.get(kind).timers) == len(after.get(kind).timers) > 0
    for old_timer, new_timer in zip(before.get(PosixTimers).timers, after.get(PosixTimers).timers, strict=True):
        assert -NS // 50 <= old_timer.value - new_timer.value <= passed


WAITS = "import select; print('ready', flush=True); select.epoll().poll(1000)"


@pytest.mark.long
def test_a_wait_goes_on_with_what_was_left_of_its_time(hosts: ThreeHosts) -> None:
    def asked(host: Host, pid: int) -> int:
        """Milliseconds that the call was given in which it waits."""
        deadline = time.monotonic() + 10
        while (words := host.path(f"/proc/{pid}/syscall").read_text().split())[0] != str(int(SYS.epoll_wait)):
            assert time.monotonic() < deadline, words
            time.sleep(0.01)
        return int(words[4], 16)

    with hosts.source.popen([sys.executable, "-ISc", WAITS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert asked(hosts.source, process.pid) == 1_000_000
        tcpmig.migrate(hosts.source, process.pid, hosts.target)
        there = asked(hosts.target, process.pid)
        tcpmig.migrate(hosts.target, process.pid, hosts.source)
        back = asked(hosts.source, process.pid)
        hosts.source.kill(process.pid, 9)
    assert 900_000 < back < there < 1_000_000
