"""The kernel's own mappings: the vdso (code that answers clock calls without entering the kernel) and its data.

They cannot be made, only moved: a rebuilt process gets those that its kernel gave to it, at the places where the
original had them.  That is right only if the code is the same: the program has addresses of functions in it.

Under another kernel, or the same one built differently, the old code stays where it was, as ordinary memory, and each
of its functions begins with a jump to the one of this kernel, whose mappings lie at a place that was free; a function
that this kernel does not have makes the system call.  The old code reads data that is gone, so no thread may be in the
middle of it: those that are leave it before they are captured (:mod:`checkpoint.indoors`), and one that a signal
handler will return into it is refused (:func:`require_outside`).  Moved on, to a third kernel, the process has two
pieces of old code, the one jumping into the other; 8 KiB with each such move.

Source: arch/x86/entry/vdso/vma.c, arch/arm64/kernel/vdso.c; elf(5).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

from checkpoint.arch import USER_END, vdso_call, vdso_jump, vdso_stays
from checkpoint.errors import AddressGapMissing, OtherVdso
from checkpoint.memory.ranges import Range, difference
from checkpoint.memory.vma import PAGE, Vma

__all__ = ["code", "free_place", "functions", "proxied"]

_MAGIC = b"\x7fELF\x02\x01"  # ELFCLASS64, ELFDATA2LSB
_SEGMENTS = struct.Struct("<32xQ14xHH4x")  # of Elf64_Ehdr: e_phoff, e_phentsize, e_phnum
_SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr
_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym
_ENTRY = struct.Struct("<QQ")  # Elf64_Dyn
_CHAINS = struct.Struct("<4xI")  # of a hash table: the number of symbols
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_HASH, _DT_STRTAB, _DT_SYMTAB = 4, 5, 6
_FUNCTION_TYPES: Final = (0, 2)  # STT_NOTYPE (assembler), STT_FUNC
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1
_MOST_SYMBOLS: Final = 256
#: the first bytes of the address space are never a place
_LOWEST: Final = 0x1000_0000


def code(mapped: bytes) -> bytes:
    """What of the vdso's pages is in use: its loaded segment, without what stands behind it (where the engine puts code
    of its own while a process is stopped). OtherVdso if it is no ELF file of that form."""
    if not mapped.startswith(_MAGIC):
        raise OtherVdso("the vdso is not a 64-bit ELF file")
    end = max((offset + size for offset, size in _segments(mapped, _PT_LOAD)), default=0)
    if not 0 < end <= len(mapped):
        raise OtherVdso("the segments of the vdso lie outside of it")
    return mapped[:end]


def _segments(elf: bytes, wanted: int) -> list[Range]:
    """(offset, bytes) of the segments of a type."""
    try:
        offset, size, count = _SEGMENTS.unpack_from(elf)
        found = [_SEGMENT.unpack_from(elf, offset + size * number) for number in range(count)]
    except (struct.error, OverflowError) as error:
        raise OtherVdso(f"the segments of the vdso cannot be read: {error}") from error
    return [(one[2], one[5]) for one in found if one[0] == wanted]


def functions(elf: bytes) -> dict[str, Range]:
    """name -> (offset, size) of the functions that programs find in a vdso. OtherVdso if it is malformed."""
    try:
        found = _functions(elf)
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise OtherVdso(f"the symbols of the vdso cannot be read: {error}") from error
    if not found:
        raise OtherVdso("the vdso has no functions")
    return found


def _functions(elf: bytes) -> dict[str, Range]:
    entries: dict[int, int] = {}
    for start, length in _segments(elf, _PT_DYNAMIC):
        for at in range(start, start + length, _ENTRY.size):
            tag, value = _ENTRY.unpack_from(elf, at)
            entries.setdefault(tag, value)  # addresses are offsets: a vdso is linked to address 0
    symbols, strings = entries[_DT_SYMTAB], entries[_DT_STRTAB]
    if _DT_HASH in entries:
        (count,) = _CHAINS.unpack_from(elf, entries[_DT_HASH])
    else:
        count = (strings - symbols) // _SYMBOL.size  # the names stand behind the symbols
    found: dict[str, Range] = {}
    for number in range(min(count, _MOST_SYMBOLS)):
        name, info, _, index, value, size = _SYMBOL.unpack_from(elf, symbols + number * _SYMBOL.size)
        if info & 0xF in _FUNCTION_TYPES and index not in (_SHN_UNDEF, _SHN_ABS):
            end = elf.index(b"\0", strings + name)
            found[elf[strings + name : end].decode("ascii")] = (value, size)
    return found


def proxied(old: bytes, new: bytes, base: int) -> bytes:
    """The code ``old`` of another kernel's vdso with its functions leading to those of ``new``, which lies at the
    address ``base``. OtherVdso if one of them has no room for that, or either is malformed."""
    here = {name: offset for name, (offset, _) in functions(new).items()}
    out = bytearray(old)
    for name, (offset, size) in functions(old).items():
        if vdso_stays(name):
            continue
        entry = vdso_jump(base + here[name]) if name in here else vdso_call(name)
        if size < len(entry) or offset + size > len(old):
            raise OtherVdso(f"the function {name} of the source's vdso has {size} bytes, too few for a jump")
        out[offset : offset + len(entry)] = entry
    return bytes(out)


def free_place(taken: Iterable[Range], special: Sequence[Vma]) -> int:
    """Where to put the kernel's own mappings, which stay together as they are: in the middle of the largest gap, where
    the program's next mappings will not come. AddressGapMissing."""
    size = special[-1].end - special[0].start
    start, end = max(difference([(_LOWEST, USER_END)], sorted(taken)), key=lambda gap: gap[1] - gap[0], default=(0, 0))
    if end - start < 3 * size:
        raise AddressGapMissing(f"there are no {size >> 10} KiB of address space for this kernel's vdso")
    return (start + end - size) // 2 // PAGE * PAGE
