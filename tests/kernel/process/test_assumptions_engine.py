"""What the process engine assumes of Linux, one assumption each. A red one names the culprit on a new kernel."""

import contextlib
import ctypes
import errno
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint.arch.x86_64.registers import Restart
from checkpoint.kernel import cbpf, ptrace
from checkpoint.kernel.kcmp import KcmpType, kcmp
from checkpoint.kernel.ptrace import Event, Option
from checkpoint.memory.vma import read_maps
from checkpoint.thread import Thread
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS

SIGNAL = 0
GROUP_STOP = (Event.STOP, signal.SIGSTOP)
INTERRUPTED = (Event.STOP, signal.SIGTRAP)


@contextlib.contextmanager
def child(source):
    """A Python program that has printed its first line."""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.02)  # into the call that comes next
            yield process
        finally:
            process.kill()


SLEEPING = 'import signal, time\nprint("ready", flush=True)\ntime.sleep(60)'


def seized(pid, options=Option(0)):  # noqa: B008
    thread = Thread(pid, pid)
    thread.seize(options)
    thread.interrupt()
    stop = thread.wait(5)
    assert (stop.event, stop.signal) == INTERRUPTED
    return thread


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def comes(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def vdso(pid):
    return next(vma for vma in read_maps(pid) if vma.name == "[vdso]")


def memory(pid, address, size):
    with open(f"/proc/{pid}/mem", "rb") as file:
        file.seek(address)
        return file.read(size)


def test_the_vdso_ends_with_zeros_that_have_room_for_boot():
    from checkpoint.boot import tail

    where = vdso(os.getpid())
    assert tail(memory(os.getpid(), where.start, where.size)) is not None


def test_a_write_to_a_vdso_is_seen_by_that_process_alone():
    with child(SLEEPING) as one, child(SLEEPING) as other:
        where = vdso(one.pid)
        with open(f"/proc/{one.pid}/mem", "r+b", buffering=0) as file:
            file.seek(where.end - 8)
            file.write(b"privates")
        assert memory(one.pid, where.end - 8, 8) == b"privates"
        assert memory(other.pid, vdso(other.pid).end - 8, 8) == bytes(8)


@pytest.mark.parametrize("how", ["SIG_IGN", "SIG_DFL"])
def test_a_tracer_sees_even_an_ignored_signal(how):
    with child(f"import signal; signal.signal(signal.SIGURG, signal.{how})\n" + SLEEPING) as process:
        thread = seized(process.pid)
        syscall(SYS.tgkill, process.pid, process.pid, signal.SIGURG)
        thread.cont()
        stop = thread.wait(5)
        assert (stop.event, stop.signal) == (SIGNAL, signal.SIGURG)
        thread.detach()


def test_an_ignored_signal_about_to_be_delivered_is_dropped_when_the_tracer_goes():
    with child(SLEEPING) as process:
        thread = seized(process.pid)
        syscall(SYS.tgkill, process.pid, process.pid, signal.SIGURG)
        thread.cont()
        thread.wait(5)
        thread.detach(signal.SIGURG)  # what the kernel does when the tracer is killed
        comes(lambda: state(process.pid) == "S")
        assert process.poll() is None


def test_an_interrupt_that_is_pending_stops_before_any_user_instruction():
    with child("print('ready', flush=True)\nwhile True: pass") as process:
        thread = seized(process.pid)
        before = thread.get_registers()
        for _ in range(20):
            thread.interrupt()
            thread.cont()
            stop = thread.wait(5)
            assert (stop.event, stop.signal) == INTERRUPTED
            assert thread.get_registers() == before
        thread.detach()


def test_a_blocked_signal_that_a_tracer_delivers_goes_back_to_its_queue():
    with child(SLEEPING) as process:
        thread = seized(process.pid)
        os.kill(process.pid, signal.SIGUSR1)
        thread.cont()
        assert thread.wait(5).signal == signal.SIGUSR1
        mask = thread.get_sigmask()
        thread.set_sigmask((1 << 64) - 1)
        thread.interrupt()
        thread.cont(signal.SIGUSR1)
        assert thread.wait(5).event == Event.STOP
        (info,) = thread.pending(shared=True)
        assert int.from_bytes(info[:4], "little") == signal.SIGUSR1
        thread.set_sigmask(mask)
        process.kill()


def test_the_restart_block_survives_a_change_of_registers_and_other_calls():
    source = (
        "import time\nprint('ready', flush=True)\nt = time.monotonic()\ntime.sleep(0.3)\nprint(time.monotonic() - t)"
    )
    from checkpoint.inject import Injection
    from checkpoint.tracee import Tree
    from tcpstate.kernel.calls import CallTable

    with child(source) as process:
        for _ in range(5):
            tree = Tree.stop([process.pid])
            with Injection(tree.processes[0]) as injection:
                table = CallTable()
                table.call(SYS.getpid)
                injection.run({process.pid: table})
            tree.resume()
        assert process.stdout is not None
        assert 0.3 <= float(process.stdout.readline()) < 0.5


def test_an_interrupted_relative_sleep_has_a_restart_block():
    with child("import ctypes; c = ctypes.CDLL(None); print('ready', flush=True); c.usleep(60000000)") as process:
        thread = seized(process.pid)
        assert thread.get_registers().result in (Restart.BLOCK, Restart.NOHAND)
        thread.detach()


def test_a_stop_makes_epoll_wait_return_eintr():
    # the very reason for checkpoint.arch.going_on: red means that it is not needed any more
    with child("import select\ne = select.epoll()\nprint('ready', flush=True)\ne.poll(60)") as process:
        thread = seized(process.pid)
        registers = thread.get_registers()
        assert (registers.call, registers.result) in ((SYS.epoll_wait, -errno.EINTR), (SYS.epoll_pwait, -errno.EINTR))
        thread.detach()


def test_eintr_turned_into_a_note_is_restarted_by_the_kernel():
    source = "import select\ne = select.epoll()\nprint('ready', flush=True)\ne.poll(60)"
    with child(source) as process:
        thread = seized(process.pid)
        registers = thread.get_registers()
        thread.set_registers(registers.returning(Restart.NOHAND))
        thread.interrupt()
        thread.cont()
        thread.wait(5)
        thread.detach()
        comes(lambda: state(process.pid) == "S")
        again = seized(process.pid)
        assert again.get_registers().call == registers.call
        assert again.get_registers().sp == registers.sp
        again.detach()


def test_the_signal_mask_inside_sigsuspend_is_the_one_that_it_puts_back():
    source = """
import ctypes, struct
libc = ctypes.CDLL(None)
mine, other = (ctypes.create_string_buffer(struct.pack("<Q", m) + bytes(120)) for m in (0x800, 0x200))
libc.sigprocmask(2, mine, 0)
print("ready", flush=True)
libc.sigsuspend(other)
"""
    with child(source) as process:
        thread = seized(process.pid)
        assert thread.get_sigmask() == 0x800
        thread.detach()


def test_detaching_a_process_in_state_t_leaves_it_there():
    with child(SLEEPING) as process:
        os.kill(process.pid, signal.SIGSTOP)
        comes(lambda: state(process.pid) == "T")
        thread = Thread(process.pid, process.pid)
        thread.seize()
        thread.interrupt()
        stop = thread.wait(5)
        assert (stop.event, stop.signal) == GROUP_STOP
        thread.detach()
        comes(lambda: state(process.pid) == "T")
        time.sleep(0.02)
        assert state(process.pid) == "T"


def in_a_tool(work):
    tool = os.fork()
    if tool == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitpid(tool, 0)[1] == signal.SIGKILL


def test_a_queued_sigstop_stops_the_tracee_when_the_tracer_is_killed():
    with child(SLEEPING) as process:

        def work():
            seized(process.pid)
            syscall(SYS.tgkill, process.pid, process.pid, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGKILL)

        in_a_tool(work)
        comes(lambda: state(process.pid) == "T")


def test_a_tracee_runs_on_when_its_tracer_is_killed():
    with child(SLEEPING) as process:

        def work():
            seized(process.pid)
            os.kill(os.getpid(), signal.SIGKILL)

        in_a_tool(work)
        comes(lambda: state(process.pid) == "S")


def test_exitkill_ends_the_tracee_with_its_tracer():
    with child(SLEEPING) as process:

        def work():
            seized(process.pid, Option.EXITKILL)
            os.kill(os.getpid(), signal.SIGKILL)

        in_a_tool(work)
        assert process.wait(5) == -signal.SIGKILL


def test_exitkill_can_be_taken_back():
    with child(SLEEPING) as process:

        def work():
            thread = seized(process.pid, Option.EXITKILL)
            ptrace.set_options(thread.tid, Option(0))
            os.kill(os.getpid(), signal.SIGKILL)

        in_a_tool(work)
        comes(lambda: state(process.pid) == "S")


def test_sigcont_takes_queued_sigstops_away():
    with child(SLEEPING) as process:
        thread = seized(process.pid)
        syscall(SYS.tgkill, process.pid, process.pid, signal.SIGSTOP)
        assert len(thread.pending()) == 1
        os.kill(process.pid, signal.SIGCONT)
        assert thread.pending() == []
        thread.detach()


def test_a_step_over_popf_leaves_the_trap_flag_on():
    # the reason for Registers.not_stepping: red means that it is not needed any more
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("9c9d9090ebfc"))  # pushf; popf; 1: nop; nop; jmp 1b
    pid = os.fork()
    if pid == 0:
        ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    try:
        time.sleep(0.05)
        thread = seized(pid)
        start = ctypes.addressof(ctypes.c_char.from_buffer(page))
        thread.set_registers(thread.get_registers().moved(start))
        for _ in range(5):
            ptrace.step(pid)
            assert thread.wait(5).signal == signal.SIGTRAP
        registers = thread.get_registers()
        assert registers.eflags & 0x100
        assert not registers.not_stepping().eflags & 0x100
        thread.set_registers(registers.not_stepping())
        thread.cont()
        thread.interrupt()
        assert thread.wait(5).event == Event.STOP
        thread.detach()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_children_of_a_stopped_process_are_all_listed():
    source = "import os, time\nfor _ in range(20):\n  if os.fork() == 0: time.sleep(9); os._exit(0)\n" + SLEEPING
    with child(source) as process:
        thread = seized(process.pid)
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(listed) == 20
        for pid in listed:
            os.kill(int(pid), signal.SIGKILL)
        thread.detach()


def test_a_vfork_parent_is_in_state_d_and_shares_its_memory_with_the_child():
    script = "import os, ctypes\nprint('ready', flush=True)\nl = ctypes.CDLL(None)\nl.syscall(58) or l.pause()\n"
    with child(script) as process:
        comes(lambda: state(process.pid) == "D")
        (borrower,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert kcmp(process.pid, int(borrower), KcmpType.VM) == 0
        os.kill(int(borrower), signal.SIGKILL)


def test_a_pidfd_becomes_readable_at_the_end_of_its_process():
    with child(SLEEPING) as process:
        pidfd = os.pidfd_open(process.pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(0) == []
        process.kill()
        assert poll.poll(5000) == [(pidfd, select.POLLIN)]
        os.close(pidfd)


def test_a_pidfd_taken_along_works_where_pidfd_open_does_not():
    """From inside another PID namespace our number cannot even be named."""
    reader, writer = os.pipe()
    own = os.pidfd_open(os.getpid())
    outer = os.fork()
    if outer == 0:
        try:
            syscall(SYS.unshare, 0x20000000)
            inner = os.fork()
            if inner == 0:
                taken = syscall(SYS.pidfd_getfd, own, writer, 0)
                os.write(taken, b"inside")
                os._exit(0)
            os._exit(os.waitpid(inner, 0)[1] != 0)
        finally:
            os._exit(1)
    assert os.waitpid(outer, 0)[1] == 0
    assert os.read(reader, 10) == b"inside"
    for fd in (reader, writer, own):
        os.close(fd)


def test_exec_enters_the_time_namespace_that_was_unshared():
    """Since 6.2 (kernel/time/namespace.c: timens_on_fork at exec); before, only a fork did."""

    def work():
        syscall(SYS.unshare, 0x80)
        with open("/proc/self/timens_offsets", "w") as offsets:
            offsets.write("monotonic 500000 0\n")
        before = time.clock_gettime(time.CLOCK_MONOTONIC)
        script = f"import time, sys; sys.exit(not time.clock_gettime(time.CLOCK_MONOTONIC) > {before} + 499000)"
        os.execv(sys.executable, [sys.executable, "-c", script])

    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


FILTER = b"".join(
    struct.pack("<HBBI", *each)
    for each in (
        (cbpf.Op.LD_W_ABS, 0, 0, 0),
        (cbpf.Op.JEQ_K, 0, 7, int(SYS.getpriority)),
        (cbpf.Op.LD_W_ABS, 0, 0, 24),  # the second argument's low half
        (cbpf.Op.TAX, 0, 0, 0),
        (cbpf.Op.MUL_X, 0, 0, 0),
        (cbpf.Op.ADD_K, 0, 0, 7),
        (cbpf.Op.AND_K, 0, 0, 15),
        (cbpf.Op.OR_K, 0, 0, 0x00050000),  # SECCOMP_RET_ERRNO with that number
        (cbpf.Op.RET_A, 0, 0, 0),
        (cbpf.Op.RET_K, 0, 0, 0x7FFF0000),
    )
)


def test_our_evaluation_of_filters_is_the_kernels():
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            code = ctypes.create_string_buffer(FILTER, len(FILTER))
            args = struct.pack("<HxxxxxxQ", len(FILTER) // 8, ctypes.addressof(code))
            assert libc.prctl(38, 1, 0, 0, 0) == 0
            assert libc.syscall(317, 1, 0, ctypes.create_string_buffer(args, 16)) == 0
            for who in range(64):
                ctypes.set_errno(0)  # the filter may also fail a call with no error
                libc.syscall(int(SYS.getpriority), 0, ctypes.c_long(who))
                found = ctypes.get_errno()
                data = cbpf.seccomp_data(SYS.getpriority, 0xC000003E, 0, (0, who))
                assert cbpf.run(FILTER, data) & 0xFFFF == found, who
                assert cbpf.evaluate([FILTER], data) == cbpf.Verdict.ERRNO
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
