"""What Linux does with queued signals."""

from __future__ import annotations

import ctypes
import os
import signal

import pytest
from kernel_child import child, in_child, stopped

from checkpoint.kernel import ptrace
from checkpoint.kernel.signals import SiCode, siginfo
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS


def _queue(pid: int, info: bytes) -> None:
    data = ctypes.create_string_buffer(info, len(info))
    syscall(SYS.rt_sigqueueinfo, pid, signal.SIGUSR2, ctypes.addressof(data))


def test_only_the_process_itself_may_queue_what_the_kernel_sent():
    info = siginfo(signal.SIGUSR2, SiCode.KERNEL)

    def itself() -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        _queue(os.getpid(), info)
        found = signal.sigtimedwait([signal.SIGUSR2], 0)
        return 0 if found is not None and found.si_code == SiCode.KERNEL else 1

    assert in_child(itself) == 0
    with child(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])) as pid:
        with pytest.raises(PermissionError):
            _queue(pid, info)


def test_ignoring_a_signal_throws_pending_ones_away():
    def work() -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        os.kill(os.getpid(), signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        return 1 if signal.SIGUSR2 in signal.sigpending() else 0

    assert in_child(work) == 0


def test_signals_are_told_with_their_details_and_stay():
    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        _queue(os.getpid(), siginfo(signal.SIGUSR2, SiCode.KERNEL))

    with child(prepare) as pid, stopped(pid):
        for _ in range(2):
            (info,) = ptrace.peek_signals(pid, shared=True)
            assert info == siginfo(signal.SIGUSR2, SiCode.KERNEL)


def test_exec_keeps_ignored_signals():
    reading, writing = os.pipe()

    def work() -> None:
        signal.signal(signal.SIGWINCH, signal.SIG_IGN)
        os.dup2(writing, 1)
        os.execv("/bin/grep", ["grep", "SigIgn", "/proc/self/status"])

    assert in_child(work) == 0
    os.close(writing)
    with os.fdopen(reading) as file:
        ignored = int(file.read().split()[1], 16)
    assert ignored >> (signal.SIGWINCH - 1) & 1
