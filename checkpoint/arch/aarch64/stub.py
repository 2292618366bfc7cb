"""The program that a rebuilt process starts as, and the machine code that starts it, aarch64.

Source: execveat(2), clone3(2), elf(5).
"""

from __future__ import annotations

from typing import Final

from checkpoint.arch.elf import EM_AARCH64, POLLFD, waiting_elf
from tcpstate.kernel.machine.aarch64 import SYS

__all__ = ["SPAWN", "SPAWN_SOURCE", "STUB", "STUB_SOURCE", "USER_END", "stub_elf"]

#: the first address that user space has only by asking for it (TASK_SIZE with 48-bit addresses)
USER_END: Final = 1 << 48

#: ``long spawn(struct clone_args *, size_t, uint64_t block[5])``; the block holds execveat's arguments.
#: The child borrows our memory and our stack (CLONE_VM and CLONE_VFORK) and therefore uses neither: registers only.
#: It ends with exec, or with exit status errno.
SPAWN_SOURCE: Final = f"""\
        .text
        mov     x9, x2
        mov     x8, {SYS.clone3:d}
        svc     0
        cbz     x0, 1f
        ret
1:      ldp     x0, x1, [x9]
        ldp     x2, x3, [x9, 16]
        ldr     x4, [x9, 32]
        mov     x8, {SYS.execveat:d}
        svc     0
        neg     w0, w0
        mov     x8, {SYS.exit_group:d}
        svc     0
"""

#: Waits for the end of the tool, by a pidfd, then exits: no stub is left behind even if the tool dies before it traces
#: the stub. The first eight bytes behind the branch are a struct pollfd, put on the stack.
STUB_SOURCE: Final = f"""\
        .text
        ldr     x9, 3f
        str     x9, [sp, -16]!
1:      mov     x0, sp
        mov     x1, 1
        mov     x2, 0
        mov     x3, 0
        mov     x4, 8
        mov     x8, {SYS.ppoll:d}
        svc     0
        cmp     x0, 1                   // not after EINTR
        b.ne    1b
        mov     x0, 0
        mov     x8, {SYS.exit_group:d}
        svc     0
        .balign 8
3:      .quad   0x1122334455667788
"""

SPAWN: Final = bytes.fromhex(
    "e90302aa683680d2010000d4400000b4c0035fd6200540a9220d41a9241140f9282380d2010000d4e003004bc80b80d2010000d4"
)
STUB: Final = bytes.fromhex(
    "c9010058e90f1ff8e0030091210080d2020080d2030080d2040180d2280980d2010000d41f0400f1"
    "01ffff54000080d2c80b80d2010000d48877665544332211"
)

_POLLFD_OFFSET: Final = len(STUB) - POLLFD.size


def stub_elf(base: int, pidfd: int) -> bytes:
    """The stub as a static ELF file that is mapped, as one page, at ``base``.

    pidfd  number, in the stub, of the pidfd whose process it waits for
    """
    return waiting_elf(EM_AARCH64, STUB, _POLLFD_OFFSET, base, pidfd)
