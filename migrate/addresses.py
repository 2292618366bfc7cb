"""What a host has of addresses: records of interfaces, addresses and routes, read by rtnetlink.

:class:`AddressRecord` and :class:`RouteRecord` are portable: they travel to the target.  :class:`Configuration` is a
picture of this host, kept (in the journal too) so that it can be put back exactly: of routes it holds the kernel's own
bytes.

Source: net/ipv4/devinet.c, net/ipv4/fib_frontend.c, net/ipv6/addrconf.c.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import replace

from migrate.errors import AddressSyntax
from migrate.routes import RouteRecord, RuleRecord, configured
from migrate.rtnetlink import Netlink
from tcpstate.kernel.rtnetlink import (
    ADDRESS_HEADER,
    INFINITE,
    LINK_HEADER,
    ROUTE_HEADER,
    AddressAttribute,
    AddressFlag,
    LinkAttribute,
    LinkFlag,
    MessageType,
    attribute,
    attributes,
    packed_address,
    unpacked_address,
)
from tcpstate.slotted import dataclass

__all__ = [
    "AddressRecord",
    "Configuration",
    "InterfaceRecord",
    "add_body",
    "delete_body",
    "link_name",
    "parse_address",
    "read_configuration",
    "stable_flags",
]

_CACHE = struct.Struct("=IIII")  # struct ifa_cacheinfo: preferred, valid, created, updated
_FOR_EVER = _CACHE.pack(INFINITE, INFINITE, 0, 0)
_U32 = struct.Struct("=I")
_ETHERNET = 1  # ARPHRD_ETHER

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressRecord:
    """One address of an interface.

    address, prefixlen   the address itself and the length of its subnet
    interface            name of the interface that has it, at the source
    scope                RT_SCOPE_*
    flags                IFA_F_*
    label                IPv4: ``eth0`` or ``eth0:name``, else empty
    broadcast            IPv4, or empty
    peer                 other end of a point-to-point address, or empty
    valid, preferred     seconds left; 2**32-1 is for ever
    priority             metric of the subnet's route; 0 for the kernel's default
    protocol             IFAPROT_*: who made it
    routes, rules        that depend on it
    """

    address: str
    prefixlen: int
    interface: str
    scope: int = 0
    flags: int = 0
    label: str = ""
    broadcast: str = ""
    peer: str = ""
    valid: int = INFINITE
    preferred: int = INFINITE
    priority: int = 0
    protocol: int = 0
    routes: tuple[RouteRecord, ...] = ()
    rules: tuple[RuleRecord, ...] = ()

    def __post_init__(self) -> None:
        # refuses an address that is none, and a prefix that is too long for it; canonical text makes equality mean it
        interface = ipaddress.ip_interface(f"{self.address}/{self.prefixlen}")
        if str(interface.ip) != self.address:
            raise ValueError(f"{self.address!r} is not written in its canonical form")
        for text in (self.broadcast, self.peer):
            if text and ipaddress.ip_address(text).version != interface.version:
                raise ValueError(f"{text} belongs to another family than {self.address}")
        for value in (self.flags, self.valid, self.preferred, self.priority):
            if not 0 <= value <= INFINITE:
                raise ValueError(f"{value} is outside 32 bits")
        if not (0 <= self.scope <= 255 and 0 <= self.protocol <= 255):
            raise ValueError("scope or protocol is outside 8 bits")
        if len(self.label) > 15 or "\0" in self.label:
            raise ValueError(f"label {self.label!r} is longer than the kernel's 15 bytes")

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""
        return socket.AF_INET if ipaddress.ip_address(self.address).version == 4 else socket.AF_INET6

    @property
    def network(self) -> Network:
        """The subnet (of the other end, if there is one)."""
        return ipaddress.ip_network(f"{self.peer or self.address}/{self.prefixlen}", strict=False)

    @property
    def secondary(self) -> bool:
        """IPv4: another address of the same subnet comes first, and this one goes when that one does."""
        return self.family == socket.AF_INET and bool(self.flags & AddressFlag.SECONDARY)

    @property
    def limited(self) -> bool:
        """Whether it expires."""
        return (self.valid, self.preferred) != (INFINITE, INFINITE)

    def aged(self, seconds: float) -> AddressRecord:
        """The record after some time: less of its life is left. One that is about to expire keeps its last second."""
        if not self.limited:
            return self

        def left(life: int, least: int) -> int:
            return life if life == INFINITE else max(least, life - int(seconds))

        return replace(self, valid=left(self.valid, 1), preferred=left(self.preferred, 0))

    @property
    def temporary(self) -> bool:
        """IPv6: made by the kernel from another one, for privacy (RFC 8981). The same flag as ``secondary``'s."""
        return self.family == socket.AF_INET6 and bool(self.flags & AddressFlag.SECONDARY)

    def __str__(self) -> str:
        return f"{self.address}/{self.prefixlen}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceRecord:
    """One interface and its addresses, in the kernel's order."""

    index: int
    name: str
    mac: str
    flags: int
    addresses: tuple[AddressRecord, ...] = ()

    @property
    def loopback(self) -> bool:
        """Whether it is the loopback interface."""
        return bool(self.flags & LinkFlag.LOOPBACK)

    @property
    def up(self) -> bool:
        """Whether it is administratively up."""
        return bool(self.flags & LinkFlag.UP)

    @property
    def resolves(self) -> bool:
        """Whether neighbours are found by ARP or ND here: it has a six-byte hardware address and is not loopback."""
        return not self.flags & (LinkFlag.LOOPBACK | LinkFlag.NOARP) and len(self.mac) == 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """The interfaces and routes of a network namespace.

    routes  bodies of RTM_NEWROUTE messages: all routes but those that follow from the addresses by themselves
    rules   bodies of RTM_NEWRULE messages
    taken   when: CLOCK_BOOTTIME, seconds; 0: not known
    """

    interfaces: tuple[InterfaceRecord, ...]
    routes: tuple[bytes, ...] = ()
    rules: tuple[bytes, ...] = ()
    taken: float = 0.0

    @property
    def age(self) -> float:
        """Seconds since it was taken, on this host; 0 if that is not known."""
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - self.taken) if self.taken else 0.0

    def all(self, address: str) -> list[InterfaceRecord]:
        """The interfaces that have ``address``."""
        return [i for i in self.interfaces if any(record.address == address for record in i.addresses)]

    def find(self, address: str) -> tuple[InterfaceRecord, AddressRecord] | None:
        """The interface that has ``address``, and its record."""
        for interface in self.interfaces:
            for record in interface.addresses:
                if record.address == address:
                    return interface, record
        return None

    def named(self, name: str) -> InterfaceRecord | None:
        """The interface of that name."""
        return next((i for i in self.interfaces if i.name == name), None)


def parse_address(text: str) -> tuple[str, int | None]:
    """(address, prefix length or None) of ``ADDR`` or ``ADDR/LEN``; AddressSyntax if it is neither."""
    address, slash, length = text.partition("/")
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError as error:
        raise AddressSyntax(str(error), object=address) from None
    return str(interface.ip), int(length) if slash else None


def read_configuration(netlink: Netlink) -> Configuration:
    """The picture of this network namespace as it is now."""
    links = netlink.dump(MessageType.GETLINK, LINK_HEADER.pack(0, 0, 0, 0, 0))
    found = netlink.dump(MessageType.GETADDR, ADDRESS_HEADER.pack(0, 0, 0, 0, 0))
    names = {}
    for body in links:
        names[LINK_HEADER.unpack_from(body)[2]] = link_name(attributes(body, LINK_HEADER.size))
    addresses: dict[int, list[AddressRecord]] = {}
    for body in found:
        index = ADDRESS_HEADER.unpack_from(body)[4]
        if body[0] in (socket.AF_INET, socket.AF_INET6):
            addresses.setdefault(index, []).append(_address(body, names.get(index, "")))
    interfaces = []
    for body in links:
        _, hardware, index, flags, _ = LINK_HEADER.unpack_from(body)
        mac = attributes(body, LINK_HEADER.size).get(LinkAttribute.ADDRESS, b"") if hardware == _ETHERNET else b""
        interfaces.append(
            InterfaceRecord(
                index=index,
                name=names[index],
                mac=mac.hex(":"),
                flags=flags,
                addresses=tuple(addresses.get(index, ())),
            )
        )
    routes = (
        body
        for family in (socket.AF_INET, socket.AF_INET6)
        for body in netlink.dump(MessageType.GETROUTE, ROUTE_HEADER.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
        if configured(body)
    )
    rules = (
        body
        for family in (socket.AF_INET, socket.AF_INET6)
        for body in netlink.dump(MessageType.GETRULE, ROUTE_HEADER.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
    )
    taken = time.clock_gettime(time.CLOCK_BOOTTIME)
    return Configuration(interfaces=tuple(interfaces), routes=tuple(routes), rules=tuple(rules), taken=taken)


def link_name(told: Mapping[int, bytes]) -> str:
    """The name of an interface, out of its attributes: any bytes."""
    return os.fsdecode(told.get(LinkAttribute.IFNAME, b"").partition(b"\0")[0])


def _address(body: bytes, interface: str) -> AddressRecord:
    """Out of the body of an RTM_NEWADDR."""
    _, prefixlen, low_flags, scope, _ = ADDRESS_HEADER.unpack_from(body)
    told = attributes(body, ADDRESS_HEADER.size)
    far = told[AddressAttribute.ADDRESS] if AddressAttribute.ADDRESS in told else told[AddressAttribute.LOCAL]
    near = told.get(AddressAttribute.LOCAL, far)
    preferred, valid, _, _ = _CACHE.unpack(told.get(AddressAttribute.CACHE, _FOR_EVER))
    broadcast = told.get(AddressAttribute.BROADCAST)
    return AddressRecord(
        address=unpacked_address(near),
        prefixlen=prefixlen,
        interface=interface,
        scope=scope,
        # all 32 bits, of which the header has eight
        flags=_number(told.get(AddressAttribute.FLAGS, bytes([low_flags]))),
        label=os.fsdecode(told.get(AddressAttribute.LABEL, b"").partition(b"\0")[0]),
        broadcast=unpacked_address(broadcast) if broadcast else "",
        peer="" if far == near else unpacked_address(far),
        valid=valid,
        preferred=preferred,
        priority=_number(told.get(AddressAttribute.PRIORITY, b"")),
        protocol=_number(told.get(AddressAttribute.PROTOCOL, b"")),
    )


def _number(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)


def stable_flags(record: AddressRecord) -> int:
    """The flags that somebody chose, without those that the kernel keeps about the address's life."""
    state = AddressFlag.SECONDARY | AddressFlag.TENTATIVE | AddressFlag.DADFAILED | AddressFlag.DEPRECATED
    return record.flags & ~(state | AddressFlag.PERMANENT)


def add_body(record: AddressRecord, index: int, flags: int) -> bytes:
    """The body of RTM_NEWADDR that makes ``record`` on interface ``index`` with IFA_F_* ``flags``."""
    family, packed = packed_address(record.address)
    body = ADDRESS_HEADER.pack(family, record.prefixlen, flags & 0xFF, record.scope, index)
    body += attribute(AddressAttribute.LOCAL, packed)
    body += attribute(AddressAttribute.ADDRESS, packed_address(record.peer)[1] if record.peer else packed)
    body += attribute(AddressAttribute.FLAGS, _U32.pack(flags))
    if record.label:
        body += attribute(AddressAttribute.LABEL, record.label.encode() + b"\0")
    if record.broadcast:
        body += attribute(AddressAttribute.BROADCAST, packed_address(record.broadcast)[1])
    if record.priority:
        body += attribute(AddressAttribute.PRIORITY, _U32.pack(record.priority))
    if record.protocol:
        body += attribute(AddressAttribute.PROTOCOL, bytes([record.protocol]))
    if (record.valid, record.preferred) != (INFINITE, INFINITE):
        body += attribute(AddressAttribute.CACHE, _CACHE.pack(record.preferred, record.valid, 0, 0))
    return body


def delete_body(record: AddressRecord, index: int) -> bytes:
    """The body of RTM_DELADDR for exactly this address."""
    family, packed = packed_address(record.address)
    body = ADDRESS_HEADER.pack(family, record.prefixlen, 0, 0, index) + attribute(AddressAttribute.LOCAL, packed)
    return body + attribute(AddressAttribute.ADDRESS, packed_address(record.peer)[1] if record.peer else packed)
