"""The kernel's own mappings: the vdso (code that answers clock calls without entering the kernel) and its data.

They cannot be made, only moved: a rebuilt process gets those that its kernel gave to it, at the places where the
original had them.  That is right only if the code is the same: the program may hold addresses of functions in it.

Source: arch/x86/entry/vdso/vma.c; elf(5).
"""

from __future__ import annotations

import struct

from checkpoint.errors import OtherVdso

__all__ = ["code"]

_MAGIC = b"\x7fELF\x02\x01"  # ELFCLASS64, ELFDATA2LSB
_SECTIONS = struct.Struct("<Q")
_SECTIONS_AT = 40  # e_shoff
_COUNT = struct.Struct("<HH")
_COUNT_AT = 58  # e_shentsize, e_shnum


def code(mapped: bytes) -> bytes:
    """The ELF file at the start of the vdso's pages, without the zero bytes behind it (where the engine puts code of
    its own while a process is stopped). OtherVdso if it is no such file."""
    if not mapped.startswith(_MAGIC) or len(mapped) < _COUNT_AT + _COUNT.size:
        raise OtherVdso("the vdso is not a 64-bit ELF file")
    (offset,) = _SECTIONS.unpack_from(mapped, _SECTIONS_AT)
    size, count = _COUNT.unpack_from(mapped, _COUNT_AT)
    end = offset + size * count  # the section headers come last
    if not 0 < end <= len(mapped):
        raise OtherVdso("the section headers of the vdso lie outside of it")
    return mapped[:end]
