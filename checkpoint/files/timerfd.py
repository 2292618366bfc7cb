"""timerfd: a timer that is read.

Source: fs/timerfd.c; fdinfo ``clockid``, ``ticks``, ``settime flags`` (octal), ``it_value`` and ``it_interval``
(seconds, nanoseconds; the value is the time left).
"""

from __future__ import annotations

import fcntl
import re
import time
from typing import TYPE_CHECKING, ClassVar, Final, Self

from checkpoint.errors import FileCaptureFailed
from checkpoint.files import abi
from checkpoint.files.abi import NS_PER_SECOND, TimerfdFlag, TimerSpec
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["TimerFd"]

_PAIR: Final = re.compile(r"\((\d+), (\d+)\)")
#: the clocks that follow the time of day: an absolute deadline on them is kept as such
_WALL_CLOCKS: Final = frozenset({time.CLOCK_REALTIME, 8})  # 8: CLOCK_REALTIME_ALARM


@register("timerfd", link=r"anon_inode:\[timerfd\]")
@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFd(OpenFile):
    """One open timerfd description. Times in nanoseconds.

    clock     CLOCK_MONOTONIC, CLOCK_REALTIME, ..
    ticks     expirations that were not read yet
    settime   flags of the last timerfd_settime
    left      time to the next expiry; 0: disarmed
    interval  period, 0: expires once
    deadline  for an absolute timer on a clock of the time of day: when it expires, else None
    """

    by_clock: ClassVar[bool] = True

    clock: int
    ticks: int
    settime: int
    left: int
    interval: int
    deadline: int | None = None

    def validate(self) -> None:
        if min(self.ticks, self.left, self.interval) < 0 or max(self.ticks, self.left, self.interval) >= 1 << 63:
            raise ValueError("ticks or times out of range")
        if self.deadline is not None and not 0 < self.deadline < 1 << 63:
            raise ValueError("deadline out of range")

    @classmethod
    def capture(cls, view: FdView) -> Self:
        # A periodic timer that expired unread stands still, shows no time left and has not counted since: only reading
        # or asking makes the kernel catch up. Asking does what the next read would have done, and keeps the phase.
        abi.timerfd_gettime(view.dup)
        view.refresh()
        clock, settime = view.number("clockid"), view.number("settime flags", 8)
        left, interval = _nanoseconds(view, "it_value"), _nanoseconds(view, "it_interval")
        ticks = view.number("ticks")
        if ticks and interval and not left:
            # It expired again since (a period of microseconds): armed it must be, 0 would disarm it.
            left = interval
        deadline = None
        if left and settime & TimerfdFlag.ABSTIME and clock in _WALL_CLOCKS:
            deadline = time.clock_gettime_ns(time.CLOCK_REALTIME) + left
        return cls(
            clock=clock,
            ticks=ticks,
            settime=settime,
            left=left,
            interval=interval,
            deadline=deadline,
            **view.common(),
        )

    def rebuild(self, host: Rebuilder) -> int:
        fd = abi.timerfd_create(self.clock, abi.FileFlag.CLOEXEC)
        set_flags(fd, self.flags)
        self._arm(fd)
        return fd

    def late(self, host: Rebuilder, fd: int) -> None:
        self._arm(fd)

    def _arm(self, fd: int) -> None:
        if self.deadline is not None:
            abi.timerfd_settime(fd, self.settime, TimerSpec(interval=self.interval, value=self.deadline))
        else:
            abi.timerfd_settime(fd, 0, TimerSpec(interval=self.interval, value=self.left))
        # Arming forgets the ticks: they come last.
        if self.ticks:
            fcntl.ioctl(fd, abi.Ioctl.TFD_IOC_SET_TICKS, self.ticks.to_bytes(8, "little"))


def _nanoseconds(view: FdView, name: str) -> int:
    pair = _PAIR.fullmatch(view.info.get(name, ""))
    if pair is None:
        raise FileCaptureFailed(f"fdinfo has no time {name!r}: {view.lines}", object=view.object)
    return int(pair[1]) * NS_PER_SECOND + int(pair[2])
