"""Scheduling: policies, struct sched_attr, and the system calls that Python lacks.

Source: include/uapi/linux/sched.h, sched/types.h, ioprio.h, mempolicy.h.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import astuple, dataclass
from typing import Final, Self

__all__ = ["CPU_SET_SIZE", "NICE_OFFSET", "SCHED_ATTR_SIZE", "IoprioWho", "MemoryPolicy", "Policy", "SchedAttr"]

_ATTR = struct.Struct("<IIQiIQQQ")
#: bytes of the first published struct sched_attr (SCHED_ATTR_SIZE_VER0); the later fields are utilisation clamps
SCHED_ATTR_SIZE: Final = _ATTR.size
#: bytes of the CPU sets passed to the kernel: 8192 CPUs, the most that x86-64 can be built for
CPU_SET_SIZE: Final = 1024
#: getpriority(2), the system call, returns 20 - nice
NICE_OFFSET: Final = 20


class Policy(enum.IntEnum):
    """Scheduling policies."""

    OTHER = 0
    FIFO = 1
    RR = 2
    BATCH = 3
    IDLE = 5
    DEADLINE = 6
    EXT = 7


class IoprioWho(enum.IntEnum):
    """First argument of ioprio_get and ioprio_set."""

    PROCESS = 1


class MemoryPolicy(enum.IntEnum):
    """Modes of set_mempolicy; the kernel adds flags in the high bits."""

    DEFAULT = 0


@dataclass(frozen=True, slots=True)
class SchedAttr:
    """struct sched_attr without its size and the clamps. Times in nanoseconds."""

    policy: int
    flags: int
    nice: int
    priority: int
    runtime: int
    deadline: int
    period: int

    def pack(self) -> bytes:
        """The structure's bytes."""
        return _ATTR.pack(SCHED_ATTR_SIZE, *astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The structure in the first bytes of ``data``."""
        return cls(*_ATTR.unpack_from(data)[1:])
