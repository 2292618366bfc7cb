"""What the functions of another kernel's vdso are replaced by, aarch64: a jump to this kernel's, or a system call.

Source: arch/arm64/kernel/vdso/vdso.lds.S (the names); the procedure call standard leaves x16 to such code.
"""

from __future__ import annotations

import struct
from typing import Final

from tcpstate.kernel.machine.aarch64 import SYS

__all__ = ["vdso_call", "vdso_jump", "vdso_stays"]

_PREFIX: Final = "__kernel_"
#: ldr x16, 8; br x16; and the address
_JUMP: Final = struct.Struct("<IIQ")
_LDR_X16, _BR_X16 = 0x58000050, 0xD61F0200
#: mov x8, number; svc 0; ret
_CALL: Final = struct.Struct("<III")
_MOVZ_X8, _SVC, _RET = 0xD2800008, 0xD4000001, 0xD65F03C0
_ENOSYS: Final = struct.pack("<II", 0x928004A0, _RET)  # mov x0, -38
#: cmn x4, 1; b.ne behind _ENOSYS: with such a size getrandom's function is asked what state it wants
_UNLESS_ASKED: Final = struct.pack("<II", 0xB100049F, 0x54000061)
_CALLS: Final = {
    "clock_gettime": SYS.clock_gettime,
    "clock_getres": SYS.clock_getres,
    "gettimeofday": SYS.gettimeofday,
    "getrandom": SYS.getrandom,
}


def vdso_jump(to: int) -> bytes:
    """Code that goes on at an address; it changes no register that a caller counts on."""
    return _JUMP.pack(_LDR_X16, _BR_X16, to)


def vdso_call(name: str) -> bytes:
    """Code that does by a system call what the function does, or answers ENOSYS where there is no such call."""
    number = _CALLS.get(name.removeprefix(_PREFIX))
    if number is None:
        return _ENOSYS
    call = _CALL.pack(_MOVZ_X8 | number << 5, _SVC, _RET)
    return _UNLESS_ASKED + _ENOSYS + call if number == SYS.getrandom else call


def vdso_stays(name: str) -> bool:
    """Whether a function needs nothing of the kernel's data, and stays as it is: frames on stacks return to it."""
    return name == f"{_PREFIX}rt_sigreturn"
