"""State that few processes have: strict seccomp, another root, cgroups, no executable memory; and what is refused."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from state_moves import capture, differences, give_memory, move, running, shown

from checkpoint.errors import SeccompSupervised, StateRefused
from checkpoint.kernel.seccomp import Mode
from checkpoint.kernel.timers import NS
from checkpoint.spawn import spawn_stub
from checkpoint.state import clocks, table
from checkpoint.state.cgroup import Cgroups
from checkpoint.state.clocks import Clocks
from checkpoint.state.filesystem import Filesystem
from checkpoint.state.itimers import IntervalTimers
from checkpoint.state.memory_switches import MemoryDenyWriteExecute
from checkpoint.state.seccomp import Seccomp
from checkpoint.state.table import ProcessState
from checkpoint.tracee import Tree
from tcpstate.kernel.prctl import MdweFlag

HEAD = "import ctypes, os, sys; libc = ctypes.CDLL(None, use_errno=True)\n"
WAIT = "\nos.write(1, b'ready\\n')\nwhile True: os.read(0, 1)\n"


def python(source: str, *args: object) -> tuple[object, ...]:
    """The command of a program that does something, says that it is ready, and waits in read(2)."""
    return (sys.executable, "-Ic", HEAD + source + WAIT, *args)


@pytest.fixture(autouse=True)
def _standard_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs read from a pipe that stays open."""
    reading, writing = os.pipe()
    saved = os.dup(0)
    os.dup2(reading, 0)
    yield
    os.dup2(saved, 0)
    for fd in (saved, reading, writing):
        os.close(fd)


def expect_equal(before: ProcessState, after: ProcessState) -> None:
    assert not (found := differences(before.states, after.states)), shown(found)
    for old, new in zip(before.threads, after.threads, strict=True):
        assert not (found := differences(old.states, new.states)), shown(found)


def test_strict_seccomp():
    with running(*python("libc.prctl(22, 1, 0, 0, 0)")) as pid:
        moved = move(pid, accept_seccomp_risk=True)
    assert moved.before.threads[0].get(Seccomp).mode is Mode.STRICT
    expect_equal(moved.before, moved.after)


def test_no_memory_may_become_executable():
    with running(*python("libc.prctl(65, 1, 0, 0, 0)")) as pid:
        moved = move(pid)
    assert moved.before.get(MemoryDenyWriteExecute).flags is MdweFlag.REFUSE_EXEC_GAIN
    expect_equal(moved.before, moved.after)


def test_another_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "inside").mkdir(parents=True)
    with running(*python("os.chroot(sys.argv[1]); os.chdir('/inside')", root)) as pid:
        moved = move(pid)
    wanted = Filesystem(cwd=str(root / "inside"), root=str(root), umask=os.umask(0o22))
    assert moved.before.get(Filesystem) == wanted
    expect_equal(moved.before, moved.after)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A group of the version 2 hierarchy, wherever that is mounted."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    at = next(line.split()[4] for line in lines if " - cgroup2 " in line)
    path = Path(at) / f"tcpmig-state-{os.getpid()}"
    path.mkdir()
    yield path
    if path.exists():
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a group whose last process has just ended: it may count for a moment."""
    deadline = time.monotonic() + 5
    while True:
        try:
            path.rmdir()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_cgroup(cgroup: Path) -> None:
    with running(*python("open(sys.argv[1], 'w').write('0')", cgroup / "cgroup.procs")) as pid:
        moved = move(pid)
    assert f"/{cgroup.name}" in [group.path for group in moved.before.get(Cgroups).groups]
    assert moved.warnings == []
    expect_equal(moved.before, moved.after)


def test_a_cgroup_that_is_absent_at_the_target(cgroup: Path) -> None:
    with running(*python("open(sys.argv[1], 'w').write('0')", cgroup / "cgroup.procs")) as pid:
        tree = Tree.stop([pid])
        state = capture(tree.processes[0])
        avoid = [(vma.start, vma.end) for vma in tree.processes[0].maps]
        tree.kill()
    _remove(cgroup)
    # the tool itself is in another group than the root: the new process must not stay there
    own = cgroup.with_name(f"{cgroup.name}-tool")
    own.mkdir()
    (own / "cgroup.procs").write_text("0")
    warnings: list[str] = []
    stub = spawn_stub(state.pid, avoid)
    try:
        give_memory(stub, state)
        table.build(stub, state, warn=warnings.append)
        after = Path(f"/proc/{stub.pid}/cgroup").read_text()
    finally:
        stub.kill()
        (own.parent / "cgroup.procs").write_text("0")
        _remove(own)
    assert len(warnings) == 1
    assert cgroup.name in warnings[0]
    assert own.name not in after


def test_a_hierarchy_that_the_source_did_not_have(cgroup: Path) -> None:
    """The new process does not stay in the tool's group: that may be an ssh session's."""
    with running(*python("")) as pid:
        tree = Tree.stop([pid])
        state = capture(tree.processes[0])
        avoid = [(vma.start, vma.end) for vma in tree.processes[0].maps]
        tree.kill()
    groups = tuple(group for group in state.get(Cgroups).groups if group.hierarchy)
    others = tuple(each for each in state.states if not isinstance(each, Cgroups))
    state = dataclasses.replace(state, states=(*others, Cgroups(groups=groups)))
    (cgroup / "cgroup.procs").write_text("0")
    stub = spawn_stub(state.pid, avoid)
    try:
        assert cgroup.name in Path(f"/proc/{stub.pid}/cgroup").read_text()
        give_memory(stub, state)
        warnings: list[str] = []
        table.build(stub, state, warn=warnings.append)
        after = Path(f"/proc/{stub.pid}/cgroup").read_text()
    finally:
        stub.kill()
        (cgroup.parent / "cgroup.procs").write_text("0")
    assert cgroup.name not in after
    assert warnings == []


def test_a_directory_that_is_absent_at_the_target(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    with running(*python("os.chdir(sys.argv[1])", gone)) as pid:
        tree = Tree.stop([pid])
        state = capture(tree.processes[0])
        avoid = [(vma.start, vma.end) for vma in tree.processes[0].maps]
        tree.kill()
    gone.rmdir()
    stub = spawn_stub(state.pid, avoid)
    try:
        with pytest.raises(StateRefused, match=r"enter the working directory .*gone: No such file") as caught:
            table.build(stub, state, warn=print)
    finally:
        stub.kill()
    assert caught.value.object == f"pid {state.pid}"


USER_NOTIFICATION = """
import struct
code = b"".join(struct.pack("<HBBI", *each) for each in [(0x20, 0, 0, 0), (0x15, 0, 1, 79), (6, 0, 0, 0x7FC00000),
                                                         (6, 0, 0, 0x7FFF0000)])
text = ctypes.create_string_buffer(code, len(code))
program = ctypes.create_string_buffer(struct.pack("<H6xQ", 4, ctypes.addressof(text)), 16)
assert libc.syscall(317, 1, 8, program) > 0     # SECCOMP_FILTER_FLAG_NEW_LISTENER
"""


def test_a_supervised_process_is_refused_and_runs_on():
    with running(*python(USER_NOTIFICATION)) as pid:
        tree = Tree.stop([pid])
        try:
            with pytest.raises(SeccompSupervised) as caught:
                capture(tree.processes[0])
        finally:
            tree.resume()
        assert caught.value.object == f"pid {pid}"
        deadline = time.monotonic() + 5
        while "S (sleeping)" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.002)


@pytest.mark.parametrize("difference", [3 * 86_400 * NS, -20 * NS])
def test_the_clocks_of_a_stub_go_on(difference: int) -> None:
    """A stub that is spawned after the tool has entered the clocks sees them; the tool does not."""

    def tool() -> int:
        now = clocks.read(os.getpid())
        wanted = Clocks(monotonic=now.monotonic + difference, boottime=now.boottime + 2 * difference)
        clocks.enter(wanted, elapsed=1_000_000)
        stub = spawn_stub(None, [])
        try:
            seen = clocks.read(stub.pid)
        finally:
            stub.kill()
        late = (seen.monotonic - wanted.monotonic, seen.boottime - wanted.boottime)
        assert all(1_000_000 <= each < 10 * NS for each in late), late
        # the tool's own clock has not moved
        assert 0 <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) - now.monotonic < 10 * NS
        return 0

    child = os.fork()
    if child == 0:
        try:
            os._exit(tool())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_timers_go_on_in_a_tool_that_took_its_time():
    """An alarm that was due while the state was on its way waits for the process, and a later one is nearer."""
    source = "import signal; signal.pthread_sigmask(0, [14]); signal.setitimer(signal.ITIMER_REAL, 100, 1000)"
    with running(*python(source)) as pid:
        tree = Tree.stop([pid])
        state = capture(tree.processes[0])
        avoid = [(vma.start, vma.end) for vma in tree.processes[0].maps]
        tree.kill()
    stub = spawn_stub(state.pid, avoid)
    try:
        give_memory(stub, state)
        table.build(stub, state, warn=print, elapsed=600 * NS)
        stub.leave()
        table.install(stub, state)
        pending = stub.leader.pending(shared=True)
        stub.note()
        again = capture(stub)
    finally:
        stub.kill()
    assert [int.from_bytes(info[:4], "little") for info in pending] == [signal.SIGALRM]
    (timer,) = again.get(IntervalTimers).timers
    assert 490 * NS < timer.value <= 500 * NS
