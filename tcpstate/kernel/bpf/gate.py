"""A gate before many connections at once: one store in memory shuts it, in both directions.

A tcx program at the ingress and one at the egress of each interface but loopback look a segment's addresses and ports
up in a hash map, and drop what is found there as long as the gate is shut.  Before that it may note which connections
something came for or left from.  Capture by AF_PACKET sees what arrives before the gate does.  Nothing outlives its
owner: links, map and flag go with our descriptors, and an open gate is what is left.

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
#: the memory: what the gate does, whether something passed that may be of any connection, what passed of each
_AT_STATE, _AT_UNCLEAR, _AT_SEEN = 0, 4, 8
_OPEN, _NOTING, _SHUT = 0, 1, 2
#: what may have TCP inside and is not looked into: ESP, AH; of IPv6 all headers before the last
_WRAPPED: Final = (50, 51)
_WRAPPED_IPV6: Final = (0, 43, 44, 50, 51, 60, 135, 139, 140)


def _load(asm: Asm, where: int | None, to: int, length: int) -> None:
    """Bytes from ``where`` in the network header (None: register 9) into the frame."""
    asm.mov(1, 6)
    if where is None:
        asm.mov(2, 9)
    else:
        asm.set(2, where)
    asm.frame(3, to).set(4, length).set(5, _FROM_NETWORK_HEADER).call(Helper.SKB_LOAD_BYTES_RELATIVE)
    asm.jump_if(Jump.NOT_EQUAL, 0, 0, "out")


def _program(keys: int, memory: int, count: int, *, arriving: bool) -> bytes:
    """The keys have the peer first: of what arrives it is the source, of what leaves the destination."""
    asm = Asm().mov(6, 1).map_value(7, memory).load(4, 1, 7, _AT_STATE).jump_if(Jump.EQUAL, 1, _OPEN, "out")
    for at in range(_AT_HEAD, 0, 8):
        asm.store_number(8, FRAME, at, 0)
    asm.load(4, 1, 6, _SKB_PROTOCOL)
    asm.jump_if(Jump.EQUAL, 1, socket.htons(0x0800), "v4").jump_if(Jump.EQUAL, 1, socket.htons(0x86DD), "v6")
    asm.jump("out")
    asm.label("v4")
    _load(asm, 0, _AT_HEAD, 20)
    asm.load(1, 1, FRAME, _AT_HEAD + 9)
    for protocol in _WRAPPED:
        asm.jump_if(Jump.EQUAL, 1, protocol, "unclear")
    asm.jump_if(Jump.NOT_EQUAL, 1, _TCP, "out")
    source, destination = (12, 16) if arriving else (16, 12)
    asm.load(4, 1, FRAME, _AT_HEAD + source).store(4, FRAME, _AT_KEY, 1)
    asm.load(4, 1, FRAME, _AT_HEAD + destination).store(4, FRAME, _AT_KEY + 4, 1)
    asm.load(1, 9, FRAME, _AT_HEAD).mask(9, 15).shift_left(9, 2)
    _load(asm, None, _AT_HEAD, 4)
    _ports(asm, 8, arriving)
    asm.jump("look")
    asm.label("v6")
    _load(asm, 0, _AT_HEAD, 8)
    asm.load(1, 1, FRAME, _AT_HEAD + 6)
    for protocol in _WRAPPED_IPV6:
        asm.jump_if(Jump.EQUAL, 1, protocol, "unclear")
    asm.jump_if(Jump.NOT_EQUAL, 1, _TCP, "out")
    _load(asm, 8 if arriving else 24, _AT_KEY, 16)
    _load(asm, 24 if arriving else 8, _AT_KEY + 16, 16)
    _load(asm, 40, _AT_HEAD, 4)
    _ports(asm, 32, arriving)
    asm.label("look").map(1, keys).frame(2, _AT_KEY).call(Helper.MAP_LOOKUP).jump_if(Jump.EQUAL, 0, 0, "out")
    asm.load(4, 1, 0, 0).jump_if(Jump.GREATER, 1, count - 1, "out").mov(2, 7).add_register(2, 1)
    asm.store_number(1, 2, _AT_SEEN, 1).load(4, 1, 7, _AT_STATE).jump_if(Jump.NOT_EQUAL, 1, _SHUT, "out").exit(_DROP)
    asm.label("unclear").store_number(4, 7, _AT_UNCLEAR, 1)
    return asm.label("out").exit(_NEXT).code()


def _ports(asm: Asm, at: int, arriving: bool) -> None:
    first, second = (0, 2) if arriving else (2, 0)
    asm.load(2, 1, FRAME, _AT_HEAD + first).store(2, FRAME, _AT_KEY + at, 1)
    asm.load(2, 1, FRAME, _AT_HEAD + second).store(2, FRAME, _AT_KEY + at + 2, 1)


class Gate:
    """Before ``connections``, on all interfaces but loopback that the calling thread's network namespace has now; open
    until :meth:`shut`. KernelFeatureMissing."""

    def __init__(self, connections: Iterable[ConnId]) -> None:
        keys = [tuple_key(one) for one in connections]
        self._count = count = max(1, len(keys))
        self._interfaces = socket.if_nameindex()
        self._fds: list[int] = []
        self._memory: mmap.mmap | None = None
        try:
            known = self._keep(call.create_map(call.MapType.HASH, _KEY, 4, count, name="tcpmig_gated"))
            size = -(-(_AT_SEEN + count) // _PAGE) * _PAGE
            memory = self._keep(call.create_map(
                call.MapType.ARRAY, 4, size, 1, flags=call.MapFlag.MMAPABLE, name="tcpmig_gate"
            ))  # fmt: skip
            self._memory = call.map_memory(memory, size)
            call.update_all(known, keys, [struct.pack("=I", index) for index in range(len(keys))])
            for attach, arriving in ((call.Attach.TCX_INGRESS, True), (call.Attach.TCX_EGRESS, False)):
                program = self._keep(call.load(
                    call.ProgramType.SCHED_CLS, _program(known, memory, count, arriving=arriving), attach=attach,
                    name="tcpmig_gate",
                ))  # fmt: skip
                for index, name in self._interfaces:
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

    def note(self) -> None:
        """From now on it is noted which connections something comes for or leaves from."""
        self._set(_NOTING)

    def seen(self) -> bytes | None:
        """A byte for each connection, in their order: 1 if something came for it or left from it since :meth:`note`.
        None if something may have passed unseen: wrapped into something else, or by an interface that is new."""
        if self._memory is None:
            raise RuntimeError("the gate was taken away")
        if any(self._memory[_AT_UNCLEAR:_AT_SEEN]) or socket.if_nameindex() != self._interfaces:
            return None
        return self._memory[_AT_SEEN : _AT_SEEN + self._count]

    def shut(self) -> None:
        """Nothing comes in or goes out any more."""
        self._set(_SHUT)

    def open(self) -> None:
        """As if it were not there."""
        self._set(_OPEN)

    def _set(self, state: int) -> None:
        if self._memory is None:
            raise RuntimeError("the gate was taken away")
        self._memory[_AT_STATE:_AT_UNCLEAR] = struct.pack("=I", state)

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
