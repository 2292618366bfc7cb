"""The timer of a call that waits lies on the thread's kernel stack, where a BPF iterator finds it; and a program at
sys_enter knows of each call that is begun."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from checkpoint.arch import WAITS
from checkpoint.kernel import taskiter
from checkpoint.kernel.callwatch import CallWatch
from checkpoint.procfs import call_of
from checkpoint.tracee import Tree
from tests.tscnet import wait_until

NS = 10**9
APART = 0.3  # seconds between two stops
HEAD = """
import ctypes, os, signal, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
time = struct.pack("<qq", 1000, 0)
epoll = libc.epoll_create1(0)
event = ctypes.create_string_buffer(32)
context = ctypes.c_ulong()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print(1, flush=True)
"""
CALLS = {
    "epoll_wait": "libc.epoll_wait(epoll, event, 1, 1000000)",
    "epoll_pwait": "libc.epoll_pwait(epoll, event, 1, 1000000, None)",
    "epoll_pwait2": "libc.syscall(441, epoll, event, 1, time, None, 8)",
    "sigtimedwait": "libc.sigtimedwait(struct.pack('<Q', 1 << 9).ljust(128, b'\\0'), None, time)",
    "semtimedop": "libc.semtimedop(libc.semget(0, 1, 0o600), struct.pack('<Hhh', 0, -1, 0), 1, time)",
    "io_getevents": "libc.syscall(206, 1, ctypes.byref(context)); libc.syscall(208, context, 1, 1, event, time)",
}


def waits(pid: int) -> bool:
    found = call_of(pid, pid)
    return found is not None and found[0] in WAITS


@contextmanager
def waiting(code: str) -> Iterator[int]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-ISc", HEAD + code], **pipes) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            wait_until(lambda: waits(process.pid))
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize("name", CALLS)
def test_the_time_that_a_wait_has_left_is_known_and_is_kept_when_it_goes_on_here(name: str) -> None:
    with waiting(CALLS[name]) as pid:
        ends = []
        for _ in range(3):
            tree = Tree.stop([pid])
            ends.append(tree.processes[0].leader.until)
            now = time.monotonic_ns()
            tree.resume()
            wait_until(lambda: waits(pid))
            time.sleep(APART)
        first = ends[0]
        assert first is not None
        assert 900 * NS < first - now < 1000 * NS
        # the end does not move with each stop, by the time that has passed
        for end in ends:
            assert end is not None
            assert abs(end - first) < APART * NS, ends


def test_a_call_that_is_begun_after_the_look_is_known() -> None:
    again = "import select; poll = select.epoll(); poll.register(0); poll.poll(1000); os.read(0, 1); poll.poll(1000)"
    with waiting(again) as pid:
        watch = CallWatch()
        watch.look(pid)
        assert watch.until(pid) is not None
        with open(f"/proc/{pid}/fd/0", "wb", buffering=0) as pipe:
            pipe.write(b"x")
        wait_until(lambda: watch.until(pid) is None)
        watch.close()


def test_a_thread_that_has_no_timer_has_none() -> None:
    with waiting("libc.epoll_wait(epoll, event, 1, -1)") as pid:
        watch = CallWatch()
        watch.look(pid)
        assert watch.until(pid) is None
        watch.close()


def test_without_bpf_a_wait_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> bytes:
        raise PermissionError(1, "not here")

    monkeypatch.setattr(taskiter, "read", refused)
    with waiting(CALLS["epoll_wait"]) as pid:
        tree = Tree.stop([pid])
        assert tree.processes[0].leader.until is None
        tree.resume()
