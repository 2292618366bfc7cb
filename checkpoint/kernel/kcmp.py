"""kcmp(2): whether two tasks share a kernel object.

Source: include/uapi/linux/kcmp.h, kernel/kcmp.c (CONFIG_KCMP).
"""

from __future__ import annotations

import enum

from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS

__all__ = ["KcmpType", "Known", "kcmp"]


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


class Known:
    """Tasks that have different things of one type: who shares with whom is found by halves, since kcmp orders them."""

    def __init__(self, what: KcmpType) -> None:
        self._what = what
        self._order: list[int] = []

    def first(self, task: int) -> int:
        """The task that was asked about before and has the same thing; this one itself, if none has.

        ProcessLookupError if it has ended, PermissionError if it may not be traced.
        """
        while True:
            low, high = 0, len(self._order)
            while low < high:
                middle = (low + high) // 2
                try:
                    order = kcmp(task, self._order[middle], self._what)
                except ProcessLookupError:
                    kcmp(task, task, self._what)  # is it this one that has ended?
                    del self._order[middle]
                    break
                if order == 0:
                    return self._order[middle]
                low, high = (low, middle) if order == 1 else (middle + 1, high)
            else:
                self._order.insert(low, task)
                return task
