"""Interval timers and POSIX timers: clocks, struct itimerval, itimerspec and sigevent.

Source: include/uapi/linux/time.h, time_types.h, asm-generic/siginfo.h.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, Self

from tcpstate.slotted import dataclass

__all__ = ["ITIMER_SIZE", "NS", "Clock", "Itimer", "Notify", "TimerSpec", "is_cpu_clock", "sigevent"]

#: nanoseconds in a second
NS: Final = 1_000_000_000
_US: Final = 1_000
_SPEC = struct.Struct("<4q")
#: bytes of struct itimerval and of struct itimerspec
ITIMER_SIZE: Final = _SPEC.size
_SIGEVENT = struct.Struct("<QiiI44x")


class Clock(enum.IntEnum):
    """Clock IDs (include/uapi/linux/time.h); a negative one names the CPU time of a thread or process."""

    REALTIME = 0
    MONOTONIC = 1
    PROCESS_CPUTIME_ID = 2
    THREAD_CPUTIME_ID = 3
    BOOTTIME = 7
    #: how /proc/PID/timers shows THREAD_CPUTIME_ID: kernel/time/posix-cpu-timers.c, THREAD_CLOCK
    CREATING_THREAD = -2


class Itimer(enum.IntEnum):
    """The three interval timers of a process, and what they count."""

    REAL = 0
    VIRTUAL = 1
    PROF = 2


class Notify(enum.IntFlag):
    """``sigev_notify``."""

    SIGNAL = 0
    NONE = 1
    THREAD = 2
    THREAD_ID = 4


def is_cpu_clock(clock: int) -> bool:
    """Whether the clock counts CPU time, which does not pass while nothing runs."""
    return clock < 0 or clock in (Clock.PROCESS_CPUTIME_ID, Clock.THREAD_CPUTIME_ID)


@dataclass(frozen=True, slots=True)
class TimerSpec:
    """Value and interval of a timer in nanoseconds; value 0: disarmed, interval 0: it expires once."""

    value: int
    interval: int

    def pack_timespec(self) -> bytes:
        """struct itimerspec."""
        return _SPEC.pack(*divmod(self.interval, NS), *divmod(self.value, NS))

    def pack_timeval(self) -> bytes:
        """struct itimerval; a value below a microsecond is rounded up: zero would disarm the timer."""
        interval, value = -(-self.interval // _US), -(-self.value // _US)
        return _SPEC.pack(*divmod(interval, NS // _US), *divmod(value, NS // _US))

    @classmethod
    def from_timespec(cls, data: bytes) -> Self:
        """The value in a struct itimerspec."""
        interval, interval_ns, value, value_ns = _SPEC.unpack_from(data)
        return cls(value * NS + value_ns, interval * NS + interval_ns)

    @classmethod
    def from_timeval(cls, data: bytes) -> Self:
        """The value in a struct itimerval."""
        interval, interval_us, value, value_us = _SPEC.unpack_from(data)
        return cls(value * NS + value_us * _US, interval * NS + interval_us * _US)

    def after(self, elapsed: int) -> tuple[TimerSpec, int]:
        """(what is left of the timer when ``elapsed`` nanoseconds have passed, expirations in that time).

        A timer with an interval keeps its phase.  One that expires once and is over is given one nanosecond, to
        expire at once: its expiration is not counted.
        """
        if not self.value or elapsed < self.value:
            return TimerSpec(self.value - elapsed if self.value else 0, self.interval), 0
        if not self.interval:
            return TimerSpec(1, 0), 0
        missed, into = divmod(elapsed - self.value, self.interval)
        return TimerSpec(self.interval - into, self.interval), missed + 1


def sigevent(value: int, signal: int, notify: int, tid: int) -> bytes:
    """struct sigevent; ``tid`` counts only with THREAD_ID."""
    return _SIGEVENT.pack(value, signal, notify, tid)
