"""Signals that were sent and not yet delivered, of a thread or of the process as a whole, with all they carry.

They are queued again by the process itself: from another one the kernel accepts no siginfo that says the kernel sent
it.  The signal by which injected code stops itself (SIGURG) may be among them: the engine keeps it back, and queues it
when it leaves.  SIGSTOP, which nobody can block, would stop the process there and then: the tool sends it at the very
end (:func:`late`).

Source: Linux kernel/signal.c; PTRACE_PEEKSIGINFO; /proc/PID/status, SigPnd and ShdPnd.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from typing import Final, Self

from checkpoint.kernel.signals import NSIG, SIGINFO_SIZE, SiCode, SigInfo, siginfo, without_kernel_fields
from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, register
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["PendingForProcess", "PendingForThread", "late"]

#: the kernel bounds the queue by RLIMIT_SIGPENDING; a record with more is not one of ours
_MOST: Final = 1 << 20


def _check(signals: Iterable[bytes]) -> None:
    count = 0
    for info in signals:
        count += 1
        if len(info) != SIGINFO_SIZE:
            raise ValueError(f"a siginfo has {SIGINFO_SIZE} bytes, not {len(info)}")
        if not 1 <= SigInfo.unpack(info).signal <= NSIG:
            raise ValueError(f"there is no signal {SigInfo.unpack(info).signal}")
    if count > _MOST:
        raise ValueError(f"{count} pending signals")


def _complete(queue: list[bytes], mask: int) -> tuple[bytes, ...]:
    """The queue, and signals that are pending without an entry in it: the kernel drops the details when out of memory.

    The tool's own SIGSTOPs are left out: they hold the tree while its sockets are frozen.
    """
    infos = [without_kernel_fields(info) for info in queue if not _ours(info)]
    listed = {SigInfo.unpack(info).signal for info in queue}
    bare = [n for n in range(1, NSIG + 1) if mask >> (n - 1) & 1 and n not in listed and n != signal.SIGKILL]
    return tuple(infos + [siginfo(n, SiCode.USER) for n in bare])


def _ours(info: bytes) -> bool:
    head = SigInfo.unpack(info)
    return head.signal == signal.SIGSTOP and head.code == SiCode.TKILL and head.sender == os.getpid()


@register("pending signals of the process")
@dataclass(frozen=True, slots=True, kw_only=True)
class PendingForProcess(State):
    """siginfo_t of each signal that any thread may take, oldest first."""

    signals: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _check(self.signals)

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        mask = task.view.status["ShdPnd"]
        # After the calls: a timer that was read as running and has expired since must not be lost (see posix_timers).
        yield
        return cls(signals=_complete(task.view.pending, int(mask, 16)))

    def rebuild(self, task: TaskBuilder) -> None:
        calls = task.calls
        if queued := _early(self.signals):
            pid = calls.call(SYS.getpid, label="ask for the process ID")
            for info in queued:
                number = SigInfo.unpack(info).signal
                calls.call(SYS.rt_sigqueueinfo, pid, number, calls.put(info), label=f"queue signal {number}")


@register("pending signals of the thread")
@dataclass(frozen=True, slots=True, kw_only=True)
class PendingForThread(State):
    """siginfo_t of each signal that was sent to this thread, oldest first."""

    signals: tuple[bytes, ...]

    def __post_init__(self) -> None:
        _check(self.signals)

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        mask = task.status["SigPnd"]
        yield
        return cls.of(task, int(mask, 16))

    @classmethod
    def of(cls, task: TaskView, mask: int) -> Self:
        """After the calls. ``mask``: as the kernel keeps it."""
        return cls(signals=_complete(task.pending, mask))

    def rebuild(self, task: TaskBuilder) -> None:
        calls = task.calls
        if queued := _early(self.signals):
            pid = calls.call(SYS.getpid, label="ask for the process ID")
            tid = calls.call(SYS.gettid, label="ask for the thread ID")
            for info in queued:
                number = SigInfo.unpack(info).signal
                calls.call(SYS.rt_tgsigqueueinfo, pid, tid, number, calls.put(info), label=f"queue signal {number}")


def _early(signals: tuple[bytes, ...]) -> list[bytes]:
    return [info for info in signals if SigInfo.unpack(info).signal != signal.SIGSTOP]


def late(signals: tuple[bytes, ...]) -> list[int]:
    """The numbers of those that the tool must send itself, when nothing runs inside any more."""
    return [n for n in (SigInfo.unpack(info).signal for info in signals) if n == signal.SIGSTOP]
