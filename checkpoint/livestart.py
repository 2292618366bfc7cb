"""What is read of a process before the rounds of pre-copy, while it stands still for a moment, and which threads it has
in each of them.

Source: kcmp(2).
"""

from __future__ import annotations

from checkpoint import procfs
from checkpoint.errors import TrackingImpossible
from checkpoint.files.abi import pidfd_getfd
from checkpoint.inject import Injection
from checkpoint.kernel.kcmp import KcmpType, kcmp
from checkpoint.kernel.userfaultfd import CREATE_FLAGS
from checkpoint.memory import softdirty
from checkpoint.memory.tracking import Tracking
from checkpoint.state.base import State
from checkpoint.state.birth import THREADS_MAX, capture_first
from checkpoint.tracee import Process
from tcpstate.kernel.calls import CallError, CallTable
from tcpstate.kernel.machine import SYS

__all__ = ["begin", "threads"]


def begin(process: Process, *, by_bits: bool) -> tuple[Tracking | softdirty.Tracking, tuple[State, ...]]:
    """Begin to track what is written; and what the process must be before it has threads.

    by_bits  the kernel has no better way

    TrackingImpossible, and errors of injected calls.
    """
    try:
        with Injection(process, [process.leader]) as injection:
            first = capture_first(process, injection)
            track = _by_bits(process) if by_bits else _track(process, injection)
    except CallError as error:
        raise TrackingImpossible(f"{error.strerror}", object=f"pid {process.pid}") from error
    except OSError as error:
        raise TrackingImpossible(f"tracking of writes: {error.strerror}", object=f"pid {process.pid}") from error
    return track, first


def _by_bits(process: Process) -> softdirty.Tracking:
    track = softdirty.Tracking(process.pid)
    try:
        track.look()
    except BaseException:
        track.close()
        raise
    return track


def _track(process: Process, injection: Injection) -> Tracking:
    """Make a userfaultfd in a process that stands still, and take it out."""
    leader = process.leader.tid
    calls = CallTable()
    made = calls.call(SYS.userfaultfd, CREATE_FLAGS, label="userfaultfd")
    calls.undo(SYS.close, made)
    injection.run({leader: calls})
    try:
        ours = pidfd_getfd(process.pidfd, made.value)
    finally:
        calls = CallTable()
        calls.call(SYS.close, made.value, label="closing it")
        injection.run({leader: calls})
    return Tracking(process.pid, ours)


def threads(pid: int, others: set[int]) -> tuple[int, ...]:
    """The threads of a process that runs, without the first; none if one of them has directories of its own, or they
    are too many: those are born in the stop. NoSuchProcess.

    others  numbers that were told of before; these are added. One that has ended may have become another process's
    """
    found = []
    for tid in procfs.threads(pid)[1:]:
        try:
            shares = kcmp(pid, tid, KcmpType.FS) == 0
        except ProcessLookupError:
            continue  # it has ended since
        if not shares and procfs.lives(pid, tid):
            return ()
        if shares and tid not in others:
            found.append(tid)
    others.update(found)
    return tuple(found) if len(found) <= THREADS_MAX else ()
