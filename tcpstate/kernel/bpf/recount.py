"""Which connections are what they were, told by the kernel itself: a census that is compared where it is taken.

As :mod:`tcpstate.kernel.bpf.census`, whose records it is given; but nothing is written of a connection: of ten thousand
there is nothing to be read, and a thread that waits for it needs the interpreter for a moment only.  In the same pass:
does anybody sign (:mod:`tcpstate.kernel.bpf.signed`), has anybody closed whose peer has not acknowledged it?

Source: as there.  BPF_F_MMAPABLE arrays since 5.5, batches of elements since 5.6.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.census import describe, traffic
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.kernel.bpf.tcpsock import iterator_program
from tcpstate.kernel.tcp import TcpState

__all__ = ["Counted", "Recount", "Same"]

_WORD: Final = 8
_PAGE: Final = 4096
_KEY: Final = struct.Struct("=Q")
#: the memory: whether anybody signs, whether anybody has closed and is not done, then a byte for each connection
_AT_SIGNS, _AT_CLOSES, _AT_SAME = 0, 1, 8
_CLOSING: Final = (TcpState.FIN_WAIT1, TcpState.CLOSING, TcpState.LAST_ACK)


def _program(known: Layout, told: int, memory: int, most: int) -> bytes:
    asm, size, _ = describe(known, "other")
    keys = known.offset("tcp_sock", "md5sig_info")
    asm.load(8, 1, 8, keys).jump_if(Jump.NOT_EQUAL, 1, 0, "signs")
    asm.map(1, told).frame(2, -size).call(Helper.MAP_LOOKUP).jump_if(Jump.EQUAL, 0, 0, "out")
    # a value is the place of the connection, and its record behind the cookie
    first, end = traffic(known)
    asm.load(8, 3, 0, 0).jump_if(Jump.GREATER, 3, most - 1, "out").map_value(4, memory).add_register(4, 3)
    for at in (*range(_WORD, first, _WORD), *range(end, size, _WORD)):
        asm.load(8, 1, 0, at).load(8, 2, FRAME, at - size).jump_if_register(Jump.NOT_EQUAL, 1, 2, "out")
    for at in range(first, end, _WORD):
        asm.load(8, 1, 0, at).load(8, 2, FRAME, at - size).jump_if_register(Jump.NOT_EQUAL, 1, 2, "moved")
    asm.store_number(1, 4, _AT_SAME, Same.WHOLLY).jump("out")
    asm.label("moved").store_number(1, 4, _AT_SAME, Same.BUT_FOR_TRAFFIC).jump("out")
    asm.label("other").mov(1, 7).call(Helper.SKC_TO_TCP_SOCK).jump_if(Jump.EQUAL, 0, 0, "out")
    asm.load(1, 1, 7, known.offset("sock_common", "skc_state"))
    for state in _CLOSING:
        asm.jump_if(Jump.EQUAL, 1, state, "closes")
    asm.label("keys").load(8, 1, 0, keys).jump_if(Jump.EQUAL, 1, 0, "out")
    asm.label("signs").map_value(2, memory).store_number(1, 2, _AT_SIGNS, 1).jump("out")
    asm.label("closes").map_value(2, memory).store_number(1, 2, _AT_CLOSES, 1).jump("keys")
    return asm.label("out").exit(0).code()


class Same(enum.IntEnum):
    """How much of a connection is what it was."""

    NOT = 0  # whatever may have happened to it
    WHOLLY = 1
    BUT_FOR_TRAFFIC = 2  # nobody has set an option


class Counted(NamedTuple):
    """What one pass has seen.

    same    a byte for each connection, in their order, one of :class:`Same`
    signs   whether any socket has a key
    closes  whether the FIN of any is not acknowledged
    """

    same: bytes
    signs: bool
    closes: bool


class Recount:
    """Of connections by ``cookies``, whose ``records`` are as a census has them. KernelFeatureMissing. Close it."""

    def __init__(self, cookies: Sequence[int], records: Sequence[bytes]) -> None:
        known = layout()
        self._count = count = len(cookies)
        size = -(-(_AT_SAME + count) // _PAGE) * _PAGE
        fds: list[int] = []
        try:
            _, length, _ = describe(known)
            if any(len(record) != length - _WORD for record in records):
                raise ValueError("records of another census")
            told = call.create_map(call.MapType.HASH, _KEY.size, length, max(1, count), name="tcpmig_told")
            fds.append(told)
            memory = call.create_map(call.MapType.ARRAY, 4, size, 1, flags=call.MapFlag.MMAPABLE, name="tcpmig_same")
            fds.append(memory)
            self._memory = call.map_memory(memory, size)
            values = [_KEY.pack(at) + record for at, record in enumerate(records)]
            call.update_all(told, [_KEY.pack(cookie) for cookie in cookies], values)
            known.save()
            self._link = iterator_program(_program(known, told, memory, size - _AT_SAME), known)
        except (OSError, BadBtf) as error:
            raise KernelFeatureMissing(
                f"connections cannot be told from what they were: {error}",
                object="bpf_iter_tcp",
                fix="Run as root (CAP_BPF, CAP_PERFMON) on a kernel from 6.6 on with CONFIG_DEBUG_INFO_BTF.",
            ) from None
        finally:
            for fd in fds:
                os.close(fd)

    def take(self) -> Counted:
        """What is seen in the calling thread's network namespace. OSError."""
        self._memory[:] = bytes(len(self._memory))
        call.iterate(self._link)
        same = self._memory[_AT_SAME : _AT_SAME + self._count]
        return Counted(same, bool(self._memory[_AT_SIGNS]), bool(self._memory[_AT_CLOSES]))

    def close(self) -> None:
        """Give the program and its memory up."""
        os.close(self._link)
        self._memory.close()
