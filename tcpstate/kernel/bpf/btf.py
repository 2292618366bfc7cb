"""BTF: the kernel's description of its own types, as /sys/kernel/btf/vmlinux has it.

Source: Documentation/bpf/btf.rst, include/uapi/linux/btf.h.  Only what our programs need is read: structures with the
offsets of their members, and the ids of types and functions.  The file is some megabytes and takes some 50 ms:
:mod:`tcpstate.kernel.bpf.layout` remembers the answers.
"""

from __future__ import annotations

import enum
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tcpstate.slotted import dataclass

__all__ = ["VMLINUX", "BadBtf", "Btf", "Kind", "Member", "Place", "minimal"]

VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")
_MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("=HBBIIIII")
_MEMBER: Final = struct.Struct("=III")
#: a chain of typedefs and qualifiers, or a path of embedded structures, is never longer
_DEPTH: Final = 32


class Kind(enum.IntEnum):
    """BTF_KIND_*"""

    INT = 1
    POINTER = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FORWARD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNCTION = 12
    PROTOTYPE = 13
    VARIABLE = 14
    SECTION = 15
    FLOAT = 16
    DECLARATION_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


#: words of 4 bytes: the head of a type, and what is behind it, fixed and per element
_HEAD: Final = 3
_FIXED: Final = {Kind.INT: 1, Kind.ARRAY: 3, Kind.VARIABLE: 1, Kind.DECLARATION_TAG: 1}
_EACH: Final = {Kind.STRUCT: 3, Kind.UNION: 3, Kind.ENUM: 2, Kind.PROTOTYPE: 2, Kind.SECTION: 3, Kind.ENUM64: 3}
#: the same by number; a kind that is unknown has no head
_SIZE_OF: Final = [_HEAD + _FIXED.get(Kind(n), 0) if n in Kind._value2member_map_ else 0 for n in range(32)]
_FOR_EACH: Final = [_EACH.get(Kind(n), 0) if _SIZE_OF[n] else 0 for n in range(32)]
_ALIASES: Final = frozenset({Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})


class BadBtf(ValueError):
    """This is not BTF, or not as this module understands it; or a name is not in it."""


class Member(NamedTuple):
    """One member: its place among the others, the id of its type, bits from the start, bits if it is a bit field."""

    number: int
    name: str
    type: int
    bit_offset: int
    bits: int


class Place(NamedTuple):
    """Where a member lies: bytes from the start of the structure, its size in bytes; a bit field's first bit from the
    start of the structure and its length in bits (0: it is none)."""

    offset: int
    size: int
    bit: int
    bits: int


@dataclass(frozen=True, slots=True)
class _Type:
    kind: int
    name: int
    size: int  # or the id of the type that this one refers to
    count: int
    has_bit_fields: bool
    at: int  # what is behind its head, in bytes


class Btf:
    """Types by kind and name. BadBtf for anything malformed.

    Of the types it is only found where each begins, and the numbers of those that may be asked for by name: the types
    themselves are read when they are asked for. So one of these may be kept.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._parse(data)
        except BadBtf:
            raise
        except (struct.error, ValueError, TypeError, IndexError) as error:
            raise BadBtf(f"truncated: {error}") from None

    @classmethod
    def of_kernel(cls) -> Btf:
        """Of the running kernel. OSError if it does not tell (CONFIG_DEBUG_INFO_BTF), BadBtf."""
        return cls(VMLINUX.read_bytes())

    def _parse(self, data: bytes) -> None:
        magic, version, _, header, types_at, types_size, names_at, names_size = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != 1:
            raise BadBtf(f"magic {magic:#x}, version {version}")
        self._names = data[header + names_at : header + names_at + names_size]
        self._data = memoryview(data)[header + types_at : header + types_at + types_size]
        if len(self._data) != types_size or len(self._names) != names_size:
            raise BadBtf("the sections are longer than the file")
        words = self._data.cast("I")
        # type 0 is void, which is not told
        self._starts = starts = array("I", [0])
        self._named: dict[int, dict[int, int]] = {kind: {} for kind in (Kind.STRUCT, Kind.UNION, Kind.FUNCTION)}
        self._found: dict[tuple[Kind, str], int] = {}
        at, end, named, size_of, for_each = 0, len(words), self._named, _SIZE_OF, _FOR_EACH
        while at < end:
            info = words[at + 1]
            kind = info >> 24 & 31
            size = size_of[kind]
            if not size:
                raise BadBtf(f"kind {kind} is unknown")
            if kind in named:
                named[kind].setdefault(words[at], len(starts))
            starts.append(at)
            at += size + for_each[kind] * (info & 0xFFFF)
        if at != end:
            raise BadBtf("the last type is longer than the file")

    def _type(self, number: int) -> _Type:
        if not 0 < number < len(self._starts):
            raise BadBtf(f"there is no type {number}")
        at = 4 * self._starts[number]
        name, info, size = self._words(at)
        return _Type(info >> 24 & 31, name, size, info & 0xFFFF, bool(info >> 31), at + 4 * _HEAD)

    def _name(self, at: int) -> str:
        end = self._names.find(b"\0", at)
        if end < 0:
            raise BadBtf("a name has no end")
        return self._names[at:end].decode("ascii", "replace")

    def id(self, kind: Kind, name: str) -> int:
        """Of a structure, union or function. BadBtf if there is none."""
        found = self._found.get((kind, name))
        if found is not None:
            return found
        text, at = b"\0%b\0" % name.encode(), 0
        # each name is there once; a damaged table may have it again
        while name and (at := self._names.find(text, at) + 1) > 0:
            if (found := self._named[kind].get(at)) is not None:
                self._found[kind, name] = found
                return found
        raise BadBtf(f"this kernel has no {kind.name.lower()} {name}")

    def size(self, name: str) -> int:
        """Bytes of a structure. BadBtf."""
        return self._type(self.id(Kind.STRUCT, name)).size

    def members(self, number: int) -> Iterator[Member]:
        """Of a structure or union by id; anonymous ones have an empty name."""
        found = self._type(number)
        if found.kind not in (Kind.STRUCT, Kind.UNION):
            raise BadBtf(f"type {number} is no structure")
        for index in range(found.count):
            name, type_id, offset = self._words(found.at + index * _MEMBER.size)
            bits = offset >> 24 if found.has_bit_fields else 0
            bit_offset = offset & 0xFFFFFF if found.has_bit_fields else offset
            yield Member(index, self._name(name), type_id, bit_offset, bits)

    def index(self, structure: str, member: str) -> int:
        """The place of a member among the others of its structure. BadBtf."""
        for found in self.members(self.id(Kind.STRUCT, structure)):
            if found.name == member:
                return found.number
        raise BadBtf(f"struct {structure} has no {member}")

    def place(self, structure: str, path: str) -> Place:
        """Of a member; ``path`` goes through embedded structures by dots, and through anonymous ones unsaid. BadBtf."""
        number, bit, bits = self.id(Kind.STRUCT, structure), 0, 0
        for step in path.split("."):
            found = self._find(self._resolve(number), step, 0)
            if found is None:
                raise BadBtf(f"struct {structure} has no {path}")
            bit, bits, number = bit + found.bit_offset, found.bits, found.type
        return Place(bit // 8, self._bytes(number), bit, bits)

    def _find(self, number: int, name: str, depth: int) -> Member | None:
        if depth > _DEPTH:
            raise BadBtf("structures are nested too deeply")
        anonymous = []
        for member in self.members(number):
            if member.name == name:
                return member
            if not member.name:
                anonymous.append(member)
        for outer in anonymous:
            inner = self._resolve(outer.type)
            if self._type(inner).kind in (Kind.STRUCT, Kind.UNION):
                found = self._find(inner, name, depth + 1)
                if found is not None:
                    return found._replace(bit_offset=found.bit_offset + outer.bit_offset)
        return None

    def _resolve(self, number: int) -> int:
        for _ in range(_DEPTH):
            found = self._type(number)
            if found.kind not in _ALIASES:
                return number
            number = found.size
        raise BadBtf("a chain of types has no end")

    def _words(self, at: int) -> tuple[int, int, int]:
        try:
            first, second, third = _MEMBER.unpack_from(self._data, at)
        except struct.error:
            raise BadBtf("a type is truncated") from None
        return first, second, third

    def _bytes(self, number: int, depth: int = 0) -> int:
        if depth > _DEPTH:
            raise BadBtf("arrays are nested too deeply")
        found = self._type(self._resolve(number))
        if found.kind == Kind.POINTER:
            return 8
        if found.kind == Kind.ARRAY:
            element, _, count = self._words(found.at)
            return self._bytes(element, depth + 1) * count
        return found.size


def minimal() -> bytes:
    """BTF with nothing but ``int``: for calls that want some BTF of the caller's."""
    types = struct.pack("=IIII", 1, Kind.INT << 24, 4, 1 << 24 | 32)
    names = b"\0int\0"
    return _HEADER.pack(_MAGIC, 1, 0, _HEADER.size, 0, len(types), len(types), len(names)) + types + names
