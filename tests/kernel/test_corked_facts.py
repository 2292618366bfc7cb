"""What is in a UDP datagram that is being put together, as checkpoint/kernel/corked.py takes it for granted."""

from __future__ import annotations

import random
import select
import socket
import struct
from collections.abc import Iterator

import pytest

from checkpoint.kernel import corked
from tcpstate.errors import KernelReadRefused
from tcpstate.kernel.bpf import opensock
from tests.tscnet import net

V4, V6 = socket.AF_INET, socket.AF_INET6
UDP, CORK, SEGMENT = 17, 1, 103
WAYS = {V4: "127.0.0.1", V6: "::1"}
BYTES = random.Random(5).randbytes(1 << 16)
#: pieces of one datagram, up to these places in it
PIECES = {"one": [5], "none": [0], "some": [1000, 9000, 30000], "whole": [65487], "halves": [30000, 65487]}


@pytest.fixture(scope="module")
def hosts() -> Iterator[object]:
    with net() as made:
        yield made


def receiver(family: int, address: str = "") -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((address or WAYS[socket.AddressFamily(family)], 0))
    sock.settimeout(10)
    return sock


def put(sock: socket.socket, to: object, ends: list[int]) -> bytes:
    """Pieces of a datagram that is not finished; all of them."""
    start = 0
    for end in ends:
        sock.sendto(BYTES[start:end], socket.MSG_MORE, to)  # type: ignore[arg-type]
        start = end
    return BYTES[: ends[-1]]


def finish(sock: socket.socket) -> None:
    sock.setsockopt(UDP, CORK, 1)
    sock.setsockopt(UDP, CORK, 0)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_all_bytes_are_found_and_nothing_is_disturbed(family: socket.AddressFamily, pieces: str) -> None:
    with receiver(family) as other, socket.socket(family, socket.SOCK_DGRAM) as sock:
        assert corked.pending(sock) is None
        data = put(sock, other.getsockname(), PIECES[pieces])
        found = corked.pending(sock)
        assert found is not None
        assert (found.family, found.data) == (family, data)
        assert (found.to, found.port, found.source) == (*other.getsockname()[:2], WAYS[family])
        assert corked.pending(sock) == found
        assert not select.select([other], [], [], 0)[0]
        finish(sock)
        assert other.recv(1 << 16) == data
        assert corked.pending(sock) is None


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_a_datagram_of_many_packets(hosts: object, family: socket.AddressFamily) -> None:
    """Longer than the interface takes at once: what no longer fits into a packet moves to the next one."""
    with hosts.c:  # type: ignore[attr-defined]
        other = receiver(family, {V4: "0.0.0.0", V6: "::"}[family])
    with hosts.a:  # type: ignore[attr-defined]
        sock = socket.socket(family, socket.SOCK_DGRAM)
        to = ({V4: "10.77.0.3", V6: "fd77::3"}[family], other.getsockname()[1])
        for ends in ([1471], [1480, 1485], [700, 1400, 2100, 7000], [20001]):
            data = put(sock, to, ends)
            found = corked.pending(sock)
            assert found is not None
            assert found.data == data
            finish(sock)
            assert other.recv(1 << 16) == data
    sock.close()
    other.close()


def test_an_ipv6_socket_that_speaks_ipv4() -> None:
    with receiver(V6, "::ffff:127.0.0.1") as other, socket.socket(V6, socket.SOCK_DGRAM) as sock:
        put(sock, other.getsockname(), [9])
        found = corked.pending(sock)
        assert found is not None
        assert (found.family, found.to, found.port) == (V4, "127.0.0.1", other.getsockname()[1])


def test_what_the_first_call_told() -> None:
    with receiver(V4) as other, socket.socket(V4, socket.SOCK_DGRAM) as sock:
        told = [
            (0, socket.IP_TTL, struct.pack("i", 7)),
            (0, socket.IP_TOS, struct.pack("i", 0x28)),
            (0, 8, struct.pack("=I4s4x", 0, socket.inet_aton("127.5.5.5"))),  # IP_PKTINFO
            (UDP, SEGMENT, struct.pack("H", 300)),
            (socket.SOL_SOCKET, socket.SO_MARK, struct.pack("I", 77)),
        ]
        sock.sendmsg([b"x"], told, socket.MSG_MORE, other.getsockname())
        found = corked.pending(sock)
        assert found is not None
        assert (found.ttl, found.tos, found.source, found.segment, found.mark) == (7, 0x28, "127.5.5.5", 300, 77)


def test_options_of_its_own_are_told() -> None:
    with receiver(V4) as other, socket.socket(V4, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x01\x01\x01\x00")
        put(sock, other.getsockname(), [9])
        with pytest.raises(KernelReadRefused, match="options"):
            corked.pending(sock)


def test_it_is_found_without_being_bound_in_any_network(hosts: object) -> None:
    """The iterator over open files knows no network namespaces, that over UDP sockets would."""
    with hosts.b, socket.socket(V4, socket.SOCK_DGRAM) as sock:  # type: ignore[attr-defined]
        inside = sock.dup()
    with inside:
        assert opensock.address(inside) >> 63
        assert corked.pending(inside) is None


def test_the_rest_goes_where_it_was_begun() -> None:
    """Why nothing but its beginning has to be told again."""
    with receiver(V4) as first, receiver(V4) as second, socket.socket(V4, socket.SOCK_DGRAM) as sock:
        put(sock, first.getsockname(), [3])
        sock.sendto(b"end", second.getsockname())
        assert first.recv(99) == BYTES[:3] + b"end"
        assert not select.select([second], [], [], 0)[0]


def test_it_goes_where_the_socket_is_connected_afterwards() -> None:
    """Why a rebuilt socket is connected first, and not once more: net/ipv4/datagram.c uses the flow of the cork."""
    with receiver(V4) as first, receiver(V4) as second, socket.socket(V4, socket.SOCK_DGRAM) as sock:
        put(sock, first.getsockname(), [3])
        sock.connect(second.getsockname())
        found = corked.pending(sock)
        assert found is not None
        assert found.port == second.getsockname()[1]
        finish(sock)
        assert second.recv(99) == BYTES[:3]
        assert not select.select([first], [], [], 0)[0]


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_a_raw_socket_that_has_not_finished_shows_it(family: socket.AddressFamily) -> None:
    with socket.socket(family, socket.SOCK_RAW, 253) as sock:
        before = struct.unpack("9I", sock.getsockopt(socket.SOL_SOCKET, 55, 36))[2]
        sock.sendto(b"half", socket.MSG_MORE, (WAYS[family], 0))
        assert struct.unpack("9I", sock.getsockopt(socket.SOL_SOCKET, 55, 36))[2] > before
