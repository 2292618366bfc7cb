"""The three interval timers of a process (setitimer, alarm).

Source: Linux kernel/time/itimer.c.
"""

from __future__ import annotations

import signal
from typing import Final, Self

from checkpoint.kernel.signals import SiCode, SigInfo, siginfo
from checkpoint.kernel.timers import ITIMER_SIZE, Itimer, TimerSpec
from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, bounded, register
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["IntervalTimer", "IntervalTimers"]

#: nanoseconds; the kernel counts them in 63 bits
_LONGEST: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalTimer:
    """Nanoseconds until it expires (0: never) and between expirations after that (0: none).

    ``REAL`` counts real time, ``VIRTUAL`` and ``PROF`` the CPU time of the process.
    """

    which: Itimer
    value: int
    interval: int

    def __post_init__(self) -> None:
        bounded("value", self.value, 0, _LONGEST)
        bounded("interval", self.interval, 0, _LONGEST)


@register("interval timers")
@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalTimers(State):
    """Those that run."""

    timers: tuple[IntervalTimer, ...]

    def __post_init__(self) -> None:
        if len({t.which for t in self.timers}) != len(self.timers):
            raise ValueError("an interval timer is given twice")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        rooms = {which: task.calls.room(ITIMER_SIZE) for which in Itimer}
        for which, room in rooms.items():
            task.calls.call(SYS.getitimer, which, room, label=f"read the interval timer {which.name}")
        yield
        found = []
        for which, room in rooms.items():
            spec = TimerSpec.from_timeval(room.bytes())
            # It may expire between its reading and that of the pending signals: then the signal is what counts.
            expired = which is Itimer.REAL and not spec.interval and _alarm_pending(task)
            # With an interval: it has expired and its signal waits. The kernel winds it up again when that is delivered
            # (kernel/signal.c), and until then shows no time. The rebuilt one goes on at once.
            value = spec.value or (spec.interval if which is Itimer.REAL else 0)
            if value and not expired:
                found.append(IntervalTimer(which=which, value=value, interval=spec.interval))
        return cls(timers=tuple(found))

    def rebuild(self, task: TaskBuilder) -> None:
        calls = task.calls
        for timer in self.timers:
            spec = TimerSpec(timer.value, timer.interval)
            missed = 0
            if timer.which is Itimer.REAL:
                spec, missed = spec.after(task.elapsed)
            calls.call(
                SYS.setitimer,
                timer.which,
                calls.put(spec.pack_timeval()),
                0,
                label=f"set the interval timer {timer.which.name}",
            )
            if missed:
                pid = calls.call(SYS.getpid, label="ask for the process ID")
                info = calls.put(siginfo(signal.SIGALRM, SiCode.KERNEL))
                calls.call(SYS.rt_sigqueueinfo, pid, signal.SIGALRM, info, label="queue the alarm that is due")


def _alarm_pending(task: TaskView) -> bool:
    infos = map(SigInfo.unpack, task.view.pending)
    return any(info.signal == signal.SIGALRM and info.code == SiCode.KERNEL for info in infos)
