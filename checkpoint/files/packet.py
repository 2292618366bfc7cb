"""Packet sockets (AF_PACKET): what listens to, or speaks, whole frames of an interface.

Source: net/packet/af_packet.c, diag.c (packet_diag: what it is bound to, memberships, rings, fanout). Frames that wait
to be read are not kept, as those that pass during the move are not seen; a warning says so. Rings (PACKET_RX_RING) lie
in memory that is mapped from the socket, and a fanout group is made by its members together: refused.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import stat
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Self

from checkpoint.errors import FileMissing, UnsupportedProtocol
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.sockopts import give_own_filter, own_classic_filter, set_buffers, sizes
from checkpoint.files.unix import held_outside
from tcpstate.filters import give_filter
from tcpstate.kernel import bpf
from tcpstate.kernel.bpf import MAX_INSTRUCTIONS, Instruction
from tcpstate.kernel.sockets import SO, Level
from tcpstate.record import Buffers
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Listening", "PacketFile"]

_SOL_PACKET: Final = 263
_ADD_MEMBERSHIP: Final = 1
_REQUEST: Final = struct.Struct("<BBHIIII")  # struct packet_diag_req
_HEADER: Final = struct.Struct("<IHHII")  # struct nlmsghdr
_SOCK_DIAG_BY_FAMILY: Final = 20
_DUMP: Final = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_DONE: Final = 3
_ERROR: Final = 2
_MESSAGE: Final = 16  # struct packet_diag_msg
_SHOW: Final = 0x1 | 0x2 | 0x4 | 0x8  # PACKET_SHOW_INFO, _MCLIST, _RING_CFG, _FANOUT
_MEMBER: Final = struct.Struct("<IIHH32s")  # struct packet_diag_mclist
_MREQ: Final = struct.Struct("<iHH8s")  # struct packet_mreq


class _Attribute(enum.IntEnum):
    """Attributes of packet_diag (linux/packet_diag.h)."""

    INFO = 0
    MCLIST = 1
    RX_RING = 2
    TX_RING = 3
    FANOUT = 4


class _Switch(enum.IntEnum):
    """Options of level SOL_PACKET that are numbers (linux/if_packet.h)."""

    AUXDATA = 8
    ORIGDEV = 9
    VERSION = 10
    RESERVE = 12
    LOSS = 14
    VNET_HDR = 15
    TIMESTAMP = 17
    TX_HAS_OFF = 19
    QDISC_BYPASS = 20
    IGNORE_OUTGOING = 23


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """What an interface is made to let through (struct packet_mreq).

    device   its name
    type     a multicast address, promiscuous, all multicast, a unicast address (PACKET_MR_..)
    address  of the hardware
    count    how often the socket has asked for it
    """

    device: str
    type: int
    address: bytes
    count: int = 1

    def __post_init__(self) -> None:
        if len(self.device) > 15 or not 0 <= self.type <= 3 or len(self.address) > 8 or not 0 < self.count < 1 << 16:
            raise ValueError("membership of a packet socket out of range")


@register(
    "packet socket", mode=stat.S_IFSOCK, match=lambda view: view.dup >= 0 and view.socket.family == socket.AF_PACKET
)
@dataclass(frozen=True, slots=True, kw_only=True)
class PacketFile(OpenFile):
    """One packet socket.

    type         SOCK_RAW or SOCK_DGRAM
    protocol     ETH_P_.., 0: it receives nothing
    device       name of the interface that it is bound to; empty: all
    switches     options of level SOL_PACKET that differ from a fresh socket's
    memberships  what it has made interfaces let through
    filter       the application's classic filter, and whether it is locked
    """

    type: int
    protocol: int
    device: str
    switches: dict[str, int]
    memberships: tuple[Listening, ...]
    buffers: Buffers
    filter: tuple[Instruction, ...] = ()
    filter_locked: bool = False

    def validate(self) -> None:
        if self.type not in (socket.SOCK_RAW, socket.SOCK_DGRAM) or not 0 <= self.protocol <= 0xFFFF:
            raise ValueError("type or protocol of a packet socket out of range")
        if (
            not {*self.switches} <= {*_Switch.__members__}
            or len(self.device) > 15
            or len(self.filter) > MAX_INSTRUCTIONS
        ):
            raise ValueError("options of a packet socket out of range")

    @classmethod
    def examine(cls, view: FdView) -> str:
        held_outside(view)
        own_classic_filter(view.socket, view.object)
        _asked(view)
        return "frames that pass during the move are not seen by this packet socket"

    @classmethod
    def capture(cls, view: FdView) -> Self:
        sock = view.socket
        name = sock.getsockname()
        return cls(
            type=int(sock.type),
            protocol=name[1],
            device=name[0],
            switches=_switches(sock),
            memberships=_asked(view),
            buffers=sizes(sock),
            filter=own_classic_filter(sock, view.object),
            filter_locked=bool(sock.getsockopt(Level.SOCKET, SO.LOCK_FILTER)),
            **view.common(),
        )

    def on_devices(self, devices: Mapping[str, str]) -> Self:
        members = tuple(replace(m, device=devices.get(m.device, m.device)) for m in self.memberships)
        return replace(self, device=devices.get(self.device, self.device), memberships=members)

    def check(self, host: Rebuilder) -> str:
        for device in {self.device, *(member.device for member in self.memberships)} - {""}:
            try:
                socket.if_nametoindex(device)
            except OSError:
                raise FileMissing("the interface of a packet socket is not here", object=device) from None
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        self.check(host)
        # with protocol 0 nothing is received before the filter stands; one that is bound to no interface has its own
        protocol = 0 if self.device else socket.htons(self.protocol)
        with socket.socket(socket.AF_PACKET, socket.SocketKind(self.type), protocol) as sock:
            give_filter(sock, bpf.DROP_ALL)
            _drain(sock)
            set_buffers(sock, self.buffers)
            for name, value in self.switches.items():
                sock.setsockopt(_SOL_PACKET, _Switch[name], value)
            for member in self.memberships:
                index = socket.if_nametoindex(member.device)
                request = _MREQ.pack(index, member.type, len(member.address), member.address.ljust(8, b"\0"))
                for _ in range(member.count):
                    sock.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, request)
            if self.device:
                sock.bind((self.device, self.protocol))
            set_flags(sock.fileno(), self.flags)
            return sock.detach()

    def release(self, host: Rebuilder, fd: int) -> None:
        with socket.socket(fileno=host.duplicate(fd)) as sock:
            give_own_filter(sock, self)


def _drain(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.recv(1, socket.MSG_DONTWAIT)


def _switches(sock: socket.socket) -> dict[str, int]:
    found = {}
    with socket.socket(socket.AF_PACKET, sock.type, 0) as fresh:
        for option in _Switch:
            try:
                value, default = (one.getsockopt(_SOL_PACKET, option) for one in (sock, fresh))
            except OSError:
                continue  # newer than this kernel
            if value != default:
                found[option.name] = value
    return found


def _asked(view: FdView) -> tuple[Listening, ...]:
    """The memberships; UnsupportedProtocol for a socket with a ring or in a fanout group."""
    attributes = _diag(view)
    for ring in (_Attribute.RX_RING, _Attribute.TX_RING):
        if any(attributes.get(ring, b"")):
            raise UnsupportedProtocol(f"packet socket with a mapped ring ({ring.name})", object=view.object)
    if _Attribute.FANOUT in attributes:
        raise UnsupportedProtocol("packet socket in a fanout group", object=view.object)
    members = []
    for index, count, kind, length, address in _MEMBER.iter_unpack(attributes.get(_Attribute.MCLIST, b"")):
        name = socket.if_indextoname(index)
        members.append(Listening(device=name, type=kind, address=address[: min(length, 8)], count=count))
    return tuple(members)


def _diag(view: FdView) -> dict[int, bytes]:
    """What packet_diag tells of the socket."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as diag:
        request = _REQUEST.pack(socket.AF_PACKET, 0, 0, 0, _SHOW, 0, 0)
        diag.send(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _DUMP, 1, 0) + request)
        while True:
            data = diag.recv(1 << 18)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind in (_DONE, _ERROR):
                    code = struct.unpack_from("<i", data, _HEADER.size)[0]
                    reason = os.strerror(-code) if code else "it does not know the socket"
                    raise UnsupportedProtocol(f"packet socket; packet_diag: {reason}", object=view.object)
                (inode,) = struct.unpack_from("<I", data, _HEADER.size + 4)
                if inode == view.stat.st_ino:
                    return _attributes(data[_HEADER.size + _MESSAGE : length])
                data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("<HH", data)
        if length < 4:
            break
        found[kind] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found
