"""Threads that are told while the program runs, and born before it stands still: in the end there are those, and only
those, that the stopped program has."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from checkpoint import procfs
from checkpoint.kernel.kcmp import KcmpType, kcmp
from checkpoint.live import LiveCopy
from checkpoint.records import LiveTree
from checkpoint.spawn import Stub, spawn_stub
from checkpoint.state import birth, table
from checkpoint.state.base import State, TaskBuilder
from checkpoint.state.filesystem import ThreadDirectories
from checkpoint.state.membarrier import Membarrier, MembarrierCommand
from checkpoint.state.table import ProcessState
from checkpoint.tracee import Tree
from tcpstate.codec import from_plain, to_plain
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tests.system.state_moves import capture, give_memory
from tests.tscnet import wait_until

#: "+": one more thread; "-": the oldest ends; "/": the oldest gets directories of its own
PROGRAM = """
import ctypes, os, sys, threading
kept = []
class One(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.said, self.asked, self.done = "", threading.Semaphore(0), threading.Semaphore(0)
    def run(self):
        while True:
            self.asked.acquire()
            if self.said == "-":
                return
            assert ctypes.CDLL(None).unshare(0x200) == 0
            self.done.release()
while order := sys.stdin.read(1):
    if order == "+":
        kept.append(One())
        kept[-1].start()
    else:
        one = kept.pop(0) if order == "-" else kept[0]
        one.said = order
        one.asked.release()
        one.join() if order == "-" else one.done.acquire()
    print(*[one.native_id for one in kept], flush=True)
"""


class Program:
    """It, and what it says that its threads are."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid, self._orders, self._answers = process.pid, process.stdin, process.stdout
        self.tids: list[int] = []

    def do(self, orders: str) -> None:
        for order in orders:
            self._orders.write(order)
            self._orders.flush()
            self.tids = list(map(int, self._answers.readline().split()))
        # of one that was joined the kernel may still have something
        wait_until(lambda: procfs.threads(self.pid)[1:] == sorted(self.tids))


@pytest.fixture
def program() -> Iterator[Program]:
    argv = [sys.executable, "-IS", "-c", PROGRAM]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Program(process)
        process.kill()


@contextlib.contextmanager
def rounds(pid: int) -> Iterator[Callable[[], birth.Told]]:
    """What each round tells of its threads."""
    copy = LiveCopy([pid])

    def told() -> birth.Told:
        tree = copy.round().tree
        return from_plain(LiveTree, to_plain(tree)).threads[pid]

    try:
        copy.begin()
        yield told
    finally:
        copy.close()


def stopped(pid: int) -> ProcessState:
    """Its state; it ends, and its numbers are free."""
    tree = Tree.stop([pid])
    try:
        state = capture(tree.processes[0])
    finally:
        tree.kill()
    return state


@contextlib.contextmanager
def stub_of(state: ProcessState) -> Iterator[Stub]:
    stub = spawn_stub(state.pid, [(0x400000, 0x500000), (0x10000000, 0x40000000), (0x500000000000, 0x7FFFFFFFF000)])
    try:
        give_memory(stub, state)
        yield stub
    finally:
        stub.kill()


def tasks(stub: Stub) -> list[int]:
    return procfs.threads(stub.pid)[1:]


def build(stub: Stub, state: ProcessState) -> None:
    """As the stop does; all that the state has are there, in its order, and nobody else, and every one can be run."""
    birth.dismiss_ended({stub.pid: stub}, {stub.pid: state})
    table.build(stub, state, warn=lambda text: None)
    wanted = [thread.tid for thread in state.threads]
    assert [thread.tid for thread in stub.threads] == wanted
    assert tasks(stub) == sorted(wanted[1:])
    tables = {tid: CallTable() for tid in wanted}
    said = {tid: calls.call(SYS.gettid) for tid, calls in tables.items()}
    stub.run_all(tables)
    assert {tid: result.value for tid, result in said.items()} == {tid: tid for tid in wanted}


def since(tid: int, pid: int) -> int:
    return int(procfs.read_stat(pid, tid).start_time)


def changed(state: ProcessState, **kinds: State) -> ProcessState:
    """With other states of the process, by class name."""
    return dataclasses.replace(state, states=tuple(kinds.get(type(one).__name__, one) for one in state.states))


def test_each_round_tells_the_threads_that_there_are(program: Program) -> None:
    program.do("+++")
    with rounds(program.pid) as told:
        first, tids = told()
        assert list(tids) == sorted(program.tids)
        assert tuple(map(type, first)) == birth.FIRST_STATES
        program.do("-++")
        assert list(told()[1]) == sorted(program.tids)


def test_threads_with_directories_of_their_own_are_not_told(program: Program) -> None:
    program.do("+++/")
    with rounds(program.pid) as told:
        assert told()[1] == ()
        program.do("-")
        assert list(told()[1]) == sorted(program.tids)


def test_threads_come_and_go_between_rounds_and_before_the_stop(program: Program) -> None:
    program.do("++++")
    with rounds(program.pid) as told:
        before = told()
        program.do("-++-")
        again = told()
        program.do("-+++-")
    state = stopped(program.pid)
    with stub_of(state) as stub:
        for one in (before, again):
            birth.bear_ahead({state.pid: stub}, {state.pid: one}, lambda text: None)
            assert tasks(stub) == sorted(one[1])
        kept = {tid: since(tid, stub.pid) for tid in set(tasks(stub)) & set(program.tids)}
        assert kept
        build(stub, state)
        # these are the very ones that were born before
        assert {tid: since(tid, stub.pid) for tid in kept} == kept


def test_nobody_is_born_ahead_whose_number_is_taken(program: Program) -> None:
    program.do("+++")
    with rounds(program.pid) as told:
        first, tids = told()
    state = stopped(program.pid)
    with stub_of(state) as stub:
        taken = [tids[0], os.getpid(), *tids[1:]]
        birth.bear_ahead({state.pid: stub}, {state.pid: (first, taken)}, lambda text: None)
        assert tasks(stub) == sorted(tids)
        build(stub, state)


def test_a_number_goes_from_one_process_to_another(program: Program) -> None:
    program.do("++")
    with rounds(program.pid) as told:
        first, tids = told()
    state = stopped(program.pid)
    with stub_of(state) as stub:
        child = stub.fork(None)
        try:
            stubs = {stub.pid: stub, child.pid: child}
            birth.bear_ahead(stubs, {child.pid: (first, tids), stub.pid: (first, ())}, lambda text: None)
            assert (tasks(child), tasks(stub)) == (sorted(tids), [])
            birth.bear_ahead(stubs, {stub.pid: (first, tids), child.pid: (first, ())}, lambda text: None)
            assert (tasks(child), tasks(stub)) == ([], sorted(tids))
            build(stub, state)
        finally:
            child.kill()


def test_what_the_process_must_be_first_has_changed(program: Program) -> None:
    program.do("++")
    with rounds(program.pid) as told:
        first, tids = told()
    registered = Membarrier(registered=int(MembarrierCommand.REGISTER_PRIVATE_EXPEDITED))
    state = changed(stopped(program.pid), Membarrier=registered)
    with stub_of(state) as stub:
        birth.bear_ahead({state.pid: stub}, {state.pid: (first, tids)}, lambda text: None)
        assert stub.first == first
        build(stub, state)
        assert stub.first[0] == registered
        calls = CallTable()
        asked = calls.call(SYS.membarrier, MembarrierCommand.GET_REGISTRATIONS, 0, 0)
        stub.run(calls)
        assert asked.value & registered.registered  # type: ignore[operator]


def test_a_thread_got_directories_of_its_own_before_the_stop(program: Program) -> None:
    program.do("++")
    with rounds(program.pid) as told:
        before = told()
        program.do("/")
    own, shared = program.tids
    state = stopped(program.pid)
    assert [one.get(ThreadDirectories).cwd is None for one in state.threads if one.tid in (own, shared)].count(
        False
    ) == 1
    with stub_of(state) as stub:
        birth.bear_ahead({state.pid: stub}, {state.pid: before}, lambda text: None)
        build(stub, state)
        assert kcmp(stub.pid, own, KcmpType.FS) != 0
        assert kcmp(stub.pid, shared, KcmpType.FS) == 0


def test_hundreds_are_born_and_dismissed_again_and_again(program: Program) -> None:
    program.do("+" * 200)
    with rounds(program.pid) as told:
        first, tids = told()
    assert len(tids) == 200
    state = stopped(program.pid)
    with stub_of(state) as stub:
        for part in (tids[::2], tids[1::2], (), tids[:150], tids[50:]):
            birth.bear_ahead({state.pid: stub}, {state.pid: (first, part)}, lambda text: None)
            assert tasks(stub) == sorted(part)
        build(stub, state)


def test_the_first_thread_is_done_when_the_others_begin(program: Program) -> None:
    """What it does may throw away the signals by which others stop."""
    program.do("+")
    state = stopped(program.pid)
    reading, writing = os.pipe()
    with stub_of(state) as stub, contextlib.ExitStack() as ends:
        ends.callback(os.close, reading)
        ends.callback(os.close, writing)
        birth.bear_threads(stub, state, lambda text: None)
        tasks = []
        for thread, pause in zip(stub.threads, (50_000_000, 0), strict=True):
            task = TaskBuilder(pid=stub.pid, tid=thread.tid, warn=lambda text: None)
            mine = task.calls.call(SYS.pidfd_getfd, stub.tool_pidfd, writing, 0)
            if pause:
                task.calls.call(SYS.nanosleep, task.calls.put(struct.pack("<qq", 0, pause)), 0)
            task.calls.call(SYS.write, mine, task.calls.put(b"first" if pause else b"other"), 5)
            task.calls.call(SYS.close, mine)
            tasks.append(task)
        birth.run(stub, tasks)
        assert os.read(reading, 100) == b"firstother"
