"""POSIX timers: created by timer_create, known to the program by small numbers that must come back the same.

They are rebuilt when all threads exist, since a timer may signal one of them.  Kernels from 6.16 create a timer under a
wanted number (PR_TIMER_CREATE_RESTORE_IDS); older ones count upwards in each process, so timers are created and deleted
there until the count is right.

What cannot be rebuilt: the overrun count of the last delivered signal (timer_getoverrun), and which thread a timer on
CLOCK_THREAD_CPUTIME_ID belongs to, if the process has several: the kernel does not tell.  Both are told as warnings.

Source: Linux kernel/time/posix-timers.c; /proc/PID/timers (CONFIG_CHECKPOINT_RESTORE).
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from typing import Final, Self

from checkpoint import procfs
from checkpoint.errors import TimerOutOfReach
from checkpoint.kernel.signals import NSIG, timer_siginfo
from checkpoint.kernel.timers import ITIMER_SIZE, Clock, Notify, TimerSpec, is_cpu_clock, sigevent
from checkpoint.state.base import Capture, State, TaskBuilder, TaskView, bounded, register, unsigned
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.prctl import Pr, TimerIds
from tcpstate.slotted import dataclass

__all__ = ["PosixTimer", "PosixTimers", "creates_wanted_ids", "parse_timers"]

#: a kernel that only counts upwards is made to do so at most this often: two system calls, 1 us each, per number
_MOST_STEPS: Final = 10_000
_MOST_OVERRUN: Final = (1 << 31) - 1
_LONGEST: Final = (1 << 63) - 1
_NOTIFY: Final = {"signal": Notify.SIGNAL, "none": Notify.NONE, "thread": Notify.THREAD}
_ENTRY: Final = re.compile(
    r"ID: (?P<id>\d+)\n"
    r"signal: (?P<signal>-?\d+)/(?:0x)?(?P<value>[0-9a-f]+|\(null\))\n"
    r"notify: (?P<notify>\w+)/(?P<target>pid|tid)\.(?P<tid>\d+)\n"
    r"ClockID: (?P<clock>-?\d+)\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PosixTimer:
    """One timer.

    id        the program's number for it
    clock     the clock that it was created on; negative: the CPU time of a process or thread
    notify    SIGEV_*; THREAD_ID: the signal goes to the thread ``thread``
    signal    with ``data``, what is sent
    value     nanoseconds until it expires; 0: disarmed
    interval  nanoseconds between expirations; 0: it expires once
    overrun   expirations that the last delivered signal stood for, beyond the first
    """

    id: int
    clock: int
    notify: int
    thread: int
    signal: int
    data: int
    value: int
    interval: int
    overrun: int

    def __post_init__(self) -> None:
        bounded("timer ID", self.id, 0, _MOST_OVERRUN)
        bounded("clock", self.clock, -(1 << 31), _MOST_OVERRUN)
        bounded("notify", self.notify, 0, Notify.THREAD | Notify.THREAD_ID)
        bounded("thread", self.thread, 0, _MOST_OVERRUN)
        bounded("signal", self.signal, 0, NSIG)
        bounded("value", self.value, 0, _LONGEST)
        bounded("interval", self.interval, 0, _LONGEST)
        bounded("overrun", self.overrun, 0, _MOST_OVERRUN)
        unsigned("data", self.data)

    @property
    def signals(self) -> bool:
        """Whether its expiration sends a signal."""
        return not self.notify & Notify.NONE


@register("posix timers")
@dataclass(frozen=True, slots=True, kw_only=True)
class PosixTimers(State):
    """All timers of the process, by ascending number."""

    timers: tuple[PosixTimer, ...]

    def __post_init__(self) -> None:
        ids = [t.id for t in self.timers]
        if ids != sorted(set(ids)):
            raise ValueError("timers are not in ascending order of their IDs")

    @classmethod
    def capture(cls, task: TaskView) -> Capture[Self]:
        calls = task.calls
        entries = parse_timers(procfs.read_timers(task.pid))
        rooms, overruns = {}, {}
        for entry in entries:
            rooms[entry["id"]] = room = calls.room(ITIMER_SIZE)
            calls.call(SYS.timer_gettime, entry["id"], room, label=f"read timer {entry['id']}")
            overruns[entry["id"]] = calls.call(
                SYS.timer_getoverrun, entry["id"], label=f"read the overrun of timer {entry['id']}"
            )
        yield
        found = []
        for entry in entries:
            spec = TimerSpec.from_timespec(rooms[entry["id"]].bytes())
            # It may expire between its reading and that of the pending signals: then the signal is what counts.
            if not spec.interval and task.view.timer_pending(entry["id"]):
                spec = TimerSpec(0, 0)
            overrun = overruns[entry["id"]].value
            entry["thread"] = task.view.inner_tid(entry["thread"])
            found.append(PosixTimer(value=spec.value, interval=spec.interval, overrun=overrun, **entry))
        return cls(timers=tuple(found))

    def rebuild(self, task: TaskBuilder) -> None:
        if not self.timers:
            return
        calls = task.calls
        wanted_ids = creates_wanted_ids()
        if wanted_ids:
            calls.call(SYS.prctl, Pr.TIMER_CREATE_RESTORE_IDS, TimerIds.ON, label="ask for wanted timer IDs")
        following = 0
        for timer in self.timers:
            if not wanted_ids:
                _count_up(task, following, timer.id)
            following = timer.id + 1
            event = sigevent(timer.data, timer.signal, timer.notify, timer.thread)
            place = calls.put(timer.id.to_bytes(8, "little"))
            calls.call(SYS.timer_create, timer.clock, calls.put(event), place, label=f"create timer {timer.id}")
            _arm(timer, task)
        if wanted_ids:
            calls.call(SYS.prctl, Pr.TIMER_CREATE_RESTORE_IDS, TimerIds.OFF, label="ask for new timer IDs again")


def _arm(timer: PosixTimer, task: TaskBuilder) -> None:
    calls = task.calls
    spec, missed = TimerSpec(timer.value, timer.interval), 0
    if not is_cpu_clock(timer.clock):
        spec, missed = spec.after(task.elapsed)
    if spec.value:
        calls.call(SYS.timer_settime, timer.id, 0, calls.put(spec.pack_timespec()), 0, label=f"arm timer {timer.id}")
    if missed and timer.signals:
        # One signal stands for all expirations since the capture, as it would after a stop of the same length.
        overrun = min(missed - 1, _MOST_OVERRUN)
        info = calls.put(timer_siginfo(timer.signal, timer.id, overrun, timer.data))
        pid = calls.call(SYS.getpid, label="ask for the process ID")
        if timer.notify & Notify.THREAD_ID:
            calls.call(
                SYS.rt_tgsigqueueinfo, pid, timer.thread, timer.signal, info, label=f"queue the signal of {timer.id}"
            )
        else:
            calls.call(SYS.rt_sigqueueinfo, pid, timer.signal, info, label=f"queue the signal of {timer.id}")
    if timer.overrun:
        task.warn(f"{task}: the overrun count {timer.overrun} of timer {timer.id} cannot be set and will read 0")
    if timer.clock in (Clock.THREAD_CPUTIME_ID, Clock.CREATING_THREAD) and len(procfs.threads(task.pid)) > 1:
        task.warn(f"{task}: timer {timer.id} counts the CPU time of a thread, and will count the first thread's")


def _count_up(task: TaskBuilder, start: int, wanted: int) -> None:
    """Use up the numbers from ``start`` to before ``wanted``, on a kernel that gives them out in ascending order."""
    if wanted - start > _MOST_STEPS:
        raise TimerOutOfReach(
            f"timer {wanted} cannot be given its number: this kernel counts up to it from {start}", object=str(task)
        )
    calls = task.calls
    event = calls.put(sigevent(0, 0, Notify.NONE, 0))
    place = calls.room(8)
    for number in range(start, wanted):
        calls.call(SYS.timer_create, Clock.MONOTONIC, event, place, label=f"use up timer ID {number}")
        calls.call(SYS.timer_delete, number, label=f"delete timer {number}")


def parse_timers(text: str) -> list[dict[str, int]]:
    """The timers of /proc/PID/timers, as keyword arguments of :class:`PosixTimer`."""
    return sorted(_entries(text), key=lambda entry: entry["id"])


def _entries(text: str) -> Iterator[dict[str, int]]:
    for entry in _ENTRY.finditer(text):
        notify = _NOTIFY[entry["notify"]] | (Notify.THREAD_ID if entry["target"] == "tid" else 0)
        yield {
            "id": int(entry["id"]),
            "signal": int(entry["signal"]),
            "data": 0 if entry["value"] == "(null)" else int(entry["value"], 16),
            "notify": int(notify),
            "thread": int(entry["tid"]) if notify & Notify.THREAD_ID else 0,
            "clock": int(entry["clock"]),
        }


@functools.cache
def creates_wanted_ids() -> bool:
    """Whether this kernel creates a timer under a wanted number."""
    state: int = ctypes.CDLL(None).prctl(Pr.TIMER_CREATE_RESTORE_IDS, TimerIds.GET, 0, 0, 0)
    return state >= 0
