"""The tool is killed at every kind of moment; the target must go on as if nothing had ever been there."""

import itertools
import os
import random
import signal
import struct
import time

import pytest

from checkpoint.inject import Injection
from checkpoint.leftovers import clean, leftovers
from checkpoint.tracee import Tree
from tcpstate.kernel import ptrace
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tests.system.engine.target import Target, as_tool, end, masks, outside_view, python, vdso, wait_state, wait_view

SEED = random.randrange(1 << 32)
ENTRIES = 40
SHORT_SLEEP = struct.pack("<qq", 0, 200_000)


def fill(table, *, kill_at=None):
    """Calls of several kinds; every tenth opens a descriptor, and says how to close it."""
    path, pause = table.path("/dev/null"), table.put(SHORT_SLEEP)
    opened = []
    for index in range(ENTRIES):
        if index == kill_at:
            table.call(SYS.kill, os.getpid(), signal.SIGKILL, ignore=True)
        elif index % 10 == 3:
            opened.append(table.call(SYS.open, path, os.O_RDONLY))
            table.undo(SYS.close, opened[-1])
        elif index % 10 == 7:
            table.call(SYS.ppoll, 0, 0, pause, 0)
        else:
            table.call(SYS.getppid)
    return opened


def session(pid, *, kill_at=None):
    """All that a tool does with a process."""
    tree = Tree.stop([pid])
    try:
        for process in tree.processes:
            with Injection(process) as injection:
                tables = {thread.tid: CallTable() for thread in process.threads}
                opened = {}
                for thread in process.threads:
                    last = thread is process.threads[-1]
                    opened[thread.tid] = fill(tables[thread.tid], kill_at=kill_at if last else None)
                injection.run(tables)
                closing = {tid: CallTable() for tid in opened}
                for tid, results in opened.items():
                    for fd in results:
                        closing[tid].call(SYS.close, fd.value)
                injection.run(closing)
    finally:
        tree.resume()


def killed_before(step, work):
    """``work``, killed before the given one of the steps by which it acts on others; how many it made if it lives."""
    count = itertools.count()
    last = []

    def stepping(function):
        def call(*args):
            # looking whether a wait is over is one step, however often it is done
            if (not last or last[0] is not function or function is not wait) and next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            last[:] = [function]
            return function(*args)

        return call

    wait = os.waitpid
    ptrace._ptrace = stepping(ptrace._ptrace)
    os.waitpid = stepping(wait)
    os.pwrite = stepping(os.pwrite)
    work()
    return next(count)


def steps_of(work):
    """How many steps the work has, uncut."""
    reader, writer = os.pipe()
    status = as_tool(lambda: os.write(writer, struct.pack("<q", killed_before(None, work))))
    assert status == 0
    (count,) = struct.unpack("<q", os.read(reader, 8))
    os.close(reader)
    os.close(writer)
    return count


def whole(target, before):
    """It goes on, traced by nobody, with the descriptors that it had."""
    target.goes_on()
    wait_view(target.pid, before, "fds", "signals", "tasks")


@pytest.mark.parametrize("name", ["registers", "threads"])
def test_killed_at_each_call_of_a_table(name, tmp_path):
    with Target(name, tmp_path) as target:
        before, code, blocked = outside_view(target.pid), vdso(target.pid), masks(target.pid)
        for entry in range(0, ENTRIES, 1 if name == "registers" else 2):
            status = as_tool(lambda entry=entry: session(target.pid, kill_at=entry))
            assert os.WIFSIGNALED(status), f"entry {entry}: {status:#x}"
            whole(target, before)
            if name == "registers":
                # a single thread takes even the memory with it
                wait_view(target.pid, before, "maps")
        assert leftovers(target.pid) is not None
        session(target.pid)  # cleans first
        assert leftovers(target.pid) is None
        assert outside_view(target.pid) == before
        assert vdso(target.pid) == code
        assert masks(target.pid) == blocked


@pytest.mark.parametrize(("name", "kills"), [("registers", 60), ("threads", 40), ("calls", 40)])
def test_killed_before_any_of_its_steps(name, kills, tmp_path):
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    # Killed right after the stop, before its registers are read, a thread does get the EINTR that signal(7) tells of.
    options = ["eintr"] if name == "calls" else []
    with Target(name, tmp_path, *options) as target:
        before, code, blocked = outside_view(target.pid), vdso(target.pid), masks(target.pid)
        count = steps_of(lambda: session(target.pid))
        assert count > 40
        killed = 0
        for _ in range(kills):
            step = chance.randrange(count)
            print(f"step {step} of {count}")
            status = as_tool(lambda step=step: killed_before(step, lambda: session(target.pid)))
            assert status in (0, signal.SIGKILL), f"step {step}: {status:#x}"
            killed += status == signal.SIGKILL
            whole(target, before)
        assert killed > kills / 2
        session(target.pid)
        assert leftovers(target.pid) is None
        assert outside_view(target.pid) == before
        assert vdso(target.pid) == code
        assert masks(target.pid) == blocked


def test_killed_with_sigstops_queued_the_tree_stays_stopped_and_whole(tmp_path):
    def work(pid):
        tree = Tree.stop([pid])
        with Injection(tree.processes[0]) as injection:
            tables = {thread.tid: CallTable() for thread in tree.processes[0].threads}
            for table in tables.values():
                fill(table)
            injection.run(tables)
        tree.queue_sigstops()
        os.kill(os.getpid(), signal.SIGKILL)

    with Target("threads", tmp_path) as target:
        for _ in range(10):
            assert as_tool(lambda: work(target.pid)) == signal.SIGKILL
            wait_state(target.pid, "T")
            done = target.progress
            time.sleep(0.01)
            assert target.progress == done
            os.kill(target.pid, signal.SIGCONT)
            target.goes_on()


def test_killed_on_the_way_out_with_sigstops_queued(tmp_path):
    """It runs, or is stopped; either way it is whole."""
    print(f"seed {SEED}")
    chance = random.Random(SEED)

    def work(pid):
        tree = Tree.stop([pid])
        tree.queue_sigstops()
        tree.resume()

    with Target("threads", tmp_path) as target:
        before = outside_view(target.pid)
        count = steps_of(lambda: work(target.pid))
        for _ in range(30):
            step = chance.randrange(count)
            as_tool(lambda step=step: killed_before(step, lambda: work(target.pid)))
            os.kill(target.pid, signal.SIGCONT)
            whole(target, before)


def test_a_thread_that_is_still_in_left_code_is_let_out(tmp_path):
    """The tool dies while a call blocks, and another comes before that call has ended."""

    def work(pid):
        tree = Tree.stop([pid])
        process = tree.processes[0]
        injection = Injection(process)
        injection.open()
        table = CallTable()
        table.call(SYS.kill, os.getpid(), signal.SIGKILL)
        table.call(SYS.ppoll, 0, 0, table.put(struct.pack("<qq", 2, 0)), 0)
        injection.run({process.threads[-1].tid: table})

    for name in ("registers", "threads"):
        with Target(name, tmp_path) as target:
            before = outside_view(target.pid)
            assert as_tool(lambda: work(target.pid)) == signal.SIGKILL
            left = leftovers(target.pid)
            assert left is not None
            assert len(left.ranges) == 2
            assert left.tracer == 0
            tree = Tree.stop([target.pid])
            assert clean(tree.processes[0])
            assert not clean(tree.processes[0])
            tree.resume()
            whole(target, before)
            assert outside_view(target.pid) == before


def test_a_stopped_process_that_was_left_is_cleaned(tmp_path):
    """SIGSTOP reaches it while it is still in the code of a dead tool."""
    with Target("threads", tmp_path) as target:
        before = outside_view(target.pid)
        for entry in (5, 20, 33):
            os.kill(target.pid, signal.SIGSTOP)
            wait_state(target.pid, "T")
            assert as_tool(lambda entry=entry: session(target.pid, kill_at=entry)) == signal.SIGKILL
            wait_state(target.pid, "T")
            session(target.pid)
            wait_state(target.pid, "T")  # each thread stops as it comes out of the kernel
            assert outside_view(target.pid) == before
            os.kill(target.pid, signal.SIGCONT)
            target.goes_on()


def test_a_handler_for_the_stop_signal_does_no_harm():
    """Programs that handle all of the signals we could stop by may see one too many, and nothing else."""
    child = python(
        """
import signal, time
seen = []
for number in (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD):
    signal.signal(number, lambda n, f: seen.append(n))
print("ready", flush=True)
while True:
    input()
    print(len(seen), flush=True)
"""
    )
    try:
        before = outside_view(child.pid)
        for entry in range(0, ENTRIES, 4):
            assert as_tool(lambda entry=entry: session(child.pid, kill_at=entry)) == signal.SIGKILL
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            assert 0 <= int(child.stdout.readline()) <= entry + 4
        session(child.pid)
        assert outside_view(child.pid) == before
    finally:
        end(child)
