"""Classic BPF as seccomp uses it: what would a filter say to a call?

Only the instructions that seccomp_check_filter admits are known here; a program comes from the kernel, which has
checked it.

Source: include/uapi/linux/bpf_common.h, filter.h, seccomp.h; net/core/filter.c, kernel/seccomp.c.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from typing import Final

__all__ = ["Verdict", "evaluate", "run", "seccomp_data"]

_INSTRUCTION = struct.Struct("<HBBI")
_DATA = struct.Struct("<iIQ6Q")
_WORD = struct.Struct("<I")
_U32: Final = 0xFFFFFFFF
_SCRATCH_WORDS: Final = 16


class Op(enum.IntEnum):
    """Instruction codes: class, size, mode and source together."""

    LD_W_ABS = 0x20
    LD_W_LEN = 0x80
    LDX_W_LEN = 0x81
    LD_IMM = 0x00
    LDX_IMM = 0x01
    LD_MEM = 0x60
    LDX_MEM = 0x61
    ST = 0x02
    STX = 0x03
    ADD_K = 0x04
    ADD_X = 0x0C
    SUB_K = 0x14
    SUB_X = 0x1C
    MUL_K = 0x24
    MUL_X = 0x2C
    DIV_K = 0x34
    DIV_X = 0x3C
    OR_K = 0x44
    OR_X = 0x4C
    AND_K = 0x54
    AND_X = 0x5C
    LSH_K = 0x64
    LSH_X = 0x6C
    RSH_K = 0x74
    RSH_X = 0x7C
    NEG = 0x84
    XOR_K = 0xA4
    XOR_X = 0xAC
    JA = 0x05
    JEQ_K = 0x15
    JEQ_X = 0x1D
    JGT_K = 0x25
    JGT_X = 0x2D
    JGE_K = 0x35
    JGE_X = 0x3D
    JSET_K = 0x45
    JSET_X = 0x4D
    RET_K = 0x06
    RET_A = 0x16
    TAX = 0x07
    TXA = 0x87


class Verdict(enum.IntEnum):
    """SECCOMP_RET_*: what a filter decides. As signed numbers: of several filters the least decides."""

    KILL_PROCESS = -0x80000000
    KILL_THREAD = 0x00000000
    TRAP = 0x00030000
    ERRNO = 0x00050000
    USER_NOTIF = 0x7FC00000
    TRACE = 0x7FF00000
    LOG = 0x7FFC0000
    ALLOW = 0x7FFF0000


_ACTION_MASK: Final = 0xFFFF0000
_SOURCE_X: Final = 0x08


def seccomp_data(nr: int, arch: int, ip: int, args: Iterable[int]) -> bytes:
    """struct seccomp_data: what a filter sees of a call (``arch``: AUDIT_ARCH_*)."""
    values = [value & ((1 << 64) - 1) for value in args]
    return _DATA.pack(nr, arch, ip, *values, *[0] * (6 - len(values)))


def _arithmetic(op: int, a: int, operand: int) -> int:
    """One arithmetic instruction on 32-bit numbers. ZeroDivisionError: the kernel ends the program with 0 then."""
    match op:
        case Op.ADD_K:
            return a + operand
        case Op.SUB_K:
            return a - operand
        case Op.MUL_K:
            return a * operand
        case Op.DIV_K:
            return a // operand
        case Op.OR_K:
            return a | operand
        case Op.AND_K:
            return a & operand
        case Op.LSH_K:
            return a << (operand & 31)
        case Op.RSH_K:
            return a >> (operand & 31)
        case Op.XOR_K:
            return a ^ operand
    raise ValueError(f"no instruction of seccomp: {op:#x}")


def _jump(op: int, a: int, operand: int) -> bool:
    match op:
        case Op.JEQ_K:
            return a == operand
        case Op.JGT_K:
            return a > operand
        case Op.JGE_K:
            return a >= operand
        case Op.JSET_K:
            return bool(a & operand)
    raise ValueError(f"no instruction of seccomp: {op:#x}")


def run(program: bytes, data: bytes) -> int:
    """What a program returns for ``data`` (struct seccomp_data). ValueError if it is none that seccomp admits."""
    code = list(_INSTRUCTION.iter_unpack(program))
    scratch = [0] * _SCRATCH_WORDS
    a = x = here = 0
    while here < len(code):
        op, if_true, if_false, k = code[here]
        here += 1
        operand = x if op & _SOURCE_X else k
        match op:
            case Op.RET_K:
                return int(k)
            case Op.RET_A:
                return a
            case Op.LD_W_ABS:
                if k % _WORD.size or k > len(data) - _WORD.size:
                    raise ValueError(f"a load at {k}")
                (a,) = _WORD.unpack_from(data, k)
            case Op.LD_IMM:
                a = k
            case Op.LDX_IMM:
                x = k
            case Op.LD_W_LEN:
                a = len(data)
            case Op.LDX_W_LEN:
                x = len(data)
            case Op.LD_MEM:
                a = scratch[k]
            case Op.LDX_MEM:
                x = scratch[k]
            case Op.ST:
                scratch[k] = a
            case Op.STX:
                scratch[k] = x
            case Op.TAX:
                x = a
            case Op.TXA:
                a = x
            case Op.NEG:
                a = -a & _U32
            case Op.JA:
                here += k
            case Op.JEQ_K | Op.JEQ_X | Op.JGT_K | Op.JGT_X | Op.JGE_K | Op.JGE_X | Op.JSET_K | Op.JSET_X:
                here += if_true if _jump(op & ~_SOURCE_X, a, operand) else if_false
            case _:
                if operand == 0 and op & ~_SOURCE_X == Op.DIV_K:
                    return 0
                a = _arithmetic(op & ~_SOURCE_X, a, operand) & _U32
    raise ValueError("the program does not end with a return")


def evaluate(programs: Iterable[bytes], data: bytes) -> int:
    """The action (a :class:`Verdict`, or a number that no kernel knows) on which all filters of a thread agree."""
    worst = int(Verdict.ALLOW)
    for program in programs:
        action = run(program, data) & _ACTION_MASK
        worst = min(worst, action - (1 << 32) if action >> 31 else action)
    return worst
