"""The program that a rebuilt process starts as, and the machine code that starts it, x86-64.

Source: execveat(2), clone3(2), elf(5).
"""

from __future__ import annotations

from typing import Final

from checkpoint.arch.elf import EM_X86_64, waiting_elf
from tcpstate.kernel.machine import SYS

__all__ = ["SPAWN", "SPAWN_SOURCE", "STUB", "STUB_SOURCE", "USER_END", "stub_elf"]

#: the first address that user space cannot have (TASK_SIZE with four-level page tables)
USER_END: Final = 0x7FFF_FFFF_F000

#: ``long spawn(struct clone_args *, size_t, uint64_t block[5])``; the block holds execveat's arguments.
#: The child borrows our memory and our stack (CLONE_VM and CLONE_VFORK) and therefore uses neither: registers only.
#: It ends with exec, or with exit status errno.
SPAWN_SOURCE: Final = f"""\
        .intel_syntax noprefix
        .text
        push    r12
        mov     r12, rdx
        mov     eax, {SYS.clone3:d}
        syscall
        test    rax, rax
        jz      1f
        pop     r12
        ret
1:      mov     rdi, [r12]
        mov     rsi, [r12 + 8]
        mov     rdx, [r12 + 16]
        mov     r10, [r12 + 24]
        mov     r8, [r12 + 32]
        mov     eax, {SYS.execveat:d}
        syscall
        mov     edi, eax
        neg     edi
        mov     eax, {SYS.exit_group:d}
        syscall
"""

#: Waits for the end of the tool, by a pidfd, then exits: no stub is left behind even if the tool dies before it traces
#: the stub. The eight bytes after the first two instruction bytes are a struct pollfd.
STUB_SOURCE: Final = f"""\
        .intel_syntax noprefix
        .text
        movabs  rax, 0x1122334455667788
        push    rax
1:      mov     eax, {SYS.poll:d}
        mov     rdi, rsp
        mov     esi, 1
        mov     edx, -1
        syscall
        cmp     eax, 1                  # not after EINTR
        jne     1b
        xor     edi, edi
        mov     eax, {SYS.exit_group:d}
        syscall
"""

SPAWN: Final = bytes.fromhex(
    "41544989d4b8b30100000f054885c07403415cc3498b3c24498b742408498b5424104d8b5424184d"
    "8b442420b8420100000f0589c7f7dfb8e70000000f05"
)
STUB: Final = bytes.fromhex(
    "48b8887766554433221150b8070000004889e7be01000000baffffffff0f0583f80175e731ffb8e70000000f05"
)

_POLLFD_OFFSET: Final = 2


def stub_elf(base: int, pidfd: int) -> bytes:
    """The stub as a static ELF file that is mapped, as one page, at ``base``.

    pidfd  number, in the stub, of the pidfd whose process it waits for
    """
    return waiting_elf(EM_X86_64, STUB, _POLLFD_OFFSET, base, pidfd)
