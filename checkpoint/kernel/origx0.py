"""The first argument of the call that a thread on aarch64 was stopped in, where its result has taken the place.

The kernel keeps it (``orig_x0`` of struct pt_regs), to be able to begin the call again, and ptrace does not show it.
It is read by a BPF iterator over tasks.  Nothing is changed.

Source: arch/arm64/include/asm/ptrace.h, kernel/bpf/task_iter.c, kernel/trace/bpf_trace.c (bpf_task_pt_regs, Linux
5.15).
"""

from __future__ import annotations

import functools
import logging
import struct
from typing import Final

from checkpoint.kernel import taskiter
from tcpstate.kernel.bpf.asm import Asm, Helper, Jump
from tcpstate.kernel.bpf.layout import Layout

__all__ = ["first_argument"]

_log = logging.getLogger(__name__)

_WORD: Final = struct.Struct("=Q")


def _program(known: Layout) -> bytes:
    asm = Asm().load(8, 6, 1, taskiter.META).load(8, 1, 1, taskiter.TASK).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.call(Helper.TASK_PT_REGS).mov(3, 0).add(3, known.offset("pt_regs", "orig_x0"))
    asm.frame(1, -_WORD.size).set(2, _WORD.size).call(Helper.PROBE_READ_KERNEL)
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, -_WORD.size).set(3, _WORD.size)
    return asm.call(Helper.SEQ_WRITE).label("out").exit(0).code()


@functools.cache
def _reader() -> int | None:
    """The loaded program; None where the kernel does not lend us the iterator."""
    return taskiter.lent(_program, "tcpmig_orig_x0", "calls that the stop has ended with EINTR stay so")


def first_argument(tid: int) -> int | None:
    """What a stopped thread had in x0 when it began its last call; None if the kernel does not tell."""
    program = _reader()
    if program is None:
        return None
    try:
        data = taskiter.read(program, tid)
    except OSError as error:
        _log.info("the first argument of the call of thread %d cannot be read: %s", tid, error)
        return None
    return int(_WORD.unpack(data)[0]) if len(data) == _WORD.size else None
