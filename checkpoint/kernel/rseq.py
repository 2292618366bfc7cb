"""Restartable sequences: the part of struct rseq and struct rseq_cs that a stop must know.

A thread inside a critical section must not go on there once it was anywhere else: it goes on at the section's abort
handler, as after a preemption.  The kernel does that only if the instruction pointer still lies in the section when the
thread runs on; after injected calls it no longer does, so it is done here.

Source: include/uapi/linux/rseq.h, kernel/rseq.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, Self

from tcpstate.slotted import dataclass

__all__ = ["CriticalSection", "abort_address"]

#: offset of ``rseq_cs``, the pointer to the critical section that was entered last, in struct rseq
_POINTER_OFFSET: Final = 8
_POINTER = struct.Struct("<Q")
_SECTION = struct.Struct("<IIQQQ")


@dataclass(frozen=True, slots=True)
class CriticalSection:
    """struct rseq_cs: the section [start, start + length), and where to go when it is interrupted."""

    version: int
    flags: int
    start: int
    length: int
    abort: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The structure from its bytes."""
        return cls(*_SECTION.unpack(data))


def abort_address(rseq: int, ip: int, read: Callable[[int, int], bytes]) -> int | None:
    """Where a thread stopped at ``ip`` must go on instead; None if it is in no critical section.

    rseq  address of its struct rseq
    read  reads its memory: (address, size) -> bytes
    """
    (pointer,) = _POINTER.unpack(read(rseq + _POINTER_OFFSET, _POINTER.size))
    if not pointer:
        return None
    section = CriticalSection.unpack(read(pointer, _SECTION.size))
    inside = section.start <= ip < section.start + section.length
    return section.abort if inside else None
