"""Which protection keys a process has allocated (pkey_alloc(2)): a bit each in its address space, which no call tells.

A key that no memory has yet shows nowhere else.  A BPF iterator over the process's first thread reads the bits; nothing
is changed.

Source: pkeys(7), arch/x86/include/asm/mmu.h and pkeys.h (mm_context_t), fs/proc/task_mmu.c (ProtectionKey).
"""

from __future__ import annotations

import functools
import logging
import struct
from pathlib import Path
from typing import Final

from checkpoint.kernel import taskiter
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.layout import Layout

__all__ = ["allocated", "machine_has_keys"]

_log = logging.getLogger(__name__)

_SMAPS: Final = Path("/proc/self/smaps")
#: the bits, and the key that the kernel itself has taken for memory that may only be executed; -1: none
_RECORD: Final = struct.Struct("=qq")
_DEFAULT: Final = 0  # all memory has it


@functools.cache
def machine_has_keys() -> bool:
    """Whether CPU and kernel have them: then every mapping has one."""
    return b"\nProtectionKey:" in _SMAPS.read_bytes()


def _program(known: Layout) -> bytes:
    asm = Asm().load(8, 6, 1, taskiter.META).load(8, 7, 1, taskiter.TASK).jump_if(Jump.EQUAL, 7, 0, "out")
    asm.load(8, 8, 7, known.offset("task_struct", "mm")).jump_if(Jump.EQUAL, 8, 0, "out")
    at = -_RECORD.size
    for path in ("context.pkey_allocation_map", "context.execute_only_pkey"):
        place = known.place("mm_struct", path)
        asm.load(place.size, 1, 8, place.offset).store(8, FRAME, at, 1)
        at += 8
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, -_RECORD.size).set(3, _RECORD.size)
    return asm.call(Helper.SEQ_WRITE).label("out").exit(0).code()


@functools.cache
def _reader() -> int | None:
    """The loaded program; None where the kernel does not lend it, or knows no keys."""
    return taskiter.lent(_program, "tcpmig_keys", "allocated protection keys cannot be read")


def allocated(pid: int) -> frozenset[int]:
    """The keys that the program itself has allocated. None, too, where the kernel does not tell."""
    reader = _reader() if machine_has_keys() else None
    if reader is None:
        return frozenset()
    try:
        data = taskiter.read(reader, pid)
    except OSError as error:
        _log.info("the protection keys of pid %d cannot be read: %s", pid, error)
        return frozenset()
    if len(data) < _RECORD.size:
        return frozenset()  # it has ended
    bits, own = _RECORD.unpack_from(data)
    return frozenset(n for n in range(bits.bit_length()) if bits >> n & 1) - {_DEFAULT, own}
