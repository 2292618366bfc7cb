"""When a call that a thread waits in will time out, where the kernel keeps no note of it and no interface tells.

While a thread waits its timer lies on its kernel stack (struct hrtimer_sleeper), and is gone as soon as the call is
interrupted.  So it is looked for before: a BPF iterator of that one thread copies the top of its stack.  Whether the
call that is interrupted a moment later is still the same one a second program knows, which notes each thread of those
looked at that begins a call (tracepoint sys_enter).  Nothing is changed; both end with their descriptors.

Source: kernel/time/sleep_timeout.c (schedule_hrtimeout_range_clock), fs/aio.c (read_events), include/linux/hrtimer.h,
kernel/bpf/task_iter.c, include/trace/events/syscalls.h.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import threading
import time
from typing import Final

from checkpoint.arch import KERNEL_STACK_POINTER
from checkpoint.kernel import taskiter
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.slotted import dataclass

__all__ = ["CallWatch", "Places", "prepare", "timer_on"]

_log = logging.getLogger(__name__)

_HEAD: Final = struct.Struct("=QQQ")  # monotonic, task, state
_KEY: Final = struct.Struct("=Q")
#: the stack is read in pieces: the one that would reach beyond its end is left out, not all of it
_PIECE, _PIECES = 256, 8
_MOST: Final = 1 << 12  # threads looked at for one stop
_INTERRUPTIBLE: Final = 1  # TASK_INTERRUPTIBLE of include/linux/sched.h
_ENQUEUED: Final = 1  # HRTIMER_STATE_ENQUEUED of include/linux/hrtimer.h
_KERNEL: Final = 1 << 63  # addresses from here on are the kernel's
#: nanoseconds: a look that took longer was held up between the two clocks, and is done again, so often
_QUICK, _ATTEMPTS = 1_000_000, 3
#: nanoseconds: a timer that should have run before is none; so much later it may run than it should
_LATE, _SLACK = 1_000_000_000, 60_000_000_000


@dataclass(frozen=True, slots=True)
class Places:
    """Where struct hrtimer_sleeper has what: bytes from its start."""

    task: int
    state: int
    soft: int
    expires: int
    function: int


@dataclass(frozen=True, slots=True)
class _Programs:
    """What is loaded: the iterator, the program for sys_enter, and the map that both have: task -> has begun a call."""

    looking: int
    noting: int
    tasks: int
    places: Places


_PATHS: Final = {
    "task": "task",
    "state": "timer.state",
    "soft": "timer._softexpires",
    "expires": "timer.node.expires",
    "function": "timer.function",
}


def _looking(known: Layout, tasks: int, memory: int) -> bytes:
    asm = Asm().load(8, 6, 1, taskiter.META).load(8, 7, 1, taskiter.TASK).jump_if(Jump.EQUAL, 7, 0, "out")
    # noted first: no call that begins from here on is missed
    asm.store(8, FRAME, -8, 7).store_number(8, FRAME, -16, 0)
    asm.map(1, tasks).frame(2, -8).frame(3, -16).set(4, 0).call(Helper.MAP_UPDATE)
    asm.call(Helper.KTIME_GET_NS).map_value(8, memory).store(8, 8, 0, 0).store(8, 8, 8, 7)
    asm.load(4, 1, 7, known.offset("task_struct", "__state")).store(8, 8, 16, 1)
    asm.load(8, 9, 7, known.offset("task_struct", KERNEL_STACK_POINTER))
    for at in range(0, _PIECE * _PIECES, _PIECE):
        asm.map_value(1, memory, _HEAD.size + at).set(2, _PIECE).mov(3, 9).add(3, at).call(Helper.PROBE_READ_KERNEL)
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).map_value(2, memory)
    return asm.set(3, _HEAD.size + _PIECE * _PIECES).call(Helper.SEQ_WRITE).label("out").exit(0).code()


def _noting(tasks: int) -> bytes:
    asm = Asm().call(Helper.GET_CURRENT_TASK).store(8, FRAME, -8, 0).map(1, tasks).frame(2, -8).call(Helper.MAP_LOOKUP)
    return asm.jump_if(Jump.EQUAL, 0, 0, "out").store_number(8, 0, 0, 1).label("out").exit(0).code()


@functools.cache
def _programs() -> _Programs | None:
    """None where the kernel does not lend us what it takes."""
    known = layout()
    try:
        places = Places(**{name: known.offset("hrtimer_sleeper", path) for name, path in _PATHS.items()})
        tasks = call.create_map(call.MapType.HASH, _KEY.size, 8, _MOST, name="tcpmig_tasks")
        memory = call.create_map(call.MapType.ARRAY, 4, _HEAD.size + _PIECE * _PIECES, 1, name="tcpmig_stack")
        looking = taskiter.load(known, _looking(known, tasks, memory), "tcpmig_look")
        noting = call.load(call.ProgramType.RAW_TRACEPOINT, _noting(tasks), name="tcpmig_begun", gpl=True)
    except (OSError, BadBtf) as error:
        _log.info("when a call times out that a thread waits in cannot be read: %s", error)
        return None
    known.save()
    return _Programs(looking, noting, tasks, places)


def prepare() -> None:
    """Load the programs: milliseconds that the stop would pay else."""
    _programs()


def timer_on(stack: bytes, places: Places, task: int, now: int) -> int | None:
    """When the timer that lies on the stack of a waiting thread will run, by CLOCK_MONOTONIC; None if there is none, or
    more than one: what earlier calls have left there is told by its state, no timer leaves the stack otherwise."""
    found = []
    at = stack.find(wanted := _KEY.pack(task), places.task)
    while at >= 0:
        start = at - places.task
        soft, expires = (
            int.from_bytes(stack[start + p : start + p + 8], "little") for p in (places.soft, places.expires)
        )
        function = int.from_bytes(stack[start + places.function : start + places.function + 8], "little")
        sane = now - _LATE < soft <= expires < soft + _SLACK
        if stack[start + places.state] == _ENQUEUED and function >= _KERNEL and sane:
            found.append(soft)
        at = stack.find(wanted, at + _KEY.size)
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class _Seen:
    """task: its address in the kernel; until: nanoseconds by our CLOCK_MONOTONIC, None if no timer was there."""

    task: int
    until: int | None


class CallWatch:
    """Looks at threads that are about to be stopped: :meth:`look` at each, stop it, ask :meth:`until`.

    stays  it is used for many stops: :meth:`close` only forgets what was seen, :meth:`end` is the end. To begin again
           soon after an end would mean to wait for a grace period of the kernel's
    """

    #: the memory that a look is copied through is one for all
    _looks = threading.Lock()

    def __init__(self, *, stays: bool = False) -> None:
        self._stays = stays
        self._programs = _programs()
        self._noting = -1
        self._seen: dict[int, _Seen] = {}

    def look(self, tid: int) -> None:
        """Note when the call times out that a thread waits in, if it does. That it cannot be told is no error."""
        programs = self._programs
        if programs is None:
            return
        try:
            if self._noting < 0:
                self._noting = call.open_tracepoint(programs.noting, "sys_enter")
            data, ours = self._read(programs.looking, tid)
        except OSError as error:
            _log.info("when the call of thread %d times out cannot be read: %s", tid, error)
            return
        if len(data) < _HEAD.size:
            return  # it has ended
        now, task, state = _HEAD.unpack_from(data)
        end = timer_on(data[_HEAD.size :], programs.places, task, now) if state & _INTERRUPTIBLE else None
        self._seen[tid] = _Seen(task, None if end is None else ours + end - now)

    def _read(self, program: int, tid: int) -> tuple[bytes, int]:
        """What the iterator tells, and our time then. Its clock is the host's, ours may be that of a time namespace. It
        is read after theirs: the end is rather too late than too early, and not much."""
        for _ in range(_ATTEMPTS):
            before = time.monotonic_ns()
            with self._looks:
                data = taskiter.read(program, tid)
            ours = time.monotonic_ns()
            if ours - before < _QUICK:
                break
        return data, ours

    def until(self, tid: int) -> int | None:
        """When the call times out in which that thread was stopped, by our CLOCK_MONOTONIC in nanoseconds; None: it was
        not seen waiting, or has begun another call since."""
        seen, programs = self._seen.get(tid), self._programs
        if seen is None or seen.until is None or programs is None:
            return None
        try:
            begun = call.lookup(programs.tasks, _KEY.pack(seen.task), 8)
        except OSError as error:
            _log.info("whether thread %d has begun another call cannot be read: %s", tid, error)
            return None
        return seen.until if begun == bytes(8) else None

    def close(self) -> None:
        """These are watched no longer. May be repeated."""
        if not self._stays:
            self.end()
        while self._seen and self._programs is not None:
            call.delete(self._programs.tasks, _KEY.pack(self._seen.popitem()[1].task))

    def end(self) -> None:
        """No call of anybody is noted any more."""
        if self._noting >= 0:
            os.close(self._noting)
            self._noting = -1
