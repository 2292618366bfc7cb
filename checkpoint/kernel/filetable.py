"""The descriptors of a process in one pass, as the kernel has them: what each leads to, and its flags.

Two rows that are equal, of two passes: the same descriptor of the same socket, with the same flags and receiver of
signals.  A socket is told by its cookie (SO_COOKIE), which no other has or will have; what is no socket, or one without
a cookie, by the address of its description alone, which proves nothing once that was closed.

Source: kernel/bpf/task_iter.c (bpf_iter__task_file), include/linux/fdtable.h, include/linux/fs.h.  Iterators over one
task since 6.1; bpf_sock_from_file since 5.11.
"""

from __future__ import annotations

import functools
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from checkpoint.kernel import taskiter
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout

__all__ = ["SIZE", "Row", "alone", "number_of", "prepare", "read", "rows", "table"]

#: members of struct bpf_iter__task_file: pointers and a number, laid out by the macro of include/linux/bpf.h
_META, _TASK, _FD, _FILE = 0, 8, 16, 24
_ROW: Final = struct.Struct("=IIQQQQ")
SIZE: Final = _ROW.size
_STATUS: Final = 0x7FFFFFFF & ~os.O_CLOEXEC
#: the frame below a row: what close_on_exec holds
_AT_BITS: Final = -8
_AT: Final = _AT_BITS - _ROW.size


class Row(NamedTuple):
    """One descriptor.

    fd       its number
    flags    f_flags of the description; bit 31: close-on-exec
    owner    address of its fown_struct (0: nobody was ever to be told)
    file     address of the description
    cookie   of its socket, 0 if it is none or has none
    locks    address of what the kernel keeps of locks on its inode (0: there never was one)
    """

    fd: int
    flags: int
    owner: int
    file: int
    cookie: int
    locks: int

    @property
    def cloexec(self) -> bool:
        """Whether exec closes it."""
        return bool(self.flags >> 31)

    @property
    def status(self) -> int:
        """The flags as fdinfo tells them, O_CLOEXEC among them."""
        return self.flags & _STATUS | (os.O_CLOEXEC if self.cloexec else 0)


def _program(known: Layout) -> bytes:
    if known.place("file", "f_owner").size != 8:
        raise BadBtf("f_owner is no pointer")
    asm = Asm().mov(6, 1).load(8, 7, 6, _TASK).jump_if(Jump.EQUAL, 7, 0, "out")
    asm.load(8, 8, 6, _FILE).jump_if(Jump.EQUAL, 8, 0, "out").load(4, 9, 6, _FD)
    for at in range(_AT, 0, 8):
        asm.store_number(8, FRAME, at, 0)
    asm.store(4, FRAME, _AT, 9)
    asm.load(8, 1, 8, known.offset("file", "f_owner")).store(8, FRAME, _AT + 8, 1).store(8, FRAME, _AT + 16, 8)
    asm.load(8, 1, 8, known.offset("file", "f_inode")).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.load(8, 1, 1, known.offset("inode", "i_flctx")).store(8, FRAME, _AT + 32, 1)
    # close-on-exec: a bit of an array of words
    asm.load(8, 1, 7, known.offset("task_struct", "files")).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.load(8, 1, 1, known.offset("files_struct", "fdt")).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.load(8, 3, 1, known.offset("fdtable", "close_on_exec"))
    asm.mov(4, 9).shift_right(4, 6).shift_left(4, 3).add_register(3, 4)
    asm.frame(1, _AT_BITS).set(2, 8).call(Helper.PROBE_READ_KERNEL)
    asm.load(8, 1, FRAME, _AT_BITS).mov(2, 9).mask(2, 63).shift_right_by(1, 2).mask(1, 1).shift_left(1, 31)
    asm.load(4, 2, 8, known.offset("file", "f_flags")).either(1, 2).store(4, FRAME, _AT + 4, 1)
    asm.store_number(8, FRAME, _AT_BITS, 0)
    asm.mov(1, 8).call(Helper.SOCK_FROM_FILE).jump_if(Jump.EQUAL, 0, 0, "tell")
    asm.load(8, 1, 0, known.offset("socket", "sk")).jump_if(Jump.EQUAL, 1, 0, "tell")
    asm.load(8, 1, 1, known.offset("sock", "__sk_common.skc_cookie")).store(8, FRAME, _AT + 24, 1)
    asm.label("tell").load(8, 1, 6, _META).load(8, 1, 1, known.offset("bpf_iter_meta", "seq"))
    asm.frame(2, _AT).set(3, _ROW.size).call(Helper.SEQ_WRITE)
    return asm.label("out").exit(0).code()


@functools.cache
def _loaded() -> int:
    return taskiter.wanted(_program, "tcpmig_files", "no BPF iterator over open files")


def prepare() -> None:
    """Load the program, which takes milliseconds. KernelFeatureMissing."""
    _loaded()


def table(pid: int) -> bytes:
    """The rows of a process, by descriptor, of SIZE bytes each; none of one that has ended. KernelFeatureMissing,
    OSError."""
    return taskiter.read(_loaded(), pid)


def read(pid: int) -> list[bytes]:
    """The same, row by row."""
    return [row for (row,) in struct.iter_unpack(f"{SIZE}s", table(pid))]


def number_of(row: bytes) -> int:
    """The descriptor of a row."""
    return int.from_bytes(row[:4], sys.byteorder)


def rows(data: list[bytes]) -> Iterator[Row]:
    """What they say."""
    return (Row(*_ROW.unpack(row)) for row in data)


def alone(pids: Sequence[int]) -> dict[int, list[tuple[bytes, Row]]]:
    """Of each process the descriptors that are the only one of their description in all of them, which nobody has
    locked or is told of by signals. (A socket has one description.) KernelFeatureMissing, OSError."""
    tables = {pid: read(pid) for pid in pids}
    seen: dict[int, int] = {}
    for told in tables.values():
        for row in rows(told):
            seen[row.file] = seen.get(row.file, 0) + 1
    return {
        pid: [
            (raw, row)
            for raw, row in zip(told, rows(told), strict=True)
            if seen[row.file] == 1 and not row.owner and not row.locks
        ]
        for pid, told in tables.items()
    }
