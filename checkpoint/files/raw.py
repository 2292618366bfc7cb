"""Raw sockets, and the datagram sockets of ICMP (ping).

Source: net/ipv4/raw.c, net/ipv4/ping.c, net/ipv6/raw.c. Packets that wait to be read are not kept: nobody may rely on
them (the kernel drops what does not fit), and to let them arrive once more the kernel's own ICMP would answer again. A
warning tells how many there were. A packet that is being put together (MSG_MORE) is refused.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import socket
import stat
from typing import TYPE_CHECKING, Final, Self

from checkpoint.errors import FileRebuildFailed, UnsupportedProtocol
from checkpoint.files import multicast
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.corked import nothing_corked
from checkpoint.files.inet import Endpoint
from checkpoint.files.listener import bind
from checkpoint.files.multicast import Membership
from checkpoint.files.sockopts import SocketOptions, before_bind, give_late, give_own_filter, save
from checkpoint.files.udp import examine_datagrams
from tcpstate.filters import give_filter
from tcpstate.kernel import bpf
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["RawFile"]

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_PING: Final = (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6)
_UNREACHABLE: Final = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EINVAL)


class _Special(enum.Enum):
    """(level, number, size) of options that only such sockets have (linux/in.h, icmp.h, in6.h, icmpv6.h)."""

    HEADER_INCLUDED = (0, 3, 4)
    ICMP_FILTER = (255, 1, 4)
    CHECKSUM6 = (41, 7, 4)
    HEADER_INCLUDED6 = (41, 36, 4)
    ICMP6_FILTER = (58, 1, 32)


def _is_raw(view: FdView) -> bool:
    if view.dup < 0 or view.socket.family not in _FAMILIES:
        return False
    sock = view.socket
    return sock.type == socket.SOCK_RAW or (sock.type == socket.SOCK_DGRAM and sock.proto in _PING)


@register("raw socket", mode=stat.S_IFSOCK, match=_is_raw)
@dataclass(frozen=True, slots=True, kw_only=True)
class RawFile(OpenFile):
    """One raw or ICMP socket.

    family, type, protocol  AF_INET or AF_INET6, SOCK_RAW or SOCK_DGRAM, IPPROTO_..
    name         what it is bound to; the port is the identifier of an ICMP socket, else 0; None: nothing
    peer         what it is connected to, None: nothing
    special      the options that only such sockets have, by name
    memberships  multicast groups that it joined
    unread       packets waited: they are not kept
    """

    family: int
    type: int
    protocol: int
    name: Endpoint | None
    peer: Endpoint | None
    special: dict[str, bytes]
    memberships: tuple[Membership, ...]
    options: SocketOptions
    unread: bool = False

    def validate(self) -> None:
        raw = self.type == socket.SOCK_RAW and 0 <= self.protocol < 256
        if self.family not in _FAMILIES or not (raw or (self.type == socket.SOCK_DGRAM and self.protocol in _PING)):
            raise ValueError("neither a raw nor an ICMP socket")
        for name, value in self.special.items():
            if name not in _Special.__members__ or len(value) != _Special[name].value[2]:
                raise ValueError(f"{name} has {len(value)} bytes")

    @classmethod
    def examine(cls, view: FdView) -> str:
        nothing_corked(view)
        return examine_datagrams(view)

    @classmethod
    def capture(cls, view: FdView) -> Self:
        nothing_corked(view)
        sock = view.socket
        name = Endpoint.of(sock.getsockname())
        bound = not name.wildcard or (sock.type == socket.SOCK_DGRAM and name.port)
        if sock.type == socket.SOCK_RAW:
            name = Endpoint(address=name.address, port=0, scope=name.scope)
        return cls(
            family=int(sock.family),
            type=int(sock.type),
            protocol=sock.proto,
            name=name if bound else None,
            peer=_peer(view),
            special=_special(sock),
            memberships=multicast.of_socket(sock, view.object),
            options=save(sock, view.object),
            unread=_unread(sock),
            **view.common(),
        )

    def _made(self) -> socket.socket:
        try:
            return socket.socket(socket.AddressFamily(self.family), socket.SocketKind(self.type), self.protocol)
        except OSError as error:
            hint = " (net.ipv4.ping_group_range)" if self.type == socket.SOCK_DGRAM else ""
            raise UnsupportedProtocol(
                f"such a socket cannot be made here: {error.strerror}{hint}", object=f"protocol {self.protocol}"
            ) from None

    def check(self, host: Rebuilder) -> str:
        self._made().close()
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        if self.unread:
            host.warn("packets that waited in a raw socket are dropped")
        with self._made() as sock:
            subject = f"raw socket of protocol {self.protocol}"
            before_bind(sock, self.options, subject)
            give_filter(sock, bpf.DROP_ALL)
            if self.name is not None:
                bind(sock, self.name)
            for name, value in self.special.items():
                level, number, _ = _Special[name].value
                sock.setsockopt(level, number, value)
            if self.peer is not None:
                try:
                    sock.connect(self.peer.sockaddr)
                except OSError as error:
                    # No route yet: it comes with the address, and release tries again.
                    if error.errno not in _UNREACHABLE:
                        raise
            set_flags(sock.fileno(), self.flags)
            return sock.detach()

    def release(self, host: Rebuilder, fd: int) -> None:
        with socket.socket(fileno=host.duplicate(fd)) as sock:
            if self.peer is not None:
                try:
                    sock.connect(self.peer.sockaddr)
                except OSError as error:
                    raise FileRebuildFailed(f"connect: {error.strerror}", object=str(self.peer)) from error
            give_late(sock, self.options, f"raw socket of protocol {self.protocol}")
            multicast.join(sock, self.memberships, host.warn)
            give_own_filter(sock, self.options)


def _peer(view: FdView) -> Endpoint | None:
    """What it is connected to. getpeername() says nothing where the port is 0; /proc/net/raw does."""
    sock = view.socket
    with contextlib.suppress(OSError):  # ENOTCONN
        return Endpoint.of(sock.getpeername())
    if sock.type == socket.SOCK_DGRAM:
        return None
    pid = view.places[0][0] if view.places else os.getpid()
    with open(f"/proc/{pid}/net/{'raw6' if sock.family == socket.AF_INET6 else 'raw'}", encoding="ascii") as lines:
        for line in lines:
            # sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode
            words = line.split()
            if len(words) > 9 and words[9] == str(view.stat.st_ino):
                packed = bytes.fromhex(words[2].partition(":")[0])
                # words in the byte order of the machine
                in_order = b"".join(packed[at : at + 4][::-1] for at in range(0, len(packed), 4))
                return Endpoint(address=socket.inet_ntop(sock.family, in_order), port=0) if any(packed) else None
    return None


def _special(sock: socket.socket) -> dict[str, bytes]:
    """Those that differ from a fresh socket's."""
    found = {}
    with socket.socket(sock.family, sock.type, sock.proto) as fresh:
        for option in _Special:
            try:
                value = sock.getsockopt(*option.value)
                default = fresh.getsockopt(*option.value)
            except OSError as error:
                if error.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL):
                    continue  # not of this family or protocol
                raise
            if value != default:
                found[option.name] = value
    return found


def _unread(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(error.errno, f"unread packets: {os.strerror(error.errno or 0)}") from None
    return True
