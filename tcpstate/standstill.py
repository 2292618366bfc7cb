"""Processes held still for a moment, while repair mode makes every call on their connection fail.

In repair a socket's owner gets EINVAL from send() and EPERM from recv(), so its threads must stand still outside of
calls: each is stopped as a debugger stops it (PTRACE_SEIZE and PTRACE_INTERRUPT), which takes it out of a call that
waits; the kernel starts that call anew afterwards.  Neither parents nor job control notice.  The few calls that cannot
be started anew (epoll_wait and others, signal(7)) return EINTR, as after any debugger.  If we are killed meanwhile, the
threads run on.

Source: ptrace(2), "Attaching and detaching", "Group-stop".
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable, Iterator
from typing import Final

from tcpstate.errors import OwnerNotStill
from tcpstate.kernel import ptrace

__all__ = ["standstill"]

_PATIENCE: Final = 5.0  # seconds for a thread to stop: one that waits for a disk may take a while
_PAUSE: Final = 0.0002
_EVENT_SHIFT: Final = 16


@contextlib.contextmanager
def standstill(pids: Iterable[int]) -> Iterator[None]:
    """In the block all threads of these processes stand still, outside of system calls. Ourselves are left out.

    OwnerNotStill: one is traced already, may not be traced, or does not stop; all run on then.
    """
    held: dict[int, int] = {}
    try:
        for pid in sorted(set(pids) - {os.getpid()}):
            _hold(pid, held)
        yield
    finally:
        for tid, pending in held.items():
            _let_go(tid, pending)


def _hold(pid: int, held: dict[int, int]) -> None:
    """Stop the threads of one process, those too that the last of them makes meanwhile."""
    while new := [tid for tid in _threads(pid) if tid not in held]:
        for tid in new:
            try:
                ptrace.seize(tid)
            except OSError as error:
                if error.errno == errno.ESRCH:
                    # it has just ended
                    continue
                reason = f"it may not be stopped: {os.strerror(error.errno or errno.EPERM)}"
                raise OwnerNotStill(reason, object=f"pid {pid} thread {tid}") from None
            held[tid] = 0
            ptrace.interrupt(tid)
        for tid in new:
            if tid in held and (pending := _stopped(pid, tid)) is not None:
                held[tid] = pending
        if not any(tid in held for tid in new):
            return


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except FileNotFoundError:
        return []


def _stopped(pid: int, tid: int) -> int | None:
    """Wait until it has stopped; the signal that it was about to get, 0 for none, None if it has ended."""
    end = time.monotonic() + _PATIENCE
    while True:
        found, status = os.waitpid(tid, ptrace.WALL | os.WNOHANG)
        if found:
            if not os.WIFSTOPPED(status):
                return None
            # another event than a stop of ours or its group's: a signal that is still to be delivered
            return 0 if status >> _EVENT_SHIFT == ptrace.Event.STOP else os.WSTOPSIG(status)
        if time.monotonic() > end:
            raise OwnerNotStill("it does not stop: it waits in the kernel", object=f"pid {pid} thread {tid}")
        time.sleep(_PAUSE)


def _let_go(tid: int, pending: int) -> None:
    try:
        ptrace.detach(tid, pending)
    except OSError as error:
        # killed meanwhile; or it never stopped: only a stopped thread can be let go
        if error.errno != errno.ESRCH:
            raise
        with contextlib.suppress(ChildProcessError):
            os.waitpid(tid, ptrace.WALL | os.WNOHANG)
