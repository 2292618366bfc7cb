"""The first process of a PID namespace that was made for a restored tree, x86-64.

It waits for every child, its own and those that the kernel gives it, and ends when there is none left: with the status
of the tree's root, or 128 and the number of the signal that ended the root, as a shell says it.

Source: pid_namespaces(7), wait4(2).
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from tcpstate.kernel.machine import SYS

__all__ = ["INIT", "INIT_SOURCE", "init_image"]

#: __WALL, include/uapi/linux/wait.h: also children that end without SIGCHLD
_WALL: Final = 0x4000_0000

#: The four bytes after the first two are the number of the root.
INIT_SOURCE: Final = f"""\
        .intel_syntax noprefix
        .text
        mov     r13d, 0x11223344
        xor     r12d, r12d              # what the root ended with
        sub     rsp, 16
1:      mov     rdi, -1
        mov     rsi, rsp
        mov     edx, {_WALL:#x}
        xor     r10d, r10d
        mov     eax, {SYS.wait4:d}
        syscall
        cmp     eax, {-errno.ECHILD:d}
        je      2f
        cmp     eax, r13d
        jne     1b
        mov     r12d, [rsp]
        jmp     1b
2:      mov     edi, r12d
        and     edi, 0x7f
        jnz     3f
        mov     edi, r12d
        shr     edi, 8
        jmp     4f
3:      or      edi, 0x80
4:      mov     eax, {SYS.exit_group:d}
        syscall
"""

INIT: Final = bytes.fromhex(
    "41bd443322114531e44883ec1048c7c7ffffffff4889e6ba000000404531d2b83d0000000f0583f8"
    "f6740b4439e875dd448b2424ebd74489e783e77f75084489e7c1ef08eb0681cf80000000b8e70000"
    "000f05"
)

_NUMBER = struct.Struct("<I")
_NUMBER_OFFSET = 2


def init_image(root: int) -> bytes:
    """The program, position independent, for the root's number in its namespace."""
    return INIT[:_NUMBER_OFFSET] + _NUMBER.pack(root) + INIT[_NUMBER_OFFSET + _NUMBER.size :]
