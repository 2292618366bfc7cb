"""signalfd: reads the pending signals of whoever reads.

Source: fs/signalfd.c; fdinfo ``sigmask`` (hexadecimal, bit n-1 is signal n). It holds no queue: the pending signals are
the process's own, and are rebuilt with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from checkpoint.files import abi
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["SignalFd"]


@register("signalfd", link=r"anon_inode:\[signalfd\]")
@dataclass(frozen=True, slots=True, kw_only=True)
class SignalFd(OpenFile):
    """One open signalfd description.

    mask  signals that it reads, bit n-1 is signal n
    """

    mask: int

    def validate(self) -> None:
        if not 0 <= self.mask < 1 << 64:
            raise ValueError("not a signal mask")

    @classmethod
    def capture(cls, view: FdView) -> Self:
        return cls(mask=view.number("sigmask", 16), **view.common())

    def rebuild(self, host: Rebuilder) -> int:
        fd = abi.signalfd(self.mask, abi.FileFlag.CLOEXEC)
        set_flags(fd, self.flags)
        return fd
