"""UDP sockets, with the datagrams that wait in them.

Source: net/ipv4/udp.c, net/core/datagram.c (SO_PEEK_OFF). Datagrams keep arriving while the process rests: the record
is taken again at the freeze. At the target the socket drops everything until the release; then the waiting datagrams
are delivered from their senders' addresses, by a raw socket through the loopback device, as they could have arrived.
One that is being put together is begun again (:mod:`checkpoint.files.corked`).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import stat
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, Self

from checkpoint.errors import FileCaptureFailed, FileRebuildFailed
from checkpoint.files import corked, multicast
from checkpoint.files.base import FdView, OpenFile, register, set_flags
from checkpoint.files.corked import Corked
from checkpoint.files.inet import Endpoint
from checkpoint.files.listener import bind, new_socket, try_bind
from checkpoint.files.multicast import Membership
from checkpoint.files.sockopts import SocketOptions, before_bind, give_late, give_own_filter, save
from checkpoint.files.udpsend import deliver
from checkpoint.files.unix import held_outside
from tcpstate.filters import give_filter
from tcpstate.kernel import bpf
from tcpstate.kernel.sockets import SO, Level
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from checkpoint.files.rebuild import Rebuilder

__all__ = ["Datagram", "UdpFile", "delivered", "examine_datagrams"]

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
IP_PKTINFO: Final = 8
IPV6_RECVPKTINFO: Final = 49
_IPV6_PKTINFO: Final = 50
_LONGEST: Final = 1 << 16
_PEEK: Final = socket.MSG_PEEK | socket.MSG_DONTWAIT
_UNREACHABLE: Final = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EINVAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Datagram:
    """One unread datagram.

    sender  where it came from
    to      the address that it was sent to
    """

    data: bytes
    sender: Endpoint
    to: str

    def __post_init__(self) -> None:
        Endpoint(address=self.to, port=0)
        if len(self.data) >= _LONGEST:
            raise ValueError("a datagram is too long")

    def same_as(self, other: Datagram) -> bool:
        """Whether one may have been delivered as the other: that comes through the loopback device, whatever it was."""
        ours, theirs = self.sender, other.sender
        return (self.data, self.to, ours.address, ours.port) == (other.data, other.to, theirs.address, theirs.port)


def examine_datagrams(view: FdView) -> str:
    """:meth:`OpenFile.examine` of a UDP, raw or ICMP socket."""
    held_outside(view)
    save(view.socket, view.object)
    multicast.of_socket(view.socket, view.object)
    return ""


def _is_udp(view: FdView) -> bool:
    if view.dup < 0:
        return False
    sock = view.socket
    return sock.family in _FAMILIES and sock.type == socket.SOCK_DGRAM and sock.proto == socket.IPPROTO_UDP


@register("udp", mode=stat.S_IFSOCK, match=_is_udp)
@dataclass(frozen=True, slots=True, kw_only=True)
class UdpFile(OpenFile):
    """One UDP socket.

    family       AF_INET or AF_INET6
    name         what it is bound to, None: nothing
    peer         what it is connected to, None: nothing
    queue        unread datagrams
    memberships  multicast groups that it joined
    peek_off     SO_PEEK_OFF, -1: off
    corked       the datagram that is being put together, None: none is
    """

    foreseeable: ClassVar[bool] = True

    family: int
    name: Endpoint | None
    peer: Endpoint | None
    queue: tuple[Datagram, ...]
    memberships: tuple[Membership, ...]
    options: SocketOptions
    peek_off: int
    corked: Corked | None = None

    def validate(self) -> None:
        if self.family not in _FAMILIES:
            raise ValueError("not an internet socket")

    @classmethod
    def examine(cls, view: FdView) -> str:
        corked.examine(view)
        return examine_datagrams(view)

    @classmethod
    def capture(cls, view: FdView) -> Self:
        sock = view.socket
        name = Endpoint.of(sock.getsockname())
        peer = None
        with contextlib.suppress(OSError):  # ENOTCONN
            peer = Endpoint.of(sock.getpeername())
        return cls(
            family=int(sock.family),
            name=name if name.port else None,
            peer=peer,
            # read once only, as late as can be: a datagram of no bytes cannot be peeked at twice (net/core/datagram.c)
            queue=_queue(sock, name, view.object) if view.table.late else (),
            corked=corked.of_socket(view) if view.table.late else None,
            memberships=multicast.of_socket(sock, view.object),
            options=save(sock, view.object),
            peek_off=sock.getsockopt(Level.SOCKET, SO.PEEK_OFF),
            **view.common(),
        )

    def check(self, host: Rebuilder) -> str:
        if self.name is not None:
            try_bind(self.family, socket.SOCK_DGRAM, self.name, self.options)
        here = {name for _, name in socket.if_nameindex()}
        missing = sorted({one.interface for one in self.memberships} - here)
        if missing:
            return f"it cannot be in its multicast groups on {' '.join(missing)}: not here (--map-dev OLD=NEW)"
        return ""

    def rebuild(self, host: Rebuilder) -> int:
        sock = new_socket(self.family, socket.SOCK_DGRAM, str(self.name))
        before_bind(sock, self.options, str(self.name))
        give_filter(sock, bpf.DROP_ALL)
        if self.name is not None:
            bind(sock, self.name)
        if self.peer is not None:
            try:
                sock.connect(self.peer.sockaddr)
            except OSError as error:
                # No route yet: it comes with the address, and release tries again.
                if error.errno not in _UNREACHABLE:
                    raise FileRebuildFailed(f"connect: {error.strerror}", object=str(self.peer)) from error
        set_flags(sock.fileno(), self.flags)
        return sock.detach()

    def late(self, host: Rebuilder, fd: int) -> None:
        """The datagrams wait in the record until the release."""

    def release(self, host: Rebuilder, fd: int) -> None:
        with socket.socket(fileno=host.duplicate(fd)) as sock:
            begun = self.corked is not None and corked.begun(sock)
            if self.peer is not None and not begun:
                try:
                    sock.connect(self.peer.sockaddr)
                except OSError as error:
                    raise FileRebuildFailed(f"connect: {error.strerror}", object=str(self.peer)) from error
            give_late(sock, self.options, str(self.name))
            multicast.join(sock, self.memberships, host.warn)
            give_filter(sock, ())
            if self.name is not None:
                for datagram in self.queue[self._delivered(host, sock) :]:
                    deliver(datagram.data, datagram.sender, datagram.to, self.name.port, host.warn)
            give_own_filter(sock, self.options)
            sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, self.peek_off)
            if self.corked is not None and not begun:
                corked.begin_again(sock, self.corked, host.warn)

    def _delivered(self, host: Rebuilder, sock: socket.socket) -> int:
        """How many of the datagrams are in the socket's queue already. Its owner has not run, so none was taken."""
        if not (host.adopted and self.queue):
            return 0
        return delivered(self.queue, _queue(sock, Endpoint.of(sock.getsockname()), str(self.name)))


def delivered(queue: Sequence[Datagram], there: Iterable[Datagram]) -> int:
    """How many of ``queue`` a release that was cut short has put where these are, in their order; others may have come
    in between."""
    count = 0
    for one in there:
        count += count < len(queue) and one.same_as(queue[count])
    return count


def _queue(sock: socket.socket, name: Endpoint, object: str) -> tuple[Datagram, ...]:
    """All unread datagrams, which stay. The address that each was sent to is asked for, then forgotten again."""
    level, option = (Level.IP, IP_PKTINFO) if sock.family == socket.AF_INET else (Level.IPV6, IPV6_RECVPKTINFO)
    peek_before = sock.getsockopt(Level.SOCKET, SO.PEEK_OFF)
    info_before = sock.getsockopt(level, option)
    found: list[Datagram] = []
    try:
        sock.setsockopt(level, option, 1)
        sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, 0)
        while True:
            try:
                data, ancillary, flags, sender = sock.recvmsg(_LONGEST, 512, _PEEK)
            except BlockingIOError:
                return tuple(found)
            if flags & socket.MSG_TRUNC:
                raise FileCaptureFailed("a datagram cannot be read whole", object=object)
            found.append(Datagram(data=data, sender=Endpoint.of(sender), to=_destination(ancillary, name)))
    except OSError as error:
        raise FileCaptureFailed(f"unread datagrams: {error.strerror}", object=object) from error
    finally:
        sock.setsockopt(level, option, info_before)
        sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, peek_before)


def _destination(ancillary: list[tuple[int, int, bytes]], name: Endpoint) -> str:
    for level, number, data in ancillary:
        if (level, number) == (Level.IP, IP_PKTINFO):
            # struct in_pktinfo: interface, address of the interface, destination of the header
            return socket.inet_ntop(socket.AF_INET, data[8:12])
        if (level, number) == (Level.IPV6, _IPV6_PKTINFO):
            return socket.inet_ntop(socket.AF_INET6, data[:16])
    return name.address
