"""Threads that are alike, as the kernel's notes say, are in the same state, as each of them says if it is asked."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint import offspring, procfs
from checkpoint.inject import Injection
from checkpoint.kernel import threaditer
from checkpoint.records import StatesRecord
from checkpoint.state import table
from checkpoint.state.likeness import Likeness
from checkpoint.state.table import ProcessState
from checkpoint.tracee import Tree
from tcpstate.codec import pack, unpack
from tcpstate.kernel.machine import SYS

#: one thread for each thing that a thread can have of its own, and many that have nothing
PROGRAM = """
import ctypes, os, signal, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
never, ready = threading.Event(), threading.Semaphore(0)
def done(result):
    assert result != -1, os.strerror(ctypes.get_errno())
def stack():
    memory = ctypes.create_string_buffer(1 << 16)
    keep.append(memory)
    done(libc.sigaltstack((ctypes.c_uint64 * 3)(ctypes.addressof(memory), 0, 1 << 16), None))
def capability():
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    done(libc.capget(header, data))
    data[0] &= ~(1 << 25)
    done(libc.capset(header, data))
def numbers(*given):
    return lambda: done(libc.syscall(*map(ctypes.c_long, given)))
def filter():
    code = (ctypes.c_uint64 * 1)(0x7FFF000000000006)
    class Prog(ctypes.Structure):
        _fields_ = (("size", ctypes.c_ushort), ("code", ctypes.c_void_p))
    keep.extend([code, prog := Prog(1, ctypes.addressof(code))])
    done(libc.syscall(SECCOMP, 1, 0, ctypes.byref(prog)))
def pending():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
keep = []
prctl = lambda *given: lambda: done(libc.prctl(*map(ctypes.c_ulong, (*given, 0, 0, 0, 0)[:5])))
name = lambda: open("/proc/thread-self/comm", "w").write("a name of mine")
things = {
    "name": name, "alternate stack": stack, "pending signal": pending, "capabilities": capability,
    "nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, 7),
    "policy": lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)),
    "real time": lambda: os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(3)),
    "reset on fork": lambda: os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0)),
    "affinity": lambda: os.sched_setaffinity(0, {0}),
    "timer slack": prctl(29, 12345), "parent death signal": prctl(1, 10),
    "machine check": prctl(33, 1, 1), "no new privileges": prctl(38, 1),
    "speculation": lambda: libc.prctl(53, 0, 4, 0, 0),  # not every machine can
    "personality": lambda: libc.personality(0x0040000), "directories": lambda: done(libc.unshare(0x200)),
    "filter": filter, "io priority": numbers(IOPRIO_SET, 1, 0, 2 << 13 | 5),
    "numa policy": numbers(SET_MEMPOLICY, 4, 0, 0), "user": numbers(SETRESUID, 99, 99, 99),
}
def run(thing):
    thing()
    ready.release()
    never.wait()
for thing in [lambda: None] * 5 + list(things.values()) + [lambda: None] * 30:
    threading.Thread(target=run, args=(thing,), daemon=True).start()
    ready.acquire()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def program() -> Iterator[int]:
    text = PROGRAM
    for word, number in {
        "SECCOMP": SYS.seccomp,
        "IOPRIO_SET": SYS.ioprio_set,
        "SET_MEMPOLICY": SYS.set_mempolicy,
        "SETRESUID": SYS.setresuid,
    }.items():
        text = text.replace(word, str(int(number)))
    with subprocess.Popen(
        [sys.executable, "-IS", "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        rest(process.pid)
        yield process.pid
        process.kill()


def rest(pid: int) -> None:
    """Wait until all threads stay where they wait: who waits for the interpreter looks every 5 ms."""
    before: list[str] = []
    while True:
        stats = [path.read_text() for path in sorted(Path(f"/proc/{pid}/task").glob("*/status"))]
        now = [
            line for text in stats for line in text.splitlines() if line.startswith(("State", "voluntary", "nonvol"))
        ]
        if now == before and not any(line.startswith("State") and "sleeping" not in line for line in now):
            return
        before = now
        time.sleep(0.1)


def states(pid: int, *, alike: bool) -> tuple[ProcessState, int]:
    """And how many threads were asked."""
    tree = Tree.stop([pid])
    try:
        (process,) = tree.processes
        if not alike:
            with Injection(process) as injection:
                return table.capture(process, injection), len(process.threads)
        likeness = Likeness(process)
        with Injection(process, likeness.asked) as injection:
            state, rows = table.capture_alike(process, injection, likeness)
        told = StatesRecord(states=(state,), clocks=state.clocks, alike={state.pid: rows})
        (found,) = unpack(StatesRecord, pack(told)).whole()
        assert (found,) == told.spelled_out().states
        return found, len(likeness.asked)
    finally:
        tree.resume()


def test_what_is_not_asked_is_what_would_be_said(program: int) -> None:
    if threaditer.rows(program) is None:
        pytest.fail("this kernel does not tell")
    said, all_of_them = states(program, alike=False)
    found, asked = states(program, alike=True)
    for one, other in zip(*(sorted(all_of.threads, key=lambda one: one.tid) for all_of in (said, found)), strict=True):
        assert one.tid == other.tid
        assert {type(state): state for state in one.states} == {type(state): state for state in other.states}
    assert [type(state) for state in said.states] == [type(state) for state in found.states]
    # 35 have nothing of their own, and those that differ in name or stack only need not be asked either
    assert asked <= all_of_them - 35


def test_of_threads_with_nothing_of_their_own_one_is_asked() -> None:
    text = """
import sys, threading
for _ in range(50):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-IS", "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        # the first has run a program since it was born, which they have not
        assert states(process.pid, alike=True)[1] == 2
        process.kill()


def test_children_of_many_threads() -> None:
    text = """
import subprocess, sys, threading
def run():
    children.append(subprocess.Popen(["sleep", "1000"]))
    threading.Event().wait()
children = []
for number in range(40):
    threading.Thread(target=run if number % 9 == 3 else threading.Event().wait, daemon=True).start()
while len(children) < 5:
    pass
print(*[child.pid for child in children], flush=True)
sys.stdin.read()
for child in children:
    child.kill()
"""
    argv = [sys.executable, "-IS", "-c", text]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = sorted(map(int, process.stdout.readline().split()))
        assert len(said) == 5
        assert sorted(offspring.children(process.pid)) == sorted(procfs.children(process.pid)) == said
        process.communicate("")
