"""What the functions of another kernel's vdso are replaced by, x86-64: a jump to this kernel's, or a system call.

Source: arch/x86/entry/vdso/vdso.lds.S (the names), arch/x86/include/asm/vdso/gettimeofday.h and getrandom.h (what each
does where it has no faster way).
"""

from __future__ import annotations

import struct
from typing import Final

from tcpstate.kernel.machine import SYS

__all__ = ["vdso_call", "vdso_jump", "vdso_stays"]

_PREFIX: Final = "__vdso_"
#: jmp [rip + 0], and the address
_JUMP: Final = struct.Struct("<6sQ")
_JUMP_CODE: Final = bytes.fromhex("ff2500000000")
#: mov eax, number; syscall; ret
_CALL: Final = struct.Struct("<Bi3s")
_MOV_EAX, _SYSCALL_RET = 0xB8, bytes.fromhex("0f05c3")
#: mov rax, -ENOSYS; ret
_ENOSYS: Final = bytes.fromhex("48c7c0daffffff c3")
#: cmp r8, -1; jne behind _ENOSYS.  With such a size getrandom's function is asked what state it wants, which is nothing
#: that the system call answers.
_UNLESS_ASKED: Final = bytes.fromhex("4983f8ff 7508")
_CALLS: Final = {
    "clock_gettime": SYS.clock_gettime,
    "clock_getres": SYS.clock_getres,
    "gettimeofday": SYS.gettimeofday,
    "time": SYS.time,
    "getcpu": SYS.getcpu,
    "getrandom": SYS.getrandom,
}


def vdso_jump(to: int) -> bytes:
    """Code that goes on at an address; it changes no register."""
    return _JUMP.pack(_JUMP_CODE, to)


def vdso_call(name: str) -> bytes:
    """Code that does by a system call what the function does, or answers ENOSYS where there is no such call."""
    number = _CALLS.get(name.removeprefix(_PREFIX))
    if number is None:
        return _ENOSYS
    call = _CALL.pack(_MOV_EAX, number, _SYSCALL_RET)
    return _UNLESS_ASKED + _ENOSYS + call if number == SYS.getrandom else call


def vdso_stays(name: str) -> bool:
    """Whether a function needs nothing of the kernel's data, and stays as it is."""
    return False
