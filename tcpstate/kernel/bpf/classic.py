"""Socket filters in classic BPF, as tuples.

Source: include/uapi/linux/filter.h, linux/bpf_common.h; the filter of a TCP socket sees the segment from its TCP header
on (net/ipv4/tcp_ipv4.c, tcp_filter).
"""

from __future__ import annotations

import ctypes
import enum
import socket
import struct

from tcpstate.kernel.sockets import SO, Level

__all__ = [
    "ACCEPT_ALL",
    "DROP_ALL",
    "INSTRUCTION_SIZE",
    "MAX_INSTRUCTIONS",
    "Ancillary",
    "Instruction",
    "Op",
    "attach",
    "drop_but",
    "pack",
    "program",
    "unpack",
]

#: (code, jump if true, jump if false, k)
Instruction = tuple[int, int, int, int]

_INSTRUCTION = struct.Struct("=HBBI")
INSTRUCTION_SIZE = _INSTRUCTION.size
#: BPF_MAXINSNS
MAX_INSTRUCTIONS = 4096
#: a result larger than any packet: keep all of it
ACCEPT_ALL = 0xFFFFFFFF


class Op(enum.IntEnum):
    """Classic BPF operation codes that we use (class | size | mode)."""

    RETURN = 0x06
    RETURN_A = 0x16
    LOAD_BYTE = 0x30
    LOAD_HALF = 0x28
    LOAD_WORD = 0x20
    LOAD_BYTE_X = 0x50
    LOAD_HALF_X = 0x48
    LOAD_X_HEADER = 0xB1  # X = 4 * (packet[k] & 15)
    AND = 0x54
    SHIFT_RIGHT = 0x74
    JUMP = 0x05
    JUMP_EQUAL = 0x15
    JUMP_SET = 0x45
    SET_X = 0x01


class Ancillary(enum.IntEnum):
    """Where classic BPF finds what is not in the packet (SKF_AD_OFF + SKF_AD_*)."""

    PROTOCOL = 0xFFFFF000
    PKTTYPE = 0xFFFFF004
    IFINDEX = 0xFFFFF008
    MARK = 0xFFFFF014
    HATYPE = 0xFFFFF01C


DROP_ALL: tuple[Instruction, ...] = ((Op.RETURN, 0, 0, 0),)


def drop_but(mark: int) -> tuple[Instruction, ...]:
    """Drops all but what carries this mark."""
    return (
        (Op.LOAD_WORD, 0, 0, Ancillary.MARK),
        (Op.JUMP_EQUAL, 0, 1, mark),
        (Op.RETURN, 0, 0, ACCEPT_ALL),
        (Op.RETURN, 0, 0, 0),
    )


def pack(instructions: tuple[Instruction, ...]) -> bytes:
    """An array of struct sock_filter."""
    return b"".join(_INSTRUCTION.pack(*i) for i in instructions)


def unpack(data: bytes) -> tuple[Instruction, ...]:
    """Of an array of struct sock_filter; ValueError if it does not end with an instruction."""
    if len(data) % INSTRUCTION_SIZE:
        raise ValueError(f"{len(data)} bytes are not whole instructions")
    return tuple(_INSTRUCTION.iter_unpack(data))


class Program:
    """struct sock_fprog with the instructions that it points to: keep it until the call was made."""

    def __init__(self, instructions: tuple[Instruction, ...]) -> None:
        code = pack(instructions)
        self._code = ctypes.create_string_buffer(code, len(code))
        self.bytes = struct.pack("HxxxxxxQ", len(instructions), ctypes.addressof(self._code))


def program(instructions: tuple[Instruction, ...]) -> Program:
    """The argument of SO_ATTACH_FILTER."""
    return Program(instructions)


def attach(sock: socket.socket, instructions: tuple[Instruction, ...]) -> None:
    """SO_ATTACH_FILTER. OSError: EPERM (SO_LOCK_FILTER), EINVAL (the kernel's verifier), EOPNOTSUPP."""
    # in a name: it must outlive the call, which follows its pointer
    argument = program(instructions)
    sock.setsockopt(Level.SOCKET, SO.ATTACH_FILTER, argument.bytes)
