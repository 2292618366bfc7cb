"""Copies of pages made by other threads: while one is sent the next is read, while one is written the next comes.

The copies themselves are single system calls that take a millisecond for each MiB, twice that and more where the
memory is not there yet, and hold no lock of ours.  What a thread fails at is raised by the next call here.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Final, TypeVar

__all__ = ["Crew", "fetched_ahead"]

T = TypeVar("T")

#: where pages come into being two threads are nearly twice as quick; more wait for each other
_THREADS: Final = 2
#: pieces of work that may be under way before :meth:`Crew.do` waits for the oldest
_AHEAD: Final = 4
_END: Final = object()


class Crew:
    """Threads for work that may be done in any order, until :meth:`wait`. They begin with the first piece. Close it."""

    def __init__(self) -> None:
        self._executor: Executor | None = None
        self._under_way: collections.deque[Future[None]] = collections.deque()

    def do(self, work: Callable[[], None]) -> None:
        """Have it done. Raises what an earlier piece of work has failed with."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(_THREADS, "pages")
        self._under_way.append(self._executor.submit(work))
        self._settle(_AHEAD)

    def wait(self) -> None:
        """Until all is done. Raises what a piece of work has failed with."""
        if self._under_way:
            self._settle(0)

    def _settle(self, ahead: int) -> None:
        while self._under_way and (len(self._under_way) > ahead or self._under_way[0].done()):
            self._under_way.popleft().result()

    def close(self) -> None:
        """Until nothing is under way any more, however it ended. May be called again."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()
        self._under_way.clear()


def fetched_ahead(items: Iterator[T], executor: Executor) -> Iterator[T]:
    """``items``, each taken by ``executor`` while the one before it is in use: two of them must be valid at a time."""
    coming = executor.submit(next, items, _END)
    try:
        while (item := coming.result()) is not _END:
            coming = executor.submit(next, items, _END)
            yield item  # type: ignore[misc]
    finally:
        # nobody may be at work in ``items`` when its owner takes it away
        coming.cancel() or coming.exception()
