"""kcmp(2): whether two tasks share a kernel object.

Source: include/uapi/linux/kcmp.h, kernel/kcmp.c (CONFIG_KCMP).
"""

from __future__ import annotations

import enum

from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS

__all__ = ["KcmpType", "kcmp"]


class KcmpType(enum.IntEnum):
    """What is compared."""

    FILE = 0  # open file descriptions; the two last arguments are descriptors
    VM = 1
    FILES = 2
    FS = 3
    SIGHAND = 4
    IO = 5
    SYSVSEM = 6
    EPOLL_TFD = 7


def kcmp(pid1: int, pid2: int, what: KcmpType, index1: int = 0, index2: int = 0) -> int:
    """0: they are the same object; 1, 2: less, greater in a secret order; 3: different, and no order.

    OSError: ESRCH no such process, EPERM it may not be traced, EBADF no such descriptor.
    """
    return syscall(SYS.kcmp, pid1, pid2, what, index1, index2)
