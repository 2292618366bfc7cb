"""When an interrupted sleep will end: what the kernel keeps of it, read by a BPF iterator over tasks.

No interface of its own tells the time that is left of a relative nanosleep, poll or futex wait.  The iterator is
attached to one thread at a time (Linux 6.1) and writes its ``struct restart_block`` and the clocks; tens of
microseconds.  Nothing is changed.

Source: kernel/bpf/task_iter.c, include/linux/restart_block.h, include/uapi/linux/bpf.h (union bpf_iter_link_info).
"""

from __future__ import annotations

import functools
import logging
import struct
from typing import Final

from checkpoint.arch import Note
from checkpoint.kernel import taskiter
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.slotted import dataclass

__all__ = ["left", "noted", "prepare"]

_log = logging.getLogger(__name__)

_CLOCKS: Final = struct.Struct("=QQ")  # monotonic, boottime
_SECOND: Final = 1_000_000_000
#: include/uapi/linux/time.h; the clocks that relative sleeps are measured by
_CLOCK_MONOTONIC, _CLOCK_BOOTTIME = 1, 7


@dataclass(frozen=True, slots=True)
class _Reader:
    """The loaded program, and where in the block things lie: (offset, size)."""

    program: int
    size: int
    places: dict[str, tuple[int, int]]


_MEMBERS: Final = {
    "clock": ("nanosleep.clockid",),
    "expires": ("nanosleep.expires",),
    "time": ("futex.time",),
    "bounded": ("poll.has_timeout",),
    # later kernels have one struct timespec64
    "seconds": ("poll.tv_sec", "poll.end_time.tv_sec"),
    "nanoseconds": ("poll.tv_nsec", "poll.end_time.tv_nsec"),
    # by what a call is known again: its arguments
    "uaddr": ("futex.uaddr",),
    "val": ("futex.val",),
    "ufds": ("poll.ufds",),
    "nfds": ("poll.nfds",),
    "rmtp": ("nanosleep.rmtp",),
}


def _place(known: Layout, paths: tuple[str, ...]) -> tuple[int, int]:
    for path in paths[:-1]:
        try:
            return known.place("restart_block", path)[:2]
        except BadBtf:
            continue
    return known.place("restart_block", paths[-1])[:2]


def _program(known: Layout, size: int) -> bytes:
    start = -(_CLOCKS.size + size)
    asm = Asm().load(8, 6, 1, taskiter.META).load(8, 7, 1, taskiter.TASK).jump_if(Jump.EQUAL, 7, 0, "out")
    asm.call(Helper.KTIME_GET_NS).store(8, FRAME, start, 0)
    asm.call(Helper.KTIME_GET_BOOT_NS).store(8, FRAME, start + 8, 0)
    asm.frame(1, start + _CLOCKS.size).set(2, size).mov(3, 7)
    asm.add(3, known.offset("task_struct", "restart_block")).call(Helper.PROBE_READ_KERNEL)
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, start).set(3, -start)
    return asm.call(Helper.SEQ_WRITE).label("out").exit(0).code()


@functools.cache
def _reader() -> _Reader | None:
    """None where the kernel does not lend us the iterator."""
    known = layout()
    try:
        places = {name: _place(known, paths) for name, paths in _MEMBERS.items()}
        size = known.size("restart_block")
        program = taskiter.load(known, _program(known, size + -size % 8), "tcpmig_sleep")
    except (OSError, BadBtf) as error:
        _log.info("the time that is left of interrupted sleeps cannot be read: %s", error)
        return None
    known.save()
    return _Reader(program, size, places)


def prepare() -> None:
    """Load the program: milliseconds that the stop would pay else."""
    _reader()


def _look(tid: int) -> tuple[int, int, dict[str, int]] | None:
    """(monotonic, boottime, members of the block) of a thread; None if the kernel does not tell."""
    reader = _reader()
    if reader is None:
        return None
    try:
        data = taskiter.read(reader.program, tid)
    except OSError as error:
        _log.info("the time that is left of the sleep of thread %d cannot be read: %s", tid, error)
        return None
    if len(data) < _CLOCKS.size + reader.size:
        return None  # it has ended
    monotonic, boottime = (int(each) for each in _CLOCKS.unpack_from(data))
    block = data[_CLOCKS.size :]

    members = {
        name: int.from_bytes(block[offset : offset + size], "little") for name, (offset, size) in reader.places.items()
    }
    return monotonic, boottime, members


def noted(tid: int) -> dict[str, int]:
    """What the kernel has noted of the sleep that a stopped thread was interrupted in: members of its restart block, of
    which those mean something that belong to the call. Empty if it does not tell."""
    found = _look(tid)
    return {} if found is None else found[2]


def left(tid: int, note: Note) -> int | None:
    """Nanoseconds until the sleep that a stopped thread was interrupted in would end, below 0 if it is over.

    None if it has no end by a clock that this is known of, or the kernel does not tell.
    """
    found = _look(tid)
    if found is None:
        return None
    monotonic, boottime, members = found
    match note:
        case Note.NANOSLEEP:
            now: int | None = {_CLOCK_MONOTONIC: monotonic, _CLOCK_BOOTTIME: boottime}.get(members["clock"])
            return None if now is None else members["expires"] - now
        case Note.POLL:
            end = members["seconds"] * _SECOND + members["nanoseconds"]
            return end - monotonic if members["bounded"] else None
        case _:
            return members["time"] - monotonic  # a relative time-out is by this clock
