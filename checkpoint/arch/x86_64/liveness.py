"""Whether a program still wants a register after a system call: read off its code.

The kernel gives all registers back as they were but for rax, rcx and r11, and compilers count on it: whoever begins a
call again with another argument must know that nobody looks at the register afterwards.  The code after the call is
followed along all its paths until each has overwritten the register, has returned from the function (r10, rdx and r8
are a callee's to spoil: System V ABI AMD64, 3.2.1) or can go no further.  What is not understood counts as a use.

Source: Intel SDM 2, chapter 2 and appendix A.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tcpstate.slotted import dataclass

__all__ = ["unused"]

#: instructions looked at, of all paths
_MOST: Final = 200
_LONGEST: Final = 15  # bytes of an instruction
_PAGE: Final = 4096
_RSP, _RDX = 4, 2

Read = Callable[[int, int], bytes]


class _UnknownError(Exception):
    """An instruction that is not understood, or not there."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What one instruction does with the register, and where it goes on; ``spoils``: it is overwritten whole."""

    uses: bool
    spoils: bool
    following: tuple[int, ...]


def unused(read: Read, ip: int, register: int) -> bool:
    """Whether nothing reads a register (by its number in instructions) that is not overwritten first.

    read  (address, size) -> bytes of code; OSError where there are none
    ip    the instruction after the call
    """
    todo, seen = [ip], set[int]()
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        if len(seen) == _MOST:
            return False
        seen.add(at)
        try:
            step = _Decoder(_code(read, at), at, register).step()
        except _UnknownError:
            return False
        if step.uses:
            return False
        if not step.spoils:
            todo += step.following
    return True


def _code(read: Read, at: int) -> bytes:
    for size in (_LONGEST, min(_LONGEST, _PAGE - at % _PAGE)):
        try:
            return read(at, size)
        except OSError:
            continue  # the page after it is not there; or it is not
    raise _UnknownError


class _Decoder:
    """One instruction in 64-bit mode."""

    def __init__(self, code: bytes, at: int, register: int) -> None:
        self._code, self._at, self._register = code, at, register
        self._next = 0
        self._rex = 0
        self._small = False  # an operand-size prefix: 16 bits

    def _byte(self) -> int:
        if self._next >= len(self._code):
            raise _UnknownError
        self._next += 1
        return self._code[self._next - 1]

    def _number(self, size: int) -> int:
        if self._next + size > len(self._code):
            raise _UnknownError
        self._next += size
        return int.from_bytes(self._code[self._next - size : self._next], "little", signed=True)

    def _on(self, uses: bool = False, spoils: bool = False) -> _Step:
        return _Step(uses, spoils, (self._at + self._next,))

    def _to(self, distance: int, *, also_on: bool) -> _Step:
        here = self._at + self._next
        return _Step(False, False, (here + distance, here) if also_on else (here + distance,))

    def step(self) -> _Step:
        """Read it. _UnknownError."""
        op = self._byte()
        while op in (0x66, 0xF0, 0xF2, 0xF3, 0x2E, 0x3E, 0x64, 0x65):
            self._small |= op == 0x66
            op = self._byte()
        if op & 0xF0 == 0x40:
            self._rex = op
            op = self._byte()
        return self._two_bytes(self._byte()) if op == 0x0F else self._one_byte(op)

    # -- operands

    def _operands(self, immediate: int = 0) -> tuple[int, int | None, bool]:
        """(the register operand, the other one or None if it is memory, whether its address uses our register)."""
        modrm = self._byte()
        reg, rm, mod = (modrm >> 3 & 7) | (self._rex & 4) << 1, modrm & 7, modrm >> 6
        if mod == 3:
            self._number(immediate)
            return reg, rm | (self._rex & 1) << 3, False
        inside: set[int] = set()
        if rm == _RSP:
            sib = self._byte()
            index, base = (sib >> 3 & 7) | (self._rex & 2) << 2, sib & 7
            if index != _RSP:
                inside.add(index)
            if base == 5 and mod == 0:
                self._number(4)
            else:
                inside.add(base | (self._rex & 1) << 3)
        elif rm == 5 and mod == 0:
            self._number(4)  # relative to the instruction
        else:
            inside.add(rm | (self._rex & 1) << 3)
        self._number({0: 0, 1: 1, 2: 4}[mod])
        self._number(immediate)
        return reg, None, self._register in inside

    def _same(self, operand: int | None, size: int = 4) -> bool:
        """Whether an operand is our register, or a part of it."""
        if operand is not None and size == 1 and not self._rex and 4 <= operand < 8:
            operand -= 4  # ah, ch, dh, bh
        return operand == self._register

    def _reading(self, size: int = 4, immediate: int = 0) -> _Step:
        """Both operands are read, or read and written."""
        reg, other, inside = self._operands(immediate)
        return self._on(uses=inside or self._same(reg, size) or self._same(other, size))

    def _one_operand(self, immediate: int, size: int = 4) -> _Step:
        """The other bits of the byte are part of the instruction."""
        _, other, inside = self._operands(immediate)
        return self._on(uses=inside or self._same(other, size))

    def _loading(self, size: int = 4, immediate: int = 0) -> _Step:
        """The register operand becomes something else, whole."""
        reg, other, inside = self._operands(immediate)
        if inside or self._same(other, size) or (self._small and self._same(reg)):
            return self._on(uses=True)
        return self._on(spoils=self._same(reg))

    # -- instructions

    def _one_byte(self, op: int) -> _Step:
        low = op & 7 | (self._rex & 1) << 3
        wide = 2 if self._small else 4
        if op < 0x40 and op & 7 < 6:
            return self._arithmetic(op, wide)
        if op & 0xF0 in (0x50, 0x70, 0xB0):
            return self._by_range(op, low)
        match op:
            case 0x84 | 0x86 | 0x88:
                return self._reading(size=1)
            case 0x85 | 0x87 | 0x89:
                return self._reading()
            case 0x63 | 0x8B | 0x8D:
                return self._loading()
            case 0x80 | 0xC0:
                return self._one_operand(1, size=1)
            case 0x83 | 0xC1:
                return self._one_operand(1)
            case 0x81:
                return self._one_operand(wide)
            case 0xD1 | 0xD3:
                return self._one_operand(0)
            case 0xC6:
                return self._one_operand(1, size=1)
            case 0xC7:
                _, other, inside = self._operands(wide)
                return self._on(uses=inside or (self._small and self._same(other)), spoils=self._same(other))
            case 0xF6 | 0xF7 | 0xFE | 0xFF:
                return self._group(op, wide)
            case 0x90 | 0x98 | 0xC9:
                return self._on()
            case 0xA8:
                self._number(1)
                return self._on()
            case 0xA9 | 0x68:
                self._number(wide)
                return self._on()
            case 0x6A:
                self._number(1)
                return self._on()
            case 0xC3 | 0xC2:
                return _Step(False, False, ())
            case 0xE8:
                return self._to(self._number(4), also_on=True)
            case 0xE9:
                return self._to(self._number(4), also_on=False)
            case 0xEB:
                return self._to(self._number(1), also_on=False)
        raise _UnknownError

    def _by_range(self, op: int, low: int) -> _Step:
        if op & 0xF0 == 0x70:
            return self._to(self._number(1), also_on=True)
        if op & 0xF8 == 0x50:
            return self._on(uses=low == self._register)
        if op & 0xF8 == 0x58:
            return self._on(spoils=low == self._register)
        if op & 0xF8 == 0xB0:
            self._number(1)
            return self._on(uses=self._same(low, 1))
        self._number(8 if self._rex & 8 else 2 if self._small else 4)
        return self._on(uses=self._small and low == self._register, spoils=low == self._register)

    def _arithmetic(self, op: int, wide: int) -> _Step:
        if op & 7 in (4, 5):  # al or eax, and a number
            self._number(1 if op & 7 == 4 else wide)
            return self._on()
        if op & ~3 == 0x30 and not self._small:
            before = self._next
            reg, other, _ = self._operands()
            if reg == other and op & 1:
                return self._on(spoils=reg == self._register)  # xor with itself
            self._next = before
        return self._reading(size=4 if op & 1 else 1)

    def _group(self, op: int, wide: int) -> _Step:
        kind = self._code[self._next] >> 3 & 7 if self._next < len(self._code) else 0
        if op in (0xF6, 0xF7):
            if kind > 3 and self._register == _RDX:
                return self._on(uses=True)  # multiplication and division
            return self._one_operand((1 if op == 0xF6 else wide) if kind < 2 else 0, size=1 if op == 0xF6 else 4)
        if kind > 1 and not (op == 0xFF and kind == 6):
            raise _UnknownError  # a jump to who knows where
        return self._one_operand(0, size=1 if op == 0xFE else 4)

    def _two_bytes(self, op: int) -> _Step:
        if op & 0xF0 == 0x80:
            return self._to(self._number(4), also_on=True)
        if op & 0xF0 == 0x40:
            return self._reading()  # a conditional move overwrites, or does not
        if op & 0xF0 == 0x90:
            return self._one_operand(0, size=1)
        match op:
            case 0x0B:
                return _Step(False, False, ())  # ud2
            case 0x1E | 0x1F | 0x10 | 0x11 | 0x28 | 0x29 | 0x57 | 0x6F | 0x7F | 0xEF | 0xD6:
                # nothing at all, endbr64; or vector registers: what looks like a general one is none
                _, _, inside = self._operands()
                return self._on(uses=inside)
            case 0xB6 | 0xBE:
                return self._loading(size=1)
            case 0xB7 | 0xBF:
                return self._loading()
            case 0xAF | 0xB1 | 0xC1:
                return self._reading()
        raise _UnknownError
