"""A UDP datagram that is being put together (UDP_CORK, MSG_MORE): begun again with the same bytes.

It belongs to the socket, and what the program sends next is added to it; so it must be there before the program runs.
Nothing leaves the host by that: it is sent when the program says so.

Source: net/ipv4/udp.c (udp_sendmsg, udp_push_pending_frames), udp(7).
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, Self

from checkpoint.errors import FileRebuildFailed, UnsupportedFile
from checkpoint.files.base import FdView
from checkpoint.files.inet import Endpoint
from checkpoint.kernel import corked
from tcpstate.errors import KernelFeatureMissing, KernelReadRefused
from tcpstate.kernel.sockets import IP, IPV6, SO, Level
from tcpstate.slotted import dataclass

__all__ = ["Corked", "begin_again", "begun", "examine", "nothing_corked", "of_socket"]

_UDP_LEVEL: Final = 17
_SEGMENT: Final = 103  # UDP_SEGMENT of linux/udp.h
_LONGEST: Final = 1 << 16
_MAPPED: Final = "::ffff:"
#: struct in_pktinfo: interface, source; struct in6_pktinfo: source, interface
_PKTINFO, _PKTINFO6 = struct.Struct("=I4s4x"), struct.Struct("=16sI")
_LINK_LOCAL: Final = (0xFE80, 0xFF02)
#: SK_MEMINFO_WMEM_ALLOC of linux/sock_diag.h: bytes of memory of what is to be sent
_TO_SEND: Final = 2
#: seconds in which what was sent leaves the host; so often a socket whose owner runs is looked at
_SENT, _PAUSE, _LOOKS = 0.05, 0.001, 5
#: what a source that is no address of this host is answered with
_NOT_HERE: Final = (errno.EINVAL, errno.EADDRNOTAVAIL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corked:
    """What is in it so far, and what its first sendmsg(2) told of it.

    data     its bytes
    to       where it goes
    source   from where, chosen when it was begun
    ttl      time to live or hop limit, 0: the socket's own
    tos      type of service or traffic class, -1: the socket's own
    segment  bytes of UDP_SEGMENT, 0: it is sent whole
    mark     SO_MARK
    """

    data: bytes
    to: Endpoint
    source: str
    ttl: int = 0
    tos: int = -1
    segment: int = 0
    mark: int = 0

    def __post_init__(self) -> None:
        Endpoint(address=self.source, port=0)
        if not self.to.port or len(self.data) >= _LONGEST or (":" in self.source) is not (":" in self.to.address):
            raise ValueError("a datagram is too long, goes nowhere, or is of two families")
        if not 0 <= self.ttl < 256 or not -1 <= self.tos < 256 or not 0 <= self.segment < _LONGEST:
            raise ValueError("time to live, type of service or segment size out of range")
        if not 0 <= self.mark < 1 << 32:
            raise ValueError("a mark is out of range")

    def on_devices(self, devices: Mapping[str, str]) -> Self:
        """The same with the interface names of another host, where they are in ``devices``."""
        return replace(self, to=self.to.on_devices(devices))


def _to_send(sock: socket.socket) -> int:
    """Bytes of memory of what is to be sent: of a datagram that is not finished, or that waits for the interface."""
    told = array.array("I", sock.getsockopt(Level.SOCKET, SO.MEMINFO, 9 * 4))
    return told[_TO_SEND]


def nothing_corked(view: FdView, why: str = "") -> None:
    """UnsupportedFile if a packet is being put together; ``why`` nobody knows what is in it."""
    end = time.monotonic() + _SENT
    # what was sent, and waits for the interface for a moment, counts as well
    while _to_send(view.socket):
        if time.monotonic() > end:
            raise UnsupportedFile(f"a datagram is not finished (UDP_CORK or MSG_MORE){why}", object=view.object)
        time.sleep(_PAUSE)


def examine(view: FdView) -> None:
    """UnsupportedFile if a datagram is being put together, and cannot be read here. Its owner may run."""
    corked.prepare()
    for left in reversed(range(_LOOKS)):
        try:
            of_socket(view)
        except UnsupportedFile:
            # a socket that is written to meanwhile does not read as one that rests
            if not left:
                raise
        else:
            return


def of_socket(view: FdView) -> Corked | None:
    """The datagram that a UDP socket is putting together. UnsupportedFile."""
    if not _to_send(view.socket):
        return None
    try:
        found = corked.pending(view.socket)
    except (KernelFeatureMissing, KernelReadRefused, OSError) as error:
        nothing_corked(view, f": {error}")
        return None
    return None if found is None else _record(found, view.socket)


def _record(found: corked.Pending, sock: socket.socket) -> Corked:
    mapped = _MAPPED if sock.family == socket.AF_INET6 and found.family == socket.AF_INET else ""
    scope = ""
    if found.family == socket.AF_INET6 and found.interface:
        first = int.from_bytes(socket.inet_pton(socket.AF_INET6, found.to)[:2], "big")
        scope = socket.if_indextoname(found.interface) if first in _LINK_LOCAL else ""
    return Corked(
        data=found.data,
        to=Endpoint(address=mapped + found.to, port=found.port, flow_info=found.label, scope=scope),
        source=mapped + found.source,
        ttl=found.ttl,
        tos=found.tos,
        segment=found.segment,
        mark=found.mark,
    )


def _told(datagram: Corked, family: int) -> list[tuple[int, int, bytes]]:
    """What sendmsg(2) is told besides, but for the source."""
    words: list[tuple[int, int, bytes]] = [(_UDP_LEVEL, _SEGMENT, struct.pack("=H", datagram.segment))]
    if datagram.mark:
        words.append((Level.SOCKET, SO.MARK, struct.pack("=I", datagram.mark)))
    four = family == socket.AF_INET
    if datagram.ttl:
        level, option = (Level.IP, IP.TTL) if four else (Level.IPV6, IPV6.HOPLIMIT)
        words.append((level, option, struct.pack("=i", datagram.ttl)))
    if datagram.tos >= 0:
        level, option = (Level.IP, IP.TOS) if four else (Level.IPV6, IPV6.TCLASS)
        words.append((level, option, struct.pack("=i", datagram.tos)))
    return words


def _source(datagram: Corked, family: int) -> tuple[int, int, bytes]:
    if family == socket.AF_INET:
        packed = socket.inet_pton(family, datagram.source.removeprefix(_MAPPED))
        return Level.IP, IP.PKTINFO, _PKTINFO.pack(0, packed)
    return Level.IPV6, IPV6.PKTINFO, _PKTINFO6.pack(socket.inet_pton(family, datagram.source), 0)


def begun(sock: socket.socket) -> bool:
    """Whether a rebuilt socket has it already, from a release that was cut short. To connect it again would lead the
    datagram elsewhere (net/ipv4/datagram.c: connect(2) uses the cork's own flow)."""
    return _to_send(sock) > 0


def begin_again(sock: socket.socket, datagram: Corked, warn: Callable[[str], None]) -> None:
    """Put the same bytes into a rebuilt socket, once it is connected: nothing is sent.

    ``warn`` is told if it will have another source. FileRebuildFailed.
    """
    four = ":" not in datagram.to.address or datagram.to.address.startswith(_MAPPED)
    family = socket.AF_INET if four else socket.AF_INET6
    told = _told(datagram, family)
    try:
        try:
            _put(sock, datagram, [*told, _source(datagram, family)])
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            _put(sock, datagram, told)
            gone = f"an unfinished datagram to {datagram.to} will not come from {datagram.source}: that is not here"
            warn(gone)
    except OSError as error:
        raise FileRebuildFailed(
            f"beginning an unfinished datagram again: {error.strerror}", object=str(datagram.to)
        ) from error


def _put(sock: socket.socket, datagram: Corked, told: list[tuple[int, int, bytes]]) -> None:
    flags = socket.MSG_MORE | socket.MSG_DONTWAIT
    if sock.sendmsg([datagram.data], told, flags, datagram.to.sockaddr) != len(datagram.data):
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
