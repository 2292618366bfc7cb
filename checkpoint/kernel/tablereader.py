"""The rows of :mod:`checkpoint.kernel.filetable`, read in one go: for tables of thousands of descriptors.

The iterator takes a reference to each file and runs the program anew for each.  Of a process that stands still nobody
closes anything: here one run goes through its table, in a third of the time.

Source: include/linux/fdtable.h, include/linux/fs.h.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

from checkpoint.kernel import filetable
from checkpoint.kernel.taskiter import TASK
from checkpoint.kernel.taskmemory import WORD, TaskMemory, read_word
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout

__all__ = ["TableReader"]

#: the map's memory: whether it was read to its end, rows, the next descriptor, their number; where the kernel has the
#: files and the bits; address of the calls of sockets; a descriptor, and the address of its file's calls; the rows
_AT_DONE, _AT_COUNT, _AT_NEXT, _AT_END, _AT_FILES, _AT_BITS, _AT_SOCKETS, _AT_ONE, _AT_CALLS = (
    0, 4, 8, 12, 16, 24, 32, 40, 48
)  # fmt: skip
_HEADER: Final = 56
_HEAD: Final = struct.Struct("=IIIIQQQQQ")
_ANSWER: Final = struct.Struct("=II")
_CALLS: Final = struct.Struct("=Q")
#: of a row: number, flags, owner, file, cookie, locks
_NUMBER, _FLAGS, _OWNER, _FILE, _COOKIE, _LOCKS = 0, 4, 8, 16, 24, 32
#: of the frame, below a word: what was read of a file
_MOST_OF_FILE: Final = 256
_OF_FILE: Final = ("f_op", "private_data", "f_inode", "f_flags", "f_owner")


def _program(known: Layout, memory: int, most: int) -> bytes:
    """Register 9 is the map's memory, 8 in it the row, less the header; what lasts from file to file lies there."""
    places = {name: known.place("file", name) for name in _OF_FILE}
    first = min(place.offset for place in places.values())
    length = max(place.offset + place.size for place in places.values()) - first
    if length > _MOST_OF_FILE or places["f_owner"].size != 8 or places["f_flags"].size != 4:
        raise BadBtf("struct file is another")
    start = WORD - -(-length // 8) * 8
    at = {name: start + place.offset - first for name, place in places.items()}
    asm = Asm().load(8, 7, 1, TASK).jump_if(Jump.EQUAL, 7, 0, "out").map_value(9, memory)
    asm.load(8, 1, 7, known.offset("task_struct", "files")).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.load(8, 1, 1, known.offset("files_struct", "fdt")).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.load(4, 2, 1, known.offset("fdtable", "max_fds")).store(4, 9, _AT_END, 2)
    asm.load(8, 2, 1, known.offset("fdtable", "fd")).store(8, 9, _AT_FILES, 2)
    asm.load(8, 2, 1, known.offset("fdtable", "close_on_exec")).store(8, 9, _AT_BITS, 2)
    asm.label("loop").once_more("out").load(4, 6, 9, _AT_NEXT).load(4, 1, 9, _AT_END)
    asm.jump_if_register(Jump.GREATER, 1, 6, "more").jump("all")
    asm.label("more").mov(1, 6).add(1, 1).store(4, 9, _AT_NEXT, 1)
    asm.load(8, 7, 9, _AT_FILES).mov(1, 6).shift_left(1, 3).add_register(7, 1)
    read_word(asm, 7, 0)
    asm.jump_if(Jump.EQUAL, 1, 0, "loop").mov(7, 1)
    asm.load(4, 8, 9, _AT_COUNT).jump_if(Jump.GREATER, 8, most - 1, "out").mov(1, 8).add(1, 1).store(4, 9, _AT_COUNT, 1)
    # 40 bytes each
    asm.mov(1, 8).shift_left(1, 5).shift_left(8, 3).add_register(8, 1).add_register(8, 9)
    asm.store(4, 8, _HEADER + _NUMBER, 6).store(8, 8, _HEADER + _FILE, 7)
    asm.mov(3, 7).add(3, first).frame(1, start).set(2, length).call(Helper.PROBE_READ_KERNEL)
    asm.load(8, 1, FRAME, at["f_owner"]).store(8, 8, _HEADER + _OWNER, 1)
    asm.load(8, 1, FRAME, at["f_op"]).load(4, 2, 9, _AT_ONE).jump_if_register(Jump.NOT_EQUAL, 2, 6, "another")
    asm.store(8, 9, _AT_CALLS, 1).label("another")
    # close-on-exec: a bit of an array of words
    asm.load(8, 7, 9, _AT_BITS).mov(1, 6).shift_right(1, 6).shift_left(1, 3).add_register(7, 1)
    read_word(asm, 7, 0)
    asm.mask(6, 63).shift_right_by(1, 6).mask(1, 1).shift_left(1, 31).load(4, 2, FRAME, at["f_flags"]).either(1, 2)
    asm.store(4, 8, _HEADER + _FLAGS, 1)
    asm.store_number(8, 8, _HEADER + _LOCKS, 0).load(8, 7, FRAME, at["f_inode"]).jump_if(Jump.EQUAL, 7, 0, "socket")
    read_word(asm, 7, known.offset("inode", "i_flctx"))
    asm.store(8, 8, _HEADER + _LOCKS, 1)
    asm.label("socket").store_number(8, 8, _HEADER + _COOKIE, 0)
    asm.load(8, 1, FRAME, at["f_op"]).load(8, 2, 9, _AT_SOCKETS).jump_if_register(Jump.NOT_EQUAL, 1, 2, "loop")
    asm.load(8, 7, FRAME, at["private_data"]).jump_if(Jump.EQUAL, 7, 0, "loop")
    read_word(asm, 7, known.offset("socket", "sk"))
    asm.jump_if(Jump.EQUAL, 1, 0, "loop").mov(7, 1)
    read_word(asm, 7, known.offset("sock", "__sk_common.skc_cookie"))
    asm.store(8, 8, _HEADER + _COOKIE, 1).jump("loop")
    asm.label("all").store_number(4, 9, _AT_DONE, 1)
    return asm.label("out").exit(0).code()


class TableReader(TaskMemory):
    """Room for ``most`` descriptors, and the program that fills it. KernelFeatureMissing. Close it."""

    def __init__(self, most: int) -> None:
        super().__init__(
            _HEADER + most * filetable.SIZE,
            lambda known, memory: _program(known, memory, most),
            name="tcpmig_table",
            what="tables of descriptors",
            object="task",
            since="6.12",
        )
        #: by these calls a file is known to be a socket
        self._sockets = 0
        with socket.socket() as sock:
            self._run(os.getpid(), sock.fileno())
        (self._sockets,) = _CALLS.unpack_from(self.memory, _AT_CALLS)

    def _run(self, pid: int, one: int = 0) -> bytes | None:
        self.run(_HEAD.pack(0, 0, 0, 0, 0, 0, self._sockets, one, 0), pid)
        done, count = _ANSWER.unpack_from(self.memory, _AT_DONE)
        return self.memory[_HEADER : _HEADER + count * filetable.SIZE] if done == 1 else None

    def read(self, pid: int) -> bytes:
        """What :func:`checkpoint.kernel.filetable.table` says of a process that stands still. OSError."""
        found = self._run(pid)
        # more than there is room for
        return filetable.table(pid) if found is None else found
