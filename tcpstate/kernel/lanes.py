"""Work on thousands of sockets in portions, by two threads.

A portion is worked through from end to end before the next is begun: what the kernel and we keep of its sockets stays
in the processor's cache meanwhile.  Tables of calls hold no lock of the interpreter, so one thread makes calls while
the other puts together what the next ones need, or what the last ones brought.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from tcpstate.kernel.beside import Beside

__all__ = ["PORTION", "WIDE", "Together", "both", "in_portions", "processors"]

T = TypeVar("T")

#: sockets of a portion
PORTION: Final = 256
#: sockets from which on there are two threads
WIDE: Final = 1024


@functools.cache
def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def both(run: Callable[[int], None]) -> None:
    """``run(0)`` on this thread and ``run(1)`` on another, which is a child of this one: in the same namespaces.

    ``run`` must not raise; it keeps what failed.
    """
    other = threading.Thread(target=run, args=(1,), name="tcpmig-lane")
    try:
        other.start()
    except RuntimeError:
        # no room for a thread (pids.max of a cgroup): one after the other, then
        run(1)
    try:
        run(0)
    finally:
        if other.ident is not None:
            other.join()


class Together:
    """Portions of ``count`` things, which another thread begins to ``work`` on now, if they are many; the caller joins
    it when there is nothing else to do."""

    def __init__(self, count: int, work: Callable[[slice], None]) -> None:
        self._count, self._work = count, work
        # an iterator over a range hands each number to one thread only
        self._starts = iter(range(0, count, PORTION))
        self._failed: dict[int, BaseException] = {}
        self._other = None if count < WIDE or processors() < 2 else Beside(self._run)

    def _run(self) -> None:
        for start in self._starts:
            if self._failed:
                return
            try:
                self._work(slice(start, min(self._count, start + PORTION)))
            except BaseException as error:
                self._failed[start] = error

    def finish(self) -> None:
        """Until all is done. What is raised is the failure of the first portion, in their order, that failed; none is
        begun after one has."""
        self._run()
        if self._other is not None:
            self._other.wait()
        if self._failed:
            raise self._failed[min(self._failed)]


def in_portions(count: int, work: Callable[[slice], Sequence[T]]) -> list[T]:
    """What ``work`` returns for each portion of ``count`` things, put together in order.

    It runs on two threads if there are many: what it changes outside its portion must bear that.  No portion is begun
    after one has failed; what is raised is the failure of the first, in their order, that did.
    """
    if count <= PORTION:
        return list(work(slice(0, count)))
    done: dict[int, Sequence[T]] = {}
    failed: dict[int, BaseException] = {}
    starts = iter(range(0, count, PORTION))

    def run(_: int) -> None:
        # an iterator over a range hands each number to one thread only
        for start in starts:
            try:
                done[start] = work(slice(start, min(count, start + PORTION)))
            except BaseException as error:
                failed[start] = error
            if failed:
                return

    if count < WIDE or processors() < 2:
        run(0)
    else:
        both(run)
    if failed:
        raise failed[min(failed)]
    return [one for start in sorted(done) for one in done[start]]
