"""Capture and replay: what AF_PACKET shows, and that injected segments count as arrived."""

import random
import socket
import time

import pytest

from tcpstate.capture import Capture, replay
from tcpstate.export import export_connections
from tcpstate.filters import drop_syns, undo_drop_syns
from tcpstate.freeze import quiet, thaw
from tcpstate.kernel import bpf
from tcpstate.kernel.sockets import Ioctl, ioctl_int
from tcpstate.segment import SEQ_MASK, Flag, Segment, build, timestamp_option
from tcpstate.silence import Blackhole
from tests.tscnet import Watcher, net, pair, receive, sh, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        with made.a:
            Blackhole().ensure()
        yield made


@pytest.fixture(params=[(V4, False), (V6, False), (V4, True)], ids=["IPv4", "IPv6", "mapped"])
def ends(request, hosts):
    family, mapped = request.param
    served, client = pair(hosts.a, hosts.c, family, service=False, port=0, mapped=mapped)
    served.settimeout(5)
    client.settimeout(5)
    yield served, client
    served.close()
    client.close()


def frozen(hosts, served, during, **how):
    """Freeze, let ``during`` happen, thaw; returns the record and what was captured."""
    port = served.getsockname()[1]
    with hosts.a, Capture(ports={port}, **how) as capture:
        states = quiet([served])
        (record,) = export_connections([served], states)
        during()
        time.sleep(0.05)
        thaw([served], states)
        return record, capture.segments(), capture.lost


def test_what_arrived_during_the_freeze_is_there_at_once_after_the_replay(hosts, ends):
    served, client = ends
    text = random.Random(1).randbytes(60_000)

    def send():
        client.send(text)
        time.sleep(0.02)
        # nothing can come by retransmission
        hosts.c.sh("nft add table inet cut")
        hosts.c.sh("nft add chain inet cut output '{ type filter hook output priority 0; }'")
        hosts.c.sh(f"nft add rule inet cut output tcp sport {client.getsockname()[1]} drop")

    try:
        record, arrived, lost = frozen(hosts, served, send)
        assert lost == 0
        with hosts.a:
            replay(arrived, [record])
        got = receive(served, 10_000)
    finally:
        hosts.c.sh("nft delete table inet cut")
    assert got + receive(served, 60_000 - len(got)) == text


def test_what_was_altered_on_its_way_is_not_replayed(hosts, ends):
    served, client = ends
    family = V6 if ":" in client.getsockname()[0] else V4

    def one_good_one_bad():
        client.send(b"good")
        with hosts.c:
            raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        (record,) = known
        made = Segment(
            source=record.conn_id.peer, source_port=record.conn_id.peer_port, destination=record.conn_id.local,
            destination_port=record.conn_id.local_port, seq=(record.rcv_nxt + 4) & SEQ_MASK, ack=record.snd_una,
            flags=Flag.ACK | Flag.PSH, window=1000, options=timestamp_option(0, 0), payload=b"sent right",
        )  # fmt: skip
        with raw:
            for packet in (build(made), build(made).replace(b"right", b"wrong")):
                raw.sendto(packet, (record.conn_id.local, 0))

    port = served.getsockname()[1]
    with hosts.a, Capture(ports={port}) as capture:
        states = quiet([served])
        known = export_connections([served], states)
        one_good_one_bad()
        time.sleep(0.05)
        thaw([served], states)
        data = [segment.payload for segment in capture.segments()]
    assert b"good" in data
    assert b"sent right" in data
    assert b"sent wrong" not in data


def test_merged_segments_are_split_for_the_injection(hosts, ends):
    served, client = ends
    text = random.Random(2).randbytes(200_000)
    client.setsockopt(socket.SOL_SOCKET, 32, 1 << 20)
    # a wide congestion window first
    client.send(text)
    receive(served, len(text))
    record, arrived, _ = frozen(hosts, served, lambda: client.send(text))
    assert max(len(s.payload) for s in arrived) > 1500, "the link did not merge"
    with hosts.a, Watcher(hosts.a, "lo") as watcher:
        count = replay(arrived, [record])
        assert receive(served, len(text)) == text
        injected = watcher.sent()
    assert count == sum(max(1, -(-len(s.payload) // record.soft.advertised_mss)) for s in arrived)
    assert max(len(s.payload) for s in injected) <= record.soft.advertised_mss


def test_a_fin_is_replayed(hosts, ends):
    served, client = ends

    def end():
        client.send(b"last words")
        client.shutdown(socket.SHUT_WR)

    record, arrived, _ = frozen(hosts, served, end)
    with hosts.a:
        replay(arrived, [record])
    served.settimeout(0.15)
    assert receive(served, 10) == b"last words"
    assert served.recv(1) == b""


def test_acknowledgements_are_replayed(hosts, ends):
    served, _ = ends
    port = served.getsockname()[1]
    with hosts.a, Capture(ports={port}) as capture:
        # the filter first, so that the data leaves and its ACK is dropped
        bpf.attach(served, bpf.DROP_ALL)
        served.send(b"acknowledge me")
        time.sleep(0.1)
        states = quiet([served])
        (record,) = export_connections([served], states)
        assert record.sent == 14
        arrived = capture.segments()
        thaw([served], states, probe=False)
        served.setsockopt(socket.SOL_SOCKET, 27, 0)
        replay(arrived, [record])
    wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCOUTQ) == 0, 0.15)


def test_what_the_connection_knows_is_left_out(hosts, ends):
    served, client = ends
    port = served.getsockname()[1]
    with hosts.a, Capture(ports={port}) as capture:
        client.send(b"known")
        wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCINQ) == 5)
        states = quiet([served])
        (record,) = export_connections([served], states)
        thaw([served], states)
        known = capture.segments()
        assert any(s.payload for s in known)
        with Watcher(hosts.a, "lo") as watcher:
            replay([s for s in known if s.payload], [record])
            assert watcher.sent() == []


def test_segments_of_unknown_connections_draw_no_reset(hosts, ends):
    served, client = ends
    record, arrived, _ = frozen(hosts, served, lambda: client.send(b"x"))
    with hosts.a, Watcher(hosts.c) as watcher:
        assert replay(arrived, []) == 0
        assert watcher.resets() == []
        replay(arrived, [record])


@pytest.mark.parametrize("family", [V4, V6])
def test_syns_that_were_dropped_begin_connections_when_replayed(hosts, family):
    with hosts.a.socket(family, socket.SOCK_STREAM) as listener, hosts.c.socket(family, socket.SOCK_STREAM) as client:
        listener.bind((hosts.a.own(family), 0))
        listener.listen(4)
        with hosts.a, Capture(syn_only=True, ports={listener.getsockname()[1]}) as capture:
            states = drop_syns([listener])
            client.setblocking(False)
            client.connect_ex(listener.getsockname()[:2])
            time.sleep(0.1)
            undo_drop_syns([listener], states)
            (syn,) = capture.segments(lambda s: s.flags & (Flag.SYN | Flag.ACK) == Flag.SYN)
            begun = time.monotonic()
            # twice, as a bridge and its port would bring it
            assert replay([syn, syn], []) == 1
            listener.settimeout(5)
            listener.accept()[0].close()
            assert time.monotonic() - begun < 0.5, "it came by the client's own retransmission"


def test_the_ports_keep_other_traffic_out(hosts, ends):
    served, client = ends
    with hosts.a, Capture(ports={served.getsockname()[1] ^ 1}) as capture:
        client.send(b"elsewhere")
        receive(served, 9)
        assert capture.segments() == []


def test_the_addresses_keep_other_traffic_out(hosts, ends):
    served, client = ends
    port, mine = served.getsockname()[1], served.getsockname()[0]
    other = ["10.99.0.1", "fd99::1"] * 50
    with (
        hosts.a,
        Capture(ports={port}, addresses=[*other, mine]) as here,
        Capture(ports={port}, addresses=other) as elsewhere,
    ):
        client.send(b"for this one")
        receive(served, 12)
        assert [s.payload for s in here.segments() if s.payload] == [b"for this one"]
        assert elsewhere.segments() == []


def test_what_we_inject_is_not_captured_again(hosts, ends):
    served, client = ends
    record, arrived, _ = frozen(hosts, served, lambda: client.send(b"once"))
    with hosts.a, Capture(ports={served.getsockname()[1]}) as capture:
        replay(arrived, [record])
        receive(served, 4)
        assert [s for s in capture.segments() if s.payload] == []


def test_a_named_interface_and_one_that_does_not_exist(hosts, ends):
    served, client = ends
    with hosts.a:
        with Capture(["eth0"], ports={served.getsockname()[1]}) as capture:
            client.send(b"here")
            receive(served, 4)
            assert [s.payload for s in capture.segments() if s.payload] == [b"here"]
        with pytest.raises(OSError, match="no interface"):
            Capture(["nowhere0"]).start()


def test_capture_survives_the_address_leaving_its_host(hosts):
    """The peer goes on sending to a host that has the address no more: what it sends is still captured."""
    hosts.a.add(V4)
    served, client = pair(hosts.a, hosts.c)
    with hosts.a, Capture(ports={7000}) as capture, Watcher(hosts.c) as watcher:
        states = quiet([served])
        export_connections([served], states)
        hosts.a.remove(V4)
        client.send(b"to nobody")
        time.sleep(0.1)
        assert b"to nobody" in [s.payload for s in capture.segments()]
        assert watcher.resets() == []
    served.close()
    client.close()


def test_built_packets_pass_the_kernels_checksum(hosts, ends):
    served, client = ends
    before = _checksum_errors(hosts)
    record, arrived, _ = frozen(hosts, served, lambda: client.send(bytes(range(255))))
    with hosts.a:
        replay(arrived, [record])
    assert receive(served, 255) == bytes(range(255))
    assert _checksum_errors(hosts) == before
    assert all(build(s) for s in arrived)


def _checksum_errors(hosts):
    lines = sh(f"ip netns exec {hosts.a.name} nstat -asz TcpInCsumErrors TcpInErrs").splitlines()[1:]
    return [line.split()[1] for line in lines]


def test_a_stopped_capture_keeps_what_it_has(hosts, ends):
    served, client = ends
    port = served.getsockname()[1]
    with hosts.a, Capture(ports={port}) as capture:
        client.sendall(b"kept")
        assert receive(served, 4) == b"kept"
        capture.stop()
        client.sendall(b"lost")
        assert receive(served, 4) == b"lost"
        assert [s.payload for s in capture.segments() if s.payload] == [b"kept"]
