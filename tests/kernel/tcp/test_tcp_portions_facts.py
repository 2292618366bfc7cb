"""Many connections are frozen, exported and rebuilt in portions by two threads; each keeps what is its own."""

import contextlib
import dataclasses
import random
import socket

import pytest

from tcpstate import softstate
from tcpstate.discard import discard_connections
from tcpstate.errors import AddressInUse, UnsupportedState
from tcpstate.export import export_connections
from tcpstate.freeze import quiet, thaw
from tcpstate.inward import MARK, inward
from tcpstate.kernel import lanes
from tcpstate.kernel.sockets import Level
from tcpstate.kernel.tcp import INFO_SIZE, TCP, Repair, TcpInfo
from tcpstate.rebuild import differences, rebuild_connections, release_connections
from tcpstate.roundtrip import teaching
from tcpstate.silence import Blackhole
from tests.tscnet import SERVICE, net, pair, wait_until

KINDS = [(socket.AF_INET, False), (socket.AF_INET6, False), (socket.AF_INET, True)]
COUNT = 30


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        for host in (made.a, made.b):
            with host:
                Blackhole().ensure()
        yield made


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(lanes, "PORTION", 4)
    monkeypatch.setattr(lanes, "WIDE", 8)
    monkeypatch.setattr(lanes, "processors", lambda: 2)


@contextlib.contextmanager
def connections(hosts):
    """(accepted on a, their peers on c), of all kinds, each with some bytes of its own unread."""
    for family in SERVICE:
        hosts.a.add(family)
    pairs = [pair(hosts.a, hosts.c, family, mapped=mapped, port=0) for family, mapped in KINDS * (COUNT // len(KINDS))]
    for i, (served, client) in enumerate(pairs):
        served.setsockopt(Level.TCP, TCP.KEEPIDLE, 100 + i)
        client.sendall(random.Random(i).randbytes(100 * i))
        wait_until(
            lambda sock=served, size=100 * i: TcpInfo.unpack(sock.getsockopt(6, 11, INFO_SIZE)).bytes_received == size
        )
    try:
        yield [served for served, _ in pairs], [client for _, client in pairs]
    finally:
        for both in pairs:
            for sock in both:
                sock.close()
        for host in (hosts.a, hosts.b):
            for address in SERVICE.values():
                host.sh(f"ip addr flush dev eth0 to {address}")


def test_each_keeps_its_own_and_goes_on(hosts):
    with connections(hosts) as (served, clients):
        names = [client.getsockname()[1] for client in clients]
        with hosts.a:
            records = export_connections(served, quiet(served))
            discard_connections(served)
        for family in SERVICE:
            hosts.a.remove(family)
        assert [r.conn_id.peer_port for r in records] == names
        assert [r.options["tcp.keepidle"] for r in records] == [(100 + i,) for i in range(COUNT)]
        assert [r.receive_queue for r in records] == [random.Random(i).randbytes(100 * i) for i in range(COUNT)]
        told = [
            dataclasses.replace(r, soft=dataclasses.replace(r.soft, cwnd=20 + i, srtt=1000 * (i + 1)))
            for i, r in enumerate(records)
        ]
        with hosts.b:
            made = rebuild_connections(told)
            assert differences(made, told) == []
            learned = [TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE)) for sock in made]
            assert [i.snd_cwnd for i in learned] == [20 + i for i in range(COUNT)]
            assert [i.rtt + 1 >= 1000 * (at + 1) for at, i in enumerate(learned)] == [True] * COUNT
            for family in SERVICE:
                hosts.b.add(family)
            release_connections(made, told)
        for i, (sock, client) in enumerate(zip(made, clients, strict=True)):
            client.settimeout(10)
            sock.settimeout(10)
            client.sendall(b"there %d" % i)
            sock.sendall(b"back %d" % i)
            assert client.recv(100) == b"back %d" % i
            got = b""
            while not got.endswith(b"there %d" % i):
                got += sock.recv(1 << 16)
            assert got == records[i].receive_queue + b"there %d" % i
            sock.close()


@pytest.mark.parametrize("place", [0, 13, COUNT - 1])
def test_one_that_cannot_be_exported_leaves_the_others_as_they_were(hosts, place):
    with connections(hosts) as (served, clients):
        states = quiet(served)
        with hosts.a.socket(socket.AF_INET, socket.SOCK_STREAM) as never_connected:
            mixed = [*served[:place], never_connected, *served[place + 1 :]]
            with hosts.a, pytest.raises(UnsupportedState, match="never connected"):
                export_connections(mixed, states)
            assert [sock.getsockopt(Level.TCP, TCP.REPAIR) for sock in mixed] == [Repair.OFF] * COUNT
        with hosts.a:
            thaw(served, states)
        for sock, client in zip(served, clients, strict=True):
            client.settimeout(10)
            sock.sendall(b"as before")
            assert client.recv(100) == b"as before"


def test_one_that_cannot_be_rebuilt_leaves_none(hosts):
    with connections(hosts) as (served, _):
        with hosts.a:
            records = export_connections(served, quiet(served))
            discard_connections(served)
        with hosts.b:
            (there,) = rebuild_connections([records[17]])
            with pytest.raises(AddressInUse, match=str(records[17].conn_id.peer_port)):
                rebuild_connections(records)
            there.close()
            again = rebuild_connections(records)
            assert differences(again, records) == []
            for sock in again:
                sock.close()


def test_the_way_in_stays_until_its_last_user_has_left(hosts):
    families = frozenset(SERVICE)

    def stands():
        return [f"{MARK:#x}" in hosts.b.sh(f"ip {which} rule") for which in ("-4", "-6")]

    with hosts.b:
        with inward(families):
            with inward(families):
                assert stands() == [True, True]
            with inward(frozenset([socket.AF_INET])), inward(frozenset()):
                assert stands() == [True, True]
            assert stands() == [True, True]
        assert stands() == [False, False]
        with hosts.a, inward(families):
            # another namespace has a way in of its own
            assert stands() == [False, False]


def test_the_way_in_that_another_process_takes_away_is_made_anew(hosts, monkeypatch):
    taken = 0

    @contextlib.contextmanager
    def disturbed(families):
        nonlocal taken
        with teaching(families) as teachers:
            # as another process does that has come to its end
            if socket.AF_INET in families:
                hosts.b.sh(f"ip -4 rule del fwmark {MARK}")
                hosts.b.sh(f"ip -4 route flush table {MARK}")
                taken += 1
            yield teachers

    monkeypatch.setattr(softstate, "teaching", disturbed)
    with connections(hosts) as (served, _):
        with hosts.a:
            records = export_connections(served, quiet(served))
            discard_connections(served)
        hosts.a.remove(socket.AF_INET)
        with hosts.b:
            again = rebuild_connections(records)
            assert differences(again, records) == []
            assert taken
            assert f"{MARK:#x}" not in hosts.b.sh("ip -4 rule")
            for sock in again:
                sock.close()
