"""What a system call that sleeps for a relative time is, whatever the machine: which part of the kernel's note it has,
and how it is told another time.

Source: include/linux/restart_block.h; include/uapi/linux/futex.h, linux/time.h, asm-generic/poll.h.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

from tcpstate.slotted import dataclass

__all__ = ["FUTEX_PRIVATE", "FUTEX_WAIT", "POLLFD_SIZE", "TIMER_ABSTIME", "Note", "Sleep"]

TIMER_ABSTIME: Final = 1
FUTEX_WAIT: Final = 0  # its time-out is relative, that of FUTEX_WAIT_BITSET is not
FUTEX_PRIVATE: Final = 0x80
#: bytes of a struct pollfd; the descriptor is its first four
POLLFD_SIZE: Final = 8

_SECOND: Final = 1_000_000_000
_MILLISECOND: Final = 1_000_000
_LONGEST: Final = (1 << 31) - 1  # poll's milliseconds are an int
_TIMESPEC: Final = struct.Struct("<qq")


class Note(enum.Enum):
    """Which part of struct restart_block the kernel has used."""

    NANOSLEEP = "nanosleep"
    POLL = "poll"  # not on every machine: ppoll writes down what is left
    FUTEX = "futex"


@dataclass(frozen=True, slots=True)
class Sleep:
    """A call that was interrupted.

    note    where its end stands
    number  of the call, and its six ``args``
    time    which argument says how long: the address of a struct timespec, or milliseconds (POLL)
    """

    note: Note
    number: int
    args: tuple[int, ...]
    time: int

    @property
    def descriptors(self) -> tuple[int, int]:
        """(address, number) of the struct pollfd that it looks at."""
        return (self.args[0], self.args[1]) if self.note is Note.POLL else (0, 0)

    @property
    def rest(self) -> tuple[int, int]:
        """(address, bytes) of where the kernel writes, each time it is interrupted, how much is left."""
        address = self.args[self.time + 1] if self.note is Note.NANOSLEEP else 0
        return (address, _TIMESPEC.size) if address else (0, 0)

    def with_time(self, nanoseconds: int, timespec_at: int) -> tuple[tuple[int, ...], bytes]:
        """The arguments with another time, and the bytes that must lie at ``timespec_at``."""
        if self.note is Note.POLL:
            how_long, data = min(-(-nanoseconds // _MILLISECOND), _LONGEST), b""
        else:
            how_long, data = timespec_at, _TIMESPEC.pack(*divmod(nanoseconds, _SECOND))
        return (*self.args[: self.time], how_long, *self.args[self.time + 1 :]), data
