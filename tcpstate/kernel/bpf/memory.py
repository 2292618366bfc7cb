"""Kernel memory, read: by a BPF program that copies it into a map that this process sees.

This is an arbitrary read of the kernel's memory, the most that CAP_PERFMON allows.  So it is done where something of a
process would be lost otherwise, and has no other way out: a datagram that is not finished, if a socket has one
(checkpoint/kernel/corked.py); for anything else only if the caller says so in so many words (tcpstate/outoforder.py).
A program that is not loaded reads nothing.  It never writes; an address that is not mapped reads as an error, not as a
fault.

Source: kernel/bpf/syscall.c (BPF_PROG_TYPE_SYSCALL, sleepable; kernel 5.14), bpf_probe_read_kernel.
"""

from __future__ import annotations

import mmap
import os
import struct
from types import TracebackType
from typing import Final, Self

from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump

__all__ = ["KernelMemory"]

_SIZE: Final = 1 << 16
_CONTEXT: Final = struct.Struct("=QQ")  # address, length


class KernelMemory:
    """A reader of kernel memory, until it is closed. Refused (no CAP_BPF or CAP_PERFMON, locked down), OSError."""

    def __init__(self) -> None:
        self._map = call.create_map(call.MapType.ARRAY, 4, _SIZE, 1, flags=call.MapFlag.MMAPABLE, name="tcpmig_mem")
        try:
            self._memory = call.map_memory(self._map, _SIZE)
            self._program = call.load(
                call.ProgramType.SYSCALL, _program(self._map), flags=call.SLEEPABLE, name="tcpmig_read", gpl=True
            )
        except BaseException:
            os.close(self._map)
            raise

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes at ``address``. OSError (EFAULT) if they are not there."""
        parts = []
        while size > 0:
            part = min(size, _SIZE - 1)
            if call.run(self._program, _CONTEXT.pack(address, part)):
                raise OSError(14, f"kernel memory at {address:#x} cannot be read")
            parts.append(self._memory[:part])
            address += part
            size -= part
        return b"".join(parts)

    def word(self, address: int) -> int:
        """The 64-bit number at ``address``. OSError."""
        return int.from_bytes(self.read(address, 8), "little")

    def close(self) -> None:
        """Read no more; what was read is overwritten."""
        if self._map >= 0:
            self._memory[:] = bytes(len(self._memory))
            self._memory.close()
            os.close(self._program)
            os.close(self._map)
            self._map = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _program(memory: int) -> bytes:
    asm = Asm().mov(6, 1).store_number(4, FRAME, -4, 0).map(1, memory).frame(2, -4).call(Helper.MAP_LOOKUP)
    asm.jump_if(Jump.EQUAL, 0, 0, "no").mov(1, 0).load(8, 3, 6, 0).load(8, 2, 6, 8)
    asm.jump_if(Jump.GREATER, 2, _SIZE - 1, "no").call(Helper.PROBE_READ_KERNEL)
    asm.jump_if(Jump.NOT_EQUAL, 0, 0, "no").exit(0)
    return asm.label("no").exit(1).code()


if mmap.PAGESIZE > _SIZE:
    raise RuntimeError("the map is smaller than a page")
