"""The registers of aarch64 beside the general ones: the TLS pointer, FP, SVE, and the keys of pointer authentication.

ptrace has a register set for each.  Here they are one area: of each set its number and length (32 bits each), and its
bytes.  Where the CPU has SVE its set takes the place of NT_PRFPREG, and has the same registers in it as long as a
thread has no more in them than FP knows.  A system call ends the life of more, so calls made inside a thread would lose
it; :func:`fleeting` has it then.

A signal's frame describes its own records, so it is right on every CPU that has what is in them.

Streaming mode and the matrix register of SME are refused.

Source: include/uapi/linux/elf.h; arch/arm64/include/uapi/asm/ptrace.h, sigcontext.h; Documentation/arch/arm64/sve.rst,
sme.rst.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Iterable
from typing import Final

from checkpoint.errors import ExtendedStateForeign, MatrixInUse
from checkpoint.kernel import ptrace
from tcpstate.slotted import dataclass

__all__ = [
    "Component",
    "Frame",
    "convert_frame",
    "convert_xstate",
    "fleeting",
    "fp_of",
    "get_extended",
    "same_layout",
    "set_extended",
    "signal_frames",
    "xstate_layout",
]


class _Set(enum.IntEnum):
    """NT_*: which register set."""

    FP = 2  # NT_PRFPREG: struct user_fpsimd_state
    TLS = 0x401  # TPIDR_EL0, and TPIDR2_EL0 where there is SME
    SVE = 0x405
    PAC_KEYS = 0x407  # NT_ARM_PACA_KEYS; with CONFIG_CHECKPOINT_RESTORE, as the next
    PACG_KEYS = 0x408
    TAGGED_ADDRESSES = 0x409  # NT_ARM_TAGGED_ADDR_CTRL: of prctl(2)
    ENABLED_KEYS = 0x40A  # NT_ARM_PAC_ENABLED_KEYS


#: with which names a refusal calls them
_NAMES: Final = {
    _Set.SVE: "SVE",
    _Set.PAC_KEYS: "keys of pointer authentication",
    _Set.PACG_KEYS: "keys of pointer authentication",
    _Set.ENABLED_KEYS: "keys of pointer authentication",
    _Set.TAGGED_ADDRESSES: "tagged addresses",
}
#: NT_ARM_SSVE and NT_ARM_ZA: with nothing in them but the head as long as they are not in use
_MATRIX: Final = {0x40B: "streaming mode", 0x40C: "the matrix register"}
_HEAD = struct.Struct("<II")
#: struct user_sve_header: size, max_size, vl, max_vl, flags, reserved; that of NT_ARM_ZA is the same
_SVE_HEAD = struct.Struct("<IIHHHH")
_SVE_WHOLE: Final = 1  # SVE_PT_REGS_SVE
_FP_SIZE: Final = 528  # struct user_fpsimd_state
_VL_UNIT: Final = 16  # bytes of which every vector length is a multiple
_LONGEST: Final = 8192  # SVE_VL_MAX
#: what this machine, or its kernel, does not have: EINVAL, ENODEV; ENOENT where PAC keys are another mode's
_ABSENT: Final = (errno.EINVAL, errno.ENODEV, errno.ENOENT)

#: struct fpsimd_context: FPSIMD_MAGIC and its size
_FP_RECORD: Final = struct.pack("<II", 0x46508001, 528)
#: bytes from struct sigcontext to its records, and where in it are sp and pc
_RECORDS_AT: Final = 288
_SP_PC = struct.Struct("<QQ")
_SP_AT: Final = 256


@dataclass(frozen=True, slots=True)
class Component:
    """A part of an area at a fixed place: areas of this machine have none."""

    number: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Frame:
    """What the kernel has put on a stack before a signal handler began.

    ip, sp      where the handler returns to
    area, size  where its record of the FP registers is
    """

    ip: int
    sp: int
    area: int
    size: int


def xstate_layout() -> tuple[Component, ...]:
    """None: an area describes itself."""
    return ()


def _get(tid: int, number: int, size: int | None = None) -> bytes | None:
    """A register set, or its first bytes; None if this machine has none."""
    try:
        return ptrace.get_register_set(tid, number) if size is None else ptrace.get_register_set(tid, number, size)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        return None


def get_extended(tid: int) -> bytes:
    """The area of a stopped thread. MatrixInUse."""
    _require_no_matrix(tid)
    found = {one: data for one in _Set if (data := _get(tid, one)) is not None}
    if (sve := found.get(_Set.SVE)) is not None:
        found[_Set.SVE] = sve[: _SVE_HEAD.unpack_from(sve)[0]]  # behind that some kernels tell zeros
        del found[_Set.FP]
    return b"".join(_HEAD.pack(one, len(data)) + data for one, data in found.items())


def set_extended(tid: int, area: bytes) -> None:
    """Give a stopped thread an area of :func:`get_extended`, or of :func:`convert_xstate`. OSError."""
    for one, data in _unpack(area).items():
        if _get(tid, one) != data:
            ptrace.set_register_set(tid, one, data)


def fleeting(tid: int) -> bytes | None:
    """The area of a stopped thread if a call made in it would lose some of that. MatrixInUse."""
    head = _get(tid, _Set.SVE, _SVE_HEAD.size)
    if head is not None and _is_whole(head):
        return get_extended(tid)
    _require_no_matrix(tid)
    return None


def _require_no_matrix(tid: int) -> None:
    for number, name in _MATRIX.items():
        head = _get(tid, number, _SVE_HEAD.size)
        if head is not None and _SVE_HEAD.unpack(head)[0] > _SVE_HEAD.size:
            raise MatrixInUse(f"{name} of SME is in use", object=f"tid {tid}")


def _is_whole(sve: bytes) -> bool:
    return bool(_SVE_HEAD.unpack_from(sve)[4] & _SVE_WHOLE)


def fp_of(area: bytes) -> bytes:
    """The struct user_fpsimd_state in it, or what it has in common with it."""
    sets = _unpack(area)
    if _Set.FP in sets:
        return sets[_Set.FP]
    sve = sets[_Set.SVE]
    if not _is_whole(sve):
        return sve[_SVE_HEAD.size :][:_FP_SIZE]
    vl = _SVE_HEAD.unpack_from(sve)[2]
    # Z registers first, the low 128 bits of which are V; then P registers and FFR; FPSR and FPCR at the next 16 bytes
    low = b"".join(sve[_SVE_HEAD.size + number * vl :][:16] for number in range(32))
    return low + sve[_status_at(vl) :][:8] + bytes(8)


def _status_at(vl: int) -> int:
    """Where FPSR and FPCR are in a whole SVE set."""
    behind = _SVE_HEAD.size + 32 * vl + 17 * vl // 8
    return behind + -behind % 16


def _unpack(area: bytes) -> dict[_Set, bytes]:
    """ExtendedStateForeign if it is malformed, or has what nobody knows."""
    found: dict[_Set, bytes] = {}
    at = 0
    try:
        while at < len(area):
            number, size = _HEAD.unpack_from(area, at)
            at += _HEAD.size
            found[_Set(number)] = area[at : at + size]
            at += size
    except (struct.error, ValueError) as error:
        raise ExtendedStateForeign(f"the area of extended registers is malformed: {error}") from error
    if at != len(area) or (_Set.FP in found) == (_Set.SVE in found) or _Set.TLS not in found:
        raise ExtendedStateForeign("the area of extended registers is not complete")
    if _Set.FP in found and len(found[_Set.FP]) != _FP_SIZE:
        raise ExtendedStateForeign(f"FP registers of {len(found[_Set.FP])} bytes")
    if _Set.SVE in found:
        _require_sve(found[_Set.SVE])
    return found


def _require_sve(sve: bytes) -> None:
    if len(sve) < _SVE_HEAD.size:
        raise ExtendedStateForeign("the SVE registers are malformed")
    size, _, vl, *_ = _SVE_HEAD.unpack_from(sve)
    least = _status_at(vl) + 8 if _is_whole(sve) else _SVE_HEAD.size + _FP_SIZE
    if size != len(sve) or not 0 < vl <= _LONGEST or vl % _VL_UNIT or size < least:
        raise ExtendedStateForeign("the SVE registers are malformed")


def same_layout(area: bytes, layout: Iterable[Component], own: bytes) -> bool:
    """Whether signal frames of the other CPU are right on this one: they describe themselves."""
    return True


def convert_xstate(area: bytes, layout: Iterable[Component], own: bytes) -> bytes:
    """The area of another CPU as this one takes it. ``own``: that of a thread here.

    ExtendedStateForeign if something is in use that this CPU does not have, or if the area is malformed.
    """
    theirs, ours = _unpack(area), _unpack(own)
    if _Set.SVE in theirs and _Set.SVE not in ours and not _is_whole(theirs[_Set.SVE]):
        theirs = {_Set.FP: fp_of(area), **{one: data for one, data in theirs.items() if one is not _Set.SVE}}
    if _Set.FP in theirs and _Set.FP not in ours:
        ours = {**ours, _Set.FP: b""}  # a kernel with SVE takes the plain set, too
    lost = [_NAMES.get(one, one.name) for one, data in theirs.items() if one not in ours and any(data)]
    if _Set.SVE in theirs and _Set.SVE in ours:
        vl, longest = _SVE_HEAD.unpack_from(theirs[_Set.SVE])[2], _SVE_HEAD.unpack_from(ours[_Set.SVE])[3]
        if vl > longest:
            lost.append(f"SVE vectors of {vl} bytes (this CPU has {longest})")
    if any(theirs[_Set.TLS][len(ours[_Set.TLS]) :]):
        lost.append("TPIDR2")
    if lost:
        raise ExtendedStateForeign(f"registers are in use that this CPU does not have: {', '.join(sorted(set(lost)))}")
    return b"".join(_HEAD.pack(one, len(data)) + data for one, data in theirs.items() if one in ours)


def signal_frames(stack: bytes, start: int) -> list[Frame]:
    """The frames of signal handlers in ``stack``, which begins at the address ``start``."""
    found = []
    at = stack.find(_FP_RECORD)
    while at >= 0:
        context = at - _RECORDS_AT
        if context >= 0:
            sp, pc = _SP_PC.unpack_from(stack, context + _SP_AT)
            found.append(Frame(pc, sp, start + at, _FP_SIZE))
        at = stack.find(_FP_RECORD, at + 1)
    return found


def convert_frame(data: bytes, layout: Iterable[Component], own: bytes) -> bytes:
    """A record of the FP registers in a signal's frame as this CPU takes it: as it is, on every one."""
    return data
