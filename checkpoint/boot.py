"""The boot code in the vdso's tail, and the mark beside it by which a later tool finds what an earlier one left.

The kernel's vdso does not fill its last page; behind it are zeros, executable, private to the process, and at a place
that no program uses.  Boot lies there while an injection is open and makes one call at a time.  Behind it stands the
:class:`Mark`: where the memory for engines and tables is.  Between these two that memory has a *head*, by which it is
told from what the application may have mapped there since.  Both formats may only ever be extended: another version of
the tool may have left them.

Source: vdso(7); the mapping is written through /proc/PID/mem, which copies the page for this process.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from typing import Final, Self

from checkpoint.arch import BOOT_SIZE, BOOT_STOP, boot_call, boot_image, boot_result
from checkpoint.errors import InjectionRefused
from checkpoint.excursion import Excursions
from checkpoint.memory.vma import VDSO, Vma, find_named
from checkpoint.tracee import Process
from tcpstate.kernel.calls import CallError
from tcpstate.slotted import dataclass

__all__ = ["HEAD_SIZE", "MARK_SIZE", "Boot", "Mark", "head_bytes", "is_head", "pristine", "tail", "vdso_of"]

_MARK_MAGIC: Final = b"tcpmigM\1"
_HEAD_MAGIC: Final = b"tcpmigH\1"
_MARK = struct.Struct("<8s4Q")
_HEAD = struct.Struct("<8sQ")
_ALIGN: Final = 64
_CALL_TIMEOUT: Final = 10.0

_SECTIONS = struct.Struct("<40xQ10xHH2x")  # of Elf64_Ehdr: e_shoff, e_shentsize, e_shnum

#: bytes of a mark
MARK_SIZE: Final = _MARK.size
#: bytes of a head
HEAD_SIZE: Final = _HEAD.size


@dataclass(frozen=True, slots=True)
class Mark:
    """What stands behind boot.

    boot, boot_size  where boot begins, and its bytes
    start, size      the mapping with engines and tables; 0, 0: there is none
    head             the address of its head
    """

    boot: int
    boot_size: int
    start: int = 0
    size: int = 0
    head: int = 0

    def pack(self) -> bytes:
        """The mark's bytes."""
        return _MARK.pack(_MARK_MAGIC, self.boot_size, self.start, self.size, self.head)

    @classmethod
    def find(cls, data: bytes, address: int) -> Self | None:
        """The mark in the bytes of a vdso that begins at ``address``."""
        at = data.find(_MARK_MAGIC)
        if not 0 <= at <= len(data) - _MARK.size:
            return None
        _, boot_size, start, size, head = _MARK.unpack_from(data, at)
        return cls(address + at - boot_size, boot_size, start, size, head)


def head_bytes(size: int) -> bytes:
    """The head of a mapping of ``size`` bytes."""
    return _HEAD.pack(_HEAD_MAGIC, size)


def is_head(data: bytes, size: int) -> bool:
    """Whether the bytes are the head of a mapping of ``size`` bytes."""
    return data == head_bytes(size)


def vdso_of(process: Process) -> Vma:
    """The mapping of the process's vdso. InjectionRefused if it has none."""
    for vma in process.maps:
        if vma.name == VDSO:
            return vma
    raise InjectionRefused("it has no vdso", object=f"pid {process.pid}")


def tail(data: bytes) -> int | None:
    """Where in the bytes of a vdso there is room for boot and mark; None if there is none.

    If the zeros behind it are too few, the table of its sections, which stands last and is read by nobody who runs, is
    room as well.
    """
    used = len(data.rstrip(b"\0"))
    for end in (used, _sections(data, used)):
        at = end + -end % _ALIGN
        if at + BOOT_SIZE + MARK_SIZE <= len(data):
            return at
    return None


def _sections(data: bytes, used: int) -> int:
    """Where the table of sections begins, if it is the last that is there; else ``used``."""
    start, end = _table(data)
    return start if 0 < start < used <= end else used


def _table(data: bytes) -> tuple[int, int]:
    """(start, end) of the table of sections in the bytes of a vdso."""
    if len(data) < _SECTIONS.size:
        return 0, 0
    start, size, count = _SECTIONS.unpack_from(data)
    return start, start + size * count


@functools.cache
def _own_vdso() -> bytes:
    """Our own, up to the end of that table."""
    vdso = find_named(os.getpid(), VDSO)
    data = b"" if vdso is None else ctypes.string_at(vdso.start, vdso.size)
    return data[: _table(data)[1]]


def pristine(offset: int, size: int) -> bytes:
    """What the kernel has put into every vdso there: zeros, or a part of the table of sections."""
    return _own_vdso()[offset : offset + size].ljust(size, b"\0")


class Boot:
    """The boot code of one process, used by its leader.

    address  where it is; by default where the vdso has room. InjectionRefused if it has none
    """

    def __init__(self, process: Process, excursions: Excursions, address: int | None = None) -> None:
        self.process = process
        self.excursions = excursions
        self._vdso = 0  # where the mapping begins, as far as that is known
        if address is not None:
            self.address = address
            return
        vdso = vdso_of(process)
        self._vdso = vdso.start
        at = tail(process.read(vdso.start, vdso.size))
        if at is None:
            raise InjectionRefused("its vdso has no room at its end", object=f"pid {process.pid}")
        self.address = vdso.start + at

    @property
    def stop_address(self) -> int:
        """Where the leader stands after a call."""
        return self.address + BOOT_STOP

    def write(self, start: int = 0, size: int = 0, head: int = 0) -> None:
        """Put boot there, with the frame of the leader, and the mark."""
        mark = Mark(self.address, BOOT_SIZE, start, size, head)
        self.process.write(self.address, boot_image(self.excursions.frame(self.process.leader)) + mark.pack())

    def find_again(self) -> None:
        """The vdso was moved: look where boot is now."""
        self.process.forget_maps()
        vdso = find_named(self.process.pid, VDSO)
        if vdso is None:
            raise InjectionRefused("its vdso is gone", object=f"pid {self.process.pid}")
        mark = Mark.find(self.process.read(vdso.start, vdso.size), vdso.start)
        if mark is None:
            raise InjectionRefused("its vdso was replaced", object=f"pid {self.process.pid}")
        self.address, self._vdso = mark.boot, vdso.start

    def call(self, nr: int, *args: int, undo: int = 0, undo_args: tuple[int, int] | None = None, label: str) -> int:
        """One call, made by the leader.

        undo, undo_args  see ``arch.boot_call``
        CallError if it fails.
        """
        leader = self.process.leader
        registers = boot_call(leader.registers, self.address, nr, args, undo, undo_args)
        self.excursions.start(leader, registers)
        result = boot_result(self.excursions.finish(leader, self.stop_address, _CALL_TIMEOUT))
        if -4096 < result < 0:
            raise CallError(-result, 0, label)
        return result

    def disarm(self) -> None:
        """The last call is no longer to be undone if the tool dies."""
        leader = self.process.leader
        leader.set_registers(boot_call(leader.registers, self.stop_address, 0, ()))

    def remove(self) -> None:
        """Put back what was there. Nobody may be in boot."""
        start = self._vdso or vdso_of(self.process).start
        self.process.write(self.address, pristine(self.address - start, BOOT_SIZE + MARK_SIZE))
