"""Telling the link where an address is now, and asking whether it is free: ARP and neighbour discovery frames.

The first half makes and reads frames and touches no socket.  :class:`LinkSocket` sends and receives them on one
interface; it is opened before the stop.

An address is announced by an ARP request *and* an ARP reply for itself: hosts differ in which of the two they learn
from (Linux takes both where it has an entry already; other stacks only one of them).  RFC 5227 section 3, RFC 826.
IPv6: an unsolicited neighbour advertisement with the override flag to all nodes, RFC 4861 section 7.2.6.  Frames get
lost, so they are repeated, by the caller, at :data:`REPEATS`.

Probes are those of duplicate address detection: an ARP request from 0.0.0.0 (RFC 5227 section 2.1.1), a neighbour
solicitation from :: (RFC 4862 section 5.4.2); nobody's cache changes by them.
"""

from __future__ import annotations

import ctypes
import enum
import ipaddress
import select
import socket
import struct
import time
from collections.abc import Collection, Iterable

from tcpstate.slotted import dataclass

__all__ = ["REPEATS", "Claim", "LinkSocket", "announcement", "claim", "probe"]

#: seconds after the first announcement at which it is repeated
REPEATS = (0.001, 0.01, 0.05, 0.2, 0.5)


class EtherType(enum.IntEnum):
    """ETH_P_* (linux/if_ether.h)."""

    ARP = 0x0806
    IPV6 = 0x86DD


class ArpOperation(enum.IntEnum):
    """ARPOP_* (linux/if_arp.h)."""

    REQUEST = 1
    REPLY = 2


class Icmp6(enum.IntEnum):
    """Types of ICMPv6 messages (RFC 4861)."""

    NEIGHBOUR_SOLICITATION = 135
    NEIGHBOUR_ADVERTISEMENT = 136


class NdOption(enum.IntEnum):
    """Options of neighbour discovery (RFC 4861 section 4.6.1); their length counts units of eight bytes."""

    TARGET_LINK_ADDRESS = 2


class SocketOption(enum.IntEnum):
    """SO_* (asm-generic/socket.h)."""

    ATTACH_FILTER = 26


ETHERNET = struct.Struct("!6s6sH")
ARP = struct.Struct("!HHBBH6s4s6s4s")
IPV6 = struct.Struct("!IHBB16s16s")
ICMP6 = struct.Struct("!BBHI")
BROADCAST_MAC = b"\xff" * 6
NO_MAC = bytes(6)
ARPHRD_ETHER = 1
ETH_P_IP = 0x0800
HOP_LIMIT = 255  # neighbour discovery is refused with any other: it would have come through a router
OVERRIDE = 1 << 29  # in the flags word of an advertisement
ALL_NODES = ipaddress.IPv6Address("ff02::1").packed
SOLICITED_NODE = ipaddress.IPv6Address("ff02::1:ff00:0").packed[:13]
UNSPECIFIED = bytes(16)
VERSION6 = 6 << 28

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Claim:
    """A frame in which a machine says that it has an address."""

    address: str
    mac: str


def announcement(address: str, mac: str) -> list[bytes]:
    """The frames that say that ``address`` is at ``mac`` now."""
    ip, hardware = ipaddress.ip_address(address), _mac(mac)
    if isinstance(ip, ipaddress.IPv4Address):
        return [
            _arp(ArpOperation.REQUEST, hardware, ip.packed, NO_MAC, ip.packed),
            _arp(ArpOperation.REPLY, hardware, ip.packed, BROADCAST_MAC, ip.packed),
        ]
    option = bytes([NdOption.TARGET_LINK_ADDRESS, 1]) + hardware
    return [_icmp6(hardware, ip.packed, ALL_NODES, Icmp6.NEIGHBOUR_ADVERTISEMENT, OVERRIDE, ip.packed + option)]


def probe(address: str, mac: str) -> bytes:
    """The frame that asks who has ``address``, without claiming it."""
    ip, hardware = ipaddress.ip_address(address), _mac(mac)
    if isinstance(ip, ipaddress.IPv4Address):
        return _arp(ArpOperation.REQUEST, hardware, bytes(4), NO_MAC, ip.packed)
    group = SOLICITED_NODE + ip.packed[13:]
    return _icmp6(hardware, UNSPECIFIED, group, Icmp6.NEIGHBOUR_SOLICITATION, 0, ip.packed)


def claim(frame: bytes) -> Claim | None:
    """What an ARP frame or a neighbour advertisement claims; None for everything else, malformed frames too."""
    if len(frame) < ETHERNET.size:
        return None
    _, source, kind = ETHERNET.unpack_from(frame)
    if kind == EtherType.ARP and len(frame) >= ETHERNET.size + ARP.size:
        hardware, protocol, mac_size, ip_size, _, mac, ip, _, _ = ARP.unpack_from(frame, ETHERNET.size)
        # a sender of 0.0.0.0 is a probe of somebody else: it claims nothing
        if (hardware, protocol, mac_size, ip_size) == (ARPHRD_ETHER, ETH_P_IP, 6, 4) and any(ip):
            return Claim(str(ipaddress.IPv4Address(ip)), mac.hex(":"))
    body = ETHERNET.size + IPV6.size
    if kind == EtherType.IPV6 and len(frame) >= body + ICMP6.size + 16:
        _, _, next_header, hops, _, _ = IPV6.unpack_from(frame, ETHERNET.size)
        if next_header == socket.IPPROTO_ICMPV6 and hops == HOP_LIMIT and frame[body] == Icmp6.NEIGHBOUR_ADVERTISEMENT:
            target = frame[body + ICMP6.size : body + ICMP6.size + 16]
            mac6 = _link_option(frame[body + ICMP6.size + 16 :]) or source.hex(":")
            return Claim(str(ipaddress.IPv6Address(target)), mac6)
    return None


def _mac(text: str) -> bytes:
    mac = bytes.fromhex(text.replace(":", ""))
    if len(mac) != 6:
        raise ValueError(f"{text!r} is not an Ethernet address")
    return mac


def _arp(operation: ArpOperation, mac: bytes, ip: bytes, target_mac: bytes, target_ip: bytes) -> bytes:
    return ETHERNET.pack(BROADCAST_MAC, mac, EtherType.ARP) + ARP.pack(
        ARPHRD_ETHER, ETH_P_IP, 6, 4, operation, mac, ip, target_mac, target_ip
    )


def _icmp6(mac: bytes, source: bytes, destination: bytes, kind: Icmp6, flags: int, rest: bytes) -> bytes:
    length = ICMP6.size + len(rest)
    # RFC 8200 section 8.1: the pseudo-header
    pseudo = source + destination + struct.pack("!II", length, socket.IPPROTO_ICMPV6)
    checksum = _checksum(pseudo + ICMP6.pack(kind, 0, 0, flags) + rest)
    # RFC 2464 section 7: multicast is mapped to 33:33 and the last four bytes
    return (
        ETHERNET.pack(b"\x33\x33" + destination[12:], mac, EtherType.IPV6)
        + IPV6.pack(VERSION6, length, socket.IPPROTO_ICMPV6, HOP_LIMIT, source, destination)
        + ICMP6.pack(kind, 0, checksum, flags)
        + rest
    )


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _link_option(options: bytes) -> str:
    while len(options) >= 8 and options[1]:
        if options[0] == NdOption.TARGET_LINK_ADDRESS and options[1] == 1:
            return options[2:8].hex(":")
        options = options[8 * options[1] :]
    return ""


# Classic BPF, linux/filter.h: {code, jump if true, jump if false, k}
_LOAD_HALF, _LOAD_BYTE, _JUMP_EQUAL, _RETURN = 0x28, 0x30, 0x15, 0x06
_CLAIMS_ONLY = (
    (_LOAD_HALF, 0, 0, 12),  # EtherType
    (_JUMP_EQUAL, 5, 0, EtherType.ARP),
    (_JUMP_EQUAL, 0, 5, EtherType.IPV6),
    (_LOAD_BYTE, 0, 0, ETHERNET.size + 6),  # next header
    (_JUMP_EQUAL, 0, 3, socket.IPPROTO_ICMPV6),
    (_LOAD_BYTE, 0, 0, ETHERNET.size + IPV6.size),  # type
    (_JUMP_EQUAL, 0, 1, Icmp6.NEIGHBOUR_ADVERTISEMENT),
    (_RETURN, 0, 0, 0xFFFF),
    (_RETURN, 0, 0, 0),
)
_CLAIMS_ONLY_CODE = b"".join(struct.pack("=HBBI", *instruction) for instruction in _CLAIMS_ONLY)
ETH_P_ALL = 0x0003


class LinkSocket:
    """Frames on one interface of the calling thread's network namespace. OSError where the kernel refuses.

    listen  also receive; without it the kernel copies nothing to this socket
    """

    def __init__(self, interface: str, mac: str, *, listen: bool = False) -> None:
        self.interface = interface
        self.mac = mac
        # protocol 0 receives nothing, and a filter that is attached before the bind lets nothing else in
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        try:
            if listen:
                code = ctypes.create_string_buffer(_CLAIMS_ONLY_CODE)
                program = struct.pack("HxxxxxxQ", len(_CLAIMS_ONLY), ctypes.addressof(code))
                self._socket.setsockopt(socket.SOL_SOCKET, SocketOption.ATTACH_FILTER, program)
            self._socket.bind((interface, ETH_P_ALL if listen else 0))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> LinkSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def announce(self, addresses: Iterable[str]) -> None:
        """Send the announcement of each address once."""
        for address in addresses:
            for frame in announcement(address, self.mac):
                self._socket.send(frame)

    def ask(self, addresses: Collection[str], *, ignore: Collection[str], wait: float, times: int = 3) -> list[Claim]:
        """Probe ``addresses`` and return the claims of machines other than ourselves and ``ignore`` (link-layer
        addresses), as soon as one is there; an empty list after ``wait`` seconds without one.

        The socket must have been made with ``listen``. The probes are sent ``times`` times, spread over the first half
        of the wait: one frame may get lost.
        """
        known = {mac.lower() for mac in (*ignore, self.mac)}
        start = time.monotonic()
        due = [start + wait / 2 * i / times for i in range(times)]
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while True:
            now = time.monotonic()
            if due and now >= due[0]:
                del due[0]
                for address in addresses:
                    self._socket.send(probe(address, self.mac))
                continue
            if now >= start + wait:
                return []
            if not poll.poll(((due[0] if due else start + wait) - now) * 1000):
                continue
            found = claim(self._socket.recv(2048))
            if found is not None and found.address in addresses and found.mac not in known:
                return [found]
