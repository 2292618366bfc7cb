"""Threads that are stopped while they wait for a time in a call of which the kernel keeps no note (arch.Wait): they go
on with what was left of it, in the process that runs on here as in a rebuilt one.

::

    look_at    while all run: when their calls time out
    end_of     they were stopped: whether they still were in those calls
    go_on      the last before they run again
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from checkpoint import procfs
from checkpoint.arch import WAITS, Registers, may_change_time, wait_of
from checkpoint.errors import NoSuchProcess
from checkpoint.kernel.callwatch import CallWatch
from checkpoint.memory.vma import PAGE, read_maps

if TYPE_CHECKING:
    from checkpoint.thread import Thread
    from checkpoint.tracee import Process

__all__ = ["end_of", "go_on", "look_at"]

_log = logging.getLogger(__name__)

#: nanoseconds that a wait lasts at least when it goes on: one look at what it waits for
_SHORTEST: Final = 1_000_000
#: how the kernel calls the stack that it has made itself
_FIRST_STACK: Final = "[stack]"


def look_at(roots: Iterable[int], watch: CallWatch | None = None) -> CallWatch:
    """Note what the kernel has of those threads of the trees that wait for a time, and whose programs would not see
    that it was changed; in a new watch if none is given. Of threads that come later nothing is known."""
    watch = watch or CallWatch()
    for pid in {each for root in roots for each in _tree(root)}:
        waiting = {tid: call for tid in _threads(pid) if (call := procfs.call_of(pid, tid)) and call[0] in WAITS}
        if not waiting:
            continue
        try:
            mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            _log.info("waits of pid %d will begin anew: %s", pid, error)
            continue
        try:
            read = functools.partial(_read, mem)
            free = {call for call in set(waiting.values()) if may_change_time(read, *call)}
        finally:
            os.close(mem)
        for tid, call in waiting.items():
            if call in free:
                watch.look(tid)
    return watch


def _tree(root: int) -> list[int]:
    with contextlib.suppress(NoSuchProcess):
        return procfs.tree(root)
    return []


def _threads(pid: int) -> list[int]:
    with contextlib.suppress(NoSuchProcess):
        return procfs.threads(pid)
    return []


def _read(mem: int, address: int, size: int) -> bytes:
    return os.pread(mem, size, address)


def end_of(process: Process, thread: Thread) -> int | None:
    """When a stopped thread has waited long enough, in nanoseconds of our CLOCK_MONOTONIC. None: it does not wait, or
    nobody has looked, or it has begun another call since."""
    wait = wait_of(thread.registers)
    end = None if wait is None or process.watch is None else process.watch.until(thread.tid)
    if wait is None or end is None:
        return None
    if wait.longest is not None and end - time.monotonic_ns() > wait.longest:
        return None  # that timer is not the call's
    return end


def go_on(process: Process, thread: Thread) -> None:
    """Make a thread wait as long as it still has to, if that is known; else it waits its whole time."""
    if thread.until is None:
        return
    registers = thread.get_registers()
    wait = wait_of(registers)
    if wait is None:
        return
    begun, place, data = wait.begun(registers, max(thread.until - time.monotonic_ns(), _SHORTEST))
    if data:
        try:
            if not _on_its_stack(process.pid, registers, place):
                return
            process.write(place, data)
        except (OSError, NoSuchProcess) as error:
            # that page is not there yet (lazy memory), or it was killed
            _log.info("%s waits its whole time again: %s", thread.name, error)
            return
    thread.set_registers(begun)


def _on_its_stack(pid: int, registers: Registers, place: int) -> bool:
    """Whether a place below the stack pointer is the stack's own: of the first thread, or of one that the C library has
    made, with the thread's own data at its upper end. A stack of a program's own making may be small, with something
    else below it."""
    for vma in read_maps(pid):
        if vma.start <= registers.sp < vma.end:
            made = registers.sp < registers.thread_pointer < vma.end
            return place - PAGE >= vma.start and (vma.name == _FIRST_STACK or made)
    return False
