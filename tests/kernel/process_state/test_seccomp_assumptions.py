"""What Linux does with seccomp filters: the order they are told in, suspension, filters that privilege installed."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading

from kernel_child import ERRNO, KILL_PROCESS, child, filter_code, finish, in_child, stopped

from checkpoint.kernel import ptrace
from checkpoint.kernel.ptrace import Option
from checkpoint.kernel.seccomp import FilterFlag, SetMode, program
from tcpstate.kernel import batch
from tcpstate.kernel.batch import libc, syscall
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.capability import capset_data, capset_header
from tcpstate.kernel.machine import SYS

FIRST = filter_code(SYS.getpriority, ERRNO | errno.EXDEV)
SECOND = filter_code(SYS.getpriority, ERRNO | errno.ENOTTY)


def _install(code: bytes, flags: int = 0) -> None:
    text = ctypes.create_string_buffer(code, len(code))
    prog = bytearray(program(len(code) // 8))
    prog[8:16] = ctypes.addressof(text).to_bytes(8, "little")
    data = ctypes.create_string_buffer(bytes(prog), len(prog))
    syscall(SYS.seccomp, SetMode.FILTER, flags, ctypes.addressof(data))


def _no_new_privs() -> None:
    assert libc.prctl(38, 1, 0, 0, 0) == 0


def test_filters_are_told_oldest_first():
    def prepare() -> None:
        _no_new_privs()
        _install(FIRST)
        _install(SECOND)

    with child(prepare) as pid, stopped(pid):
        assert [ptrace.seccomp_filter(pid, n) for n in range(3)] == [FIRST, SECOND, None]


def test_the_log_flag_is_told():
    def prepare() -> None:
        _no_new_privs()
        _install(FIRST)
        _install(SECOND, FilterFlag.LOG)

    with child(prepare) as pid, stopped(pid):
        assert [ptrace.seccomp_flags(pid, n) for n in range(2)] == [0, FilterFlag.LOG]


def test_a_suspended_filter_kills_nobody():
    def prepare() -> None:
        _no_new_privs()
        _install(filter_code(SYS.getpriority, KILL_PROCESS))

    with child(prepare, lambda: libc.getpriority(0, 0) and 1) as pid:
        ptrace.seize(pid, Option.SUSPEND_SECCOMP)
        # it makes the forbidden call, and exits; the signal that it waits for makes no stop, since it is blocked
        assert os.waitstatus_to_exitcode(finish(pid)) in (0, 1)


def test_without_suspension_the_filter_kills():
    def prepare() -> None:
        _no_new_privs()
        _install(filter_code(SYS.getpriority, KILL_PROCESS))

    with child(prepare, lambda: libc.getpriority(0, 0)) as pid:
        with stopped(pid, Option.SUSPEND_SECCOMP):
            pass
        assert os.WTERMSIG(finish(pid)) == signal.SIGSYS


def test_a_filter_installed_with_privilege_outlives_it():
    def work() -> int:
        _install(FIRST)  # no no_new_privs: CAP_SYS_ADMIN allows it
        table = CallTable()
        nothing = table.put(capset_data(effective=0, permitted=0, inheritable=0))
        table.call(SYS.capset, table.put(capset_header()), nothing)
        batch.run(table)
        try:
            _install(SECOND)
        except PermissionError:
            with open("/proc/self/status", encoding="ascii") as file:
                return 0 if "Seccomp_filters:\t1" in file.read() else 2
        return 1

    assert in_child(work) == 0


def test_tsync_gives_all_threads_the_filters_and_they_stay_in_step():
    def work() -> int:
        stop = threading.Event()
        others = [threading.Thread(target=stop.wait) for _ in range(2)]
        for each in others:
            each.start()
        _install(FIRST, FilterFlag.TSYNC)
        _install(SECOND, FilterFlag.TSYNC)
        found = set()
        for tid in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{tid}/status", encoding="ascii") as file:
                found.add(next(line for line in file if line.startswith("Seccomp_filters")))
        stop.set()
        return 0 if found == {"Seccomp_filters:\t2\n"} else 1

    assert in_child(work) == 0
