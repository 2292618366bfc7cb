"""Programs are stopped, made to make calls, and let go, hundreds of times, and must not notice."""

import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest

from checkpoint.errors import InjectionTimeout
from checkpoint.inject import Injection
from checkpoint.leftovers import leftovers
from checkpoint.tracee import Tree
from tcpstate.kernel.calls import CallError, CallTable
from tcpstate.kernel.machine import SYS
from tests.system.engine.target import Target, end, masks, outside_view, python, state, vdso, wait_state

SEED = random.randrange(1 << 32)


def numbers(process):
    """A table for each thread that asks for its own number, and the results."""
    tables = {thread.tid: CallTable() for thread in process.threads}
    results = {tid: [table.call(SYS.gettid) for _ in range(20)] for tid, table in tables.items()}
    return tables, results


def cycle(pid):
    tree = Tree.stop([pid])
    try:
        for process in tree.processes:
            with Injection(process) as injection:
                tables, results = numbers(process)
                injection.run(tables)
                for tid, found in results.items():
                    assert {result.value for result in found} == {tid}
                injection.run({process.leader.tid: numbers(process)[0][process.leader.tid]})
    finally:
        tree.resume()


@pytest.mark.parametrize(("name", "cycles"), [("registers", 200), ("threads", 100), ("calls", 100)])
def test_a_program_does_not_notice(name, cycles, tmp_path):
    print(f"seed {SEED}")
    moments = random.Random(SEED)
    with Target(name, tmp_path) as target:
        before, code, blocked = outside_view(target.pid), vdso(target.pid), masks(target.pid)
        for _ in range(cycles):
            cycle(target.pid)
            time.sleep(moments.random() * 0.006)
        target.goes_on()
        assert leftovers(target.pid) is None
        assert vdso(target.pid) == code
        assert outside_view(target.pid) == before
        assert masks(target.pid) == blocked


@pytest.mark.parametrize("name", ["registers", "threads", "calls"])
def test_a_program_that_is_only_stopped_does_not_notice(name, tmp_path):
    print(f"seed {SEED}")
    moments = random.Random(SEED)
    with Target(name, tmp_path) as target:
        for _ in range(100):
            Tree.stop([target.pid]).resume()
            time.sleep(moments.random() * 0.006)
        target.goes_on()


@pytest.mark.parametrize("name", ["registers", "threads", "calls"])
def test_everything_is_as_before_when_the_injection_is_closed(name, tmp_path):
    def look(thread):
        return thread.get_registers(), thread.get_sigmask(), thread.get_xstate(), thread.pending()

    with Target(name, tmp_path) as target:
        for _ in range(20):
            code = vdso(target.pid)
            tree = Tree.stop([target.pid])
            (process,) = tree.processes
            maps = outside_view(target.pid)["maps"]
            expected = [(t.registers, t.sigmask, t.get_xstate(), t.pending()) for t in process.threads]
            with Injection(process) as injection:
                injection.run(numbers(process)[0])
                assert outside_view(target.pid)["maps"] != maps
                # what colleagues read meanwhile is the application's, not ours
                assert [(t.registers, t.sigmask) for t in process.threads] == [each[:2] for each in expected]
            assert [look(thread) for thread in process.threads] == expected
            assert outside_view(target.pid)["maps"] == maps
            assert vdso(target.pid) == code
            tree.resume()
        target.goes_on()


def test_results_and_data_come_back(tmp_path):
    with Target("registers", tmp_path) as target:
        tree = Tree.stop([target.pid])
        with Injection(tree.processes[0]) as injection:
            table = CallTable()
            ends = table.room(8)
            table.call(SYS.pipe2, ends, os.O_CLOEXEC)
            text = table.put(b"through the pipe")
            table.call(SYS.fcntl, 0, 0, 0, ignore=True)
            injection.run({target.pid: table})
            read, write = ends.u32(), ends.u32(4)
            again = CallTable()
            text, back = again.put(b"through the pipe"), again.room(16)
            written = again.call(SYS.write, write, text, 16)
            # the result of one call is an argument of the next
            got = again.call(SYS.read, read, back, written)
            again.call(SYS.close, read)
            again.call(SYS.close, write)
            injection.run({target.pid: again})
            assert (written.value, got.value, back.bytes()) == (16, 16, b"through the pipe")
        tree.resume()
        target.goes_on()


def test_a_call_that_fails_ends_its_table_and_nothing_else(tmp_path):
    with Target("threads", tmp_path) as target:
        before = outside_view(target.pid)
        tree = Tree.stop([target.pid])
        (process,) = tree.processes
        with Injection(process) as injection:
            tables, results = numbers(process)
            bad = tables[process.threads[2].tid] = CallTable()
            bad.call(SYS.getpid)
            bad.call(SYS.close, 12345, label="close a hole")
            never = bad.call(SYS.getpid)
            with pytest.raises(CallError, match="close a hole: Bad file descriptor") as caught:
                injection.run(tables)
            assert caught.value.index == 1
            with pytest.raises(RuntimeError, match="has not run"):
                assert never.value
            for tid in set(tables) - {process.threads[2].tid}:
                assert {result.value for result in results[tid]} == {tid}
        tree.resume()
        target.goes_on()
        assert outside_view(target.pid) == before


def test_many_large_tables_run_one_group_after_the_other(tmp_path):
    with Target("threads", tmp_path) as target:
        tree = Tree.stop([target.pid])
        (process,) = tree.processes
        with Injection(process) as injection:
            tables = {thread.tid: CallTable() for thread in process.threads}
            places = {tid: table.put(bytes([tid & 0xFF]) * 400_000) for tid, table in tables.items()}
            results = {tid: table.call(SYS.gettid) for tid, table in tables.items()}
            injection.run(tables)
            assert all(results[tid].value == tid for tid in tables)
            assert all(places[tid].bytes() == bytes([tid & 0xFF]) * 400_000 for tid in tables)
        tree.resume()
        target.goes_on()


def test_a_call_that_does_not_return_is_interrupted(tmp_path):
    with Target("threads", tmp_path) as target:
        before = outside_view(target.pid)
        tree = Tree.stop([target.pid])
        (process,) = tree.processes
        with Injection(process) as injection:
            table = CallTable()
            table.call(SYS.ppoll, 0, 0, 0, 0, label="for ever")
            start = time.monotonic()
            with pytest.raises(InjectionTimeout, match=r"TM-0507.*did not return within"):
                injection.run({process.threads[1].tid: table}, timeout=0.2)
            assert time.monotonic() - start < 5
        tree.resume()
        target.goes_on()
        assert outside_view(target.pid) == before


def test_it_works_while_the_address_space_is_limited(tmp_path):
    with Target("registers", tmp_path) as target:
        size = int(Path(f"/proc/{target.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(target.pid, resource.RLIMIT_AS, (size + 128 * 1024, size + 128 * 1024))
        cycle(target.pid)
        target.goes_on()


# -- signals


COUNTS = """
import signal, time
n = {}
def seen(number, frame): n[number] = n.get(number, 0) + 1
for number in NUMBERS: signal.signal(number, seen)
print("ready", flush=True)
while True:
    input()
    print(sorted(n.items()), flush=True)
"""


def counting(*numbers_):
    return python(COUNTS.replace("NUMBERS", repr([int(n) for n in numbers_])))


def told(child):
    child.stdin.write("\n")
    child.stdin.flush()
    return eval(child.stdout.readline())


@pytest.mark.parametrize(
    "number", [signal.SIGURG, signal.SIGUSR1, signal.SIGRTMIN + 3, signal.SIGWINCH, signal.SIGCHLD]
)
def test_a_signal_that_comes_meanwhile_arrives_once(number):
    child = counting(signal.SIGURG, signal.SIGUSR1, signal.SIGRTMIN + 3, signal.SIGWINCH, signal.SIGCHLD)
    try:
        tree = Tree.stop([child.pid])
        os.kill(child.pid, number)  # between stop and calls
        with Injection(tree.processes[0]) as injection:
            injection.run(numbers(tree.processes[0])[0])
        tree.resume()
        assert told(child) == [(number, 1)]
        tree = Tree.stop([child.pid])
        with Injection(tree.processes[0]) as injection:
            injection.run(numbers(tree.processes[0])[0])
            os.kill(child.pid, number)  # between two runs
            injection.run(numbers(tree.processes[0])[0])
        tree.resume()
        assert told(child) == [(number, 2)]
    finally:
        end(child)


def test_a_signal_during_a_call_arrives_once_and_does_not_end_the_table():
    child = counting(signal.SIGURG, signal.SIGUSR1)
    try:
        for number, count in ((signal.SIGURG, 1), (signal.SIGUSR1, 1), (signal.SIGURG, 2)):
            tree = Tree.stop([child.pid])
            with Injection(tree.processes[0]) as injection:
                table = CallTable()
                table.call(SYS.kill, child.pid, number)
                last = table.call(SYS.getpid)
                injection.run({child.pid: table})
                assert last.value == child.pid
            tree.resume()
            assert dict(told(child))[number] == count
    finally:
        end(child)


def test_signal_data_survives():
    child = python(
        """
import ctypes, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG, signal.SIGRTMIN])
print("ready", flush=True)
input()
print([tuple(signal.sigwaitinfo([signal.SIGURG, signal.SIGRTMIN])) for _ in range(3)], flush=True)
"""
    )
    try:
        os.kill(child.pid, signal.SIGURG)
        os.kill(child.pid, signal.SIGRTMIN)
        os.kill(child.pid, signal.SIGRTMIN)
        cycle(child.pid)
        infos = [info[:5] for info in told(child)]
        # si_signo, si_code SI_USER, si_errno, si_pid, si_uid
        assert infos == [(int(n), 0, 0, os.getpid(), os.getuid()) for n in (signal.SIGURG, 34, 34)]
    finally:
        end(child)


def test_a_program_with_handlers_for_all_ignored_signals_sees_none():
    child = counting(signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD)
    try:
        for _ in range(20):
            cycle(child.pid)
        assert told(child) == []
    finally:
        end(child)


def test_sigstop_during_the_calls_takes_effect_afterwards(tmp_path):
    with Target("threads", tmp_path) as target:
        tree = Tree.stop([target.pid])
        with Injection(tree.processes[0]) as injection:
            os.kill(target.pid, signal.SIGSTOP)
            injection.run(numbers(tree.processes[0])[0])
        tree.resume()
        wait_state(target.pid, "T")
        cycle(target.pid)
        wait_state(target.pid, "T")
        os.kill(target.pid, signal.SIGCONT)
        target.goes_on()
        assert state(target.pid) in "RS"
