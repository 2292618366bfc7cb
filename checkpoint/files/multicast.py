"""Multicast groups that a socket joined.

No call lists them. /proc/net/igmp and igmp6 list the groups of the namespace; MCAST_MSFILTER answers EADDRNOTAVAIL
for those that a socket is not a member of.

Source: include/uapi/linux/in.h (struct group_filter, group_req), net/ipv4/igmp.c, net/ipv6/mcast.c.
"""

from __future__ import annotations

import errno
import re
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, Self

from checkpoint.errors import UnsupportedProtocol
from tcpstate.kernel.sockets import Level, pack_address
from tcpstate.slotted import dataclass

__all__ = ["Membership", "join", "of_socket"]

_MCAST_JOIN_GROUP: Final = 42
_MCAST_MSFILTER: Final = 48
_EXCLUDE: Final = 0
_STORAGE: Final = 128  # struct sockaddr_storage
_GROUP_FILTER: Final = struct.Struct(f"=I4x{_STORAGE}sII")


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """One group on one interface."""

    group: str
    interface: str

    def __post_init__(self) -> None:
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in self.group else socket.AF_INET, self.group)
        except OSError:
            raise ValueError(f"{self.group!r} is not an address") from None
        if not 0 < len(self.interface) < 16:
            raise ValueError("not the name of an interface")

    def on_devices(self, devices: Mapping[str, str]) -> Self:
        """The same with the interface name of another host, if it is in ``devices``."""
        return replace(self, interface=devices.get(self.interface, self.interface))


def groups_ipv4(text: str) -> list[Membership]:
    """The groups in the text of /proc/net/igmp."""
    found = []
    interface = ""
    for line in text.splitlines()[1:]:
        head = re.match(r"(\d+)\s+(\S+)\s*:", line)
        if head:
            interface = head[2].rstrip(":")
        elif line.strip():
            # the group's four bytes are printed as one number in the machine's order
            raw = struct.pack("=I", int(line.split()[0], 16))
            found.append(Membership(group=socket.inet_ntop(socket.AF_INET, raw), interface=interface))
    return found


def groups_ipv6(text: str) -> list[Membership]:
    """The groups in the text of /proc/net/igmp6."""
    found = []
    for line in text.splitlines():
        _, interface, group, *_ = line.split()
        found.append(Membership(group=socket.inet_ntop(socket.AF_INET6, bytes.fromhex(group)), interface=interface))
    return found


def _candidates(family: int) -> list[Membership]:
    found = []
    with open("/proc/thread-self/net/igmp", encoding="ascii") as file:
        found += groups_ipv4(file.read())
    if family == socket.AF_INET6:
        try:
            with open("/proc/thread-self/net/igmp6", encoding="ascii") as file:
                found += groups_ipv6(file.read())
        except FileNotFoundError:
            # a kernel without IPv6 multicast: no groups
            return found
    return found


def _request(membership: Membership) -> tuple[int, int, bytes]:
    """(level, interface index, sockaddr) of a membership."""
    family = socket.AF_INET6 if ":" in membership.group else socket.AF_INET
    level = Level.IPV6 if family == socket.AF_INET6 else Level.IP
    index = socket.if_nametoindex(membership.interface)
    return level, index, pack_address(membership.group, 0, family=family).ljust(_STORAGE, b"\0")


def of_socket(sock: socket.socket, object: str) -> tuple[Membership, ...]:
    """The groups of a socket; UnsupportedProtocol if it joined one for certain sources only."""
    found = []
    for membership in _candidates(sock.family):
        level, index, address = _request(membership)
        try:
            answer = _ask(sock, level, _GROUP_FILTER.pack(index, address, 0, 0))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.ENOPROTOOPT, errno.EINVAL):
                continue
            raise
        _, _, mode, sources = _GROUP_FILTER.unpack(answer)
        if mode != _EXCLUDE or sources:
            raise UnsupportedProtocol(f"member of {membership.group} for certain sources only", object=object)
        found.append(membership)
    return tuple(found)


def _ask(sock: socket.socket, level: int, request: bytes) -> bytes:
    """getsockopt with an argument, which Python's has not."""
    import ctypes

    from tcpstate.kernel import batch
    from tcpstate.kernel.machine import SYS

    value = ctypes.create_string_buffer(request, len(request))
    length = ctypes.create_string_buffer(struct.pack("=I", len(request)), 4)
    batch.syscall(
        SYS.getsockopt, sock.fileno(), level, _MCAST_MSFILTER, ctypes.addressof(value), ctypes.addressof(length)
    )
    return value.raw


def join(sock: socket.socket, memberships: tuple[Membership, ...], warn: Callable[[str], None]) -> None:
    """Join the groups; a warning for each that cannot be joined here (no such interface)."""
    for membership in memberships:
        try:
            level, index, address = _request(membership)
            sock.setsockopt(level, _MCAST_JOIN_GROUP, struct.pack("=I4x", index) + address)
        except OSError as error:
            warn(f"group {membership.group} on {membership.interface} was not joined: {error.strerror}")
