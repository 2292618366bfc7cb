"""What the kernel takes back of what a connection had learned, and by which means."""

import contextlib
import dataclasses
import logging
import random
import socket
import time

import pytest

from tcpstate import export, softstate
from tcpstate.discard import discard_connections
from tcpstate.errors import KernelFeatureMissing, SoftStateNotRestored
from tcpstate.export import export_connections
from tcpstate.freeze import quiet
from tcpstate.kernel.bpf import windows
from tcpstate.kernel.bpf.windows import SLOTS, slot
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import TCP, InfoOption, RepairQueue, TcpInfo
from tcpstate.rebuild import differences, rebuild_connections, release_connections
from tcpstate.silence import Blackhole
from tests.tscnet import SERVICE, Watcher, net, pair, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6
NEVER = 2**31 - 1  # TCP_INFINITE_SSTHRESH


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        for host in (made.a, made.b):
            with host:
                Blackhole().ensure()
        yield made


def info(sock):
    return TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, 280))


@pytest.fixture(params=[(V4, False), (V6, False), (V4, True)], ids=["IPv4", "IPv6", "mapped"])
def record(request, hosts):
    """Of a connection of host a with its service address, which is not at host b."""
    family, mapped = request.param
    hosts.a.add(family)
    served, client = pair(hosts.a, hosts.c, family, mapped=mapped, port=0)
    with hosts.a:
        (made,) = export_connections([served], quiet([served]))
    yield made
    served.close()
    client.close()
    hosts.a.remove(family)


def learned(record, congestion="cubic", **soft):
    return dataclasses.replace(record, congestion=congestion, soft=dataclasses.replace(record.soft, **soft))


@contextlib.contextmanager
def rebuilt(host, record, **how):
    with host:
        (sock,) = rebuild_connections([record], **how)
        try:
            assert differences([sock], [record]) == []
            yield sock
        finally:
            sock.close()


def tables(host):
    return [host.sh(f"ip {family} {what}") for family in ("-4", "-6") for what in ("rule", "route show table all")]


@pytest.mark.parametrize(("congestion", "ssthresh"), [("cubic", 300), ("reno", 300), ("bbr", NEVER)])
def test_windows_are_given_back(hosts, record, congestion, ssthresh):
    told = learned(record, congestion, cwnd=426, ssthresh=300, pacing_rate=123456)
    with rebuilt(hosts.b, told) as sock:
        found = info(sock)
        assert (found.snd_cwnd, found.snd_ssthresh) == (426, ssthresh)
        if congestion != "bbr":  # it sets a pace of its own
            assert found.pacing_rate == 123456
        assert sock.getsockopt(Level.TCP, TCP.CONGESTION, 16).rstrip(b"\0").decode() == congestion
        assert sock.getsockopt(Level.SOCKET, SO.PRIORITY) == 0


@pytest.mark.parametrize(
    ("srtt", "rttvar"), [(37_000, 18_500), (37_000, 9_000), (150_000, 120_000), (400_000, 300_000), (2_000, 400)]
)
def test_round_trip_times_are_given_back_and_the_time_out_with_them(hosts, record, srtt, rttvar):
    with rebuilt(hosts.b, learned(record, srtt=srtt, rttvar=rttvar)) as sock:
        found = info(sock)
    # a busy machine makes a sample longer, never shorter
    assert srtt <= found.rtt + 1 <= srtt + 50_000
    assert found.rto >= srtt + max(200_000, 3 * rttvar)
    assert found.rto <= srtt + max(200_000, 5 * rttvar) + 150_000


def test_without_it_a_connection_begins_anew(hosts, record):
    with rebuilt(hosts.b, learned(record, cwnd=426, srtt=37_000), soft=False) as sock:
        found = info(sock)
    assert (found.snd_cwnd, found.rtt, found.snd_ssthresh) == (10, 0, NEVER)
    assert found.rto >= 1_000_000


def test_ecn_is_given_back(hosts, record):
    ecn = dataclasses.replace(record, negotiated=dataclasses.replace(record.negotiated, ecn=True))
    with rebuilt(hosts.b, ecn) as sock:
        assert info(sock).options & InfoOption.ECN
    with rebuilt(hosts.b, record) as sock:
        assert not info(sock).options & InfoOption.ECN


def test_nothing_is_sent_and_nothing_left_behind(hosts, record):
    with hosts.b:
        before = tables(hosts.b)
    with Watcher(hosts.b, "eth0") as out:
        with rebuilt(hosts.b, learned(record, cwnd=50, srtt=5_000)):
            pass
        assert out.sent() == []
    assert tables(hosts.b) == before


def test_more_sockets_than_slots(hosts, monkeypatch):
    monkeypatch.setattr(softstate, "SLOTS", 4)
    served, client, records = [], [], []
    for _ in range(10):
        one, other = pair(hosts.a, hosts.c, service=False, port=0)
        served.append(one)
        client.append(other)
    with hosts.a:
        records = export_connections(served, quiet(served))
        discard_connections(served)
    told = [learned(r, cwnd=20 + i, srtt=1000 * (i + 1), rttvar=500 * (i + 1)) for i, r in enumerate(records)]
    with hosts.a:
        socks = rebuild_connections(told)
    assert [info(s).snd_cwnd for s in socks] == list(range(20, 30))
    assert [(info(s).rtt + 1) // 1000 >= i + 1 for i, s in enumerate(socks)] == [True] * 10
    with pytest.raises(ValueError, match="slots"), windows.setter().lent([slot(1, 1, 1, 0)] * (SLOTS + 1)):
        pass
    for sock in (*socks, *client):
        sock.close()


def test_without_bpf_the_rest_is_given_and_one_warning_says_what_is_lost(hosts, record, monkeypatch, caplog):
    def refuse():
        raise KernelFeatureMissing("no congestion control by BPF: not today", object="struct_ops")

    monkeypatch.setattr(windows, "setter", refuse)
    with caplog.at_level(logging.WARNING), rebuilt(hosts.b, learned(record, cwnd=426, srtt=37_000)) as sock:
        found = info(sock)
    assert found.snd_cwnd <= 11  # the injected ACK counts as one
    assert found.rtt >= 36_999
    assert [r.message for r in caplog.records] == [
        "congestion windows are lost, the connections begin with slow start: no congestion control by BPF: not today"
    ]


def test_where_loopback_is_filtered_the_rest_is_given_and_one_warning_says_so(hosts, record, monkeypatch, caplog):
    monkeypatch.setattr("tcpstate.roundtrip._TRIES", 3)
    hosts.b.sh("nft add table inet shut")
    hosts.b.sh("nft add chain inet shut input '{ type filter hook input priority 0; }'")
    hosts.b.sh("nft add rule inet shut input iif lo drop")
    try:
        told = learned(record, cwnd=426, srtt=37_000)
        with caplog.at_level(logging.WARNING), rebuilt(hosts.b, told) as sock:
            found = info(sock)
        assert (found.snd_cwnd, found.rtt) == (426, 0)
        (said,) = caplog.records
        assert "round-trip times are lost" in said.message
        assert SoftStateNotRestored.code in said.message
    finally:
        hosts.b.sh("nft delete table inet shut")


def test_what_was_tried_before_the_stop_is_not_tried_in_it(hosts, record, monkeypatch):
    monkeypatch.setattr(softstate, "_taught", set())
    with hosts.b:
        softstate.foresee([(record.conn_id.local, record.conn_id.peer)])
    monkeypatch.setattr(softstate, "_try", None)
    with hosts.b:
        (plan,) = softstate.plan([learned(record, srtt=20_000, rttvar=5_000)])
    assert plan.samples


@pytest.mark.parametrize("lost", [True, False], ids=["data lost", "ACKs lost"])
@pytest.mark.parametrize("congestion", ["cubic", "reno", "bbr"])
def test_what_was_in_flight_goes_out_at_once_because_the_window_is_its_own_again(hosts, lost, congestion):
    """Some hundred segments whose ACKs never came: repeated in one go, not after a time-out from ten segments. The peer
    has them all or none, and its ACKs of what was not repeated yet are ignored: nothing may wait for them."""
    hosts.a.sh(f"ip addr replace {SERVICE[V4]}/24 dev eth0")
    hosts.a.announce(V4)
    served, client = pair(hosts.a, hosts.c, port=0)
    served.setsockopt(Level.SOCKET, SO.SNDBUFFORCE, 4 << 20)
    client.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, 4 << 20)
    client.settimeout(5)
    data = random.Random(5).randbytes(200_000)
    # the peer's window grows as the application reads
    while info(served).snd_wnd < 2 * len(data):
        served.sendall(data)
        got = 0
        while got < len(data):
            got += len(client.recv(1 << 20))
    wait_until(lambda: info(served).unacked == 0)
    with windows.setter().lent([slot(200, 100, 0, 0)]) as (number,):
        served.setsockopt(Level.SOCKET, SO.PRIORITY, number)
        served.setsockopt(Level.TCP, TCP.CONGESTION, windows.setter().name.encode())
        served.setsockopt(Level.SOCKET, SO.PRIORITY, 0)
    hook = "input" if lost else "output"
    hosts.c.sh("nft add table inet dark")
    hosts.c.sh(f"nft add chain inet dark {hook} '{{ type filter hook {hook} priority 0; }}'")
    hosts.c.sh(f"nft add rule inet dark {hook} tcp {'sport' if lost else 'dport'} {served.getsockname()[1]} drop")
    served.sendall(data)
    wait_until(lambda: ioctl_int(served.fileno(), Ioctl.SIOCOUTQNSD) == 0)
    with hosts.a:
        (record,) = export_connections([served], quiet([served]))
        discard_connections([served])
        hosts.a.remove(V4)
    # not what time-outs made of it meanwhile
    record = learned(record, congestion, cwnd=200, srtt=1000, rttvar=500)
    assert record.sent == len(data)
    hosts.c.sh("nft delete table inet dark")
    with hosts.b:
        (sock,) = socks = rebuild_connections([record])
        assert info(sock).unacked == 0  # not queued as sent: it fits
        # longer than its time-out: the kernel would shrink the window for that
        time.sleep(0.7)
        hosts.b.add(V4)
        release_connections(socks, [record])
    got = b""
    while len(got) < len(data):
        got += client.recv(1 << 20)
    assert got == data
    wait_until(lambda: info(sock).unacked == 0)
    assert sock.getsockopt(Level.TCP, TCP.CONGESTION, 16).rstrip(b"\0").decode() == congestion
    sock.close()
    hosts.b.remove(V4)


def test_what_repair_mode_counts_as_sent_was_not(hosts, monkeypatch):
    """With the send queue chosen, anything that makes the kernel look at it counts all of it as sent."""
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    client.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, 1 << 12)
    served.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            served.send(bytes(1 << 16))
    wait_until(lambda: info(served).snd_wnd < 1448 or info(served).unacked == 0)
    waiting = ioctl_int(served.fileno(), Ioctl.SIOCOUTQNSD)
    assert waiting
    read_all = export.read_all

    def disturbed(socks, *rest):
        for sock in socks:
            sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
            sock.setsockopt(Level.TCP, TCP.NODELAY, 1)  # looks at the queue
            sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
            assert ioctl_int(sock.fileno(), Ioctl.SIOCOUTQNSD) == 0
        return read_all(socks, *rest)

    monkeypatch.setattr(export, "read_all", disturbed)
    with hosts.a:
        (record,) = export_connections([served], quiet([served]))
    assert len(record.send_queue) - record.sent == waiting
    client.close()
    served.close()


@pytest.mark.parametrize("classic", [False, True], ids=["eBPF", "classic"])
def test_where_the_address_is_here_already_nothing_of_the_peer_arrives_meanwhile(hosts, monkeypatch, classic):
    served, client = pair(hosts.a, hosts.c, service=False, port=0)
    client.setsockopt(Level.TCP, TCP.NODELAY, 1)
    with hosts.a:
        (record,) = export_connections([served], quiet([served]))
        discard_connections([served])
    told = learned(record, cwnd=50, srtt=37_000)
    if classic:
        monkeypatch.setattr("tcpstate.kernel.bpf.mark_program", lambda mark: None)
    give = softstate.give

    def sends(*arguments):
        client.send(b"x" * 100)
        time.sleep(0.02)  # it has come, were it let in
        give(*arguments)

    monkeypatch.setattr(softstate, "give", sends)
    with rebuilt(hosts.a, told) as sock:
        assert info(sock).rtt >= 36_999
        assert ioctl_int(sock.fileno(), Ioctl.SIOCINQ) == 0
    client.close()
