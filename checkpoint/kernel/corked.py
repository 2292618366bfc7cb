"""A UDP datagram that is being put together (UDP_CORK, MSG_MORE): what is in it so far, which no call tells.

It is read from kernel memory (:mod:`tcpstate.kernel.bpf.memory`), only from a socket that has one, and nothing in it is
changed. Its owner must rest; else what does not belong together is told as an error.

::

    struct udp_sock       pending   AF_INET, AF_INET6: of the datagram; 0: there is none
                          len       bytes so far, with the UDP header
    struct inet_sock      cork      where it goes, and what its first sendmsg(2) told of it
    struct sock           sk_write_queue   packets that become its fragments: room for headers, then data

Source: net/ipv4/udp.c (udp_sendmsg), net/ipv4/ip_output.c (__ip_append_data, ip_setup_cork), net/ipv6/ip6_output.c
(ip6_setup_cork), include/net/inet_sock.h (struct inet_cork), include/linux/ipv6.h (struct inet6_cork).
"""

from __future__ import annotations

import contextlib
import functools
import socket
import struct
from typing import Final

from tcpstate.errors import KernelFeatureMissing, KernelReadRefused
from tcpstate.kernel.bpf import opensock
from tcpstate.kernel.bpf.btf import BadBtf, Place
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.kernel.bpf.memory import KernelMemory
from tcpstate.kernel.bpf.packets import PacketReader, Shape
from tcpstate.slotted import dataclass

__all__ = ["Pending", "pending", "prepare"]

_UDP_HEADER: Final = 8
_PACKETS_MAX: Final = 1 << 10
_LABEL: Final = 0x000FFFFF  # IPV6_FLOWLABEL_MASK
#: members of struct inet_sock, by our names; in the cork is what the first sendmsg(2) said, or the socket's own
_COMMON: Final = {
    "options": "cork.base.opt",
    "ttl": "cork.base.ttl",
    "tos": "cork.base.tos",
    "segment": "cork.base.gso_size",
    "time": "cork.base.transmit_time",
    "mark": "cork.base.mark",
}
_FLOW: Final = {
    socket.AF_INET: {
        "to": "cork.fl.u.ip4.daddr",
        "source": "cork.fl.u.ip4.saddr",
        "port": "cork.fl.u.ip4.uli.ports.dport",
    },
    socket.AF_INET6: {
        "to": "cork.fl.u.ip6.daddr",
        "source": "cork.fl.u.ip6.saddr",
        "port": "cork.fl.u.ip6.uli.ports.dport",
        "label": "cork.fl.u.ip6.flowlabel",
        "interface": "cork.fl.u.ip6.__fl_common.flowic_oif",
    },
}
#: of struct ipv6_pinfo
_SIX: Final = {"options": "cork.opt", "ttl": "cork.hop_limit", "tos": "cork.tclass"}


@dataclass(frozen=True, slots=True)
class Pending:
    """What is in it so far.

    family     AF_INET or AF_INET6: an IPv6 socket may speak IPv4
    data       its bytes
    to, port   where it goes; ``interface``: through which, IPv6, 0: any; ``label``: IPv6
    source     from where, chosen by the kernel when it was begun
    ttl, tos   time to live and type of service, hop limit and traffic class; IPv4: 0 and -1 are the socket's own
    segment    bytes of UDP_SEGMENT, 0: it is sent whole
    mark       SO_MARK
    """

    family: int
    data: bytes
    to: str
    port: int
    source: str
    ttl: int
    tos: int
    segment: int
    mark: int
    label: int = 0
    interface: int = 0


class _Reader:
    """Where everything lies in this kernel's structures. BadBtf, OSError."""

    def __init__(self, known: Layout) -> None:
        self.shape = Shape(known)
        self.queue = known.offset("sock", "sk_write_queue")
        self.pending, self.length = (known.place("udp_sock", name) for name in ("pending", "len"))
        self.common = {name: known.place("inet_sock", path) for name, path in _COMMON.items()}
        self.flow = {
            family: {name: known.place("inet_sock", path) for name, path in paths.items()}
            for family, paths in _FLOW.items()
        }
        self.six_at = known.offset("inet_sock", "pinet6")
        self.six = {name: known.place("ipv6_pinfo", path) for name, path in _SIX.items()}


@functools.cache
def _reader() -> _Reader:
    known = layout()
    try:
        return _Reader(known)
    except (OSError, BadBtf) as error:
        raise KernelFeatureMissing(f"corked data cannot be read: {error}", object="struct udp_sock") from None
    finally:
        known.save()


def prepare() -> None:
    """Find out beforehand where everything lies: the better part of a second, once for each kernel. Where it does not
    tell, :func:`pending` says so."""
    with contextlib.suppress(KernelFeatureMissing):
        _reader()


def pending(sock: socket.socket) -> Pending | None:
    """The datagram that a UDP socket of ours is putting together; None: it is not.

    KernelFeatureMissing, OSError where the kernel does not lend what it takes; KernelReadRefused where what was found
    is no such datagram, or one with options that cannot be told again (IP options, extension headers, SO_TXTIME).
    """
    reader = _reader()
    at = opensock.address(sock)
    with KernelMemory() as memory:
        return _Look(reader, memory, at).datagram()


class _Look:
    """At one socket."""

    def __init__(self, reader: _Reader, memory: KernelMemory, at: int) -> None:
        self._r = reader
        self._memory = memory
        self._at = at

    def _bytes(self, place: Place, base: int | None = None) -> bytes:
        return self._memory.read((self._at if base is None else base) + place.offset, place.size)

    def _number(self, place: Place, base: int | None = None) -> int:
        return int.from_bytes(self._bytes(place, base), "little", signed=True)

    def datagram(self) -> Pending | None:
        family = self._number(self._r.pending)
        if not family:
            return None
        if family not in self._r.flow:
            raise KernelReadRefused(f"a datagram of family {family} is put together")
        flow = self._r.flow[socket.AddressFamily(family)]
        numbers = {name: self._number(place) for name, place in self._r.common.items()}
        label = interface = 0
        if family == socket.AF_INET6:
            six = self._memory.word(self._at + self._r.six_at)
            numbers |= {name: self._number(place, six) for name, place in self._r.six.items()}
            numbers["tos"] &= 0xFF
            label = struct.unpack("!I", self._bytes(flow["label"]))[0] & _LABEL
            interface = self._number(flow["interface"])
        if numbers["options"] or numbers["time"]:
            raise KernelReadRefused("it has options of its own (IP options, extension headers or SO_TXTIME)")
        return Pending(
            family=family,
            data=self._data(),
            to=socket.inet_ntop(family, self._bytes(flow["to"])),
            port=int.from_bytes(self._bytes(flow["port"]), "big"),
            source=socket.inet_ntop(family, self._bytes(flow["source"])),
            ttl=numbers["ttl"] & 0xFF,
            tos=numbers["tos"],
            segment=numbers["segment"] & 0xFFFF,
            mark=numbers["mark"] & 0xFFFFFFFF,
            label=label,
            interface=interface,
        )

    def _data(self) -> bytes:
        packets = PacketReader(self._r.shape, self._memory)
        parts: list[bytes] = []
        for packet in packets.queue(self._at + self._r.queue, _PACKETS_MAX):
            # room for the headers is there already: of IP in all, of UDP in the first
            headers = packet.transport - packet.data + (0 if parts else _UDP_HEADER)
            if not 0 <= headers <= packet.length:
                raise KernelReadRefused("a packet is shorter than its headers")
            parts.append(packets.data(packet)[headers:])
        data = b"".join(parts)
        told = self._number(self._r.length) & 0xFFFF
        if told != len(data) + _UDP_HEADER:
            raise KernelReadRefused(f"{len(data)} bytes were found in a datagram of {told - _UDP_HEADER}")
        return data
