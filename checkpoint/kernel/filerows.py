"""The open files, directories and devices of a process in one pass, as the kernel has them: by which path, and where.

What fdinfo, the link in /proc/PID/fd and fstat(2) would tell of each, in three calls.  A path is what d_path makes of
it, as seen from our root directory, " (deleted)" behind it if nothing has that name any more.

Source: kernel/bpf/task_iter.c (bpf_iter__task_file), kernel/trace/bpf_trace.c (bpf_d_path, for iterators since 5.10),
include/linux/fs.h.  Names of an inode's times: 6.13, 6.7, before.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from checkpoint.kernel import taskiter
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf, Place
from tcpstate.kernel.bpf.layout import Layout

__all__ = ["NUMBERS", "SIZE", "FileRow", "number_of", "prepare", "rows", "table"]

#: members of struct bpf_iter__task_file
_META, _FD, _FILE = 0, 16, 24
#: bytes of a path, with its end; a longer one is not told
_PATH: Final = 192
#: number, mode; inode; its generation, its file system; device, bytes of the path; position, size, seconds, nanoseconds
_HEAD: Final = struct.Struct("=IIQIIIiQQqQ")
SIZE: Final = _HEAD.size + _PATH
#: where in a row the numbers are that come and go: position, size, time of modification
NUMBERS: Final = slice(32, 64)
_AT: Final = -SIZE
_FORMAT, _REGULAR, _DIRECTORY, _CHARACTERS = 0o170000, 0o100000, 0o040000, 0o020000
_TIMES: Final = (
    ("i_mtime_sec", "i_mtime_nsec"),
    ("__i_mtime.tv_sec", "__i_mtime.tv_nsec"),
    ("i_mtime.tv_sec", "i_mtime.tv_nsec"),
)


class FileRow(NamedTuple):
    """One descriptor.

    fd        its number
    pos       position of the description
    size      bytes of the file
    mtime_ns  time of its modification, as the inode in memory has it
    path      empty: too long to be told
    """

    fd: int
    pos: int
    size: int
    mtime_ns: int
    path: str


def _times(known: Layout) -> tuple[Place, Place]:
    """Where an inode has the seconds and nanoseconds. BadBtf."""
    for first, second in _TIMES[:-1]:
        try:
            return known.place("inode", first), known.place("inode", second)
        except BadBtf:
            continue
    return known.place("inode", _TIMES[-1][0]), known.place("inode", _TIMES[-1][1])


def _program(known: Layout) -> bytes:
    seconds, nanoseconds = _times(known)
    asm = Asm().mov(6, 1).load(8, 8, 6, _FILE).jump_if(Jump.EQUAL, 8, 0, "out")
    asm.load(8, 7, 8, known.offset("file", "f_inode")).jump_if(Jump.EQUAL, 7, 0, "out")
    asm.load(2, 9, 7, known.offset("inode", "i_mode")).mov(1, 9).mask(1, _FORMAT)
    for kind in (_REGULAR, _DIRECTORY, _CHARACTERS):
        asm.jump_if(Jump.EQUAL, 1, kind, "file")
    asm.jump("out").label("file")
    for at in range(_AT, 0, 8):
        asm.store_number(8, FRAME, at, 0)
    asm.load(4, 1, 6, _FD).store(4, FRAME, _AT, 1).store(4, FRAME, _AT + 4, 9)
    asm.load(8, 1, 7, known.offset("inode", "i_ino")).store(8, FRAME, _AT + 8, 1)
    asm.load(4, 1, 7, known.offset("inode", "i_generation")).store(4, FRAME, _AT + 16, 1)
    asm.load(4, 1, 7, known.offset("inode", "i_rdev")).store(4, FRAME, _AT + 24, 1)
    asm.load(8, 1, 8, known.offset("file", "f_pos")).store(8, FRAME, _AT + 32, 1)
    asm.load(8, 1, 7, known.offset("inode", "i_size")).store(8, FRAME, _AT + 40, 1)
    asm.load(seconds.size, 1, 7, seconds.offset).store(8, FRAME, _AT + 48, 1)
    asm.load(nanoseconds.size, 1, 7, nanoseconds.offset).store(8, FRAME, _AT + 56, 1)
    asm.load(8, 1, 7, known.offset("inode", "i_sb")).jump_if(Jump.EQUAL, 1, 0, "path")
    asm.load(4, 1, 1, known.offset("super_block", "s_dev")).store(4, FRAME, _AT + 20, 1)
    asm.label("path").mov(1, 8).add(1, known.offset("file", "f_path"))
    asm.frame(2, _AT + _HEAD.size).set(3, _PATH).call(Helper.D_PATH).store(4, FRAME, _AT + 28, 0)
    asm.load(8, 1, 6, _META).load(8, 1, 1, known.offset("bpf_iter_meta", "seq"))
    asm.frame(2, _AT).set(3, SIZE).call(Helper.SEQ_WRITE)
    return asm.label("out").exit(0).code()


@functools.cache
def _loaded() -> int:
    return taskiter.wanted(_program, "tcpmig_paths", "no BPF iterator over open files with their paths")


def prepare() -> None:
    """Load the program, which takes milliseconds. KernelFeatureMissing."""
    _loaded()


def table(pid: int) -> bytes:
    """The rows of a process, by descriptor, of SIZE bytes each; none of one that has ended. KernelFeatureMissing,
    OSError."""
    return taskiter.read(_loaded(), pid)


def number_of(row: bytes) -> int:
    """The descriptor of a row."""
    number: int = _HEAD.unpack_from(row)[0]
    return number


def rows(data: bytes) -> Iterator[tuple[bytes, FileRow]]:
    """Each row, and what it says."""
    for at in range(0, len(data), SIZE):
        raw = data[at : at + SIZE]
        fd, _, _, _, _, _, length, pos, size, seconds, nanoseconds = _HEAD.unpack_from(raw)
        # with the byte that ends it
        path = raw[_HEAD.size : _HEAD.size + length - 1] if 0 < length <= _PATH else b""
        yield raw, FileRow(fd, pos, size, seconds * 10**9 + nanoseconds, path.decode("utf-8", "surrogateescape"))
