"""Something that is done by another thread while we go on: what waits for the kernel only."""

from __future__ import annotations

import _thread
import contextlib
import os
from collections.abc import Callable
from typing import Final, Generic, TypeVar

__all__ = ["Beside"]

_Result = TypeVar("_Result")
_REAL_TIME: Final = (os.SCHED_FIFO, os.SCHED_RR)


class Beside(Generic[_Result]):
    """``work``, begun now, in the namespaces of the calling thread, and as urgently: a real-time policy of that one is
    taken over, though it be one that children do not get (SCHED_RESET_ON_FORK): what is begun here is waited for.

    Not a :class:`threading.Thread`: whoever starts such a one waits until it runs, and if it takes our processor, until
    the kernel lets go of that: milliseconds.
    """

    def __init__(self, work: Callable[[], _Result]) -> None:
        self._work = work
        self._results: list[_Result] = []
        self._error: BaseException | None = None
        self._policy = os.sched_getscheduler(0)
        self._param = os.sched_getparam(0)
        self._over = _thread.allocate_lock()
        self._over.acquire()
        try:
            _thread.start_new_thread(self._start, ())
        except RuntimeError:
            # no room for a thread (pids.max of a cgroup): now, then
            self._run()

    def _start(self) -> None:
        if self._policy & ~os.SCHED_RESET_ON_FORK in _REAL_TIME:
            # it may have ceased to be allowed to us: then it takes longer
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, self._policy, self._param)
        self._run()

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:  # told to who asks for the result
            self._error = error
        finally:
            self._over.release()

    def wait(self) -> None:
        """Until it is over, however it ends. May be repeated."""
        with self._over:
            pass

    def result(self) -> _Result:
        """What it returned, or raises what it raised. May be repeated."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]
