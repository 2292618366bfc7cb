"""TCP segments in IP packets: values in, values out; no sockets here.

Source: RFC 791, RFC 8200, RFC 9293 section 3.1.  Checksums are always rebuilt: on a virtual link a captured packet
carries only half of one (the sender left the rest to hardware that does not exist).
"""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace

from tcpstate.connid import PORT_MAX, ConnId, canonical_address
from tcpstate.kernel.sockets import is_v6
from tcpstate.slotted import dataclass

__all__ = ["Flag", "OptionKind", "Segment", "build", "intact", "parse", "split", "timestamp_option"]

SEQ_MASK = 0xFFFFFFFF
_V4_HEADER = 20
_V6_HEADER = 40
_TCP_HEADER = struct.Struct("!HHIIBBHHH")
_OPTIONS_MAX = 40
_PAYLOAD_MAX = 1 << 20
_TTL = 64
_PROTOCOL_TCP = 6
#: IPv6 extension headers that may stand before TCP: hop-by-hop, routing, destination options (RFC 8200 4.1)
_EXTENSIONS = frozenset({0, 43, 60})
_DONT_FRAGMENT = 0x4000
_FRAGMENT_BITS = 0x3FFF


class Flag(enum.IntFlag):
    """Control bits of the TCP header."""

    FIN = 1
    SYN = 2
    RST = 4
    PSH = 8
    ACK = 16
    URG = 32
    ECE = 64
    CWR = 128


class OptionKind(enum.IntEnum):
    """Kinds of TCP options (IANA, TCP parameters)."""

    END = 0
    NOP = 1
    MSS = 2
    WINDOW_SCALE = 3
    SACK_PERMITTED = 4
    SACK = 5
    TIMESTAMP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One TCP segment, or several that an interface merged into one (larger than any MSS).

    source, destination            addresses, canonical
    source_port, destination_port  ports
    seq, ack                       sequence and acknowledgement numbers
    flags                          :class:`Flag` bits
    window                         window field, unscaled
    urgent                         urgent pointer
    options                        the option bytes, padded to a multiple of four
    payload                        data

    Raises ValueError for values that do not fit a header.
    """

    source: str
    source_port: int
    destination: str
    destination_port: int
    seq: int
    ack: int
    flags: int
    window: int
    urgent: int = 0
    options: bytes = b""
    payload: bytes = b""

    def __post_init__(self) -> None:
        for number, top in (
            (self.source_port, PORT_MAX),
            (self.destination_port, PORT_MAX),
            (self.seq, SEQ_MASK),
            (self.ack, SEQ_MASK),
            (self.flags, 0xFF),
            (self.window, 0xFFFF),
            (self.urgent, 0xFFFF),
        ):
            if not 0 <= number <= top:
                raise ValueError(f"{number} does not fit a TCP header")
        if len(self.options) > _OPTIONS_MAX or len(self.options) % 4:
            raise ValueError(f"{len(self.options)} bytes of options")
        if len(self.payload) > _PAYLOAD_MAX:
            raise ValueError(f"{len(self.payload)} bytes of payload")
        if canonical_address(self.source) != self.source or canonical_address(self.destination) != self.destination:
            raise ValueError("an address is not in canonical form")
        if is_v6(self.source) != is_v6(self.destination):
            raise ValueError("one end is IPv4, the other IPv6")

    @property
    def conn_id(self) -> ConnId:
        """The connection as the receiver of this segment names it."""
        return ConnId("tcp", self.destination, self.destination_port, self.source, self.source_port)

    @property
    def begins(self) -> bool:
        """Whether it asks for a new connection: SYN without ACK (RFC 9293 3.5)."""
        return self.flags & (Flag.SYN | Flag.ACK) == Flag.SYN

    @property
    def sequence_length(self) -> int:
        """Sequence numbers that it occupies: data, SYN and FIN."""
        return len(self.payload) + bool(self.flags & Flag.SYN) + bool(self.flags & Flag.FIN)

    @property
    def end(self) -> int:
        """The sequence number after its last."""
        return (self.seq + self.sequence_length) & SEQ_MASK

    def each_option(self) -> Iterator[tuple[int, bytes]]:
        """(kind, data) of each option; stops where the bytes stop making sense."""
        at = 0
        while at < len(self.options):
            kind = self.options[at]
            if kind == OptionKind.END:
                return
            if kind == OptionKind.NOP:
                at += 1
                continue
            length = self.options[at + 1] if at + 1 < len(self.options) else 0
            if length < 2 or at + length > len(self.options):
                return
            yield kind, self.options[at + 2 : at + length]
            at += length

    @property
    def timestamps(self) -> tuple[int, int] | None:
        """(TSval, TSecr), if it carries them (RFC 7323 3.2)."""
        for kind, data in self.each_option():
            if kind == OptionKind.TIMESTAMP and len(data) == 8:
                value, echo = struct.unpack("!II", data)
                return value, echo
        return None


def before(a: int, b: int) -> bool:
    """Whether sequence number ``a`` comes before ``b`` (RFC 9293 3.4: modulo 2**32)."""
    return ((a - b) & SEQ_MASK) > SEQ_MASK >> 1


def timestamp_option(value: int, echo: int) -> bytes:
    """The timestamp option with the two NOPs that align it (RFC 7323 appendix A)."""
    return struct.pack("!BBBBII", OptionKind.NOP, OptionKind.NOP, OptionKind.TIMESTAMP, 10, value & SEQ_MASK, echo)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of ``data``."""
    if len(data) & 1:
        data += b"\0"
    # 2**16 is 1 modulo 65535: the number's remainder is the ones' complement sum of its 16-bit words
    total = int.from_bytes(data, "big")
    folded = total % 0xFFFF
    if not folded and total:
        folded = 0xFFFF
    return ~folded & 0xFFFF


def build(segment: Segment, *, identification: int = 0) -> bytes:
    """The IP packet. ValueError if it is larger than an IP packet can be: :func:`split` it first."""
    header = bytearray(
        _TCP_HEADER.pack(
            segment.source_port,
            segment.destination_port,
            segment.seq,
            segment.ack,
            (_TCP_HEADER.size + len(segment.options)) // 4 << 4,
            segment.flags,
            segment.window,
            0,
            segment.urgent,
        )
    )
    header += segment.options
    length = len(header) + len(segment.payload)
    if length + _V6_HEADER > 0xFFFF:
        raise ValueError(f"a segment of {length} bytes does not fit an IP packet")
    if is_v6(segment.source):
        ends = _packed6(segment.source) + _packed6(segment.destination)
        pseudo = ends + struct.pack("!II", length, _PROTOCOL_TCP)
        ip = struct.pack("!IHBB", 6 << 28, length, _PROTOCOL_TCP, _TTL) + ends
    else:
        ends = socket.inet_pton(socket.AF_INET, segment.source) + socket.inet_pton(socket.AF_INET, segment.destination)
        pseudo = ends + struct.pack("!HH", _PROTOCOL_TCP, length)
        head = struct.pack("!BBHHHBBH", 0x45, 0, _V4_HEADER + length, identification, _DONT_FRAGMENT, _TTL, 6, 0)
        ip = head[:10] + struct.pack("!H", checksum(head + ends)) + ends
    struct.pack_into("!H", header, 16, checksum(pseudo + header + segment.payload))
    return ip + bytes(header) + segment.payload


def parse(packet: bytes | memoryview) -> Segment | None:
    """The segment in an IP packet; None if there is none (not TCP, a fragment, truncated, malformed).

    A merged packet larger than 65,535 bytes has 0 in its length field (BIG TCP): then the packet's own length counts.
    """
    if len(packet) < _V4_HEADER:
        return None
    version = packet[0] >> 4
    if version == 4:
        at = (packet[0] & 15) * 4
        (total, _, fragment) = struct.unpack_from("!HHH", packet, 2)
        end = total or len(packet)
        if at < _V4_HEADER or packet[9] != _PROTOCOL_TCP or fragment & _FRAGMENT_BITS:
            return None
        source = socket.inet_ntop(socket.AF_INET, packet[12:16])
        destination = socket.inet_ntop(socket.AF_INET, packet[16:20])
    elif version == 6 and len(packet) >= _V6_HEADER:
        (payload_length,) = struct.unpack_from("!H", packet, 4)
        end = _V6_HEADER + payload_length if payload_length else len(packet)
        source = canonical_address(socket.inet_ntop(socket.AF_INET6, packet[8:24]))
        destination = canonical_address(socket.inet_ntop(socket.AF_INET6, packet[24:40]))
        found = _skip_extensions(packet)
        if found is None:
            return None
        at = found
    else:
        return None
    if end > len(packet) or at + _TCP_HEADER.size > end:
        return None
    source_port, destination_port, seq, ack, offset, flags, window, _, urgent = _TCP_HEADER.unpack_from(packet, at)
    data = at + (offset >> 4) * 4
    options = at + _TCP_HEADER.size
    if not options <= data <= end:
        return None
    try:
        return Segment(
            source=source,
            source_port=source_port,
            destination=destination,
            destination_port=destination_port,
            seq=seq,
            ack=ack,
            flags=flags,
            window=window,
            urgent=urgent,
            options=bytes(packet[options:data]),
            payload=bytes(packet[data:end]),
        )
    except ValueError:
        # for example one mapped and one plain IPv6 address: no stack of ours would have such a connection
        return None


def intact(packet: bytes | memoryview) -> bool:
    """Whether the TCP checksum of a packet that :func:`parse` takes is right (RFC 9293 3.1)."""
    if packet[0] >> 4 == 4:
        at, ends = (packet[0] & 15) * 4, packet[12:20]
        (total,) = struct.unpack_from("!H", packet, 2)
        end = total or len(packet)
    else:
        at, ends = _skip_extensions(packet) or len(packet), packet[8:40]
        (payload_length,) = struct.unpack_from("!H", packet, 4)
        end = _V6_HEADER + payload_length if payload_length else len(packet)
    pseudo = bytes(ends) + struct.pack("!II", end - at, _PROTOCOL_TCP)
    return checksum(pseudo + packet[at:end]) == 0


def split(segment: Segment, size: int) -> list[Segment]:
    """The segments, of ``size`` bytes of data at most, that an interface may have merged into this one.

    FIN and PSH stay with the last, SYN and CWR with the first; the urgent pointer, counted from each segment's own
    start, as long as it points into or past it.
    """
    if size < 1:
        raise ValueError("the size must be positive")
    if len(segment.payload) <= size:
        return [segment]
    parts = []
    for start in range(0, len(segment.payload), size):
        flags = segment.flags
        if start:
            flags &= ~(Flag.SYN | Flag.CWR)
        if start + size < len(segment.payload):
            flags &= ~(Flag.FIN | Flag.PSH)
        urgent = segment.urgent - start
        if urgent <= 0:
            flags &= ~Flag.URG
            urgent = 0
        parts.append(
            replace(
                segment,
                # SYN takes the first number, so that the data behind it begins one later
                seq=(segment.seq + start + (bool(segment.flags & Flag.SYN) if start else 0)) & SEQ_MASK,
                flags=int(flags),
                urgent=urgent,
                payload=segment.payload[start : start + size],
            )
        )
    return parts


def _skip_extensions(packet: bytes | memoryview) -> int | None:
    """Offset of the TCP header of an IPv6 packet; None if there is none."""
    protocol, at = packet[6], _V6_HEADER
    while protocol in _EXTENSIONS:
        if at + 8 > len(packet):
            return None
        protocol, at = packet[at], at + (packet[at + 1] + 1) * 8
    return at if protocol == _PROTOCOL_TCP else None


def _packed6(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
