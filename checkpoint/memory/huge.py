"""Private anonymous memory out of the pool of huge pages (mmap with MAP_HUGETLB).

The kernel has a file behind each such mapping, also where nothing is shared: it is mapped again without one.

Source: fs/hugetlbfs/inode.c (hugetlb_file_setup); include/uapi/asm-generic/hugetlb_encode.h.
"""

from __future__ import annotations

import os
from typing import Final

from checkpoint.memory.vma import Vma

__all__ = ["is_private_huge", "map_flags", "page_shift"]

_NAME: Final = "/anon_hugepage (deleted)"
_MAP_HUGETLB: Final = 0x40000
#: where in the flags of mmap the logarithm of the pages' size stands
_SHIFT: Final = 26


def is_private_huge(vma: Vma) -> bool:
    """Whether it is such memory. Its offset in the file behind it means nothing."""
    return vma.name == _NAME and not vma.shared


def page_shift(pid: int, vma: Vma) -> int:
    """The logarithm of the size of the pages of such memory; 0: it is no such memory."""
    if not is_private_huge(vma):
        return 0
    return os.stat(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}").st_blksize.bit_length() - 1


def map_flags(shift: int) -> int:
    """What mmap is told besides."""
    return _MAP_HUGETLB | shift << _SHIFT if shift else 0
