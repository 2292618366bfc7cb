"""The file of the program that a rebuilt process starts as: a page of machine code that waits for a pidfd.

Source: elf(5); include/uapi/linux/elf.h, elf-em.h, poll.h.
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["EM_AARCH64", "EM_X86_64", "POLLFD", "waiting_elf"]

EM_X86_64: Final = 62
EM_AARCH64: Final = 183

#: struct pollfd: the descriptor, what is waited for, what has come
POLLFD: Final = struct.Struct("<ihh")

_POLLIN: Final = 1
_ELF_HEADER: Final = struct.Struct("<4sBBB9xHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_ET_EXEC, _EV_CURRENT = 2, 1
_ELFCLASS64, _ELFDATA2LSB = 2, 1
_PT_LOAD, _PT_GNU_STACK = 1, 0x6474E551
_PF_X, _PF_W, _PF_R = 1, 2, 4
_PAGE: Final = 4096


def waiting_elf(machine: int, code: bytes, pollfd_at: int, base: int, pidfd: int) -> bytes:
    """A static ELF file of ``code`` that is mapped, as one page, at ``base``.

    machine    EM_*
    pollfd_at  where in the code the struct pollfd lies that it waits for
    pidfd      number, in the program, of the pidfd whose process it waits for
    """
    code = code[:pollfd_at] + POLLFD.pack(pidfd, _POLLIN, 0) + code[pollfd_at + POLLFD.size :]
    headers = _ELF_HEADER.size + 2 * _PROGRAM_HEADER.size
    size = headers + len(code)
    return b"".join(
        (
            _ELF_HEADER.pack(
                *(b"\x7fELF", _ELFCLASS64, _ELFDATA2LSB, _EV_CURRENT, _ET_EXEC, machine, _EV_CURRENT),
                *(base + headers, _ELF_HEADER.size, 0, 0, _ELF_HEADER.size, _PROGRAM_HEADER.size, 2, 0, 0, 0),
            ),
            _PROGRAM_HEADER.pack(_PT_LOAD, _PF_R | _PF_X, 0, base, base, size, size, _PAGE),
            _PROGRAM_HEADER.pack(_PT_GNU_STACK, _PF_R | _PF_W, 0, 0, 0, 0, 0, 16),
            code,
        )
    )
