"""Datagrams that are being put together: whole, once, and from where they would have come."""

from __future__ import annotations

import random
import select
import socket
import struct
from collections.abc import Iterator

from tests.system.state.case import Here, case

UDP, CORK, SEGMENT = 17, 1, 103
IP_PKTINFO, IP_RECVTTL = 8, 12
BYTES = random.Random(4).randbytes(1 << 16)


def pair(family: int, address: str) -> tuple[socket.socket, socket.socket]:
    """A sender and a receiver, both bound."""
    made = []
    for _ in range(2):
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.bind((address, 0))
        sock.settimeout(10)
        made.append(sock)
    return made[0], made[1]


def nothing_more(sock: socket.socket) -> None:
    assert not select.select([sock], [], [], 0)[0], "more has come"


@case("aspect/corked", "files/udp")
def udp_unfinished_by_msg_more(here: Here) -> Iterator[None]:
    a, b = pair(socket.AF_INET, "127.0.0.1")
    a.sendto(b"one, ", socket.MSG_MORE, b.getsockname())
    a.sendto(b"two, ", socket.MSG_MORE, b.getsockname())
    yield
    nothing_more(b)
    a.sendto(b"three", b.getsockname())
    assert b.recvfrom(99) == (b"one, two, three", a.getsockname())
    nothing_more(b)
    a.sendto(b"the next", b.getsockname())
    assert b.recv(99) == b"the next"


@case("aspect/corked", "files/udp")
def udp_corked_connected_and_large(here: Here) -> Iterator[None]:
    a, b = pair(socket.AF_INET, "127.0.0.1")
    a.connect(b.getsockname())
    a.setsockopt(UDP, CORK, 1)
    for start, end in ((0, 100), (100, 30000), (30000, 65507)):
        a.send(BYTES[start:end])
    yield
    assert a.getsockopt(UDP, CORK) == 1
    nothing_more(b)
    a.setsockopt(UDP, CORK, 0)
    assert b.recvfrom(1 << 16) == (BYTES[:65507], a.getsockname())
    nothing_more(b)


@case("aspect/corked", "files/udp")
def udp6_unfinished_with_words_of_its_own(here: Here) -> Iterator[None]:
    a, b = pair(socket.AF_INET6, "::1")
    b.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    b.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
    told = [(41, socket.IPV6_HOPLIMIT, struct.pack("i", 7)), (41, socket.IPV6_TCLASS, struct.pack("i", 0x28))]
    a.sendmsg([BYTES[:9000]], told, socket.MSG_MORE, b.getsockname())
    yield
    a.sendto(BYTES[9000:9100], b.getsockname())
    data, words, _, sender = b.recvmsg(1 << 16, 512)
    assert (data, sender) == (BYTES[:9100], a.getsockname())
    found = {kind: struct.unpack("i", value)[0] for _, kind, value in words}
    assert found == {socket.IPV6_HOPLIMIT: 7, socket.IPV6_TCLASS: 0x28}
    nothing_more(b)


@case("aspect/corked", "files/udp")
def udp6_that_speaks_ipv4_corked(here: Here) -> Iterator[None]:
    a, b = pair(socket.AF_INET6, "::ffff:127.0.0.1")
    a.setsockopt(UDP, CORK, 1)
    a.sendto(b"half", b.getsockname())
    yield
    a.sendto(b", whole", b.getsockname())
    a.setsockopt(UDP, CORK, 0)
    assert b.recvfrom(99) == (b"half, whole", a.getsockname())
    nothing_more(b)


@case("aspect/corked", "files/udp")
def udp_unfinished_from_an_address_of_its_choice(here: Here) -> Iterator[None]:
    _, b = pair(socket.AF_INET, "127.0.0.1")
    b.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    a = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    a.bind(("0.0.0.0", 0))
    told = [
        (0, IP_PKTINFO, struct.pack("=I4s4x", 0, socket.inet_aton("127.7.7.7"))),
        (0, socket.IP_TTL, struct.pack("i", 9)),
        (UDP, SEGMENT, struct.pack("H", 300)),
    ]
    a.sendmsg([BYTES[:500]], told, socket.MSG_MORE, b.getsockname())
    yield
    a.sendto(BYTES[500:700], b.getsockname())
    for start, end in ((0, 300), (300, 600), (600, 700)):
        data, words, _, sender = b.recvmsg(999, 512)
        assert (data, sender) == (BYTES[start:end], ("127.7.7.7", a.getsockname()[1]))
        assert [struct.unpack("i", value)[0] for _, _, value in words] == [9]
    nothing_more(b)


@case("files/udp")
def udp_corked_with_nothing_in_it(here: Here) -> Iterator[None]:
    a, b = pair(socket.AF_INET, "127.0.0.1")
    a.setsockopt(UDP, CORK, 1)
    yield
    a.sendto(b"all ", b.getsockname())
    a.sendto(b"of it", b.getsockname())
    nothing_more(b)
    a.setsockopt(UDP, CORK, 0)
    assert b.recvfrom(99) == (b"all of it", a.getsockname())


@case("aspect/corked", "files/udp")
def udp_unfinished_without_a_byte(here: Here) -> Iterator[None]:
    a, b = pair(socket.AF_INET, "127.0.0.1")
    a.sendto(b"", socket.MSG_MORE, b.getsockname())
    a.setsockopt(UDP, CORK, 1)
    yield
    nothing_more(b)
    # its end is that of the datagram that was begun
    a.setsockopt(UDP, CORK, 0)
    assert b.recvfrom(99) == (b"", a.getsockname())
    nothing_more(b)
