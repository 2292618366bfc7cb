"""What the kernel keeps of each thread of a process, by a BPF iterator over them: in a few microseconds each what would
else take a file of /proc and a dozen calls by the thread itself.

Most of it is not looked into, but compared: threads of which all that is the same are in the same state, whatever the
state is.  Pointers are the things that they share (credentials, filters, directories).  What differs from thread to
thread anyway, and is a plain value, is told.  Nothing is changed.

Source: include/linux/sched.h (struct task_struct), include/linux/pid.h, kernel/bpf/task_iter.c.
"""

from __future__ import annotations

import functools
import logging
import struct
import threading
from typing import Final, NamedTuple

from checkpoint.kernel import taskiter
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout, layout

__all__ = ["ThreadRow", "prepare", "rows"]

_log = logging.getLogger(__name__)

#: what is told, and how many bytes of it a row has
_TOLD: Final = {
    "comm": 16,
    "robust_list": 8,
    "clear_child_tid": 8,
    "sas_ss_sp": 8,
    "sas_ss_size": 8,
    "sas_ss_flags": 4,
    "pending.signal": 8,
    "fs": 8,
    "policy": 4,
    "children.next": 8,
}
_HEAD: Final = struct.Struct("=Qii16sQQQQIQQIQ")
#: what is compared: all that states of a thread (checkpoint.state.table) are read from. Bits that come and go by
#: themselves are among it: they cost a comparison that fails, never a wrong one
_COMPARED: Final = (
    "thread_info.flags",
    "flags",
    "atomic_flags",
    "personality",
    "fs",
    "timer_slack_ns",
    "policy",
    "static_prio",
    "rt_priority",
    "cpus_mask",
    "cred",
    "pdeath_signal",
    "seccomp",
    "sched_reset_on_fork",
)
#: the same, where the kernel has it at all: CONFIG_NUMA; from 6.6 on; on machines with the common entry code
_MAYBE: Final = ("mempolicy", "se.slice", "syscall_dispatch")
_DEADLINE: Final = 6  # SCHED_DEADLINE, include/uapi/linux/sched.h
_LARGEST: Final = 4096
#: rows are made in one piece of memory
_memory = threading.Lock()
_UPID: Final = 16  # bytes from one entry of struct pid's numbers to the next


class ThreadRow(NamedTuple):
    """One thread.

    address       of the kernel's struct task_struct
    outer, inner  its number one PID namespace further out than its own (0: there is none), and in its own
    comm          its name, with zeros behind it
    robust, clear_child_tid             addresses that it has given to the kernel
    stack, stack_size, stack_flags      its alternate signal stack
    pending       signals that wait for it alone, bit n-1 for signal n
    directories   which it has: the same number, the same ones
    policy        SCHED_*
    children      where the list of its children goes on; :attr:`bears`: whether it has any
    common        whoever has the same here is in the same state, but for what is told, and unless :attr:`alone`
    """

    address: int
    outer: int
    inner: int
    comm: bytes
    robust: int
    clear_child_tid: int
    stack: int
    stack_size: int
    stack_flags: int
    pending: int
    directories: int
    policy: int
    children: int
    common: bytes
    alone: bool
    bears: bool


class _Reader(NamedTuple):
    """program: the loaded one; size: bytes of a row; numa: where in what is compared the NUMA policy is, or -1;
    children: where the list of children lies."""

    program: int
    size: int
    numa: int
    children: int


def _compared(known: Layout) -> list[tuple[str, int, int]]:
    """(path, offset, size) of each."""
    found = []
    for path in (*_COMPARED, *_MAYBE):
        try:
            place = known.place("task_struct", path)
        except BadBtf:
            if path not in _MAYBE:
                raise
            continue
        # of a bit field the word that it is in
        offset = place.bit // 32 * 4 if place.bits else place.offset
        if place.size:  # some have nothing in them
            found.append((path, offset, place.size))
    return found


def _program(known: Layout, memory: int, compared: list[tuple[str, int, int]]) -> tuple[bytes, int]:
    """The program, and the bytes of a row."""
    asm = Asm().load(8, 6, 1, taskiter.META).load(8, 7, 1, taskiter.TASK).jump_if(Jump.EQUAL, 7, 0, "out")
    at = 0

    def copy(base: int, offset: int, size: int) -> None:
        nonlocal at
        asm.map_value(1, memory, at).set(2, size).mov(3, base).add(3, offset).call(Helper.PROBE_READ_KERNEL)
        at += size

    asm.map_value(1, memory).store(8, 1, 0, 7)
    at = 8
    # struct pid ends with its numbers, the outermost first; level is the place of the last
    asm.load(8, 8, 7, known.offset("task_struct", "thread_pid")).jump_if(Jump.EQUAL, 8, 0, "out")
    asm.load(4, 9, 8, known.offset("pid", "level")).shift_left(9, 4)
    if known.size("upid") != _UPID:
        raise BadBtf("struct upid has another size")
    numbers = known.offset("pid", "numbers") + known.offset("upid", "nr")
    asm.add_register(9, 8)
    copy(9, numbers - _UPID, 4)
    copy(9, numbers, 4)
    for path, size in _TOLD.items():
        place = known.place("task_struct", path)
        if place.size != size:
            raise BadBtf(f"task_struct.{path} has {place.size} bytes")
        copy(7, place.offset, size)
    for _, offset, size in compared:
        copy(7, offset, size)
    # struct io_context lies behind a pointer, and may not be there: it reads as zeros then
    asm.load(8, 9, 7, known.offset("task_struct", "io_context"))
    copy(9, known.offset("io_context", "ioprio"), 2)
    if at > _LARGEST:
        raise BadBtf(f"a row of a thread has {at} bytes")
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).map_value(2, memory).set(3, at)
    return asm.call(Helper.SEQ_WRITE).label("out").exit(0).code(), at


@functools.cache
def _reader() -> _Reader | None:
    """None where the kernel does not lend it."""
    known = layout()
    try:
        compared = _compared(known)
        memory = call.create_map(call.MapType.ARRAY, 4, _LARGEST, 1, name="tcpmig_thread")
        code, size = _program(known, memory, compared)
        children = known.offset("task_struct", "children")
        program = taskiter.load(known, code, "tcpmig_threads")
    except (OSError, BadBtf) as error:
        _log.info("the state of each thread is read by itself: %s", error)
        return None
    finally:
        known.save()
    at, numa = 0, -1
    for path, _, length in compared:
        if path == "mempolicy":
            numa = at
        at += length
    return _Reader(program, size, numa, children)


def prepare() -> None:
    """Load the program: milliseconds that the stop would pay else."""
    _reader()


def rows(pid: int) -> list[ThreadRow] | None:
    """Of all threads of a process, in no certain order; of one that runs, of each at another moment. None where the
    kernel does not tell."""
    reader = _reader()
    if reader is None:
        return None
    try:
        with _memory:
            data = taskiter.read_process(reader.program, pid)
    except OSError as error:
        _log.info("the state of each thread of pid %d is read by itself: %s", pid, error)
        return None
    found = []
    head, size, numa = _HEAD.size, reader.size, reader.numa + _HEAD.size
    for at in range(0, len(data) - size + 1, size):
        told = _HEAD.unpack_from(data, at)
        # what such a pointer leads to is each thread's own
        alone = told[-2] == _DEADLINE or (reader.numa >= 0 and any(data[at + numa : at + numa + 8]))
        bears = told[-1] != told[0] + reader.children
        found.append(ThreadRow._make((*told, data[at + head : at + size], alone, bears)))
    return found
