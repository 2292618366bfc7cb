"""A packet filter for what arrives for one connection. Values in, values out.

The program sees a packet from its IP header on (AF_PACKET, SOCK_DGRAM).  Fragments and IPv6 extension headers before
TCP are left out: their sender repeats what they held.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from tcpstate.connid import ConnId
from tcpstate.kernel import bpf
from tcpstate.kernel.bpf import Ancillary, Instruction, Op
from tcpstate.kernel.packet import ARPHRD_LOOPBACK, PACKET_OUTGOING

__all__ = ["FROM_LOOPBACK", "arriving"]

_V4_FRAGMENT: Final = 6
_V4_FRAGMENT_BITS: Final = 0x3FFF  # offset, and "more follow"
_V4_PROTOCOL: Final = 9
_V4_SOURCE: Final = 12
_V6_PROTOCOL: Final = 6
_V6_SOURCE: Final = 8
_V6_HEADER: Final = 40
_FAIL: Final = -1

#: a filter for TCP sockets: only what comes through loopback gets in, that is, what we inject
FROM_LOOPBACK: Final[tuple[Instruction, ...]] = (
    (Op.LOAD_HALF, 0, 0, Ancillary.HATYPE),
    (Op.JUMP_EQUAL, 0, 1, ARPHRD_LOOPBACK),
    (Op.RETURN, 0, 0, bpf.ACCEPT_ALL),
    (Op.RETURN, 0, 0, 0),
)


def arriving(conn_id: ConnId, *, loopback: bool, length: int = bpf.ACCEPT_ALL) -> tuple[Instruction, ...]:
    """The segments of the peer of ``conn_id``.

    loopback  also those that come through the loopback interface (which is how our own injections come)
    length    how many bytes of each packet to keep
    """
    checks: list[tuple[int, int, int]] = []  # (load, its k, value that it must have), or (operation, k, _FAIL)

    def must(load: int, at: int, value: int) -> None:
        checks.append((load, at, value))

    if conn_id.v6:
        family, words = socket.AF_INET6, 4
        must(Op.LOAD_BYTE, _V6_PROTOCOL, socket.IPPROTO_TCP)
        source = _V6_SOURCE
    else:
        family, words = socket.AF_INET, 1
        must(Op.LOAD_BYTE, _V4_PROTOCOL, socket.IPPROTO_TCP)
        source = _V4_SOURCE
    for number, address in enumerate((conn_id.peer, conn_id.local)):
        raw = socket.inet_pton(family, address.partition("%")[0])
        for word, value in enumerate(struct.unpack(f"!{words}I", raw)):
            must(Op.LOAD_WORD, source + 4 * (number * words + word), value)

    program: list[Instruction] = [(Op.LOAD_WORD, 0, 0, Ancillary.PKTTYPE), (Op.JUMP_EQUAL, _FAIL, 0, PACKET_OUTGOING)]
    if not loopback:
        program += [(Op.LOAD_HALF, 0, 0, Ancillary.HATYPE), (Op.JUMP_EQUAL, _FAIL, 0, ARPHRD_LOOPBACK)]
    program += [(Op.LOAD_BYTE, 0, 0, 0), (Op.SHIFT_RIGHT, 0, 0, 4), (Op.JUMP_EQUAL, 0, _FAIL, 6 if conn_id.v6 else 4)]
    for load, at, value in checks:
        program += [(load, 0, 0, at), (Op.JUMP_EQUAL, 0, _FAIL, value)]
    if conn_id.v6:
        program.append((Op.SET_X, 0, 0, _V6_HEADER))
    else:
        program += [(Op.LOAD_HALF, 0, 0, _V4_FRAGMENT), (Op.JUMP_SET, _FAIL, 0, _V4_FRAGMENT_BITS)]
        program.append((Op.LOAD_X_HEADER, 0, 0, 0))
    for at, port in ((0, conn_id.peer_port), (2, conn_id.local_port)):
        program += [(Op.LOAD_HALF_X, 0, 0, at), (Op.JUMP_EQUAL, 0, _FAIL, port)]
    program += [(Op.RETURN, 0, 0, length), (Op.RETURN, 0, 0, 0)]
    return tuple(_aimed(i, at, len(program) - 1) for at, i in enumerate(program))


def _aimed(instruction: Instruction, at: int, end: int) -> Instruction:
    """With its jumps to the failing end counted from where it stands."""
    code, yes, no, k = instruction
    away = end - at - 1
    return code, away if yes == _FAIL else yes, away if no == _FAIL else no, k
