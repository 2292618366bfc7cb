"""Netlink sockets: port, groups, options.

Source: net/netlink/af_netlink.c; /proc/net/netlink (port, dump under way, unread bytes, inode). Messages of the kernel
cannot be put into a queue again: a socket with unread ones, or in the middle of a dump, is refused until it has read
them. What is told to groups during the move is lost, as a target has another network anyway; a warning says so.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from typing import TYPE_CHECKING, Final, Self

from checkpoint.errors import FileRebuildFailed, UnreadKernelMessages, UnsupportedProtocol
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.sockopts import give_own_filter, own_classic_filter, set_buffers, sizes
from checkpoint.files.unix import held_outside
from tcpstate.kernel.bpf import MAX_INSTRUCTIONS, Instruction
from tcpstate.kernel.sockets import SO, Level
from tcpstate.record import Buffers
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["NetlinkFile"]

#: linux/socket.h, linux/netlink.h
_SOL_NETLINK: Final = 270
_ADD_MEMBERSHIP: Final = 1
_LIST_MEMBERSHIPS: Final = 9
#: options that are on or off: packet info, broadcast errors, no ENOBUFS, all namespaces, short and extended
#: acknowledgements, strict checks
_SWITCHES: Final = (3, 4, 5, 8, 10, 11, 12)
#: as many as Python asks for
_GROUP_BYTES: Final = 1024
_MOST_GROUPS: Final = 8 * _GROUP_BYTES


@register("netlink", mode=stat.S_IFSOCK, match=lambda view: view.dup >= 0 and view.socket.family == socket.AF_NETLINK)
@dataclass(frozen=True, slots=True, kw_only=True)
class NetlinkFile(OpenFile):
    """One netlink socket.

    type, protocol  SOCK_RAW or SOCK_DGRAM, NETLINK_..
    port            its address, 0: not bound
    groups          those that it has joined
    peer            (port, groups) that it is connected to
    switches        options of level SOL_NETLINK that are on
    passes          credentials are asked for (SO_PASSCRED)
    filter          the application's classic filter, and whether it is locked
    """

    type: int
    protocol: int
    port: int
    groups: tuple[int, ...]
    peer: tuple[int, int]
    switches: tuple[int, ...]
    passes: bool
    buffers: Buffers
    filter: tuple[Instruction, ...] = ()
    filter_locked: bool = False

    def validate(self) -> None:
        if self.type not in (socket.SOCK_RAW, socket.SOCK_DGRAM) or not 0 <= self.protocol < 256:
            raise ValueError("not a netlink socket")
        if not {*self.switches} <= {*_SWITCHES} or len(self.filter) > MAX_INSTRUCTIONS:
            raise ValueError("options of a netlink socket out of range")
        if (
            not all(0 < group <= _MOST_GROUPS for group in self.groups)
            or not 0 <= self.port < 1 << 32
            or any(not 0 <= word < 1 << 32 for word in self.peer)
        ):
            raise ValueError("port or groups of a netlink socket out of range")

    @classmethod
    def examine(cls, view: FdView) -> str:
        held_outside(view)
        _refuse_unread(view)
        own_classic_filter(view.socket, view.object)
        return "what is told to its groups during the move is lost" if _groups(view.socket) else ""

    @classmethod
    def capture(cls, view: FdView) -> Self:
        _refuse_unread(view)
        sock = view.socket
        peer = sock.getpeername()
        return cls(
            type=int(sock.type),
            protocol=sock.proto,
            port=sock.getsockname()[0],
            groups=_groups(sock),
            peer=(peer[0], peer[1]),
            switches=tuple(number for number in _SWITCHES if _is_on(sock, number)),
            passes=bool(sock.getsockopt(Level.SOCKET, socket.SO_PASSCRED)),
            buffers=sizes(sock),
            filter=own_classic_filter(sock, view.object),
            filter_locked=bool(sock.getsockopt(Level.SOCKET, SO.LOCK_FILTER)),
            **view.common(),
        )

    def check(self, host: Rebuilder) -> str:
        try:
            socket.socket(socket.AF_NETLINK, socket.SocketKind(self.type), self.protocol).close()
        except OSError as error:
            raise UnsupportedProtocol(
                f"this kernel has no netlink protocol {self.protocol}: {error.strerror}", object="netlink"
            ) from None
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        with socket.socket(socket.AF_NETLINK, socket.SocketKind(self.type), self.protocol) as sock:
            set_buffers(sock, self.buffers)
            if self.port:
                self._bind(sock, host)
            for number in self.switches:
                sock.setsockopt(_SOL_NETLINK, number, 1)
            for group in self.groups:
                try:
                    sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
                except OSError as error:
                    raise FileRebuildFailed(
                        f"group {group} of netlink protocol {self.protocol}: {error.strerror}", object="netlink"
                    ) from error
            if any(self.peer):
                sock.connect(self.peer)
            sock.setsockopt(Level.SOCKET, socket.SO_PASSCRED, self.passes)
            give_own_filter(sock, self)
            set_flags(sock.fileno(), self.flags)
            return sock.detach()

    def _bind(self, sock: socket.socket, host: Rebuilder) -> None:
        try:
            sock.bind((self.port, 0))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            sock.bind((0, 0))
            host.warn(f"netlink port {self.port} is taken here: the socket has {sock.getsockname()[0]} now")


def _groups(sock: socket.socket) -> tuple[int, ...]:
    bits = sock.getsockopt(_SOL_NETLINK, _LIST_MEMBERSHIPS, _GROUP_BYTES)
    words = struct.unpack(f"<{len(bits) // 4}I", bits)
    return tuple(32 * at + bit + 1 for at, word in enumerate(words) for bit in range(32) if word >> bit & 1)


def _is_on(sock: socket.socket, number: int) -> bool:
    try:
        return bool(sock.getsockopt(_SOL_NETLINK, number))
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return False  # newer than this kernel
        raise


def _refuse_unread(view: FdView) -> None:
    pid = view.places[0][0] if view.places else os.getpid()
    with open(f"/proc/{pid}/net/netlink", encoding="ascii") as lines:
        for line in lines:
            # sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
            words = line.split()
            if words[-1] == str(view.stat.st_ino):
                if int(words[4]):
                    raise UnreadKernelMessages("netlink messages wait to be read", object=view.object)
                if int(words[6]):
                    raise UnreadKernelMessages("a netlink dump is under way", object=view.object)
