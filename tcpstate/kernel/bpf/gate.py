"""A gate before many connections at once: one store in memory shuts it, in both directions.

A tcx program at the ingress and one at the egress of each interface but loopback look a segment's addresses and ports
up in a hash map, and drop what is found there as long as the flag is set.  Capture by AF_PACKET sees what arrives
before the gate does.  Nothing outlives its owner: links, map and flag go with our descriptors, and an open gate is what
is left.

What one processor let through just before another shut the gate may still be at work.  It is not answered any more:
the answer would have to leave through the gate.

Source: include/uapi/linux/bpf.h (TCX_NEXT, TCX_DROP), net/core/dev.c (ptype_all before sch_handle_ingress).  From 6.6.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

from tcpstate.connid import ConnId
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.handshake import tuple_key

__all__ = ["Gate", "missing"]

_KEY: Final = 40
_PAGE: Final = 4096
#: struct __sk_buff.protocol
_SKB_PROTOCOL: Final = 16
_FROM_NETWORK_HEADER: Final = 1  # BPF_HDR_START_NET
_NEXT: Final = -1
_DROP: Final = 2
_TCP: Final = 6
#: the frame: key, head of the IP header
_AT_KEY, _AT_HEAD = -40, -80
_OPEN: Final = struct.pack("=I", 0)
_SHUT: Final = struct.pack("=I", 1)


def _load(asm: Asm, where: int | None, to: int, length: int) -> None:
    """Bytes from ``where`` in the network header (None: register 9) into the frame."""
    asm.mov(1, 6)
    if where is None:
        asm.mov(2, 9)
    else:
        asm.set(2, where)
    asm.frame(3, to).set(4, length).set(5, _FROM_NETWORK_HEADER).call(Helper.SKB_LOAD_BYTES_RELATIVE)
    asm.jump_if(Jump.NOT_EQUAL, 0, 0, "out")


def _program(keys: int, flag: int, *, arriving: bool) -> bytes:
    """The keys have the peer first: of what arrives it is the source, of what leaves the destination."""
    asm = Asm().mov(6, 1).map_value(1, flag).load(4, 1, 1, 0).jump_if(Jump.EQUAL, 1, 0, "out")
    for at in range(_AT_HEAD, 0, 8):
        asm.store_number(8, FRAME, at, 0)
    asm.load(4, 1, 6, _SKB_PROTOCOL)
    asm.jump_if(Jump.EQUAL, 1, socket.htons(0x0800), "v4").jump_if(Jump.EQUAL, 1, socket.htons(0x86DD), "v6")
    asm.jump("out")
    asm.label("v4")
    _load(asm, 0, _AT_HEAD, 20)
    asm.load(1, 1, FRAME, _AT_HEAD + 9).jump_if(Jump.NOT_EQUAL, 1, _TCP, "out")
    source, destination = (12, 16) if arriving else (16, 12)
    asm.load(4, 1, FRAME, _AT_HEAD + source).store(4, FRAME, _AT_KEY, 1)
    asm.load(4, 1, FRAME, _AT_HEAD + destination).store(4, FRAME, _AT_KEY + 4, 1)
    asm.load(1, 9, FRAME, _AT_HEAD).mask(9, 15).shift_left(9, 2)
    _load(asm, None, _AT_HEAD, 4)
    _ports(asm, 8, arriving)
    asm.jump("look")
    asm.label("v6")
    _load(asm, 0, _AT_HEAD, 8)
    asm.load(1, 1, FRAME, _AT_HEAD + 6).jump_if(Jump.NOT_EQUAL, 1, _TCP, "out")
    _load(asm, 8 if arriving else 24, _AT_KEY, 16)
    _load(asm, 24 if arriving else 8, _AT_KEY + 16, 16)
    _load(asm, 40, _AT_HEAD, 4)
    _ports(asm, 32, arriving)
    asm.label("look").map(1, keys).frame(2, _AT_KEY).call(Helper.MAP_LOOKUP).jump_if(Jump.EQUAL, 0, 0, "out")
    return asm.exit(_DROP).label("out").exit(_NEXT).code()


def _ports(asm: Asm, at: int, arriving: bool) -> None:
    first, second = (0, 2) if arriving else (2, 0)
    asm.load(2, 1, FRAME, _AT_HEAD + first).store(2, FRAME, _AT_KEY + at, 1)
    asm.load(2, 1, FRAME, _AT_HEAD + second).store(2, FRAME, _AT_KEY + at + 2, 1)


class Gate:
    """Before ``connections``, on all interfaces but loopback that the calling thread's network namespace has now; open
    until :meth:`shut`. KernelFeatureMissing."""

    def __init__(self, connections: Iterable[ConnId]) -> None:
        keys = [tuple_key(one) for one in connections]
        self._fds: list[int] = []
        self._memory: mmap.mmap | None = None
        try:
            known = self._keep(call.create_map(call.MapType.HASH, _KEY, 1, max(1, len(keys)), name="tcpmig_gated"))
            flag = self._keep(call.create_map(
                call.MapType.ARRAY, 4, 4, 1, flags=call.MapFlag.MMAPABLE, name="tcpmig_gate"
            ))  # fmt: skip
            self._memory = call.map_memory(flag, _PAGE)
            for key in keys:
                call.update(known, key, b"\1")
            for attach, arriving in ((call.Attach.TCX_INGRESS, True), (call.Attach.TCX_EGRESS, False)):
                program = self._keep(call.load(
                    call.ProgramType.SCHED_CLS, _program(known, flag, arriving=arriving), attach=attach,
                    name="tcpmig_gate",
                ))  # fmt: skip
                for index, name in socket.if_nameindex():
                    if name != "lo":
                        self._keep(call.link(program, index, attach))
        except OSError as error:
            self.close()
            raise KernelFeatureMissing(
                f"no gate before connections: {error}",
                object="tcx",
                fix="Run as root (CAP_BPF, CAP_NET_ADMIN) on a kernel from 6.6 on with CONFIG_BPF_SYSCALL.",
            ) from None

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def shut(self) -> None:
        """Nothing comes in or goes out any more."""
        self._set(_SHUT)

    def open(self) -> None:
        """As if it were not there."""
        self._set(_OPEN)

    def _set(self, value: bytes) -> None:
        if self._memory is None:
            raise RuntimeError("the gate was taken away")
        self._memory[: len(value)] = value

    def close(self) -> None:
        """Take it away: it is open then. May be called again."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def missing() -> KernelFeatureMissing | None:
    """Why there can be no gate on this host; None if there can."""
    try:
        Gate([]).close()
    except KernelFeatureMissing as error:
        return error
    return None
