"""Delivering a datagram to a local socket as if it came from its sender.

A raw socket sends it with the sender's address in its header; it travels through the loopback device. The kernel
keeps the route of a packet that it sent itself, so that no reverse path filter looks at the foreign source.

Source: raw(7), ipv6(7); RFC 768, RFC 8200 8.1; net/ipv4/raw.c (raw_send_hdrinc).
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable

from checkpoint.errors import FileRebuildFailed
from checkpoint.files.inet import Endpoint

__all__ = ["checksum", "deliver", "packet"]

_HOPS = 64


def checksum(data: bytes) -> int:
    """The ones' complement sum of 16-bit words (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(data: bytes, source: str, source_port: int, to: str, port: int) -> bytes:
    """An IP packet with one UDP datagram."""
    version = 6 if ":" in to else 4
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    ends = socket.inet_pton(family, source) + socket.inet_pton(family, to)
    length = 8 + len(data)
    header = struct.pack("!HHHH", source_port, port, length, 0)
    pseudo = ends + struct.pack("!II" if version == 6 else "!HH", *((length, 17) if version == 6 else (17, length)))
    total = checksum(pseudo + header + data) or 0xFFFF
    datagram = struct.pack("!HHHH", source_port, port, length, total) + data
    if version == 6:
        return struct.pack("!IHBB", 6 << 28, length, 17, _HOPS) + ends + datagram
    # the kernel fills in identification and checksum
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, _HOPS, 17, 0) + ends + datagram


def _plain(address: str) -> str:
    mapped = ipaddress.ip_address(address)
    if isinstance(mapped, ipaddress.IPv6Address) and mapped.ipv4_mapped is not None:
        return str(mapped.ipv4_mapped)
    return str(mapped)


def deliver(data: bytes, sender: Endpoint, to: str, port: int, warn: Callable[[str], None]) -> None:
    """Let the datagram arrive once more. One to a group or to all cannot be addressed to one socket: a warning."""
    source, destination = _plain(sender.address), _plain(to)
    target = ipaddress.ip_address(destination)
    if target.is_multicast or destination == "255.255.255.255":
        warn(f"an unread datagram from {sender} to {to} could not be delivered again")
        return
    family = socket.AF_INET6 if target.version == 6 else socket.AF_INET
    try:
        # IPPROTO_RAW: the packets bring their own header
        with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(packet(data, source, sender.port, destination, port), (destination, 0))
    except OSError as error:
        raise FileRebuildFailed(
            f"delivering an unread datagram: {error.strerror}", object=f"{destination}:{port}"
        ) from error
