"""Processes with seccomp filters: calls are made nevertheless, unless the tool's death would then do harm."""

import ctypes
import os
import signal
import struct
import time
from pathlib import Path

import pytest

from checkpoint import procfs
from checkpoint.errors import SeccompInTheWay, SyscallDispatch
from checkpoint.inject import Injection
from checkpoint.tracee import Tree
from tcpstate.kernel.calls import CallTable
from tcpstate.kernel.machine import SYS
from tests.system.engine.target import as_tool, end, outside_view, python, wait_view

SANDBOX = """
import ctypes, os, select, struct, sys
libc = ctypes.CDLL(None)
def op(*x): return struct.pack("<HBBI", *x)
ACTION, NUMBERS = ARGUMENTS
code = op(0x20, 0, 0, 0)
for n in NUMBERS: code += op(0x15, 0, 1, n) + op(6, 0, 0, 0x7fff0000)
code += op(6, 0, 0, ACTION)
program = ctypes.create_string_buffer(code, len(code))
args = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(program)))
libc.prctl(38, 1, 0, 0, 0)
print("ready", flush=True)
libc.syscall(317, 1, 0, args)
while True: libc.syscall(34)
"""
CAP_SYS_ADMIN = 21
KILL = 0x80000000
ERRNO = 0x00050001
NEEDED = [SYS.rt_sigprocmask, SYS.tgkill, SYS.munmap, SYS.close]
OWN = [SYS.pause, SYS.restart_syscall, SYS.exit_group, SYS.rt_sigreturn]


def wait_seccomp(pid, mode):
    deadline = time.monotonic() + 5
    while f"Seccomp:\t{mode}" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def sandboxed(action, numbers):
    child = python(SANDBOX.replace("ARGUMENTS", repr((action, [int(n) for n in numbers]))))
    wait_seccomp(child.pid, 2)
    return child


def calls(kill_at=None):
    table = CallTable()
    for index in range(6):
        if index == kill_at:
            table.call(SYS.kill, os.getpid(), signal.SIGKILL, ignore=True)
        table.call(SYS.getppid)
    fd = table.call(SYS.epoll_create1, 0)
    table.undo(SYS.close, fd)
    table.call(SYS.close, fd)
    return table


def visit(pid, kill_at=None, **options):
    tree = Tree.stop([pid])
    try:
        with Injection(tree.processes[0], **options) as injection:
            injection.run({pid: calls(kill_at)})
    finally:
        tree.resume()


def test_a_filter_that_knows_none_of_our_calls_is_suspended():
    child = sandboxed(KILL, OWN + NEEDED)
    try:
        before = outside_view(child.pid)
        for _ in range(5):
            visit(child.pid)
        assert child.poll() is None
        assert outside_view(child.pid) == before
    finally:
        end(child)


@pytest.mark.parametrize("missing", NEEDED)
def test_a_filter_that_would_kill_the_way_home_is_refused(missing):
    child = sandboxed(KILL, [n for n in OWN + NEEDED if n != missing])
    try:
        before = outside_view(child.pid)
        with pytest.raises(SeccompInTheWay, match=f"TM-0310.*forbids {missing.name}"):
            visit(child.pid)
        assert child.poll() is None
        assert outside_view(child.pid) == before
        visit(child.pid, accept_seccomp_risk=True)
        assert child.poll() is None
    finally:
        end(child)


def test_the_tools_death_under_a_filter_that_allows_the_way_home():
    # the rest of the table is made under the filter, too: here it fails
    child = sandboxed(ERRNO, OWN + NEEDED)
    try:
        before = outside_view(child.pid)
        for kill_at in range(6):
            assert as_tool(lambda kill_at=kill_at: visit(child.pid, kill_at)) == signal.SIGKILL
            assert child.poll() is None
            wait_view(child.pid, before, "maps", "fds")
        visit(child.pid)
        assert outside_view(child.pid) == before
    finally:
        end(child)


def test_a_filter_that_only_fails_our_signal_is_accepted():
    child = sandboxed(ERRNO, [*OWN, SYS.rt_sigprocmask])
    try:
        visit(child.pid)
        assert child.poll() is None
    finally:
        end(child)


def test_without_the_capability_a_filter_is_in_the_way():
    child = sandboxed(KILL, OWN + NEEDED)

    def work():
        permitted = int(procfs.read_status(os.getpid())["CapPrm"], 16)
        effective = permitted & ~(1 << CAP_SYS_ADMIN)
        low, high = ((effective & 0xFFFFFFFF, permitted & 0xFFFFFFFF), (effective >> 32, permitted >> 32))
        head, data = struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", *low, 0, *high, 0)
        assert ctypes.CDLL(None).capset(head, data) == 0
        with pytest.raises(SeccompInTheWay, match=r"TM-0310.*may not"):
            visit(child.pid)
        plain = python('print("ready", flush=True)\ninput()')
        visit(plain.pid)
        end(plain)

    try:
        assert as_tool(work) == 0
        assert child.poll() is None
    finally:
        end(child)


def test_strict_mode_is_refused():
    child = python(
        """
import ctypes, os
print("ready", flush=True)
libc = ctypes.CDLL(None)
libc.prctl(22, 1, 0, 0, 0)
os.read(0, 1)
"""
    )
    try:
        wait_seccomp(child.pid, 1)
        with pytest.raises(SeccompInTheWay, match=r"TM-0310.*strict"):
            visit(child.pid)
        assert child.poll() is None
    finally:
        end(child)


def test_dispatched_system_calls_are_refused():
    child = python(
        """
import ctypes
libc = ctypes.CDLL(None)
selector = ctypes.create_string_buffer(1)
# everything is dispatched, while the selector says so (it does not)
assert libc.prctl(59, 1, 0, 0, selector) == 0
print("ready", flush=True)
input()
"""
    )
    try:
        with pytest.raises(SyscallDispatch, match="TM-0311"):
            visit(child.pid)
        assert child.poll() is None
    finally:
        end(child)
