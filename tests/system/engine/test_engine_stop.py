"""Stopping whole trees, letting them go as they were, ending them, and refusing what is not to be touched."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from checkpoint import procfs
from checkpoint.errors import (
    AlreadyTraced,
    CgroupFrozen,
    InitProcess,
    KernelThread,
    LeaderExited,
    MayNotTrace,
    NoSuchProcess,
    OwnProcess,
    VforkParent,
    ZombieProcess,
)
from checkpoint.kernel.ptrace import Event
from checkpoint.refuse import refuse_root, verdicts
from checkpoint.tracee import Tree
from checkpoint.verdict import Status
from tests.system.engine.target import Target, as_tool, end, python, state, wait_state

FREEZERS = [("cgroup2", "cgroup.freeze", "1", "0"), ("cgroup", "freezer.state", "FROZEN", "THAWED")]
FAMILY = """
import os, signal, sys, time
def child(depth):
    for _ in range(2):
        if os.fork() == 0:
            if depth: child(depth - 1)
            while True: signal.pause()
child(2)
if os.fork() == 0: os._exit(7)
time.sleep(0.2)
print("ready", flush=True)
while True: signal.pause()
"""


def end_family(child, pids):
    for pid in reversed(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end(child)


def test_a_tree_is_stopped_parents_first_with_its_zombies():
    child = python(FAMILY)
    pids = procfs.tree(child.pid)
    try:
        tree = Tree.stop([child.pid])
        found = [process.pid for process in tree.processes]
        (zombie,) = tree.zombies
        assert sorted([*found, zombie.pid]) == sorted(pids)
        assert len(found) == 15
        assert found[0] == child.pid
        for process in tree.processes[1:]:
            assert found.index(process.stat.ppid) < found.index(process.pid)
        assert (zombie.ppid, zombie.exit_code) == (child.pid, 7 << 8)
        assert all(state(pid) == "t" for pid in found)
        tree.resume()
        assert all(state(pid) in "SR" for pid in found)
        assert all(procfs.read_status(pid)["TracerPid"] == "0" for pid in found)
    finally:
        end_family(child, pids)


def test_several_roots_one_inside_the_other():
    child = python(FAMILY)
    pids = procfs.tree(child.pid)
    try:
        inner = procfs.children(child.pid)[0]
        tree = Tree.stop([inner, child.pid])
        assert next(process.pid for process in tree.processes) == child.pid
        assert len(tree.processes) == 15
        tree.resume()
    finally:
        end_family(child, pids)


FORKING = """
import os, sys, threading, time
def threads():
    while True:
        t = threading.Thread(target=time.sleep, args=(0.001,)); t.start(); t.join()
for _ in range(2): threading.Thread(target=threads, daemon=True).start()
print("ready", flush=True)
while True:
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0: time.sleep(0.01); os._exit(0)
        os._exit(0)
    os.waitpid(pid, 0)
"""


def test_a_tree_that_forks_and_clones_all_the_time_stands_still_when_it_is_stopped():
    child = python(FORKING)
    try:
        for _ in range(40):
            tree = Tree.stop([child.pid])
            pids = [process.pid for process in tree.processes]
            for process in tree.processes:
                assert procfs.threads(process.pid) == [thread.tid for thread in process.threads]
                assert set(procfs.children(process.pid)) <= {*pids, *(zombie.pid for zombie in tree.zombies)}
            states = {t: procfs.read_stat(p.pid, t.tid).state for p in tree.processes for t in p.threads}
            assert set(states.values()) == {"t"}
            tree.resume()
            time.sleep(0.002)
        assert child.poll() is None
    finally:
        end(child)


def test_a_process_in_state_t_stays_in_it(tmp_path):
    with Target("threads", tmp_path) as target:
        os.kill(target.pid, signal.SIGSTOP)
        wait_state(target.pid, "T")
        done = target.progress
        for queue in (False, True):
            tree = Tree.stop([target.pid])
            (process,) = tree.processes
            assert process.stop_signal == signal.SIGSTOP
            if queue:
                tree.queue_sigstops()
            tree.resume()
            wait_state(target.pid, "T")
        assert target.progress == done
        os.kill(target.pid, signal.SIGCONT)
        target.goes_on()
        tree = Tree.stop([target.pid])
        assert tree.processes[0].stop_signal == 0
        tree.resume()


def test_queued_sigstops_are_taken_back(tmp_path):
    with Target("threads", tmp_path) as target:
        for _ in range(20):
            tree = Tree.stop([target.pid])
            tree.queue_sigstops()
            for thread in tree.processes[0].threads:
                assert [int.from_bytes(info[:4], "little") for info in thread.pending()] == [signal.SIGSTOP]
            tree.resume()
            assert state(target.pid) in "RS"
            target.goes_on()


def test_a_sigcont_that_removes_the_queued_sigstops_does_no_harm(tmp_path):
    with Target("threads", tmp_path) as target:
        tree = Tree.stop([target.pid])
        tree.queue_sigstops()
        os.kill(target.pid, signal.SIGCONT)
        tree.resume()
        target.goes_on()


def test_a_sigstop_from_outside_meanwhile_takes_effect(tmp_path):
    with Target("threads", tmp_path) as target:
        tree = Tree.stop([target.pid])
        tree.queue_sigstops()
        os.kill(target.pid, signal.SIGSTOP)
        tree.resume()
        wait_state(target.pid, "T")
        os.kill(target.pid, signal.SIGCONT)
        target.goes_on()


def test_signals_that_come_while_it_is_stopped_arrive_with_sigstops_queued():
    child = python(
        """
import signal
got = []
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda n, f: got.append(n))
print("ready", flush=True)
while True:
    input()
    print(sorted(got), flush=True)
"""
    )
    try:
        tree = Tree.stop([child.pid])
        tree.queue_sigstops()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(child.pid, number)
        tree.resume()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "[1, 10, 15]\n"
    finally:
        end(child)


def test_a_tree_is_ended_with_all_that_descends():
    child = python(FAMILY)
    pids = procfs.tree(child.pid)
    try:
        living = [pid for pid in pids if not procfs.read_stat(pid).zombie]

        def work():
            tree = Tree.stop([child.pid])
            tree.queue_sigstops()
            tree.kill()

        assert as_tool(work) == 0
        assert child.wait(5) == -signal.SIGKILL
        deadline = time.monotonic() + 5
        while remaining := [pid for pid in living if procfs.exists(pid) and not procfs.read_stat(pid).zombie]:
            assert time.monotonic() < deadline, remaining
    finally:
        end_family(child, pids)


def test_a_pid_namespace_is_ended_leaves_first():
    with subprocess.Popen(
        ["unshare", "-p", "--fork", "--kill-child", sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True
    ) as outer:
        try:
            assert outer.stdout is not None
            assert outer.stdout.readline() == "ready\n"
            (init,) = procfs.children(outer.pid)
            assert procfs.inner_ids(init)[0] == 1
            start = time.monotonic()
            tree = Tree.stop([init])
            assert tree.processes[0].inner_pid == 1
            assert tree.processes[0].leader.inner_tid == 1
            tree.kill()
            assert time.monotonic() - start < 5
            assert outer.wait(5) != 0
            assert not procfs.exists(init)
        finally:
            outer.kill()


# -- what is refused


def test_a_number_that_is_no_process_is_refused():
    with pytest.raises(NoSuchProcess, match=r"TM-0301.*does not exist"):
        Tree.stop([(1 << 22) - 1])
    for number in (0, -1):
        with pytest.raises(NoSuchProcess, match="TM-0301"):
            Tree.stop([number])


def test_the_number_of_a_thread_is_refused_with_its_process_named(tmp_path):
    with Target("threads", tmp_path) as target:
        tid = procfs.threads(target.pid)[1]
        with pytest.raises(NoSuchProcess, match=f"a thread of process {target.pid}"):
            Tree.stop([tid])


def test_a_kernel_thread_is_refused():
    kernel = next(
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and int(name) > 1 and procfs.exists(int(name)) and procfs.read_stat(int(name)).kernel_thread
    )
    with pytest.raises(KernelThread, match="TM-0302"):
        Tree.stop([kernel])


def test_init_is_refused():
    with pytest.raises(InitProcess, match="TM-0303"):
        Tree.stop([1])


def test_ourselves_and_our_ancestors_are_refused():
    with pytest.raises(OwnProcess, match=r"TM-0304.*tcpmig itself"):
        Tree.stop([os.getpid()])
    parent = os.getppid()
    if parent == 1:
        pytest.fail("the tests need a parent that is not init")
    with pytest.raises(OwnProcess, match=r"TM-0304.*ancestor"):
        Tree.stop([parent])


def test_a_zombie_is_refused():
    with subprocess.Popen(["true"]) as child:
        wait_state(child.pid, "Z")
        with pytest.raises(ZombieProcess, match="TM-0305"):
            Tree.stop([child.pid])


def test_a_traced_process_is_refused_with_its_tracer_named(tmp_path):
    with Target("registers", tmp_path) as target:
        reader, writer = os.pipe()
        tracer = os.fork()
        if tracer == 0:
            Tree.stop([target.pid]).processes[0].leader.cont()
            os.write(writer, b"x")
            signal.pause()
            os._exit(0)
        os.read(reader, 1)
        try:
            with pytest.raises(AlreadyTraced, match=f"TM-0306.*traced by process {tracer}"):
                Tree.stop([target.pid])
            (verdict,) = verdicts(target.pid)
            assert (verdict.status, verdict.code) == (Status.REFUSE, "TM-0306")
        finally:
            os.kill(tracer, signal.SIGKILL)
            os.waitpid(tracer, 0)
            os.close(reader)
            os.close(writer)
        target.goes_on()


def test_a_process_that_we_may_not_trace_is_refused(tmp_path):
    with Target("registers", tmp_path) as target:

        def work():
            os.setuid(65534)
            with pytest.raises(MayNotTrace, match="TM-0307"):
                Tree.stop([target.pid])

        assert as_tool(work) == 0
        target.goes_on()


def test_a_process_whose_main_thread_has_ended_is_refused():
    child = python(
        """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall(60, 0)
"""
    )
    try:
        wait_state(child.pid, "Z")
        with pytest.raises(LeaderExited, match="TM-0308"):
            Tree.stop([child.pid])
        assert procfs.read_status(child.pid)["TracerPid"] == "0"
    finally:
        end(child)


VFORK = """
#include <unistd.h>
int main(void) { write(1, "ready\\n", 6); if (vfork() == 0) { sleep(60); _exit(0); } return 0; }
"""


def test_a_vfork_parent_is_given_time_and_then_refused(tmp_path):
    source = tmp_path / "v.c"
    source.write_text(VFORK)
    subprocess.run(["gcc", "-w", "-o", tmp_path / "v", source], check=True)
    with subprocess.Popen([tmp_path / "v"], stdout=subprocess.PIPE) as child:
        try:
            wait_state(child.pid, "D")
            (borrower,) = procfs.children(child.pid)
            with pytest.raises(VforkParent, match=f"TM-0502.*child {borrower}"):
                Tree.stop([child.pid], timeout=0.3)
            assert procfs.read_status(child.pid)["TracerPid"] == "0"
            os.kill(borrower, signal.SIGKILL)
            assert child.wait(5) == 0
        finally:
            child.kill()


@pytest.mark.parametrize(("kind", "file", "freeze", "thaw"), FREEZERS)
def test_a_frozen_process_is_refused(kind, file, freeze, thaw, tmp_path):
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    points = [
        point for _, point, what, options, *_ in mounts if what == kind and (what == "cgroup2" or "freezer" in options)
    ]
    assert points, "this system mounts no such hierarchy"
    group = Path(points[0]) / "tcpmig-engine-test"
    group.mkdir()
    try:
        with Target("registers", tmp_path) as target:
            (group / "cgroup.procs").write_text(str(target.pid))
            refuse_root(target.pid)
            (group / file).write_text(freeze)
            done, deadline = -1, time.monotonic() + 5
            while done != (done := target.progress):  # it freezes a moment later
                assert time.monotonic() < deadline
                time.sleep(0.05)
            try:
                with pytest.raises(CgroupFrozen, match=r"TM-0312.*tcpmig-engine-test"):
                    Tree.stop([target.pid])
            finally:
                (group / file).write_text(thaw)
            target.goes_on()
            Tree.stop([target.pid]).resume()
    finally:
        group.rmdir()


def test_verdicts_name_every_process():
    child = python(FAMILY)
    pids = procfs.tree(child.pid)
    try:
        found = verdicts(child.pid)
        assert sorted(v.subject for v in found) == sorted(f"pid {pid}" for pid in pids)
        assert {v.status for v in found} == {Status.OK}
        (gone,) = verdicts((1 << 22) - 1)
        assert (gone.status, gone.code) == (Status.REFUSE, "TM-0301")
    finally:
        end_family(child, pids)


def test_a_stop_that_fails_half_way_lets_everything_run():
    child = python(
        """
import os, ctypes, threading, time, signal
if os.fork() == 0:
    threading.Thread(target=time.sleep, args=(60,)).start()
    ctypes.CDLL(None).syscall(60, 0)
time.sleep(0.2)
print("ready", flush=True)
while True: signal.pause()
"""
    )
    pids = procfs.tree(child.pid)
    try:
        with pytest.raises(LeaderExited):
            Tree.stop([child.pid])
        assert state(child.pid) in "SR"
        assert procfs.read_status(child.pid)["TracerPid"] == "0"
    finally:
        end_family(child, pids)


def test_refusing_touches_nothing(tmp_path):
    with Target("registers", tmp_path) as target:
        refuse_root(target.pid)
        assert procfs.read_status(target.pid)["TracerPid"] == "0"
        target.check()


def test_a_busy_process_and_its_threads_all_stand_in_a_stop(tmp_path):
    with Target("threads", tmp_path) as target:
        tree = Tree.stop([target.pid])
        done = target.progress
        for thread in tree.processes[0].threads:
            assert thread.stop is not None
            assert thread.stop.event == Event.STOP
        time.sleep(0.02)
        assert target.progress == done
        tree.resume()


def test_other_threads_of_ours_go_on(tmp_path):
    """Waiting for a tracee must not hold up the interpreter."""
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(1)

    worker = threading.Thread(target=tick)
    worker.start()
    try:
        with Target("threads", tmp_path) as target:
            for _ in range(20):
                Tree.stop([target.pid]).resume()
        assert ticks
    finally:
        stop.set()
        worker.join()
