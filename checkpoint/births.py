"""The thread that bears processes, where it must be another than the one that does all the rest.

A thread that has unshared its time namespace can bear processes into it; before Linux 6.2 it can bear no threads any
more, nor processes that borrow our memory (kernel/fork.c: EINVAL), and the way back is closed to a process with several
threads.  There a thread is given up for it, and spawns.

Source: time_namespaces(7); Linux 6.2, "fs/exec: allow to unshare a time namespace on vfork+exec".
"""

from __future__ import annotations

import _thread
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from checkpoint import urgency
from checkpoint.kernel.clone import CloneFlag
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS

__all__ = ["apart", "ask", "run", "threads_go_on"]

_T = TypeVar("_T")
_spawner: list[ThreadPoolExecutor] = []
#: the child that tries it
_tried: list[int] = []


def ask() -> None:
    """Have :func:`threads_go_on` tried beside what comes next: a fork of ours takes milliseconds. OSError."""
    if _tried:
        return
    child = os.fork()
    if not child:
        try:
            syscall(SYS.unshare, CloneFlag.NEWTIME)
            _thread.start_new_thread(lambda: None, ())
            os._exit(0)
        finally:
            os._exit(1)
    _tried.append(child)


@functools.cache
def threads_go_on() -> bool:
    """Whether a thread that has unshared its time namespace can still bear threads. Tried in a child of ours."""
    ask()
    return os.waitstatus_to_exitcode(os.waitpid(_tried[0], 0)[1]) == 0


def apart() -> None:
    """From now on what is to be run() is run by a thread of its own."""
    if not _spawner:
        _spawner.append(ThreadPoolExecutor(1, "births"))


def run(work: Callable[[], _T]) -> _T:
    """What ``work`` returns or raises, done by the thread that bears processes: ours, unless apart()."""
    with urgency.relaxed():
        return _spawner[0].submit(work).result() if _spawner else work()
