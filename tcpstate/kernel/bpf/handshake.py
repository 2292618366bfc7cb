"""Connections into an accept queue: a tcx program that vouches for the last ACK of a handshake.

The kernel lets BPF implement SYN cookies (bpf_sk_assign_tcp_reqsk): a program at the ingress of an interface tells, for
an ACK that belongs to no connection, that its handshake was in order, and what was negotiated in it.  The kernel then
makes the connection and puts it into the listener's accept queue, with the sequence numbers of that very ACK.

The program here knows the connections from a hash map: addresses and ports, and the numbers that the ACK must have.  An
entry serves once.  Until then whatever else comes for such a connection is dropped: the stack would answer with a
reset, since there is no connection yet, and the peer sends it again.

Source: net/core/filter.c bpf_sk_assign_tcp_reqsk, net/ipv4/syncookies.c cookie_bpf_check.  Kernel 6.9; tcx 6.6.
"""

from __future__ import annotations

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
from tcpstate.kernel.bpf.btf import BadBtf, Kind
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.slotted import dataclass

__all__ = ["Agreed", "Vouching", "cookies_allowed", "tuple_key"]

_KFUNC: Final = "bpf_sk_assign_tcp_reqsk"
_ATTRS: Final = "bpf_tcp_req_attrs"
_COOKIES: Final = "/proc/sys/net/ipv4/tcp_syncookies"
_ENTRIES: Final = 65536
_KEY: Final = 40  # struct bpf_sock_tuple of IPv6, padded
_TUPLE4, _TUPLE6 = 12, 36
#: offsets in struct __sk_buff, the kernel's ABI (linux/bpf.h)
_SKB_PROTOCOL: Final = 16
_ETHERNET: Final = 14
_NEXT: Final = -1  # TCX_NEXT: other programs and the stack go on
_DROP: Final = 2  # TCX_DROP
_ACK_BITS: Final = 0x17  # FIN, SYN, RST, ACK
_SYN: Final = 0x02
_ACK: Final = 0x10
_TIMESTAMP_WORD: Final = 0x0101080A  # NOP, NOP, timestamp of 10 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What a handshake settled: members of struct bpf_tcp_req_attrs.

    seq, ack     numbers of the ACK that completes it
    mss          the peer's segment size, bytes
    snd_wscale, rcv_wscale  shifts; None: windows are not scaled
    sack, ecn    whether they were agreed on
    timestamps   (the peer's clock, ours now) if they were agreed on; (None, None): as the ACK itself tells
    microseconds  whether our clock counts microseconds
    """

    seq: int
    ack: int
    mss: int
    snd_wscale: int | None
    rcv_wscale: int | None
    sack: bool
    ecn: bool
    timestamps: tuple[int, int] | tuple[None, None] | None
    microseconds: bool = False


class Vouching:
    """The program on the interfaces ``devices`` (indices) of the calling thread's network namespace, until
    :meth:`close`. KernelFeatureMissing, with what is missing."""

    def __init__(self, devices: Iterable[int]) -> None:
        self._fds: list[int] = []
        known = layout()
        try:
            self._attrs = _Attrs(known)
            self._map = self._keep(
                call.create_map(call.MapType.HASH, _KEY, self._attrs.value_size, _ENTRIES, name="tcpmig_acks")
            )
            program = call.load(
                call.ProgramType.SCHED_CLS,
                _program(known, self._map, self._attrs.size),
                attach=call.Attach.TCX_INGRESS,
                name="tcpmig_vouch",
                gpl=True,
            )
            self._keep(program)
            for device in devices:
                self._keep(call.link(program, device, call.Attach.TCX_INGRESS))
        except (OSError, BadBtf) as error:
            self.close()
            raise KernelFeatureMissing(
                f"connections cannot be put into an accept queue: {error}",
                object=_KFUNC,
                fix="A kernel with CONFIG_BPF_SYSCALL, CONFIG_DEBUG_INFO_BTF and CONFIG_SYN_COOKIES has it (from 6.9).",
            ) from None
        finally:
            known.save()

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def expect(self, conn_id: ConnId, agreed: Agreed) -> None:
        """Vouch for this connection's ACK. OSError."""
        call.update(self._map, tuple_key(conn_id), self._attrs.pack(agreed))

    def expects(self, conn_id: ConnId) -> bool:
        """Whether its ACK has not come yet. OSError."""
        return call.lookup(self._map, tuple_key(conn_id), self._attrs.value_size) is not None

    def close(self) -> None:
        """Take the program away. May be called again."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def cookies_allowed() -> bool:
    """Whether the calling thread's network namespace lets SYN cookies be (net.ipv4.tcp_syncookies, not 0)."""
    try:
        with open(_COOKIES, encoding="ascii") as file:
            return int(file.read()) > 0
    except (OSError, ValueError):
        # a kernel without CONFIG_SYN_COOKIES
        return False


def tuple_key(conn_id: ConnId) -> bytes:
    """struct bpf_sock_tuple as a packet to us has it: the peer first."""
    family = socket.AF_INET6 if conn_id.v6 else socket.AF_INET
    ends = [socket.inet_pton(family, address.partition("%")[0]) for address in (conn_id.peer, conn_id.local)]
    return b"".join((*ends, struct.pack("!HH", conn_id.peer_port, conn_id.local_port))).ljust(_KEY, b"\0")


#: before the attributes in a value: both numbers, and whether timestamps come from the segment
_VALUE_HEAD: Final = struct.Struct("=IIII")
_SEQ, _ACKED, _FROM_SEGMENT = 0, 4, 8


class _Attrs:
    """struct bpf_tcp_req_attrs by its names in BTF."""

    _NAMES: Final = (
        "rcv_tsval", "rcv_tsecr", "mss", "rcv_wscale", "snd_wscale", "ecn_ok", "wscale_ok", "sack_ok", "tstamp_ok",
        "usec_ts_ok",
    )  # fmt: skip

    def __init__(self, known: Layout) -> None:
        self.size = known.size(_ATTRS)
        self._places = {name: known.place(_ATTRS, name) for name in self._NAMES}

    @property
    def value_size(self) -> int:
        return _VALUE_HEAD.size + self.size + -self.size % 8

    def pack(self, agreed: Agreed) -> bytes:
        value, echo = agreed.timestamps or (0, 0)
        from_segment = agreed.timestamps == (None, None)
        numbers = {
            "rcv_tsval": value or 0,
            "rcv_tsecr": echo or 0,
            "mss": agreed.mss,
            "rcv_wscale": agreed.rcv_wscale or 0,
            "snd_wscale": agreed.snd_wscale or 0,
            "ecn_ok": agreed.ecn,
            "wscale_ok": agreed.snd_wscale is not None,
            "sack_ok": agreed.sack,
            "tstamp_ok": agreed.timestamps is not None,
            "usec_ts_ok": agreed.microseconds,
        }
        attrs = bytearray(self.size)
        for name, number in numbers.items():
            place = self._places[name]
            attrs[place.offset : place.offset + place.size] = int(number).to_bytes(place.size, "little")
        return (_VALUE_HEAD.pack(agreed.seq, agreed.ack, from_segment, 0) + attrs).ljust(self.value_size, b"\0")


#: the frame: key, TCP header of the packet, timestamp option, attributes
_AT_KEY, _AT_HEADER, _AT_OPTION, _AT_ATTRS = -40, -64, -80, -128


def _program(known: Layout, acks: int, attrs_size: int) -> bytes:
    value, echo = (_AT_ATTRS + known.offset(_ATTRS, name) for name in ("rcv_tsval", "rcv_tsecr"))
    asm = Asm().mov(6, 1)
    for at in range(_AT_KEY, 0, 8):
        asm.store_number(8, FRAME, at, 0)
    asm.load(4, 1, 6, _SKB_PROTOCOL)
    asm.jump_if(Jump.EQUAL, 1, socket.htons(0x0800), "v4").jump_if(Jump.EQUAL, 1, socket.htons(0x86DD), "v6")
    asm.jump("out")
    # register 9: where the TCP header begins.  Headers with IP options are left to the stack: nobody answers with them.
    for name, ends, length, tcp, first in (
        ("v4", _ETHERNET + 12, _TUPLE4, _ETHERNET + 20, 0x45),
        ("v6", _ETHERNET + 8, _TUPLE6, _ETHERNET + 40, None),
    ):
        asm.label(name)
        if first is not None:
            asm.mov(1, 6).set(2, _ETHERNET).frame(3, _AT_OPTION).set(4, 1).call(Helper.SKB_LOAD_BYTES)
            asm.jump_if(Jump.NOT_EQUAL, 0, 0, "out")
            asm.load(1, 1, FRAME, _AT_OPTION).jump_if(Jump.NOT_EQUAL, 1, first, "out")
        asm.mov(1, 6).set(2, ends).frame(3, _AT_KEY).set(4, length).call(Helper.SKB_LOAD_BYTES)
        asm.jump_if(Jump.NOT_EQUAL, 0, 0, "out").set(9, tcp).jump("tcp")
    asm.label("tcp").mov(1, 6).mov(2, 9).frame(3, _AT_HEADER).set(4, 20).call(Helper.SKB_LOAD_BYTES)
    asm.jump_if(Jump.NOT_EQUAL, 0, 0, "out")
    asm.map(1, acks).frame(2, _AT_KEY).call(Helper.MAP_LOOKUP).jump_if(Jump.EQUAL, 0, 0, "out").mov(8, 0)
    asm.load(1, 1, FRAME, _AT_HEADER + 13).mask(1, _ACK_BITS).jump_if(Jump.EQUAL, 1, _SYN, "anew")
    asm.jump_if(Jump.NOT_EQUAL, 1, _ACK, "drop")
    for at, number in ((_AT_HEADER + 4, _SEQ), (_AT_HEADER + 8, _ACKED)):
        asm.load(4, 1, FRAME, at).big_endian(1, 32).load(4, 2, 8, number)
        asm.jump_if_register(Jump.NOT_EQUAL, 1, 2, "drop")
    for at in range(0, attrs_size, 4):
        asm.load(4, 1, 8, _VALUE_HEAD.size + at).store(4, FRAME, _AT_ATTRS + at, 1)
    # the clocks as this very segment tells them
    asm.load(4, 1, 8, _FROM_SEGMENT).jump_if(Jump.EQUAL, 1, 0, "look up")
    asm.mov(1, 6).mov(2, 9).add(2, 20).frame(3, _AT_OPTION).set(4, 12).call(Helper.SKB_LOAD_BYTES)
    asm.jump_if(Jump.NOT_EQUAL, 0, 0, "look up").load(4, 1, FRAME, _AT_OPTION).big_endian(1, 32)
    asm.jump_if(Jump.NOT_EQUAL, 1, _TIMESTAMP_WORD, "look up")
    for source, to in ((_AT_OPTION + 4, value), (_AT_OPTION + 8, echo)):
        asm.load(4, 1, FRAME, source).big_endian(1, 32).store(4, FRAME, to, 1)
    asm.label("look up").jump_if(Jump.EQUAL, 9, _ETHERNET + 20, "look up 4")
    for name, length in (("look up 6", _TUPLE6), ("look up 4", _TUPLE4)):
        asm.label(name).mov(1, 6).frame(2, _AT_KEY).set(3, length).set(4, -1).set(5, 0).call(Helper.SKC_LOOKUP_TCP)
        asm.jump_if(Jump.EQUAL, 0, 0, "out")
        asm.mov(7, 0).jump("found")
    asm.label("found").mov(1, 7).call(Helper.SKC_TO_TCP_SOCK).jump_if(Jump.EQUAL, 0, 0, "release")
    asm.mov(2, 0).mov(1, 6).frame(3, _AT_ATTRS).set(4, attrs_size).call_kernel(known.id(Kind.FUNCTION, _KFUNC))
    asm.map(1, acks).frame(2, _AT_KEY).call(Helper.MAP_DELETE)
    asm.label("release").mov(1, 7).call(Helper.SK_RELEASE).label("out").exit(_NEXT)
    # a peer that has not heard of the handshake's second step begins anew, with the listener itself
    asm.label("anew").load(4, 1, 8, _FROM_SEGMENT).jump_if(Jump.EQUAL, 1, 0, "drop")
    asm.map(1, acks).frame(2, _AT_KEY).call(Helper.MAP_DELETE).jump("out")
    asm.label("drop").exit(_DROP)
    return asm.code()
