"""What a tool that was killed has left in a process, and its removal.

It can be: boot code and mark in the vdso's tail; the memory for engines and tables, if the process has several threads;
rarely a thread that is still in our code, in a call that blocks, or because the process was stopped by a signal
meanwhile.  All of it is harmless, and taken away by the next tool that stops the process.
"""

from __future__ import annotations

import signal
import time
from typing import Final

from checkpoint import procfs
from checkpoint.arch import interrupted_in
from checkpoint.boot import HEAD_SIZE, MARK_SIZE, Boot, Mark, is_head, pristine, vdso_of
from checkpoint.errors import NoSuchProcess, StopTimeout
from checkpoint.excursion import Excursions, is_stop_signal
from checkpoint.kernel import ptrace
from checkpoint.kernel.ptrace import Event
from checkpoint.memory.vma import VDSO, find_named
from checkpoint.thread import Thread
from checkpoint.tracee import Process
from tcpstate.kernel.machine import SYS
from tcpstate.slotted import dataclass

__all__ = ["Leftovers", "clean", "leftovers"]

#: seconds in which a thread must have come out of left code
_OUT_TIMEOUT: Final = 5.0
_STEP_TIMEOUT: Final = 1.0
_INTERRUPT_TIMEOUT: Final = 5.0
_ALL_SIGNALS: Final = (1 << 64) - 1
# How much of a stack is searched for a signal handler that will return into left code.
_STACK_SEARCHED: Final = 256 * 1024

_Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is there.

    ranges  (start, end) of boot, and of the mapping with engines and tables if it is still there
    tracer  the PID of the tool, if it is alive and at work; 0 if it is dead
    """

    ranges: _Ranges
    tracer: int


def _ranges(process: Process, mark: Mark) -> _Ranges:
    boot = (mark.boot, mark.boot + mark.boot_size)
    end = mark.start + mark.size
    if mark.start < mark.head < end - HEAD_SIZE:
        covered = mark.start
        for vma in process.maps:
            if vma.start <= covered < vma.end:
                covered = vma.end
        # Else the memory is gone; or, without its head, the address belongs to the application now.
        if covered >= end and is_head(process.read(mark.head, HEAD_SIZE), mark.size):
            return (boot, (mark.start, end))
    return (boot,)


def _find(process: Process) -> Mark | None:
    vdso = vdso_of(process)
    mark = Mark.find(process.read(vdso.start, vdso.size), vdso.start)
    return mark if mark is not None and mark.boot >= vdso.start else None


def leftovers(pid: int) -> Leftovers | None:
    """What a tool has left in a process, or is just using (``tracer`` not 0); None: nothing. Nothing is stopped."""
    if find_named(pid, VDSO) is None:
        return None
    process = Process(pid)
    try:
        mark = _find(process)
        if mark is None:
            return None
        return Leftovers(_ranges(process, mark), int(procfs.read_status(pid)["TracerPid"]))
    except ProcessLookupError as error:
        raise NoSuchProcess("the process has just ended", object=f"pid {pid}") from error
    finally:
        process.close()


def clean(process: Process) -> bool:
    """Remove what a dead tool has left in a stopped process. Whether there was anything.

    StopTimeout if a thread does not come out of the left code, or a signal handler will return into it.
    """
    mark = _find(process)
    if mark is None:
        return False
    ranges = _ranges(process, mark)
    inside = [thread for thread in process.threads if _is_in(thread, ranges)]
    for thread in inside:
        _let_out(thread, ranges)
    if inside:
        process.note()
        process.forget_maps()
        ranges = _ranges(process, mark)  # the last one may have taken the memory with it
    for thread in process.threads:
        _require_no_return(thread, process, ranges)
    excursions = Excursions(process)
    boot = Boot(process, excursions, mark.boot)
    memory = ranges[1:]
    if memory:
        boot.write(mark.start, mark.size, mark.head)
        for start, end in memory:
            boot.call(SYS.munmap, start, end - start, label="removing what an earlier tcpmig left")
        excursions.home([process.leader])
        process.forget_maps()
    boot.remove()
    # another version's boot may be longer
    start = vdso_of(process).start
    process.write(mark.boot, pristine(mark.boot - start, mark.boot_size + MARK_SIZE))
    return True


def _is_in(thread: Thread, ranges: _Ranges) -> bool:
    ip = thread.get_registers().ip
    return any(start <= ip < end for start, end in ranges)


def _let_out(thread: Thread, ranges: _Ranges) -> None:
    """Let a thread run on, step by step, until it has left the code; it then stands where it was stopped long ago.

    Its own way out ends with a jump home, so not one instruction of the application is executed here. Signals that are
    due once it has put back its mask wait until it is out: a handler would return into the code.
    """
    deadline = time.monotonic() + _OUT_TIMEOUT
    deliver = 0
    mask: int | None = None
    while _is_in(thread, ranges):
        if time.monotonic() > deadline:
            raise StopTimeout("a thread does not come out of code that an earlier tcpmig left", object=thread.name)
        ptrace.step(thread.tid, deliver)
        deliver = 0
        try:
            stop = thread.wait(_STEP_TIMEOUT)
        except StopTimeout:
            thread.interrupt()  # it is in a call that blocks, and makes it again when it goes on
            thread.await_interrupt(_INTERRUPT_TIMEOUT)
            continue
        if stop.event != Event.SIGNAL or stop.signal == signal.SIGTRAP or is_stop_signal(thread):
            continue
        if mask is None:
            mask = thread.get_sigmask()
            thread.set_sigmask(_ALL_SIGNALS)
        deliver = stop.signal  # being blocked now, it goes back to its queue
    thread.set_registers(thread.get_registers().not_stepping())
    if mask is not None:
        thread.set_sigmask(mask)


def _require_no_return(thread: Thread, process: Process, ranges: _Ranges) -> None:
    sp = thread.registers.sp
    for vma in process.maps:
        if vma.start <= sp < vma.end:
            stack = process.read(sp & ~7, min(vma.end - (sp & ~7), _STACK_SEARCHED))
            if interrupted_in(stack, ranges):
                raise StopTimeout(
                    "a signal handler will return into code that an earlier tcpmig left", object=thread.name
                )
