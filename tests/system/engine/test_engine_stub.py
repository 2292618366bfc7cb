"""Stubs: born with the wanted numbers, with nothing of ours left at the end, and gone if the tool goes."""

import dataclasses
import os
import signal
import struct
import time
from pathlib import Path

import pytest

from checkpoint import procfs, spawn
from checkpoint.errors import PidTaken, SpawnFailed
from checkpoint.inject import Injection
from checkpoint.kernel.clone import CloneFlag
from checkpoint.memory.vma import read_maps
from checkpoint.spawn import spawn_stub
from checkpoint.tracee import Tree
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tests.system.engine.target import as_tool, wait_state

AVOID = [(0x400000, 0x500000), (0x10000000, 0x40000000), (0x7F0000000000, 0x7FFFFFFFF000)]


def free_numbers(count):
    """Numbers that nobody uses, well away from those that are given out next."""
    last = int(Path("/proc/loadavg").read_text().split()[-1])
    used = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    at = (last + 9000) % 20000 + 2000
    found = []
    while len(found) < count:
        if at not in used and not procfs.users_of_number(at):
            found.append(at)
        at += 1
    return found


@pytest.fixture
def born():
    """Stubs that are killed at the end, children first."""
    stubs = []
    yield stubs
    for stub in reversed(stubs):
        stub.kill()


def own_number(stub, tid=None):
    calls = CallTable()
    pid, thread = calls.call(SYS.getpid), calls.call(SYS.gettid)
    stub.run(calls, tid)
    return pid.value, thread.value


def test_a_stub_has_the_number_that_was_asked_for(born):
    (number,) = free_numbers(1)
    stub = spawn_stub(number, AVOID)
    born.append(stub)
    assert stub.pid == number
    assert own_number(stub) == (number, number)
    assert procfs.read_stat(number).ppid == os.getpid()
    assert procfs.fds(number) == [stub.tool_pidfd]


def test_a_stub_without_a_wish_gets_any_number(born):
    born.append(spawn_stub(None, AVOID))
    assert own_number(born[0]) == (born[0].pid, born[0].pid)


def test_what_is_ours_lies_in_the_window_and_the_window_in_a_gap(born):
    stub = spawn_stub(None, AVOID)
    born.append(stub)
    low, high = stub.window
    assert not [each for each in AVOID if each[0] < high and low < each[1]]
    assert low <= stub.parking[0] < stub.parking[1] <= high
    inside = [vma for vma in read_maps(stub.pid) if low <= vma.start < high]
    assert inside
    assert not [vma for vma in inside if vma.end > high]
    assert not [vma for vma in inside if vma.start < stub.parking[1] and stub.parking[0] < vma.end]
    outside = {vma.name for vma in read_maps(stub.pid) if not low <= vma.start < high}
    assert outside <= {"[vvar]", "[vvar_vclock]", "[vdso]", "[stack]", "[vsyscall]"}


def test_a_stub_takes_our_descriptors(born):
    stub = spawn_stub(None, AVOID)
    born.append(stub)
    reader, writer = os.pipe()
    try:
        calls = CallTable()
        taken = calls.call(SYS.pidfd_getfd, stub.tool_pidfd, writer, 0)
        text = calls.put(b"from the stub")
        calls.call(SYS.write, taken, text, 13)
        calls.call(SYS.close, taken)
        stub.run(calls)
        assert os.read(reader, 100) == b"from the stub"
    finally:
        os.close(reader)
        os.close(writer)


def test_children_siblings_and_threads(born):
    numbers = free_numbers(6)
    root = spawn_stub(numbers[0], AVOID)
    born.append(root)
    child = root.fork(numbers[1])
    born.append(child)
    grandchild = child.fork(numbers[2])
    born.append(grandchild)
    sibling = child.fork(numbers[3], CloneFlag.PARENT)
    born.append(sibling)
    assert [stub.pid for stub in born] == numbers[:4]
    assert [procfs.read_stat(stub.pid).ppid for stub in born[1:]] == [root.pid, child.pid, root.pid]
    # the second number is lower than the first: the order is the caller's
    child.clone_threads([numbers[5], numbers[4]])
    assert [thread.tid for thread in child.threads] == [numbers[1], numbers[5], numbers[4]]
    for stub in born:
        assert own_number(stub) == (stub.pid, stub.pid)
    tables = {thread.tid: CallTable() for thread in child.threads}
    results = {tid: table.call(SYS.gettid) for tid, table in tables.items()}
    child.run_all(tables)
    assert all(result.value == tid for tid, result in results.items())
    assert own_number(child, numbers[4]) == (child.pid, numbers[4])


def test_the_exit_signal_is_the_one_asked_for(born):
    root = spawn_stub(None, AVOID)
    born.append(root)
    born.append(root.fork(None, exit_signal=signal.SIGUSR1))
    assert procfs.read_stat(born[1].pid).exit_signal == signal.SIGUSR1
    born.append(root.fork(None))
    assert procfs.read_stat(born[2].pid).exit_signal == signal.SIGCHLD


def test_a_taken_number_is_refused_and_its_user_named(born):
    stub = spawn_stub(None, AVOID)
    born.append(stub)
    with pytest.raises(PidTaken, match=rf"TM-0381.*process {stub.pid} \("):
        spawn_stub(stub.pid, AVOID)
    with pytest.raises(PidTaken, match=rf"TM-0381.*process {os.getpid()} \("):
        stub.fork(os.getpid())
    (number,) = free_numbers(1)
    stub.clone_threads([number])
    with pytest.raises(PidTaken, match=f"a thread of process {stub.pid}"):
        spawn_stub(number, AVOID)
    assert own_number(stub) == (stub.pid, stub.pid)


def test_a_number_that_is_only_a_session_is_taken(born):
    root = spawn_stub(None, AVOID)
    born.append(root)
    leader = root.fork(None)
    calls = CallTable()
    calls.call(SYS.setsid)
    leader.run(calls)
    member = leader.fork(None, CloneFlag.PARENT)
    born.append(member)
    leader.exit(0)
    reap = CallTable()
    reap.call(SYS.wait4, leader.pid, 0, 0, 0)
    root.run(reap)
    assert not procfs.exists(leader.pid)
    with pytest.raises(PidTaken, match=f"the session of process {member.pid}"):
        spawn_stub(leader.pid, AVOID)


def test_a_number_out_of_range_is_refused():
    limit = int(Path("/proc/sys/kernel/pid_max").read_text())
    with pytest.raises(SpawnFailed, match=r"TM-0508.*range"):
        spawn_stub(limit + 5, AVOID)


def test_ends(born):
    root = spawn_stub(None, AVOID)
    born.append(root)
    exited, killed = root.fork(None), root.fork(None)
    exited.clone_threads(free_numbers(2))
    exited.exit(7)
    killed.die(signal.SIGTERM)
    assert procfs.read_stat(exited.pid).zombie
    assert procfs.read_stat(exited.pid).exit_code == 7 << 8
    assert procfs.read_stat(killed.pid).exit_code == signal.SIGTERM


def test_what_leaves_has_nothing_of_ours_in_it(born):
    root = spawn_stub(None, AVOID)
    born.append(root)
    child = root.fork(None)
    born.append(child)
    child.clone_threads(free_numbers(3))
    for stub in (root, child):
        low, high = stub.window
        stub.leave()
        assert not [vma for vma in read_maps(stub.pid) if vma.start < high and low < vma.end]
        vdso = next(vma for vma in read_maps(stub.pid) if vma.name == "[vdso]")
        own = next(vma for vma in read_maps(os.getpid()) if vma.name == "[vdso]")
        with open("/proc/self/mem", "rb") as memory:
            memory.seek(own.start)
            assert stub.read(vdso.start, vdso.size) == memory.read(own.size)
        unblockable = 1 << signal.SIGKILL - 1 | 1 << signal.SIGSTOP - 1
        assert all(thread.get_sigmask() | unblockable == (1 << 64) - 1 for thread in stub.threads)


PROGRAM = bytes.fromhex(
    "b800000000"  # mov eax, 0 (read)
    "bf00000000"  # mov edi, 0 (number put in below)
    "4889e6"  # mov rsi, rsp
    "ba01000000"  # mov edx, 1
    "0f05"  # syscall
    "b8e7000000"  # mov eax, 231 (exit_group)
    "0fb63c24"  # movzx edi, byte ptr [rsp]
    "0f05"  # syscall
)


def make_program(stub, descriptor):
    """Give the stub a program that reads a byte from a pipe of ours and exits with it."""
    calls = CallTable()
    taken = calls.call(SYS.pidfd_getfd, stub.tool_pidfd, descriptor, 0)
    code = calls.call(SYS.mmap, 0x50000000, 8192, 7, 0x100022, -1 & 0xFFFFFFFF, 0)
    stub.run(calls)
    stub.write(code.value, PROGRAM[:6] + struct.pack("<i", taken.value) + PROGRAM[10:])
    return code.value


def start_program(stub, code):
    stub.leave()
    registers = stub.leader.get_registers().moved(code)
    stub.leader.set_registers(dataclasses.replace(registers, rsp=code + 8000))
    stub.leader.set_sigmask(0)
    stub.survive_tool()
    stub.release()


def test_a_stub_that_was_released_runs_what_it_was_made(born):
    reader, writer = os.pipe()
    stub = spawn_stub(None, AVOID)
    try:
        start_program(stub, make_program(stub, reader))
        assert procfs.read_status(stub.pid)["TracerPid"] == "0"
        # it can be stopped again like any other process
        tree = Tree.stop([stub.pid])
        with Injection(tree.processes[0]) as injection:
            calls = CallTable()
            number = calls.call(SYS.getpid)
            injection.run({stub.pid: calls})
            assert number.value == stub.pid
        tree.resume()
        os.write(writer, b"\x2a")
        assert os.waitpid(stub.pid, 0) == (stub.pid, 42 << 8)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("survives", [False, True])
def test_stubs_die_with_the_tool_unless_they_were_told_to_survive(survives):
    numbers = free_numbers(3)
    reader, writer = os.pipe()

    def work():
        root = spawn_stub(numbers[0], AVOID)
        child = root.fork(numbers[1])
        child.clone_threads([numbers[2]])
        code = [make_program(root, reader)]
        if survives:
            stub = root
            stub.leave()
            stub.leader.set_registers(stub.leader.get_registers().moved(code[0]))
            stub.leader.set_sigmask(0)
            stub.survive_tool()
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        assert as_tool(work) == signal.SIGKILL
        if survives:
            # its stack is still that of the stub: it reads, and exits
            wait_state(numbers[0], "SR")
            os.write(writer, b"x")
        deadline = time.monotonic() + 5
        while any(procfs.exists(number) and not procfs.read_stat(number).zombie for number in numbers[:2]):
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_stub_that_is_not_traced_yet_ends_with_the_tool():
    (number,) = free_numbers(1)

    def work():
        def never(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        spawn.Stub._seized = never
        spawn_stub(number, AVOID)

    assert as_tool(work) == signal.SIGKILL
    deadline = time.monotonic() + 5
    while procfs.exists(number) and not procfs.read_stat(number).zombie:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_without_executable_memory_plain_calls_start_a_stub(monkeypatch, born):
    monkeypatch.setattr(spawn, "_machine_spawn", lambda: None)
    (number,) = free_numbers(1)
    born.append(spawn_stub(number, AVOID))
    assert own_number(born[0]) == (number, number)


def test_a_program_that_cannot_be_executed_is_an_error(monkeypatch):
    monkeypatch.setattr(spawn, "stub_elf", lambda base, tool: b"no program")
    with pytest.raises(SpawnFailed, match=r"TM-0508.*Exec format error"):
        spawn_stub(None, AVOID)
    monkeypatch.setattr(spawn, "_machine_spawn", lambda: None)
    with pytest.raises(SpawnFailed, match=r"TM-0508.*Exec format error"):
        spawn_stub(None, AVOID)


def test_in_a_pid_namespace_the_first_is_its_init_and_numbers_are_those_inside():
    def work():
        syscall(SYS.unshare, CloneFlag.NEWPID)
        init = spawn_stub(1, AVOID)
        assert init.inner_pid == 1
        child = init.fork(500)
        child.clone_threads([600, 700])
        assert child.inner_pid == 500
        assert [thread.inner_tid for thread in child.threads] == [500, 600, 700]
        assert child.pid != 500
        for tid in (thread.tid for thread in child.threads):
            assert own_number(child, tid) == (500, child.thread(tid).inner_tid)
        taken = CallTable()
        descriptor = taken.call(SYS.pidfd_getfd, child.tool_pidfd, 2, 0)
        child.run(taken)
        assert descriptor.value >= 0
        child.kill()
        init.kill()

    assert as_tool(work) == 0


def test_a_time_namespace_that_was_unshared_is_entered():
    def work():
        syscall(SYS.unshare, CloneFlag.NEWTIME)
        with open("/proc/self/timens_offsets", "w") as offsets:
            offsets.write("monotonic 1000000 0\n")
        stub = spawn_stub(None, AVOID)
        child = stub.fork(None)
        for each in (stub, child):
            calls = CallTable()
            now = calls.room(16)
            calls.call(SYS.clock_gettime, time.CLOCK_MONOTONIC, now)
            each.run(calls)
            assert now.u64() > time.clock_gettime(time.CLOCK_MONOTONIC) + 999_000
        child.kill()
        stub.kill()

    assert as_tool(work) == 0


def test_the_signal_that_a_handler_will_have_is_dealt_with(born):
    """The rebuilt handlers may be for the very signal by which our code stops; leaving must not run them."""
    stub = spawn_stub(None, AVOID)
    born.append(stub)
    calls = CallTable()
    for number in (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD):
        action = calls.put(struct.pack("<QQQQ", 0xDEAD0000, 0x04000000, 0xDEAD1000, 0))
        calls.call(SYS.rt_sigaction, number, action, 0, 8)
    stub.run(calls)
    queue = CallTable()
    queue.call(SYS.kill, stub.pid, signal.SIGURG)
    queue.call(SYS.kill, stub.pid, signal.SIGUSR1)
    stub.run(queue)
    stub.leave()
    pending = stub.leader.pending(shared=True) + stub.leader.pending()
    assert sorted(int.from_bytes(info[:4], "little") for info in pending) == [signal.SIGUSR1, signal.SIGURG]


def test_the_pidfd_of_the_tool_is_not_left_inheritable(born):
    before = set(os.listdir("/proc/self/fd"))
    born.append(spawn_stub(None, AVOID))
    assert set(os.listdir("/proc/self/fd")) - before <= {str(fd) for fd in born[0]._fds.values()}
