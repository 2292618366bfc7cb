"""What forwarding of connections between hosts is built on: tcx programs, a tunnel, an address that nobody asks for."""

import contextlib
import os
import random
import socket
import struct
import threading

import pytest

from migrate.announce import claim
from migrate.announce import probe as probe_frame
from tcpstate.connid import ConnId
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.steer import AWAY_MAC, HOME_MAC, PROBE, PROBE_MAC, Role, Seen, Steering, attach
from tcpstate.segment import Flag
from tests.tscnet import SERVICE, Watcher, net, sh, until_local, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6
FAMILIES = pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
PORT = 7500
BULK = random.Random(6).randbytes(3 << 20)
TABLE, RULE = 7450, 4200
#: of 1500 bytes the way leaves, over IPv6 (IPv4: 20 more)
FITS = 1430


def own(host, family):
    return ("10.77.0." if family == V4 else "fd77::") + str(host.number)


class Ends:
    """a is home, b is away, over a tunnel; nothing is switched on."""

    def __init__(self, hosts, underlay):
        self.hosts, self.underlay, self.open = hosts, underlay, contextlib.ExitStack()
        self.steering, self.links, self.devices = {}, {}, {}
        for host, peer, mac in ((hosts.a, hosts.b, HOME_MAC), (hosts.b, hosts.a, AWAY_MAC)):
            name = host.name
            sh(
                f"ip -n {name} link add tmf0 address {mac.hex(':')} type vxlan id 77 dstport 4790 nolearning"
                f" local {own(host, underlay)} remote {own(peer, underlay)}"
            )
            self.open.callback(sh, f"ip -n {name} link del tmf0", check=False)
            sh(f"ip -n {name} link set tmf0 arp off addrgenmode none")
            sh(f"ip -n {name} link set tmf0 mtu {FITS if host is hosts.b else 9000} up")
        for family in (V4, V6):
            sh(f"ip -n {hosts.b.name} {'-6' if family == V6 else ''} route add default dev tmf0 table {TABLE}")
            rule = f"from {SERVICE[family]} lookup {TABLE} priority {RULE}"
            sh(f"ip -n {hosts.b.name} {'-6' if family == V6 else ''} rule add {rule}")
            self.open.callback(sh, f"ip -n {hosts.b.name} {'-6' if family == V6 else ''} rule del {rule}")
        for host, role in ((hosts.a, Role.HOME), (hosts.b, Role.AWAY)):
            with host:
                steering = self.steering[role] = Steering.make(100, 10)
                self.open.callback(steering.close)
                self.devices[role] = socket.if_nametoindex("eth0")
                self.links[role] = attach(role, steering, socket.if_nametoindex("tmf0"), [self.devices[role]], FITS)
        self.open.callback(self._unlink_all)

    def unlink(self, role, index):
        """Take one program away."""
        os.close(self.links[role].pop(f"link-{index}"))

    def _unlink_all(self):
        for links in self.links.values():
            while links:
                os.close(links.popitem()[1])

    @property
    def home_device(self):
        return self.devices[Role.HOME]

    @property
    def home(self):
        return self.steering[Role.HOME]

    @property
    def away(self):
        return self.steering[Role.AWAY]

    def bring(self, family):
        """The service address: on a's eth0 it is, on b's tunnel it comes."""
        nodad = "nodad" if family == V6 else ""
        sh(f"ip -n {self.hosts.b.name} addr replace {SERVICE[family]}/{32 if family == V4 else 128} dev tmf0 {nodad}")
        until_local(self.hosts.b.name, SERVICE[family], "tmf0")
        self.away.admit(SERVICE[family])
        self.away.switch(on=True)


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


def listening(host, family, port=PORT):
    listener = host.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((SERVICE[family], port))
    listener.listen()
    listener.settimeout(10)
    return listener


def connect(hosts, family, port=PORT):
    client = hosts.c.socket(family, socket.SOCK_STREAM)
    client.settimeout(10)
    client.connect((SERVICE[family], port))
    return client


def carried(sender, receiver, data=BULK):
    thread = threading.Thread(target=sender.sendall, args=(data,))
    thread.start()
    found = b""
    while len(found) < len(data):
        part = receiver.recv(1 << 20)
        assert part
        found += part
    thread.join()
    return found == data


def established(family, peer, local):
    return ConnId(protocol="tcp", local=local[0], local_port=local[1], peer=peer[0], peer_port=peer[1])


@contextlib.contextmanager
def forwarded(ends, family):
    """(client on c, its connection on b): begun at a, served by b."""
    ends.bring(family)
    ends.home.forward_port(SERVICE[family], PORT, ends.home_device)
    ends.home.switch(on=True)
    with listening(ends.hosts.b, family) as listener, connect(ends.hosts, family) as client:
        with listener.accept()[0] as served:
            served.settimeout(10)
            yield client, served


@FAMILIES
def test_new_connections_to_a_port_are_served_elsewhere(ends, family):
    with Watcher(ends.hosts.c) as seen, forwarded(ends, family) as (client, served):
        assert carried(client, served)
        assert carried(served, client)
        # what was agreed on in the handshake fits the tunnel
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= 1430 - (40 if family == V4 else 60)
    assert not [segment for out, segment in seen.seen if segment.flags & Flag.RST]


def probe(ends, size):
    """Whether it comes back."""
    with ends.hosts.a.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as out:
        with ends.hosts.a:
            out.bind(("tmf0", 0))
        out.send((AWAY_MAC + PROBE_MAC + PROBE.to_bytes(2, "big")).ljust(14 + size, b"\0"))
    with contextlib.suppress(TimeoutError, AssertionError):
        wait_until(lambda: ends.home.echoed >= 14 + size, 1)
    return ends.home.echoed >= 14 + size


def test_a_probe_tells_whether_packets_of_full_size_come_through(ends):
    assert probe(ends, 64)
    # the outer packet of IPv4 is sent in fragments; that of IPv6 is not
    assert probe(ends, 1500) == (ends.underlay == V4)


@FAMILIES
def test_a_connection_of_another_process_at_home_stays_there(ends, family):
    a = ends.hosts.a
    with listening(a, family) as listener, connect(ends.hosts, family) as old, listener.accept()[0] as stays:
        with forwarded(ends, family) as (client, served):
            old.sendall(b"home")
            client.sendall(b"away")
            stays.settimeout(10)
            assert (stays.recv(10), served.recv(10)) == (b"home", b"away")


@FAMILIES
def test_a_connection_is_forwarded_by_its_key_alone_and_its_end_is_seen(ends, family):
    with forwarded(ends, family) as (client, served):
        one = established(family, client.getsockname(), served.getsockname())
        ends.home.forward(one, ends.home_device)
        for key in list(call.keys(ends.home.fds["ports"], 20)):
            call.delete(ends.home.fds["ports"], key)
        client.sendall(b"alive")
        assert served.recv(10) == b"alive"
        (entry,) = ends.home.entries()
        assert (entry.connection, entry.device, entry.seen, entry.over) == (one, ends.home_device, Seen(0), False)
        assert entry.last > 0
        client.shutdown(socket.SHUT_WR)
        assert served.recv(10) == b""
        assert ends.home.entries()[0].seen == Seen.PEER_FIN
        served.shutdown(socket.SHUT_WR)
        assert client.recv(10) == b""
        assert ends.home.entries()[0].over
        ends.home.drop(entry)
        assert ends.home.entries() == []


@FAMILIES
def test_switched_off_home_answers_for_itself(ends, family):
    with forwarded(ends, family) as (client, _):
        ends.home.switch(on=False)
        client.sendall(b"who is there")
        with pytest.raises(ConnectionResetError):
            client.recv(10)
        assert not ends.home.on


def answers(host, sock, mac):
    """The MACs that answered an ARP request for the service address, until ``mac`` was among them."""
    found = set()
    sock.send(probe_frame(SERVICE[V4], host.mac.hex(":")))
    while mac not in found:
        said = claim(sock.recv(2048))
        if said is not None and said.address == SERVICE[V4]:
            found.add(said.mac)
    return found


def test_nobody_away_is_asked_for_the_address(ends):
    a, b, c = ends.hosts.hosts
    ends.bring(V4)
    home, away = a.mac.hex(":"), b.mac.hex(":")
    with c.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        with c:
            sock.bind(("eth0", 0x0806))
        sock.settimeout(10)
        # as many times as it takes to see a second answer, if there was one
        assert set.union(*(answers(c, sock, home) for _ in range(5))) == {home}
        # the kernel answers for an address on any interface
        ends.unlink(Role.AWAY, ends.devices[Role.AWAY])
        assert away in answers(c, sock, away)


def test_only_its_interface_answers_for_an_ipv6_address(ends):
    a, b, c = ends.hosts.hosts
    ends.bring(V6)
    ends.unlink(Role.AWAY, ends.devices[Role.AWAY])
    with c.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        with c:
            sock.bind(("eth0", 0x86DD))
        sock.settimeout(10)
        found = set()
        for _ in range(5):
            # straight to b, too: it is not in the group of the address on this interface
            for to in (None, b.mac):
                frame = probe_frame(SERVICE[V6], c.mac.hex(":"))
                sock.send(frame if to is None else to + frame[6:])
            while a.mac.hex(":") not in found:
                said = claim(sock.recv(2048))
                if said is not None and said.address == SERVICE[V6]:
                    found.add(said.mac)
        assert found == {a.mac.hex(":")}


@FAMILIES
def test_an_error_about_a_connection_finds_its_way(ends, family):
    # its way to the client has become narrow: a router tells the address, which is at home
    with forwarded(ends, family) as (client, served):
        (ours, our_port), (theirs, port) = served.getsockname()[:2], client.getsockname()[:2]
        client.sendall(b"x")
        assert served.recv(10) == b"x"
        with Watcher(ends.hosts.c) as watched:
            served.sendall(b"y" * 100)
            assert client.recv(100)
            wait_until(lambda: any(s.payload for _, s in watched.seen))
        segment = next(s for _, s in watched.seen if s.payload)
        tcp = struct.pack("!HHII", our_port, port, segment.seq + 100, segment.ack) + b"\x50\x10" + bytes(6)
        source, to = (socket.inet_pton(family, address) for address in (ours, theirs))
        if family == V4:
            about = struct.pack("!BBHHHBBH", 0x45, 0, 1400, 1, 0x4000, 64, 6, 0) + source + to + tcp
            error = struct.pack("!BBHHH", 3, 4, 0, 0, 1000) + about
            error = error[:2] + checksum(error) + error[4:]
            kind, level, option = socket.IPPROTO_ICMP, socket.IPPROTO_IP, 14  # IP_MTU
        else:
            about = struct.pack("!IHBB", 6 << 28, 1300, 6, 64) + source + to + tcp
            error = struct.pack("!BBHI", 2, 0, 0, 1300) + about
            kind, level, option = socket.IPPROTO_ICMPV6, socket.IPPROTO_IPV6, 24  # IPV6_MTU
        assert served.getsockopt(level, option) == 1430
        with ends.hosts.c.socket(family, socket.SOCK_RAW, kind) as router:
            router.sendto(error, (ours, 0))
        wait_until(lambda: served.getsockopt(level, option) == (1000 if family == V4 else 1300))


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)


def test_what_is_pinned_goes_on_without_its_maker(ends, tmp_path):
    sh(f"mount -t bpf bpf {tmp_path}")
    try:
        for name, fd in (*ends.away.fds.items(), *ends.links[Role.AWAY].items()):
            call.pin(fd, str(tmp_path / name))
        ends.away.close()
        for index in list(ends.links[Role.AWAY]):
            ends.unlink(Role.AWAY, int(index.removeprefix("link-")))
        assert probe(ends, 64)
        again = Steering({name: call.pinned(str(tmp_path / name)) for name in Steering.NAMES})
        again.switch(on=True)
        assert again.on
        again.close()
        for path in tmp_path.glob("link-*"):
            path.unlink()
        # a link ends when nothing has it open and its name is gone, some time later
        assert not all(probe(ends, size) for size in range(128, 1400))
    finally:
        sh(f"umount {tmp_path}")
