"""The flags word of every mapping of a process, as the kernel keeps it, without a walk over its pages; and where its
heap ends, which else only the process itself can ask (brk(2)).

smaps tells the same as names, and walks every page for it: 11-20 ms per GB of small pages.  A BPF iterator over the
mappings reads the words alone: some 0.2 ms for a hundred.  Nothing is changed.

Source: kernel/bpf/task_iter.c (task_vma), include/linux/mm_types.h (struct vm_area_struct, struct mm_struct).
"""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from checkpoint.kernel import taskiter
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout

__all__ = ["Words", "words"]

_log = logging.getLogger(__name__)

#: start, end, flags, end of the heap
_RECORD: Final = struct.Struct("=QQQQ")
_MEMBERS: Final = ("vm_start", "vm_end", "vm_flags")


def _is_again(last: bytes, part: bytes) -> bool:
    """Of a thread with more mappings than one read brings (1,023), the kernel tells those of the last read again and
    again, without end (6.18). Addresses ascend, and what grows or moves while we read begins behind the last part."""
    return part[:8] == last[:8] or _RECORD.unpack_from(part)[0] < _RECORD.unpack_from(last)[0]


class Words(NamedTuple):
    """flags: (start, end) to the word of each mapping. brk: where the heap ends; 0 if there are no mappings."""

    flags: Mapping[tuple[int, int], int]
    brk: int


def _program(known: Layout) -> bytes:
    asm = Asm().load(8, 6, 1, taskiter.META).load(8, 7, 1, taskiter.VMA).jump_if(Jump.EQUAL, 7, 0, "out")
    at = -_RECORD.size
    for member in _MEMBERS:
        place = known.place("vm_area_struct", member)
        if place.size != 8:
            raise BadBtf(f"vm_area_struct.{member} has {place.size} bytes")
        asm.load(8, 1, 7, place.offset).store(8, FRAME, at, 1)
        at += 8
    asm.load(8, 1, 7, known.offset("vm_area_struct", "vm_mm")).load(8, 1, 1, known.offset("mm_struct", "brk"))
    asm.store(8, FRAME, at, 1)
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, -_RECORD.size).set(3, _RECORD.size)
    return asm.call(Helper.SEQ_WRITE).label("out").exit(0).code()


@functools.cache
def _reader() -> int | None:
    """The loaded program; None where the kernel does not lend it."""
    return taskiter.lent(_program, "tcpmig_vmas", "the flags of mappings are read from smaps", taskiter.MAPPINGS)


def words(pid: int) -> Words | None:
    """Of all mappings, one consistent picture only while the process is stopped. None where the kernel does not tell;
    nothing of a process that has ended."""
    reader = _reader()
    if reader is None:
        return None
    try:
        data = taskiter.read(reader, pid, _is_again)
    except OSError as error:
        _log.info("the flags of mappings of pid %d are read from smaps: %s", pid, error)
        return None
    told = list(_RECORD.iter_unpack(data))
    return Words({(start, end): flags for start, end, flags, _ in told}, told[0][-1] if told else 0)
