"""Sockets that speak with the kernel, or with whole networks."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

from tests.system.state.case import Here, case

SOL_NETLINK = 270
#: RTM_GETLINK, dump
GET_LINKS = struct.pack("<IHHIIB15x", 32, 18, 0x301, 1, 0, 0)


def links(sock: socket.socket) -> int:
    """How many interfaces the kernel tells of."""
    sock.send(GET_LINKS)
    count = 0
    while True:
        data = sock.recv(1 << 16)
        while data:
            length, kind = struct.unpack_from("<IH", data)
            if kind == 3:  # NLMSG_DONE
                return count
            count += kind == 16
            data = data[(length + 3) & ~3 :]


@case("files/netlink")
def route_netlink(here: Here) -> Iterator[None]:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    sock.bind((0, 0))
    name, before = sock.getsockname(), links(sock)
    yield
    assert sock.getsockname() == name
    assert links(sock) == before > 0


@case("files/netlink")
def netlink_groups_and_options(here: Here) -> Iterator[None]:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
    sock.bind((987654, 0))
    for group in (5, 33):
        sock.setsockopt(SOL_NETLINK, 1, group)
    sock.setsockopt(SOL_NETLINK, 11, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 77777)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    yield
    assert sock.getsockname() == (987654, 1 << 4)
    bits = sock.getsockopt(SOL_NETLINK, 9, 8)
    assert struct.unpack("<II", bits) == (1 << 4, 1)
    assert sock.getsockopt(SOL_NETLINK, 11) == 1
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 77777
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
    # group 5: addresses of IPv4
    os.system("ip addr add 127.0.0.77/32 dev lo")
    try:
        sock.setblocking(True)
        kind = struct.unpack_from("<IH", sock.recv(1 << 16))[1]
        assert kind == 20, kind
    finally:
        os.system("ip addr del 127.0.0.77/32 dev lo")


@case("files/netlink")
def netlink_connected_without_a_port(here: Here) -> Iterator[None]:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)  # NETLINK_SOCK_DIAG
    yield
    assert sock.getsockname() == (0, 0)
    # struct inet_diag_req_v2: all listening TCP sockets
    sock.send(struct.pack("<IHHII", 72, 20, 0x301, 1, 0) + struct.pack("<BBBxI", 2, 6, 0, 1 << 10) + bytes(48))
    assert struct.unpack_from("<IH", sock.recv(1 << 16))[1] == 3


def arrived(sock: socket.socket, wanted: bytes) -> bytes:
    """The first packet with these bytes in it."""
    sock.settimeout(20)
    while True:
        data = sock.recv(1 << 16)
        if wanted in data:
            return data


@case("files/raw-socket")
def raw_udp_that_brings_its_header(here: Here) -> Iterator[None]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
    sock.bind(("127.0.0.1", 0))
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 33)
    yield
    assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL) == 1
    assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL) == 33
    assert sock.getsockname()[0] == "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.sendto(b"heard by all", ("127.0.0.1", 9))
    assert len(arrived(sock, b"heard by all")) == 20 + 8 + 12


@case("files/raw-socket")
def raw_icmp_with_a_filter(here: Here) -> Iterator[None]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    # all but echo replies are kept out
    sock.setsockopt(255, 1, struct.pack("<I", ~1 & 0xFFFFFFFF))
    sock.connect(("127.0.0.1", 0))
    yield
    assert sock.getsockopt(255, 1, 4) == struct.pack("<I", ~1 & 0xFFFFFFFF)
    body = struct.pack("!HH", 77, 1) + b"ping"
    echo = struct.pack("!BBH", 8, 0, checksum(b"\x08\0\0\0" + body)) + body
    sock.send(echo)
    assert arrived(sock, b"ping")[20] == 0


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@case("files/raw-socket")
def raw_icmp6(here: Here) -> Iterator[None]:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    only_replies = bytearray(b"\xff" * 32)
    only_replies[129 // 8 & ~3 | (129 // 8 & 3)] &= ~(1 << 129 % 8)
    sock.setsockopt(58, 1, bytes(only_replies))
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 44)
    yield
    assert sock.getsockopt(58, 1, 32) == bytes(only_replies)
    assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS) == 44
    sock.sendto(struct.pack("!BBHHH", 128, 0, 0, 5, 6) + b"six", ("::1", 0))
    assert arrived(sock, b"six")[0] == 129


@case("files/raw-socket")
def ping_socket(here: Here) -> Iterator[None]:
    with open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
        file.write("0 0")
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    sock.bind(("0.0.0.0", 4321))
    yield
    assert sock.getsockname() == ("0.0.0.0", 4321)
    sock.sendto(struct.pack("!BBHHH", 8, 0, 0, 0, 9) + b"pong", ("127.0.0.1", 0))
    reply = arrived(sock, b"pong")
    assert (reply[0], struct.unpack_from("!H", reply, 4)[0]) == (0, 4321)


ETH_P_ALL, ETH_P_IP = 3, 0x800
SOL_PACKET = 263
#: ld [16]; jeq "fil1" ..: a filter that takes UDP only, as classic BPF: ldb [9]; jeq 17, 0, 1; ret -1; ret 0
ONLY_UDP = b"".join(
    struct.pack("<HBBI", *one) for one in ((0x30, 0, 0, 9), (0x15, 0, 1, 17), (0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0))
)


def attach(sock: socket.socket) -> None:
    import ctypes

    code = ctypes.create_string_buffer(ONLY_UDP)
    program = struct.pack("<H6xQ", len(ONLY_UDP) // 8, ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, 26, program)


@case("files/packet-socket")
def packets_of_an_interface_with_a_filter(here: Here) -> Iterator[None]:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
    attach(sock)
    sock.setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER
    sock.bind(("lo", ETH_P_IP))
    yield
    assert sock.getsockname()[:2] == ("lo", ETH_P_IP)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.sendto(b"on the wire", ("127.0.0.1", 9))
    assert arrived(sock, b"on the wire")[9] == 17
    # taken, and so not to be taken away again
    try:
        sock.setsockopt(socket.SOL_SOCKET, 27, 0)
    except PermissionError:
        return
    raise AssertionError("the filter is not locked")


@case("files/packet-socket")
def packets_promiscuous_with_options(here: Here) -> Iterator[None]:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    index = socket.if_nametoindex("eth0")
    sock.setsockopt(SOL_PACKET, 1, struct.pack("<iHH8x", index, 1, 0))
    sock.setsockopt(SOL_PACKET, 8, 1)
    sock.setsockopt(SOL_PACKET, 23, 1)
    sock.setblocking(False)
    flags = int(open("/sys/class/net/eth0/flags").read(), 16)
    yield
    assert sock.getsockopt(SOL_PACKET, 8) == sock.getsockopt(SOL_PACKET, 23) == 1
    assert not os.get_blocking(sock.fileno())
    assert sock.getsockname()[:2] == ("", ETH_P_ALL)
    assert int(open("/sys/class/net/eth0/flags").read(), 16) == flags
    table = [line.split() for line in open("/proc/net/dev_mcast")]
    assert table is not None
    # promiscuous as long as the socket asks for it
    shown = os.popen("ip -d link show eth0").read()
    assert "promiscuity 1" in shown, shown
    sock.close()
    assert "promiscuity 0" in os.popen("ip -d link show eth0").read()


@case("files/packet-socket")
def packet_socket_that_only_sends(here: Here) -> Iterator[None]:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.bind(("lo", 0))
    sock.setsockopt(SOL_PACKET, 20, 1)
    yield
    assert sock.getsockname()[:2] == ("lo", 0)
    assert sock.getsockopt(SOL_PACKET, 20) == 1
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as other:
        other.bind(("lo", ETH_P_ALL))
        sock.send(bytes(12) + b"\x88\xb5" + b"frame")
        assert arrived(other, b"frame")[12:14] == b"\x88\xb5"
