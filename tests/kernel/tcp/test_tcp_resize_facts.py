"""What a forwarded packet of many segments becomes: each segment fits the way, wherever it is cut."""

import contextlib
import ctypes
import fcntl
import random
import socket
import struct
import time

import pytest

from tcpstate.kernel.bpf import resize
from tcpstate.kernel.route import mtu_towards
from tcpstate.segment import Flag, OptionKind, Segment, build, checksum, intact, parse, split, timestamp_option
from tests.kernel.tcp.test_tcp_forward_facts import FITS, PORT, Ends, carried, forwarded
from tests.tscnet import ETH_P_ALL, SERVICE, Watcher, net, sh

V4, V6 = socket.AF_INET, socket.AF_INET6
FAMILIES = pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
HEAD = {V4: 20, V6: 40}
#: linux/ethtool.h
SIOCETHTOOL, CHECKSUMS, SCATTER, SEGMENTS, MERGE = 0x8946, 0x17, 0x19, 0x1F, 0x2C
#: linux/virtio_net.h
NEEDS_CHECKSUM, GSO = 1, {V4: 1, V6: 4}
VNET_HDR = struct.Struct("=BBHHHH")
SOL_PACKET, PACKET_VNET_HDR, SO_RCVBUFFORCE = 263, 15, 33
VXLAN = 8
#: a record route option of eight bytes
ROUTE = b"\x07\x07\x04\0\0\0\0\0"
#: three blocks, as they stand beside a timestamp
SACK = b"\1\1" + bytes((OptionKind.SACK, 26)) + bytes(range(24))
STAMP = timestamp_option(77, 88)


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        for family in (V4, V6):
            made.a.add(family)
        yield made


@pytest.fixture(params=[V4, V6], ids=["over IPv4", "over IPv6"])
def ends(hosts, request):
    made = Ends(hosts, request.param)
    with made.open:
        yield made


@contextlib.contextmanager
def offloads(space, device, on, *commands):
    """What an interface leaves to a card, or merges, as long as the block lasts."""

    def tell(value):
        for command in commands:
            told = ctypes.create_string_buffer(struct.pack("=II", command, value), 8)
            with space, socket.socket() as sock:
                fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sQ16x", device.encode(), ctypes.addressof(told)))

    tell(on)
    try:
        yield
    finally:
        tell(not on)


def fragments(host):
    """How many were made, of both families."""
    four = [line.split() for line in host.sh("cat /proc/net/snmp").splitlines() if line.startswith("Ip:")]
    six = dict(line.split() for line in host.sh("cat /proc/net/snmp6").splitlines())
    return int(four[1][four[0].index("FragCreates")]) + int(six["Ip6FragCreates"])


def send_merged(hosts, family, segment, size, ip_options=b""):
    """c sends a packet that is to be cut into segments of ``size`` bytes, the checksum half done."""
    packet = bytearray(build(segment))
    head = HEAD[family] + len(ip_options)
    length = len(packet) - HEAD[family]
    packet[HEAD[family] : HEAD[family]] = ip_options
    if family == V4:
        packet[0] = 0x40 | head // 4
        packet[2:4] = struct.pack("!H", len(packet))
        packet[10:12] = bytes(2)
        packet[10:12] = struct.pack("!H", checksum(bytes(packet[:head])))
        pseudo = packet[12:20] + struct.pack("!HH", 6, length)
    else:
        pseudo = packet[8:40] + struct.pack("!II", length, 6)
    packet[head + 16 : head + 18] = struct.pack("!H", checksum(bytes(pseudo)) ^ 0xFFFF)
    frame = hosts.a.mac + hosts.c.mac + (b"\x08\0" if family == V4 else b"\x86\xdd") + packet
    headers = 14 + head + 20 + len(segment.options)
    told = VNET_HDR.pack(NEEDS_CHECKSUM, GSO[family], headers, size, 14 + head, 16)
    with hosts.c.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as out:
        out.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        with hosts.c:
            out.bind(("eth0", 0))
        out.send(told + frame)


class Wire:
    """The tunnel's packets as they come to b: those inside of them, whole ones and fragments."""

    def __init__(self, ends):
        self._underlay, self._inner = ends.underlay, 14 + HEAD[ends.underlay] + 8 + VXLAN + 14
        self._sock = ends.hosts.b.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        with ends.hosts.b:
            self._sock.bind(("eth0", ETH_P_ALL))
        self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        self._sock.settimeout(5)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._sock.close()

    def until(self, number):
        """(packets inside of whole ones, number of fragments), when so many of both have come."""
        whole, parts = [], 0
        end = time.monotonic() + 10
        while len(whole) + parts < number:
            assert time.monotonic() < end, (len(whole), parts)
            frame, address = self._sock.recvfrom(1 << 17)
            if address[2] == socket.PACKET_OUTGOING:
                continue
            if self._underlay == V4 and frame[12:14] == b"\x08\0" and frame[23] == socket.IPPROTO_UDP:
                assert len(frame) - 14 <= 1500
                if frame[20] & 0x3F or frame[21]:
                    parts += 1
                else:
                    whole.append(self._checked(frame, frame[26:34]))
            elif self._underlay == V6 and frame[12:14] == b"\x86\xdd" and frame[20] == socket.IPPROTO_UDP:
                assert len(frame) - 14 <= 1500
                whole.append(self._checked(frame, frame[22:54]))
        return whole, parts

    def _checked(self, frame, addresses):
        datagram = frame[14 + HEAD[self._underlay] :]
        (said,) = struct.unpack_from("!H", datagram, 6)
        # over IPv4 there may be none
        if said or self._underlay == V6:
            assert checksum(addresses + struct.pack("!II", len(datagram), 17) + datagram) == 0
        return frame[self._inner :]


def merged(hosts, family, **fields):
    plain = {"flags": int(Flag.ACK), "options": STAMP, "payload": bytes(range(251)) * 40}
    return Segment(
        source=hosts.c.own(family), source_port=1234, destination=SERVICE[family], destination_port=PORT,
        seq=0xFFFFF000, ack=99, window=500, **(plain | fields),
    )  # fmt: skip


@FAMILIES
def test_segments_are_cut_so_that_they_fit(ends, family):
    hosts, head = ends.hosts, HEAD[family] + 20
    ends.home.forward_port(SERVICE[family], PORT, ends.home_device)
    ends.home.switch(on=True)
    stamped = FITS - head - len(STAMP)
    cases = [
        # (what is sent, size of its segments, of those that come)
        ({}, 1500 - head - 12, stamped),
        ({"payload": bytes(1448 * 4)}, 1448, stamped),
        # the last one may be of a single byte
        ({"payload": bytes(stamped * 7 + 1)}, 1500 - head - 12, stamped),
        # it ends where it ended, and more than the first was not told of congestion
        ({"flags": int(Flag.ACK | Flag.PSH | Flag.FIN | Flag.CWR)}, 1500 - head - 12, stamped),
        ({"options": STAMP + SACK}, 1500 - head - 40, FITS - head - 40),
        ({"options": b""}, 1500 - head, FITS - head),
        # those that fit stay as they are
        ({}, 500, 500),
        ({}, stamped, stamped),
        ({}, stamped + 1, stamped),
        # two, of which the second gets what the first has no room for
        ({"payload": bytes(stamped + 2)}, stamped + 1, stamped),
        # room for so much is made in two steps
        ({"payload": bytes(60_000)}, 8948, stamped),
        ({"payload": bytes(60_000)}, stamped + 0xFFF, stamped),
        ({"payload": bytes(60_000)}, stamped + 0x1000, stamped),
    ]
    chance = random.Random(6)
    for _ in range(20):
        size, options = chance.randrange(200, 9000), chance.choice((b"", STAMP, SACK, STAMP + SACK))
        payload = chance.randbytes(chance.randrange(size + 1, 60_000))
        flags = int(Flag.ACK | chance.choice((0, Flag.PSH, Flag.FIN, Flag.CWR, Flag.ECE)))
        fields = {"options": options, "payload": payload, "flags": flags}
        cases.append((fields, size, min(size, FITS - head - len(options))))
    if family == V4:
        cases.append(({"ip_options": ROUTE}, 1440, stamped - len(ROUTE)))
    made = fragments(hosts.a)
    with offloads(hosts.a, "eth0", False, CHECKSUMS, SEGMENTS), Wire(ends) as wire:
        for fields, size, cut in cases:
            options = fields.pop("ip_options", b"")
            segment = merged(hosts, family, **fields)
            expected = split(segment, cut)
            send_merged(hosts, family, segment, size, options)
            packets, parts = wire.until(len(expected))
            assert [parse(packet) for packet in packets] == expected, (fields, size)
            assert all(intact(packet) for packet in packets), (fields, size)
            assert parts == 0, (fields, size)
            if family == V4:
                heads = [packet[: (packet[0] & 15) * 4] for packet in packets]
                assert all(checksum(one) == 0 and one[20:] == options for one in heads)
    assert fragments(hosts.a) == made


@FAMILIES
@pytest.mark.parametrize("ends", [V4], ids=["over IPv4"], indirect=True)
def test_urgent_segments_are_not_cut_anew(ends, family):
    # the pointer counts from each one's own beginning: there is none that would be right for shorter ones
    ends.home.forward_port(SERVICE[family], PORT, ends.home_device)
    ends.home.switch(on=True)
    segment = merged(ends.hosts, family, flags=int(Flag.ACK | Flag.URG), urgent=3, payload=bytes(1400 * 2))
    with offloads(ends.hosts.a, "eth0", False, CHECKSUMS, SEGMENTS), Wire(ends) as wire:
        send_merged(ends.hosts, family, segment, 1400)
        assert wire.until(4) == ([], 4)


@FAMILIES
def test_what_fits_the_way_is_asked_of_a_socket(hosts, family):
    name, far = hosts.a.name, hosts.b.own(family)
    with hosts.a:
        assert mtu_towards(far) == 1500
        # what routers have told is kept in the same place (dst_mtu)
        sh(f"ip -n {name} route add {far} dev eth0 mtu 1400")
        assert mtu_towards(far) == 1400
        sh(f"ip -n {name} route del {far}")
        with pytest.raises(OSError, match="unreachable"):
            mtu_towards("192.0.2.1" if family == V4 else "2001:db8::1")


@FAMILIES
def test_where_the_kernel_makes_no_room_they_go_as_they_came(hosts, family, monkeypatch):
    monkeypatch.setattr(resize, "_MOST", 0x1FFF)  # bpf_skb_adjust_room: 0xFFF
    ends = Ends(hosts, V4)
    with ends.open:
        ends.home.forward_port(SERVICE[family], PORT, ends.home_device)
        ends.home.switch(on=True)
        segment = merged(hosts, family, payload=bytes(8948 * 2))
        with offloads(hosts.a, "eth0", False, CHECKSUMS, SEGMENTS), Wire(ends) as wire:
            send_merged(hosts, family, segment, 8948)
            assert wire.until(14) == ([], 14)


@FAMILIES
@pytest.mark.parametrize("merged_from", [(), (SEGMENTS,), (SEGMENTS, SCATTER)], ids=["as sent", "pages", "packets"])
@pytest.mark.parametrize("ends", [V4], ids=["over IPv4"], indirect=True)
def test_segments_of_full_size_that_come_alone_are_sent_in_fragments_and_no_others(ends, family, merged_from):
    # as of a connection that has agreed on its segments before it was forwarded
    sh(f"ip -n {ends.hosts.b.name} link set tmf0 mtu 1500")
    a = ends.hosts.a
    with contextlib.ExitStack() as until:
        if merged_from:
            # cut in front of a, as by a wire; it merges them again, into one packet or a list of them
            until.enter_context(offloads(ends.hosts.bridge, f"p{a.number}", False, CHECKSUMS, *merged_from))
            until.enter_context(offloads(a, "eth0", True, MERGE))
        client, served = until.enter_context(forwarded(ends, family))
        made = fragments(a)
        with Watcher(a, keep=lambda segment: segment.destination_port == PORT) as seen:
            alone = bytes(1500 - HEAD[family] - 32)
            client.sendall(alone)
            assert served.recv(2000) == alone
            assert fragments(a) >= made + 2
            assert carried(client, served)
        sizes = [HEAD[family] + 20 + len(one.options) + len(one.payload) for out, one in seen.seen if not out]
        in_two = 2 * sum(FITS < size <= 1500 for size in sizes)
        in_many = 2 * sum(size // 1500 for size in sizes if size > 1500)
        print(f"{fragments(a) - made} fragments, {in_two} of segments that came alone, {in_many} there could be")
        # what is watched and what is counted may differ by a few: a pair can be shorter than one segment
        assert in_many > 20
        assert fragments(a) - made < in_two + in_many // 2
        assert carried(served, client)
