"""What an epoll instance watches, as the kernel has it: read in one go, in the order of its fdinfo.

fdinfo writes a line of text for each entry, again and again until they fit its buffer: of ten thousand that is 15 ms,
and more to read them.  Here a program goes through the tree of entries (struct eventpoll.rbr) and copies 24 bytes of
each.  Two rows that are equal, of two readings: the same file, as long as that stays open, watched under the same
number for the same events with the same data.

Nothing is locked (:mod:`checkpoint.kernel.taskmemory`): whoever can change the instance must stand still.

Source: fs/eventpoll.c (struct eventpoll, epitem; ep_show_fdinfo; files and numbers order the tree, ep_cmp_ffd),
lib/rbtree.c.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from checkpoint.kernel.taskiter import TASK
from checkpoint.kernel.taskmemory import TaskMemory, read_word
from tcpstate.kernel.bpf.asm import Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout

__all__ = ["SIZE", "Reader", "Watched", "key_of", "pack", "pairs", "rows"]

#: struct epoll_filefd and struct epoll_event, both packed: file, number; events, data
_ROW: Final = struct.Struct("=QiIQ")
SIZE: Final = _ROW.size
_FILE_PART, _EVENT_PART = 12, 12
_KEY: Final = struct.Struct("=Qi")
#: the map's memory: what is asked, what came of it, the way down the tree, the rows
_AT_FD, _AT_DONE, _AT_COUNT, _AT_DEPTH, _AT_NODE, _AT_CALLS, _AT_WAY = 0, 4, 8, 12, 16, 24, 32
#: a tree of 2^32 entries is no deeper
_DEEPEST: Final = 64
_HEADER: Final = _AT_WAY + 8 * _DEEPEST
_ANSWER: Final = struct.Struct("=II")
_CALLS: Final = struct.Struct("=Q")


class Watched(NamedTuple):
    """One entry.

    file    address of the description that it watches
    number  under which it was added
    events  mask
    data    what epoll_wait hands back
    """

    file: int
    number: int
    events: int
    data: int


def _program(known: Layout, memory: int, most: int) -> bytes:
    """Register 9 is the map's memory throughout; whatever lasts from one step to the next lies there."""
    if known.place("epitem", "ffd").size != _FILE_PART or known.place("epitem", "event").size != _EVENT_PART:
        raise BadBtf("an entry of an epoll instance is another")
    left = known.offset("rb_node", "rb_left")
    right = known.offset("rb_node", "rb_right")
    node = known.offset("epitem", "rbn")
    asm = Asm().load(8, 7, 1, TASK).jump_if(Jump.EQUAL, 7, 0, "out").map_value(9, memory)
    asm.load(8, 1, 7, known.offset("task_struct", "files")).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.load(8, 1, 1, known.offset("files_struct", "fdt")).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.load(4, 2, 9, _AT_FD).load(4, 3, 1, known.offset("fdtable", "max_fds"))
    asm.jump_if_register(Jump.GREATER, 3, 2, "open").jump("out")
    asm.label("open").load(8, 6, 1, known.offset("fdtable", "fd")).shift_left(2, 3).add_register(6, 2)
    read_word(asm, 6, 0)
    asm.jump_if(Jump.EQUAL, 1, 0, "out").mov(6, 1)
    read_word(asm, 6, known.offset("file", "f_op"))
    asm.store(8, 9, _AT_CALLS, 1)
    read_word(asm, 6, known.offset("file", "private_data"))
    asm.jump_if(Jump.EQUAL, 1, 0, "out").mov(6, 1)
    read_word(asm, 6, known.offset("eventpoll", "rbr.rb_root.rb_node"))
    asm.store(8, 9, _AT_NODE, 1).store_number(4, 9, _AT_DEPTH, 0).store_number(4, 9, _AT_COUNT, 0)
    # down to the left as far as it goes
    asm.label("loop").once_more("out").load(8, 6, 9, _AT_NODE).jump_if(Jump.EQUAL, 6, 0, "up")
    asm.load(4, 7, 9, _AT_DEPTH).jump_if(Jump.GREATER, 7, _DEEPEST - 1, "out")
    asm.mov(1, 7).add(1, 1).store(4, 9, _AT_DEPTH, 1)
    asm.shift_left(7, 3).mov(8, 9).add_register(8, 7).store(8, 8, _AT_WAY, 6)
    read_word(asm, 6, left)
    asm.store(8, 9, _AT_NODE, 1).jump("loop")
    # the entry there, and then what is right of it
    asm.label("up").load(4, 7, 9, _AT_DEPTH).jump_if(Jump.EQUAL, 7, 0, "all")
    asm.add(7, -1).jump_if(Jump.GREATER, 7, _DEEPEST - 1, "out").store(4, 9, _AT_DEPTH, 7)
    asm.shift_left(7, 3).mov(8, 9).add_register(8, 7).load(8, 6, 8, _AT_WAY)
    asm.load(4, 7, 9, _AT_COUNT).jump_if(Jump.GREATER, 7, most - 1, "out")
    asm.mov(1, 7).add(1, 1).store(4, 9, _AT_COUNT, 1)
    asm.mov(8, 7).shift_left(8, 4).shift_left(7, 3).add_register(8, 7).mov(7, 9).add_register(7, 8)
    for at, size, member in ((0, _FILE_PART, "ffd"), (_FILE_PART, _EVENT_PART, "event")):
        asm.mov(1, 7).add(1, _HEADER + at).set(2, size).mov(3, 6).add(3, known.offset("epitem", member) - node)
        asm.call(Helper.PROBE_READ_KERNEL)
    read_word(asm, 6, right)
    asm.store(8, 9, _AT_NODE, 1).jump("loop")
    asm.label("all").store_number(4, 9, _AT_DONE, 1)
    return asm.label("out").exit(0).code()


class Reader(TaskMemory):
    """Room for ``most`` entries, and the program that fills it. KernelFeatureMissing. Close it."""

    def __init__(self, most: int) -> None:
        self._most = most
        super().__init__(
            _HEADER + most * SIZE,
            lambda known, memory: _program(known, memory, most),
            name="tcpmig_epoll",
            what="epoll instances",
            object="epoll",
            since="6.9",
        )
        #: address of the calls of such files: what has others is no epoll instance
        self._calls = 0
        with select.epoll() as one:
            self.read(os.getpid(), one.fileno())
        (self._calls,) = _CALLS.unpack_from(self.memory, _AT_CALLS)

    def read(self, pid: int, fd: int) -> bytes | None:
        """The rows of the epoll instance behind a descriptor, of SIZE bytes each; None if there is none, or it has more
        than there is room for. OSError."""
        self.run(fd.to_bytes(4, "little").ljust(_HEADER, b"\0"), pid)
        done, count = _ANSWER.unpack_from(self.memory, _AT_DONE)
        if _CALLS.unpack_from(self.memory, _AT_CALLS) != (self._calls,):
            return None
        return self.memory[_HEADER : _HEADER + count * SIZE] if done == 1 and count <= self._most else None


def rows(data: bytes) -> Iterator[Watched]:
    """What they say."""
    return map(Watched._make, _ROW.iter_unpack(data))


def pairs(data: bytes) -> Iterator[tuple[bytes, Watched]]:
    """Each row, and what it says."""
    return zip((raw for (raw,) in struct.iter_unpack(f"{SIZE}s", data)), rows(data), strict=True)


def pack(one: Watched) -> bytes:
    """As it is in the kernel."""
    return _ROW.pack(*one)


def key_of(row: bytes) -> tuple[int, int]:
    """What the rows are sorted by."""
    file, number = _KEY.unpack_from(row)
    return file, number
