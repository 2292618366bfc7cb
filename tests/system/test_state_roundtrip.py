"""State of every kind: captured from a program, rebuilt in a stub with its PID, captured again with the same code.

Needs neither memory nor files: what the kernel keeps by address is only an address.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import time
from pathlib import Path

import pytest
from state_moves import TIMES, differences, move, running, shown

from checkpoint.kernel.signals import SigInfo
from checkpoint.kernel.timers import NS
from checkpoint.state.addresses import RestartableSequences
from checkpoint.state.comm import Comm
from checkpoint.state.credentials import Credentials
from checkpoint.state.filesystem import Filesystem
from checkpoint.state.itimers import IntervalTimers
from checkpoint.state.limits import ResourceLimits
from checkpoint.state.pending import PendingForProcess, PendingForThread
from checkpoint.state.posix_timers import PosixTimers
from checkpoint.state.preflight import verdicts
from checkpoint.state.registers import Registers
from checkpoint.state.scheduling import CpuAffinity, Scheduling
from checkpoint.state.seccomp import Seccomp
from checkpoint.state.table import ProcessState
from checkpoint.verdict import Status

PROGRAM = Path(__file__).parent / "programs" / "all_state.c"


@pytest.fixture(scope="session")
def all_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("programs") / "all_state"
    subprocess.run(["gcc", "-O1", "-Wall", "-Werror", "-pthread", "-o", out, PROGRAM], check=True)
    return out


def same_timers(before: ProcessState, after: ProcessState, seconds: int) -> None:
    for kind in TIMES:
        first, second = before.get(kind).timers, after.get(kind).timers
        assert [dataclasses.replace(t, value=0) for t in first] == [dataclasses.replace(t, value=0) for t in second]
        for old, new in zip(first, second, strict=True):
            assert bool(old.value) == bool(new.value)
            assert -NS // 50 <= old.value - new.value <= seconds * NS


@pytest.mark.parametrize("variant", ["root", "user", "container"])
def test_everything_comes_back(all_state: Path, tmp_path: Path, variant: str) -> None:
    with running(all_state, variant, tmp_path) as pid:
        assert all(v.status is Status.OK for v in verdicts(pid))
        start = time.monotonic()
        moved = move(pid)
        seconds = int(time.monotonic() - start) + 1
    before, after = moved.before, moved.after
    print(f"{variant}: capture {moved.capture_ms:.2f} ms, rebuild {moved.rebuild_ms:.2f} ms")
    assert moved.warnings == []
    assert (after.pid, [t.tid for t in after.threads]) == (before.pid, [t.tid for t in before.threads])
    assert not (found := differences(before.states, after.states)), shown(found)
    for old, new in zip(before.threads, after.threads, strict=True):
        assert not (found := differences(old.states, new.states)), shown(found)
    same_timers(before, after, seconds)
    assert 0 <= after.clocks.monotonic - before.clocks.monotonic <= seconds * NS
    expect_all(before, variant, tmp_path)


def expect_all(state: ProcessState, variant: str, directory: Path) -> None:
    """That the program did what it was written for: else nothing would have been compared."""
    main, first, second = state.threads
    assert [t.get(Comm).name for t in state.threads] == [b"state %d \xff" % n for n in range(3)]
    assert state.get(Filesystem) == Filesystem(cwd=str(directory), root=None, umask=0o123)
    assert [t.id for t in state.get(PosixTimers).timers] == [1, 2, 3]
    assert state.get(PosixTimers).timers[1].thread == second.tid
    assert len(state.get(IntervalTimers).timers) == 2
    assert state.get(ResourceLimits).limits[7].soft == 55
    # the kernel tells a queue in the order of arrival; SIGURG, which stopped injected code, comes last
    pending = [SigInfo.unpack(info).signal for info in state.get(PendingForProcess).signals]
    assert pending == [signal.SIGRTMIN + 5, signal.SIGRTMIN + 5, signal.SIGUSR2, signal.SIGURG]
    assert [len(t.get(PendingForThread).signals) for t in state.threads] == [0, 1, 1]
    assert first.get(CpuAffinity).cpus == (0,)
    assert [t.get(Scheduling).policy.name for t in state.threads] == ["OTHER", "BATCH", "RR"]
    filters = [len(t.get(Seccomp).filters) for t in state.threads]
    assert filters == {"root": [0, 0, 0], "user": [2, 3, 2], "container": [2, 2, 2]}[variant]
    assert main.get(Seccomp).shared == main.get(Seccomp).privileged == (variant == "container")
    if variant == "user":
        assert [t.get(Credentials).users.real for t in state.threads] == [1011, 2011, 3011]
        assert [t.get(Credentials).no_new_privs for t in state.threads] == [True] * 3
        assert main.get(Credentials).capabilities.ambient == 1 << 13
    assert all(t.get(RestartableSequences).address for t in state.threads)
    assert len({t.get(Registers).blocked for t in state.threads}) == 3
