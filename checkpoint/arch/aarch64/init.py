"""The first process of a PID namespace that was made for a restored tree, aarch64.

It waits for every child, its own and those that the kernel gives it, and ends when there is none left: with the status
of the tree's root, or 128 and the number of the signal that ended the root, as a shell says it.

Source: pid_namespaces(7), wait4(2).
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from tcpstate.kernel.machine.aarch64 import SYS

__all__ = ["INIT", "INIT_SOURCE", "init_image"]

#: __WALL, include/uapi/linux/wait.h: also children that end without SIGCHLD
_WALL: Final = 0x4000_0000

#: The last four bytes are the number of the root.
INIT_SOURCE: Final = f"""\
        .text
        ldr     w20, 5f
        mov     w19, 0                  // what the root ended with
        sub     sp, sp, 16
1:      mov     x0, -1
        mov     x1, sp
        mov     x2, {_WALL:#x}
        mov     x3, 0
        mov     x8, {SYS.wait4:d}
        svc     0
        cmn     w0, {errno.ECHILD:d}
        b.eq    2f
        cmp     w0, w20
        b.ne    1b
        ldr     w19, [sp]
        b       1b
2:      ands    w0, w19, 0x7f
        b.ne    3f
        ubfx    w0, w19, 8, 8
        b       4f
3:      orr     w0, w0, 0x80
4:      mov     x8, {SYS.exit_group:d}
        svc     0
5:      .word   0x11223344
"""

INIT: Final = bytes.fromhex(
    "d402001813008052ff4300d100008092e10300910200a8d2030080d2882080d2010000d41f280031"
    "a00000541f00146be1feff54f30340b9f5ffff17601a007261000054603e08530200001400001932"
    "c80b80d2010000d444332211"
)

_NUMBER = struct.Struct("<I")


def init_image(root: int) -> bytes:
    """The program, position independent, for the root's number in its namespace."""
    return INIT[: -_NUMBER.size] + _NUMBER.pack(root)
