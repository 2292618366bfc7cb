"""While processes stand still, the thread that takes them apart or puts them together goes before all others.

A host that is being emptied is often a busy one, and each time that another program gets the processor the stop lasts
longer: with four programs that compute on two processors, a small server's was half again as long.  So for the time of
a stop, and half a second at most, the calling thread has a real-time policy; while it waits, and when it makes
processes, it has its own again.  Whatever is forked from it, threads too, begins with the ordinary policy
(SCHED_RESET_ON_FORK).

Source: sched(7); Linux kernel/sched/syscalls.c.  What a forked child has of a real-time parent all the same is a
default timer slack of zero (kernel/fork.c): hence :func:`relaxed`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from checkpoint.kernel.sched import default_slice

__all__ = ["begin", "end", "relaxed"]

_log = logging.getLogger(__name__)

#: seconds; copying gigabytes in a stop is not to keep a processor from everybody
_LONGEST: Final = 0.5
#: the lowest of all real-time threads: those of the host's own stay before us
_URGENT: Final = (os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


class _Urgent(NamedTuple):
    """thread: which one; policy, param: what it had before; since: when it became urgent (CLOCK_MONOTONIC, seconds)."""

    thread: int
    policy: int
    param: os.sched_param
    since: float

    def calm(self) -> None:
        os.sched_setscheduler(0, self.policy, self.param)


#: the one that is urgent, if any
_now: list[_Urgent] = []


def begin() -> None:
    """The calling thread is urgent from now on; one of a program is. It stays as it is if that is not allowed, or if it
    has a real-time policy already."""
    if _now:
        return
    default_slice()  # asked while the policy is our own
    policy = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
    if policy not in (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE):
        return
    before = _Urgent(threading.get_ident(), policy, os.sched_getparam(0), time.monotonic())
    try:
        os.sched_setscheduler(0, *_URGENT)
    except OSError as error:
        _log.debug("the stop has the priority that we have: %s", error)
        return
    _now.append(before)


def end() -> None:
    """As before. By the same thread; may be repeated."""
    while _now:
        _now.pop().calm()


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Inside, the calling thread is as it was before it was urgent; if it has been so for long, afterwards as well."""
    urgent = _now[0] if _now and _now[0].thread == threading.get_ident() else None
    if urgent is None:
        yield
        return
    urgent.calm()
    try:
        yield
    finally:
        if time.monotonic() - urgent.since > _LONGEST:
            _now.clear()
        else:
            os.sched_setscheduler(0, *_URGENT)
