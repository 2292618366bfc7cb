"""Threads in code of the kernel's own, the vdso: where another kernel's takes its place nobody may be in it.

At the source a thread that was stopped there walks out, step by step; its functions take a microsecond and do not wait.
But they begin anew when the kernel has changed the time meanwhile, at each tick, so a few of them may never come out:
they are left where they are, which matters only where the vdso is another one.  No signal is held back on the way: our
death must not leave a thread deaf.  What a signal handler will return to cannot be walked: at the target such a process
is refused, if its vdso is another there.  The same frames on the stacks hold vector registers in the layout of the
source's CPU, and are put right.
"""

from __future__ import annotations

import logging
import signal
import struct
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from checkpoint import arch
from checkpoint.errors import ExtendedStateForeign, HandlerInVdso, HandlerOnOtherCpu, LazyImpossible
from checkpoint.kernel import ptrace
from checkpoint.kernel.ptrace import Event
from checkpoint.memory import special
from checkpoint.memory.layout import MemoryLayout
from checkpoint.memory.vma import VDSO
from checkpoint.state.registers import Registers
from checkpoint.thread import Thread
from checkpoint.tracee import Process

if TYPE_CHECKING:
    from checkpoint.spawn import Stub

__all__ = ["settle", "walk_out"]

_log = logging.getLogger(__name__)

#: seconds in which the threads of a process are led out; the others stay
_PATIENCE: Final = 0.03
_STEP_TIMEOUT: Final = 1.0
_SIGINFO_HEAD: Final = struct.Struct("<iii")  # si_signo, si_errno, si_code
#: how much of a stack is searched for the frames of signal handlers
_STACK_SEARCHED: Final = 1 << 20
#: handlers that interrupted each other
_MOST_FRAMES: Final = 64


def walk_out(process: Process) -> None:
    """Let the threads of a stopped process that stand in the vdso leave it, as far as they do in time. StopTimeout if
    one does not even take a step."""
    ranges = [(vma.start, vma.end) for vma in process.maps if vma.name == VDSO]
    inside = [thread for thread in process.threads if _in(ranges, thread.registers.ip)]
    deadline = time.monotonic() + _PATIENCE
    left = [thread for thread in inside if not _walk_out(thread, ranges, deadline)]
    if left:
        _log.debug("%s: %d threads stand in the vdso", f"pid {process.pid}", len(left))
    if inside:
        process.note()


def _in(ranges: Sequence[tuple[int, int]], ip: int) -> bool:
    return any(start <= ip < end for start, end in ranges)


def _walk_out(thread: Thread, ranges: Sequence[tuple[int, int]], deadline: float) -> bool:
    """Whether it has come out."""
    deliver = 0
    try:
        while _in(ranges, thread.get_registers().ip) or deliver:
            if time.monotonic() > deadline and not deliver:
                return False
            ptrace.step(thread.tid, deliver)
            stop = thread.wait(_STEP_TIMEOUT)
            deliver = stop.signal if stop.event == Event.SIGNAL and not _is_step(thread, stop.signal) else 0
    finally:
        thread.set_registers(thread.get_registers().not_stepping())
    return True


def _is_step(thread: Thread, number: int) -> bool:
    """Whether a signal is the end of a step, and not one that somebody has sent."""
    return number == signal.SIGTRAP and _SIGINFO_HEAD.unpack_from(ptrace.signal_info(thread.tid))[2] > 0


def settle(stub: Stub, layout: MemoryLayout, states: Sequence[Registers], *, whole: bool) -> None:
    """Let the threads go on here, as far as code and layouts of another kernel and CPU go.

    whole  all of the memory is there, so that stacks can be searched

    HandlerInVdso, HandlerOnOtherCpu; LazyImpossible.
    """
    old = special.leads_on(layout, stub)
    own = stub.leader.get_xstate()
    name = f"pid {layout.pid}"
    for state in states:
        same = arch.same_layout(state.extended, state.layout, own)
        if old is None and same:
            continue
        if not whole:
            raise LazyImpossible(
                "the image is from another kernel or CPU, and its stacks must be searched", object=name
            )
        registers = arch.Registers.unpack(state.general)
        if old is not None and _in([old], registers.ip):
            raise HandlerInVdso("a thread stands in the vdso of another kernel", object=name)
        for frame in _frames(stub, registers.sp):
            if old is not None and _in([old], frame.ip):
                raise HandlerInVdso("a signal handler will return into the vdso of another kernel", object=name)
            if not same:
                _convert(stub, frame, state.layout, own, name)


def _convert(stub: Stub, frame: arch.Frame, layout: Sequence[arch.Component], own: bytes, name: str) -> None:
    try:
        stub.write(frame.area, arch.convert_frame(stub.read(frame.area, frame.size), layout, own))
    except ExtendedStateForeign as error:
        raise HandlerOnOtherCpu(error.message, object=name) from error


def _frames(stub: Stub, sp: int) -> Iterator[arch.Frame]:
    """Those of the handlers that run on a stack, and on the stacks that they interrupted."""
    searched: list[tuple[int, int]] = []
    places = [sp]
    while places and len(searched) < _MOST_FRAMES:
        at = places.pop() & ~7
        vma = next((vma for vma in stub.maps if vma.start <= at < vma.end), None)
        if vma is None or _in(searched, at):
            continue
        end = min(vma.end, at + _STACK_SEARCHED)
        searched.append((at, end))
        try:
            stack = stub.read(at, end - at)
        except OSError:
            continue  # a mapping that cannot be read is no stack
        for frame in arch.signal_frames(stack, at):
            yield frame
            places.append(frame.sp)
