"""seccomp: modes, filter flags and actions, and the programs' layout.

Source: include/uapi/linux/seccomp.h, filter.h, ptrace.h.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Final

__all__ = ["INSTRUCTION_SIZE", "MAX_INSTRUCTIONS", "Action", "FilterFlag", "Mode", "SetMode", "actions", "program"]

#: bytes of one struct sock_filter
INSTRUCTION_SIZE: Final = 8
#: BPF_MAXINSNS
MAX_INSTRUCTIONS: Final = 4096
_INSTRUCTION = struct.Struct("<HBBI")
_PROGRAM = struct.Struct("<H6xQ")
# BPF_RET | BPF_K, the only way in which libseccomp and all known writers return an action
_RET_K: Final = 0x06


class Mode(enum.IntEnum):
    """``Seccomp:`` of /proc/PID/status."""

    DISABLED = 0
    STRICT = 1
    FILTER = 2


class SetMode(enum.IntEnum):
    """First argument of seccomp(2)."""

    STRICT = 0
    FILTER = 1


class FilterFlag(enum.IntFlag):
    """Flags of SECCOMP_SET_MODE_FILTER."""

    TSYNC = 1 << 0
    LOG = 1 << 1
    SPEC_ALLOW = 1 << 2


class Action(enum.IntEnum):
    """High half of what a filter returns."""

    USER_NOTIF = 0x7FC00000
    TRACE = 0x7FF00000


_ACTION_MASK: Final = 0xFFFF0000


def program(length: int) -> bytes:
    """struct sock_fprog for ``length`` instructions, with no address yet (at byte 8)."""
    return _PROGRAM.pack(length, 0)


def actions(code: bytes) -> Iterator[int]:
    """The actions that a program's constant returns name (``Action`` and others)."""
    for opcode, _, _, k in _INSTRUCTION.iter_unpack(code):
        if opcode == _RET_K:
            yield k & _ACTION_MASK
