"""A child process that does something and waits, for tests that look at it or into it."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import traceback
from collections.abc import Callable, Iterator

from checkpoint.kernel import ptrace
from checkpoint.kernel.ptrace import Option

#: BPF instructions of seccomp filters (linux/filter.h, linux/seccomp.h)
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def filter_code(number: int, action: int) -> bytes:
    """A filter: ``action`` for one system call, anything else is allowed."""
    instructions = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, action), (6, 0, 0, ALLOW)]
    return b"".join(struct.pack("<HBBI", *each) for each in instructions)


@contextlib.contextmanager
def child(prepare: Callable[[], object], then: Callable[[], object] | None = None) -> Iterator[int]:
    """PID of a child that has run ``prepare`` and waits; at SIGUSR1 it runs ``then``, whose result is its status."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            prepare()
            os.write(writing, b"!")
            signal.sigwait([signal.SIGUSR1])
            os._exit(int(then() or 0) if then else 0)  # type: ignore[call-overload]
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"!"
        yield pid
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def finish(pid: int) -> int:
    """Let the child run its second part; its wait status."""
    os.kill(pid, signal.SIGUSR1)
    return os.waitpid(pid, 0)[1]


@contextlib.contextmanager
def stopped(pid: int, options: Option = Option(0)) -> Iterator[None]:  # noqa: B008 - an immutable flag
    """The process in a ptrace stop."""
    ptrace.seize(pid, options)
    ptrace.interrupt(pid)
    os.waitpid(pid, ptrace.WALL)
    yield
    ptrace.detach(pid)


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a child that does ``work`` (its result; 99 for an exception)."""
    with child(lambda: None, work) as pid:
        return os.waitstatus_to_exitcode(finish(pid))
