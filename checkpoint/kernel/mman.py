"""Constants of memory calls: mmap(2), mremap(2), madvise(2), mlock2(2), and the prctl(2) options on a whole memory.

Source: include/uapi/asm-generic/mman-common.h, include/uapi/linux/mman.h, include/uapi/linux/prctl.h.
"""

from __future__ import annotations

import enum
import errno
import functools
import mmap
import struct

__all__ = [
    "MM_MAP",
    "MM_MAP_AUXV",
    "MM_MAP_EXE_FD",
    "MM_MAP_SAME_EXE",
    "Advice",
    "Lock",
    "LockAll",
    "Map",
    "PrSetMm",
    "PrSetVma",
    "Prot",
    "Remap",
    "droppable_known",
]


class Prot(enum.IntFlag):
    """Protection of a mapping."""

    READ = 1
    WRITE = 2
    EXEC = 4


class Map(enum.IntFlag):
    """Flags of mmap."""

    SHARED = 0x01
    PRIVATE = 0x02
    DROPPABLE = 0x08  # 6.11
    ANONYMOUS = 0x20
    GROWSDOWN = 0x0100
    NORESERVE = 0x4000
    FIXED_NOREPLACE = 0x100000  # 4.17


class Remap(enum.IntFlag):
    """Flags of mremap."""

    MAYMOVE = 1
    FIXED = 2


class Advice(enum.IntEnum):
    """Advice of madvise."""

    RANDOM = 1
    SEQUENTIAL = 2
    DONTNEED = 4
    DONTFORK = 10
    MERGEABLE = 12
    HUGEPAGE = 14
    NOHUGEPAGE = 15
    DONTDUMP = 16
    WIPEONFORK = 18
    POPULATE_WRITE = 23  # 5.14
    GUARD_INSTALL = 102  # 6.13


class Lock(enum.IntFlag):
    """Flags of mlock2."""

    ONFAULT = 1


class LockAll(enum.IntFlag):
    """Flags of mlockall."""

    CURRENT = 1
    FUTURE = 2
    ONFAULT = 4


class PrSetMm(enum.IntEnum):
    """prctl(SET_MM, ...)."""

    OPTION = 35
    MAP = 14


class PrSetVma(enum.IntEnum):
    """prctl(SET_VMA, ANON_NAME, address, size, name); a kernel may be built without it."""

    OPTION = 0x53564D41
    ANON_NAME = 0


#: struct prctl_mm_map: start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start, arg_end,
#: env_start, env_end, auxv (pointer), auxv_size, exe_fd
MM_MAP = struct.Struct("<12QII")
#: where the pointer auxv and the descriptor exe_fd stand in it
MM_MAP_AUXV = MM_MAP.size - 16
MM_MAP_EXE_FD = MM_MAP.size - 4
#: exe_fd that leaves the exe link alone
MM_MAP_SAME_EXE = 0xFFFFFFFF


@functools.cache
def droppable_known() -> bool:
    """Whether this kernel has mappings that it may drop (6.11). Tried."""
    try:
        mmap.mmap(-1, mmap.PAGESIZE, flags=Map.DROPPABLE | Map.ANONYMOUS).close()
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return False
    return True
