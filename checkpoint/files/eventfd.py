"""eventfd: a 64-bit counter that wakes its readers.

Source: Linux fs/eventfd.c; /proc/PID/fdinfo/N, line ``eventfd-count`` (hexadecimal), ``eventfd-semaphore`` since 6.5.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Self

from checkpoint.files.base import FdView, OpenFile, register, set_flags
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["EventFd"]

_LARGEST: Final = 2**64 - 2


@register("eventfd", link=r"anon_inode:\[eventfd\]")
@dataclass(frozen=True, slots=True, kw_only=True)
class EventFd(OpenFile):
    """One open eventfd description.

    count      value of the counter, 0 .. 2**64 - 2
    semaphore  a read takes one instead of all (EFD_SEMAPHORE)
    """

    count: int
    semaphore: bool

    def validate(self) -> None:
        if not 0 <= self.count <= _LARGEST:
            raise ValueError(f"{self.count} is not the count of an eventfd")

    @classmethod
    def capture(cls, view: FdView) -> Self:
        # The counter is read from fdinfo: reading the descriptor itself would reset it.
        count, semaphore = view.number("eventfd-count", 16), view.info.get("eventfd-semaphore") == "1"
        return cls(count=count, semaphore=semaphore, **view.common())

    def rebuild(self, host: Rebuilder) -> int:
        # The first value is 32 bits wide; what is written is added to it, and no flag keeps a write short.
        fd = os.eventfd(0, os.EFD_CLOEXEC | (os.EFD_SEMAPHORE if self.semaphore else 0))
        if self.count:
            os.eventfd_write(fd, self.count)
        set_flags(fd, self.flags)
        return fd
