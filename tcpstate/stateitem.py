"""Items of a connection's state: (keyword, datatype, value, flags), as section 5.2 of the paper has them."""

from __future__ import annotations

import enum
from typing import Final

from tcpstate.errors import BadStateItem
from tcpstate.slotted import dataclass

__all__ = ["Datatype", "StateFlag", "StateItem", "Value", "check_value"]

#: what a value may be; None where there is none
Value = int | str | bytes | tuple[int, ...] | None


class Datatype(enum.Enum):
    """Simple types, and an array of one of them."""

    BOOL = "bool"  # 0 or 1
    INT = "int"  # 32 bits, signed
    U8 = "u8"
    U16 = "u16"
    U32 = "u32"
    U64 = "u64"
    SEQUENCE = "sequence"  # a sequence number: 32 bits, modulo 2**32
    TEXT = "text"
    BYTES = "bytes"
    NUMBERS = "int[]"


class StateFlag(enum.IntFlag):
    """What is told of an item beside its value."""

    HARD = 1  # must be kept, else the peer or the owner notices
    SOFT = 2  # may be lost: it is learned again
    FIXED = 4  # the same for the connection's whole life
    VARYING = 8  # changes all the time
    INITIALIZATION = 16  # settled by the handshake
    INITIALIZED = 32  # there is a value
    SETTABLE = 64
    PRIVILEGED = 128  # setting it takes CAP_NET_ADMIN
    UNKNOWN = 256  # of another stack: this version has no such keyword


NO_FLAGS: Final = StateFlag(0)


@dataclass(frozen=True, slots=True)
class StateItem:
    """One item of a connection's state.

    keyword   its name (docs/reference/keywords.md)
    datatype  what kind of value it is
    value     None where this host cannot tell it (without INITIALIZED among the flags)
    flags     :class:`StateFlag` bits; ignored where an item is set
    """

    keyword: str
    datatype: Datatype
    value: Value = None
    flags: StateFlag = NO_FLAGS


_BITS = {Datatype.BOOL: 1, Datatype.U8: 8, Datatype.U16: 16, Datatype.U32: 32, Datatype.SEQUENCE: 32, Datatype.U64: 64}
_INT_MAX = 2**31 - 1
_KINDS = {Datatype.TEXT: str, Datatype.BYTES: bytes}


def check_value(keyword: str, datatype: Datatype, value: object) -> None:
    """BadStateItem if ``value`` is none of this type."""
    if datatype in _KINDS:
        fine = isinstance(value, _KINDS[datatype])
    elif datatype is Datatype.NUMBERS:
        fine = isinstance(value, tuple) and all(type(n) is int and abs(n) < 2**64 for n in value)
    elif type(value) is not int and not (datatype is Datatype.BOOL and type(value) is bool):
        fine = False
    elif datatype is Datatype.INT:
        fine = -_INT_MAX - 1 <= int(value) <= _INT_MAX
    else:
        fine = 0 <= int(value) < 1 << _BITS[datatype]
    if not fine:
        # queues may be secret and are long: the value itself is not shown
        raise BadStateItem(f"its value is not a {datatype.value}", object=keyword)
