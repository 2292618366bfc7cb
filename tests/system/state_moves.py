"""Moving the state of a process into a stub with its PID: what the tests of state share."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import time
from collections.abc import Iterator

from checkpoint.inject import Injection
from checkpoint.kernel.mman import Map, Prot
from checkpoint.memory.vma import PAGE
from checkpoint.spawn import Stub, spawn_stub
from checkpoint.state import table
from checkpoint.state.addresses import RestartableSequences
from checkpoint.state.base import State, kind_of
from checkpoint.state.itimers import IntervalTimers
from checkpoint.state.posix_timers import PosixTimers
from checkpoint.state.table import ProcessState
from checkpoint.tracee import Process, Tree
from tcpstate.codec import pack, unpack
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS


@contextlib.contextmanager
def running(*command: object) -> Iterator[int]:
    """PID of a program that has said that it is ready."""
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.stdout.close()
        process.kill()
        process.wait()


@dataclasses.dataclass
class Moved:
    """What was captured, before and after, and what was told."""

    before: ProcessState
    after: ProcessState
    warnings: list[str]
    capture_ms: float
    rebuild_ms: float


def capture(process: Process, *, accept_seccomp_risk: bool = False) -> ProcessState:
    with Injection(process, accept_seccomp_risk=accept_seccomp_risk) as injection:
        return table.capture(process, injection)


def give_memory(stub: Stub, state: ProcessState) -> None:
    """Map where the threads' rseq areas lie: the kernel writes there."""
    calls = CallTable()
    pages = set()
    for thread in state.threads:
        rseq = thread.get(RestartableSequences)
        if rseq.address:
            pages |= {rseq.address // PAGE, (rseq.address + rseq.size - 1) // PAGE}
    for page in pages:
        flags = Map.PRIVATE | Map.ANONYMOUS | Map.FIXED_NOREPLACE
        calls.call(SYS.mmap, page * PAGE, PAGE, Prot.READ | Prot.WRITE, flags, -1, 0, label="map an rseq area")
    if len(calls):
        stub.run(calls)


def move(pid: int, *, accept_seccomp_risk: bool = False) -> Moved:
    """End the process, and give a stub with its numbers its state.

    accept_seccomp_risk  its filter would kill it if the test ended in the middle
    """
    tree = Tree.stop([pid])
    (process,) = tree.processes
    try:
        start = time.monotonic_ns()
        before = capture(process, accept_seccomp_risk=accept_seccomp_risk)
        captured = time.monotonic_ns()
        avoid = [(vma.start, vma.end) for vma in process.maps]
    finally:
        tree.kill()
    before = unpack(ProcessState, pack(before))
    warnings: list[str] = []
    stub = spawn_stub(pid, avoid)
    try:
        give_memory(stub, before)
        begun = time.monotonic_ns()
        table.build(stub, before, warn=warnings.append, elapsed=begun - captured)
        stub.leave()
        table.install(stub, before)
        rebuilt = time.monotonic_ns()
        stub.seccomp_suspended = True  # by the options that stubs are seized with
        stub.note()
        after = capture(stub, accept_seccomp_risk=accept_seccomp_risk)
    finally:
        stub.kill()
    return Moved(before, after, warnings, (captured - start) / 1e6, (rebuilt - begun) / 1e6)


#: remaining times differ by what the test takes, and CPU time by ticks
TIMES = (IntervalTimers, PosixTimers)


def differences(before: tuple[State, ...], after: tuple[State, ...]) -> dict[str, tuple[State, State]]:
    by_kind = {type(state): state for state in after}
    assert len(before) == len(after) == len(by_kind)
    pairs = {kind_of(type(state)): (state, by_kind[type(state)]) for state in before if type(state) not in TIMES}
    return {kind: pair for kind, pair in pairs.items() if pair[0] != pair[1]}


def shown(found: dict[str, tuple[State, State]]) -> str:
    return "\n".join(f"{kind}:\n  {old}\n  {new}" for kind, (old, new) in found.items())
