"""Scheduling: policies, struct sched_attr, and the system calls that Python lacks.

Source: include/uapi/linux/sched.h, sched/types.h, ioprio.h, mempolicy.h.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import struct
from dataclasses import astuple
from typing import Final, Self

from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = [
    "CPU_SET_SIZE",
    "NICE_OFFSET",
    "SCHED_ATTR_SIZE",
    "IoprioWho",
    "MemoryPolicy",
    "Policy",
    "SchedAttr",
    "SchedFlag",
    "default_slice",
    "get_attributes",
    "online_cpus",
    "set_attributes",
    "set_io_priority",
]

_ATTR = struct.Struct("<IIQiIQQQ")
#: bytes of the first published struct sched_attr (SCHED_ATTR_SIZE_VER0); the later fields are utilisation clamps
SCHED_ATTR_SIZE: Final = _ATTR.size
#: bytes of the CPU sets passed to the kernel: for 8192 CPUs, the most that any kernel is built for
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


class SchedFlag(enum.IntFlag):
    """SCHED_FLAG_* that belong to the policy (others say how to read the structure)."""

    RESET_ON_FORK = 1 << 0
    RECLAIM = 1 << 1
    DL_OVERRUN = 1 << 2


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


def set_attributes(tid: int, attr: SchedAttr) -> None:
    """sched_setattr(2) of a thread. OSError as the kernel says."""
    data = ctypes.create_string_buffer(attr.pack(), SCHED_ATTR_SIZE)
    syscall(SYS.sched_setattr, tid, ctypes.addressof(data), 0)


def get_attributes(tid: int) -> SchedAttr:
    """sched_getattr(2) of a thread. OSError as the kernel says."""
    data = ctypes.create_string_buffer(SCHED_ATTR_SIZE)
    syscall(SYS.sched_getattr, tid, ctypes.addressof(data), SCHED_ATTR_SIZE, 0)
    return SchedAttr.unpack(data.raw)


@functools.cache
def default_slice() -> int:
    """Nanoseconds that a thread of our own may run at a time: what the kernel shows where none was asked for. To be
    asked first while we have an ordinary policy. OSError."""
    return get_attributes(0).runtime


def get_io_priority(tid: int) -> int:
    """ioprio_get(2) of a thread. OSError as the kernel says."""
    return syscall(SYS.ioprio_get, IoprioWho.PROCESS, tid)


def set_io_priority(tid: int, value: int) -> None:
    """ioprio_set(2) of a thread. OSError as the kernel says."""
    syscall(SYS.ioprio_set, IoprioWho.PROCESS, tid, value)


def online_cpus() -> frozenset[int]:
    """The CPUs of this host that are online: what a thread that was never bound may use, cpusets apart."""
    with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
        ranges = [part.partition("-") for part in file.read().strip().split(",")]
    return frozenset(cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1))
