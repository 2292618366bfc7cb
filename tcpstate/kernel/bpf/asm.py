"""An assembler for eBPF: the instructions that we use, with labels.

Source: include/uapi/linux/bpf.h, linux/bpf_common.h; Documentation/bpf/standardization/instruction-set.rst (RFC 9669).
Registers are plain numbers: 0 the result, 1..5 arguments, 6..9 kept over calls, 10 the frame (512 bytes below it).
"""

from __future__ import annotations

import enum
import struct
from typing import Final, Self

__all__ = ["FRAME", "Asm", "Helper", "Jump"]

_INSTRUCTION: Final = struct.Struct("=BBhi")
#: the register of the frame
FRAME: Final = 10

_LOAD: Final = {1: 0x71, 2: 0x69, 4: 0x61, 8: 0x79}
_STORE: Final = {1: 0x73, 2: 0x6B, 4: 0x63, 8: 0x7B}
_STORE_NUMBER: Final = {1: 0x72, 2: 0x6A, 4: 0x62, 8: 0x7A}
_MOV, _MOV_NUMBER = 0xBF, 0xB7
_ADD, _ADD_NUMBER, _SUB, _AND_NUMBER, _OR, _SHIFT_LEFT, _SHIFT_RIGHT = 0x0F, 0x07, 0x1F, 0x57, 0x4F, 0x67, 0x77
_TO_BIG_ENDIAN = 0xDC
_JUMP_ALWAYS, _CALL, _EXIT = 0x05, 0x85, 0x95
_MAY_GOTO = 0xE5
_BY_REGISTER = 0x08
_LOAD_WIDE = 0x18
_PSEUDO_MAP_FD, _PSEUDO_MAP_VALUE, _PSEUDO_KFUNC = 1, 2, 2


class Jump(enum.IntEnum):
    """Conditions of a jump; unsigned, 64 bits wide."""

    EQUAL = 0x15
    NOT_EQUAL = 0x55
    GREATER = 0x25
    SET = 0x45  # any of these bits
    EQUAL_32 = 0x16
    NOT_EQUAL_32 = 0x56


class Helper(enum.IntEnum):
    """Helpers of the kernel that we call (uapi linux/bpf.h, ___BPF_FUNC_MAPPER)."""

    MAP_LOOKUP = 1
    MAP_UPDATE = 2
    MAP_DELETE = 3
    KTIME_GET_NS = 5
    SKB_STORE_BYTES = 9
    REDIRECT = 23
    SKB_LOAD_BYTES = 26
    GET_CURRENT_TASK = 35
    GET_SOCKET_COOKIE = 46
    SKB_ADJUST_ROOM = 50
    SKB_LOAD_BYTES_RELATIVE = 68
    SK_RELEASE = 86
    SKC_LOOKUP_TCP = 99
    PROBE_READ_KERNEL = 113
    JIFFIES64 = 118
    KTIME_GET_BOOT_NS = 125
    SEQ_WRITE = 127
    SKC_TO_TCP_SOCK = 137
    SKC_TO_TCP_REQUEST_SOCK = 139
    D_PATH = 147  # 5.10
    REDIRECT_NEIGH = 152
    SOCK_FROM_FILE = 162
    TASK_PT_REGS = 175  # 5.15
    MAP_LOOKUP_PERCPU = 195  # 5.19


class Asm:
    """A program that grows by one method call per instruction; :meth:`code` resolves the labels."""

    def __init__(self) -> None:
        self._code: list[bytes] = []
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []

    def _add(self, op: int, to: int = 0, source: int = 0, offset: int = 0, number: int = 0) -> Self:
        # immediates are signed in the encoding
        signed = number - (1 << 32) if number > 0x7FFFFFFF else number
        self._code.append(_INSTRUCTION.pack(op, to | source << 4, offset, signed))
        return self

    def label(self, name: str) -> Self:
        """Here is ``name``. ValueError if it is somewhere already."""
        if name in self._labels:
            raise ValueError(f"label {name!r} stands twice")
        self._labels[name] = len(self._code)
        return self

    def mov(self, to: int, source: int) -> Self:
        """to = source"""
        return self._add(_MOV, to, source)

    def set(self, to: int, number: int) -> Self:
        """to = number (32 bits, sign-extended)"""
        return self._add(_MOV_NUMBER, to, number=number)

    def add(self, to: int, number: int) -> Self:
        """to += number"""
        return self._add(_ADD_NUMBER, to, number=number)

    def wide(self, to: int, number: int) -> Self:
        """to = number (64 bits)"""
        self._add(_LOAD_WIDE, to, number=number & 0xFFFFFFFF)
        return self._add(0, number=number >> 32)

    def mask(self, to: int, number: int) -> Self:
        """to &= number"""
        return self._add(_AND_NUMBER, to, number=number)

    def shift_left(self, to: int, bits: int) -> Self:
        """to <<= bits"""
        return self._add(_SHIFT_LEFT, to, number=bits)

    def shift_right(self, to: int, bits: int) -> Self:
        """to >>= bits"""
        return self._add(_SHIFT_RIGHT, to, number=bits)

    def shift_right_by(self, to: int, bits: int) -> Self:
        """to >>= the number in the register ``bits``"""
        return self._add(_SHIFT_RIGHT | _BY_REGISTER, to, bits)

    def add_register(self, to: int, other: int) -> Self:
        """to += the register ``other``"""
        return self._add(_ADD, to, other)

    def subtract_register(self, to: int, other: int) -> Self:
        """to -= the register ``other``"""
        return self._add(_SUB, to, other)

    def either(self, to: int, other: int) -> Self:
        """to |= the register ``other``"""
        return self._add(_OR, to, other)

    def big_endian(self, to: int, bits: int) -> Self:
        """Swap the lower ``bits`` between the machine's and the network's order."""
        return self._add(_TO_BIG_ENDIAN, to, number=bits)

    def load(self, size: int, to: int, base: int, offset: int) -> Self:
        """to = the ``size`` bytes at base + offset"""
        return self._add(_LOAD[size], to, base, offset)

    def store(self, size: int, base: int, offset: int, source: int) -> Self:
        """The ``size`` bytes at base + offset = source"""
        return self._add(_STORE[size], base, source, offset)

    def store_number(self, size: int, base: int, offset: int, number: int) -> Self:
        """The ``size`` bytes at base + offset = number"""
        return self._add(_STORE_NUMBER[size], base, 0, offset, number)

    def frame(self, to: int, offset: int) -> Self:
        """to = address of the frame's byte ``offset`` (negative)"""
        return self.mov(to, FRAME).add(to, offset)

    def jump(self, label: str) -> Self:
        """Go on at ``label``."""
        self._jumps.append((len(self._code), label))
        return self._add(_JUMP_ALWAYS)

    def once_more(self, otherwise: str) -> Self:
        """Inside a loop: go on, unless it has lasted too long (8 million times, or 250 ms); then at ``otherwise``.
        From 6.9."""
        self._jumps.append((len(self._code), otherwise))
        return self._add(_MAY_GOTO)

    def jump_if(self, condition: Jump, register: int, number: int, label: str) -> Self:
        """Go on at ``label`` if the register compares so with a number."""
        self._jumps.append((len(self._code), label))
        return self._add(condition, register, number=number)

    def jump_if_register(self, condition: Jump, register: int, other: int, label: str) -> Self:
        """Go on at ``label`` if the register compares so with another."""
        self._jumps.append((len(self._code), label))
        return self._add(condition | _BY_REGISTER, register, other)

    def map(self, to: int, fd: int) -> Self:
        """to = the map of this descriptor"""
        self._add(_LOAD_WIDE, to, _PSEUDO_MAP_FD, number=fd)
        return self._add(0)

    def map_value(self, to: int, fd: int, offset: int = 0) -> Self:
        """to = address inside the only value of an array map"""
        self._add(_LOAD_WIDE, to, _PSEUDO_MAP_VALUE, number=fd)
        return self._add(0, number=offset)

    def call(self, helper: Helper) -> Self:
        """Call a helper; 1..5 are its arguments and are gone afterwards."""
        return self._add(_CALL, number=helper)

    def call_kernel(self, function: int) -> Self:
        """Call a kernel function by its BTF id (a kfunc)."""
        return self._add(_CALL, 0, _PSEUDO_KFUNC, number=function)

    def exit(self, value: int | None = None) -> Self:
        """Return ``value``, or what register 0 holds."""
        if value is not None:
            self.set(0, value)
        return self._add(_EXIT)

    def code(self) -> bytes:
        """The program. ValueError for a jump to nowhere."""
        code = list(self._code)
        for at, name in self._jumps:
            if name not in self._labels:
                raise ValueError(f"there is no label {name!r}")
            one = code[at]
            code[at] = one[:2] + struct.pack("=h", self._labels[name] - at - 1) + one[4:]
        return b"".join(code)
