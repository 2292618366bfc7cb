"""A thread that is stopped twice in one sleep: the second time the kernel has only restart_syscall in its notes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from checkpoint import tracee
from checkpoint.procfs import read_stat
from checkpoint.tracee import Tree
from tcpstate.kernel.machine import SYS
from tests.tscnet import wait_until

SLEEPS = {
    "sleep": ("import ctypes; ctypes.CDLL(None).sleep(1000)", SYS.clock_nanosleep),
    "poll": ("import select; select.poll().poll(10**6)", SYS.poll),
}


@contextmanager
def sleeping(code: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-ISc", f"print(1, flush=True)\n{code}"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            wait_until(lambda: read_stat(process.pid).state == "S")
            yield process.pid
        finally:
            process.kill()


def call_of(pid: int) -> tuple[int | None, int | None]:
    """(what the kernel has in its notes, what we make of it)."""
    tree = Tree.stop([pid])
    try:
        thread = tree.processes[0].leader
        return thread.registers.call, thread.call
    finally:
        tree.resume()


@pytest.mark.parametrize("kind", ["sleep", "poll"])
def test_the_call_is_known_when_we_have_stopped_it_before(kind: str) -> None:
    code, call = SLEEPS[kind]
    with sleeping(code) as pid:
        first = call_of(pid)
        wait_until(lambda: read_stat(pid).state == "S")
        assert first[1] == call
        assert call_of(pid) == (SYS.restart_syscall, call)


@pytest.mark.parametrize("kind", ["sleep", "poll"])
def test_the_call_is_read_off_the_code_when_somebody_else_has(kind: str) -> None:
    code, call = SLEEPS[kind]
    with sleeping(code) as pid:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: read_stat(pid).state == "T")
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: read_stat(pid).state == "S")
        tracee._calls.pop(pid, None)
        assert call_of(pid) == (SYS.restart_syscall, call)
