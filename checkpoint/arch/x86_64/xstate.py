"""The XSAVE area: FP, SSE, AVX and the other registers beside the general ones, from one CPU's layout to another's.

ptrace shows the area in its *standard* format: legacy region (512 bytes, with XCR0 in its software-reserved bytes),
header (64 bytes: which components are not in their initial state), then the components, each at the offset that
CPUID leaf 0xD of *this* CPU gives it.  PTRACE_SETREGSET takes an area of exactly the size that this CPU has, so an area
from another CPU is put together again component by component.

Signal frames on the stack have the same layout: a thread that is moved to a CPU with another layout while a handler
runs would return from it with wrong vector registers.  ``same_layout`` tells when that cannot happen; else
``signal_frames`` finds them, by the marks that the kernel checks, too, and ``convert_frame`` puts them right.

Source: Intel SDM volume 1, chapter 13; arch/x86/kernel/fpu/xstate.c, signal.c; arch/x86/include/uapi/asm/sigcontext.h.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from collections.abc import Iterable
from typing import Final

from checkpoint.errors import ExtendedStateForeign
from checkpoint.kernel import ptrace
from tcpstate.kernel.batch import libc
from tcpstate.slotted import dataclass

__all__ = [
    "Component",
    "Frame",
    "convert_frame",
    "convert_xstate",
    "fleeting",
    "get_extended",
    "same_layout",
    "set_extended",
    "signal_frames",
    "xstate_layout",
]

#: the register set that holds FP, SSE, AVX, ...: NT_X86_XSTATE of include/uapi/linux/elf.h
XSTATE_SET: Final = 0x202

_XCR0_OFFSET: Final = 464
_LEGACY_SIZE: Final = 512
_HEADER_SIZE: Final = 64
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")
#: the x87 and SSE registers, which are in the legacy region
_LEGACY_COMPONENTS: Final = 0b11
_FIRST_EXTENDED: Final = 2
_LAST_COMPONENT: Final = 62
_PKRU: Final = 9
#: what Linux gives every new thread: all keys but 0 deny access (init_pkru_value)
_PKRU_INIT: Final = 0x55555554
#: enum xfeature
_NAMES: Final = {
    2: "AVX",
    3: "MPX bounds",
    4: "MPX configuration",
    5: "AVX-512 masks",
    6: "AVX-512 (upper halves)",
    7: "AVX-512 (16 to 31)",
    9: "protection keys",
    17: "AMX configuration",
    18: "AMX tiles",
    19: "APX",
}
_LEAF: Final = 0xD
_ECX_SUPERVISOR: Final = 1  # ECX bit 0 of a component: a supervisor's, which ptrace does not show
_MOST_BYTES: Final = 64 * 1024

#: struct _fpx_sw_bytes, in the software-reserved bytes of a frame's area: FP_XSTATE_MAGIC1
_MAGIC: Final = (0x46505853).to_bytes(4, "little")
_MAGIC_END: Final = (0x46505845).to_bytes(4, "little")  # FP_XSTATE_MAGIC2, behind the area
_SOFTWARE = struct.Struct("<IIQI")  # magic1, extended_size, xfeatures, xstate_size
#: bytes of struct rt_sigframe up to uc.uc_mcontext, and in that struct sigcontext: sp, ip, cs, fpstate
_CONTEXT_AT: Final = 48
_CONTEXT = struct.Struct("<120x2Q8xH38xQ")
_USER_CS: Final = 0x33

#: void cpuid(u32 leaf, u32 subleaf, u32 out[4])
_CPUID_SOURCE: Final = """\
        .intel_syntax noprefix
        push    rbx
        mov     eax, edi
        mov     ecx, esi
        mov     r8, rdx
        cpuid
        mov     [r8], eax
        mov     [r8 + 4], ebx
        mov     [r8 + 8], ecx
        mov     [r8 + 12], edx
        pop     rbx
        ret
"""
_CPUID: Final = bytes.fromhex("5389f889f14989d00fa241890041895804418948084189500c5bc3")


@dataclass(frozen=True, slots=True)
class Component:
    """Where one component of the extended state lies in the area."""

    number: int
    offset: int
    size: int

    def __post_init__(self) -> None:
        if not _FIRST_EXTENDED <= self.number <= _LAST_COMPONENT:
            raise ValueError(f"there is no extended component {self.number}")
        if self.offset < _LEGACY_SIZE + _HEADER_SIZE or self.size <= 0 or self.end > _MOST_BYTES:
            raise ValueError(f"component {self.number} at {self.offset}, {self.size} bytes")

    @property
    def end(self) -> int:
        """Offset behind it."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class Frame:
    """What the kernel has put on a stack before a signal handler began.

    ip, sp      where the handler returns to
    area, size  where the vector registers are, with the mark behind them
    """

    ip: int
    sp: int
    area: int
    size: int


def get_extended(tid: int) -> bytes:
    """The area of a stopped thread."""
    return ptrace.get_register_set(tid, XSTATE_SET)


def set_extended(tid: int, area: bytes) -> None:
    """Replace the area of a stopped thread. OSError if this machine's format is another."""
    ptrace.set_register_set(tid, XSTATE_SET, area)


def fleeting(tid: int) -> bytes | None:
    """The area of a stopped thread if a call made in it would lose some of that: none does."""
    return None


@functools.cache
def xstate_layout() -> tuple[Component, ...]:
    """The components of this CPU that user programs have, beyond x87 and SSE.

    Empty where executable memory is refused to us: then only areas of exactly our own size and XCR0 are accepted.
    """
    memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(_CPUID)
    code = (ctypes.c_char * mmap.PAGESIZE).from_buffer(memory)
    # Never writable and executable at once: that is what security modules look for first.
    if libc.mprotect(ctypes.c_void_p(ctypes.addressof(code)), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
        return ()
    out = (ctypes.c_uint32 * 4)()
    cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(ctypes.addressof(code))
    cpuid(_LEAF, 0, ctypes.addressof(out))
    supported = out[0] | out[3] << 32
    found = []
    for number in range(_FIRST_EXTENDED, _LAST_COMPONENT + 1):
        if supported >> number & 1:
            cpuid(_LEAF, number, ctypes.addressof(out))
            if not out[2] & _ECX_SUPERVISOR:
                found.append(Component(number, out[1], out[0]))
    return tuple(found)


def same_layout(area: bytes, layout: Iterable[Component], own: bytes) -> bool:
    """Whether an area can be used here as it is: the CPUs agree on size, XCR0 and the place of each component."""
    return len(area) == len(own) and _xcr0(area) == _xcr0(own) and tuple(layout) == xstate_layout()


def convert_xstate(area: bytes, layout: Iterable[Component], own: bytes) -> bytes:
    """The area ``area`` of a CPU with that layout, as this CPU takes it.

    own  the area of a thread here, for its size and XCR0

    ExtendedStateForeign if a component is in use that this CPU, or this kernel, does not have, or if the area is
    malformed.
    """
    layout = tuple(layout)
    if same_layout(area, layout, own):
        return area
    if len(area) < _LEGACY_SIZE + _HEADER_SIZE or any(c.end > len(area) for c in layout if _in_use(area, c)):
        raise ExtendedStateForeign(f"an extended register area of {len(area)} bytes is shorter than its layout says")
    here = {component.number: component for component in xstate_layout()}
    out = bytearray(len(own))
    out[:_LEGACY_SIZE] = area[:_LEGACY_SIZE]
    xcr0 = _xcr0(own)
    _U64.pack_into(out, _XCR0_OFFSET, xcr0)
    used = _used(area) & _LEGACY_COMPONENTS
    known = {component.number for component in layout}
    lost = [n for n in range(_FIRST_EXTENDED, _LAST_COMPONENT + 1) if _used(area) >> n & 1 and n not in known]
    for source in layout:
        data = area[source.offset : source.end]
        if not _in_use(area, source) or (source.number != _PKRU and not any(data)):
            continue  # in its initial state, which some machines say by zeroes
        target = here.get(source.number)
        if target and target.size == source.size and xcr0 >> source.number & 1 and target.end <= len(out):
            out[target.offset : target.end] = data
            used |= 1 << source.number
        elif source.number != _PKRU or _U32.unpack_from(data)[0] not in (_PKRU_INIT, 0):
            lost.append(source.number)
    default = here.get(_PKRU)
    if default and _PKRU not in known and default.end <= len(own) and _in_use(own, default):
        # not the CPU's initial state, which denies nothing
        out[default.offset : default.end] = own[default.offset : default.end]
        used |= 1 << _PKRU
    if lost:
        names = ", ".join(_NAMES.get(number, f"component {number}") for number in sorted(lost))
        raise ExtendedStateForeign(f"registers are in use that this CPU does not have: {names}")
    _U64.pack_into(out, _LEGACY_SIZE, used)
    return bytes(out)


def _xcr0(area: bytes) -> int:
    value: int = _U64.unpack_from(area, _XCR0_OFFSET)[0] if len(area) >= _LEGACY_SIZE else 0
    return value


def _used(area: bytes) -> int:
    value: int = _U64.unpack_from(area, _LEGACY_SIZE)[0]
    return value


def _in_use(area: bytes, component: Component) -> bool:
    return bool(_used(area) >> component.number & 1)


def signal_frames(stack: bytes, start: int) -> list[Frame]:
    """The frames of signal handlers in ``stack``, which begins at the address ``start``."""
    found = []
    at = stack.find(_MAGIC)
    while at >= 0:
        area = at - _XCR0_OFFSET
        returns = _context_of(stack, area, start) if len(stack) >= at + _SOFTWARE.size else None
        if returns is not None:
            size = _SOFTWARE.unpack_from(stack, at)[3] + len(_MAGIC_END)
            if _LEGACY_SIZE + _HEADER_SIZE < size <= _MOST_BYTES and area + size <= len(stack):
                found.append(Frame(*returns, start + area, size))
        at = stack.find(_MAGIC, at + 1)
    return found


def _context_of(stack: bytes, area: int, start: int) -> tuple[int, int] | None:
    """ip and sp out of the context, below the area, that has the area's address as its last member; None if there is
    none. What was on the stack before may have the address in between."""
    address = _U64.pack((start + area) % (1 << 64))
    pointer = stack.rfind(address, 0, max(area, 0))
    while pointer >= 0:
        context = pointer + _U64.size - _CONTEXT.size
        if context < _CONTEXT_AT:
            return None
        sp, ip, cs, _ = _CONTEXT.unpack_from(stack, context)
        if cs == _USER_CS:
            return ip, sp
        pointer = stack.rfind(address, 0, pointer + _U64.size - 1)
    return None


def convert_frame(data: bytes, layout: Iterable[Component], own: bytes) -> bytes:
    """The area of a signal frame (``Frame.area``, ``Frame.size``) of a CPU with that layout, as this CPU takes it, in
    as many bytes. ``own``: the area of a thread here.

    ExtendedStateForeign as of :func:`convert_xstate`, or if it does not fit.
    """
    magic, extended, xfeatures, size = _SOFTWARE.unpack_from(data, _XCR0_OFFSET)
    if len(data) != size + len(_MAGIC_END) or data[size:] != _MAGIC_END:
        raise ExtendedStateForeign("the frame of a signal handler is malformed")
    area = data[:_XCR0_OFFSET] + _U64.pack(xfeatures) + bytes(_LEGACY_SIZE - _XCR0_OFFSET - _U64.size)
    here = convert_xstate(area + data[_LEGACY_SIZE:size], layout, own)
    used = _used(here)
    end = max((c.end for c in xstate_layout() if used >> c.number & 1), default=_LEGACY_SIZE + _HEADER_SIZE)
    if end > size:
        raise ExtendedStateForeign("the frame of a signal handler has no room for this CPU's registers")
    size = min(size, len(here))
    software = _SOFTWARE.pack(magic, extended, used | _LEGACY_COMPONENTS, size)
    whole = here[:_XCR0_OFFSET] + software.ljust(_LEGACY_SIZE - _XCR0_OFFSET, b"\0") + here[_LEGACY_SIZE:size]
    return (whole + _MAGIC_END).ljust(len(data), b"\0")
