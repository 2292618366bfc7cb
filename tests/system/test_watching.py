"""The judges of migrations, on trial themselves: resets, retransmissions and time-outs that happen must be seen."""

import os
import select
import socket
import struct
import time

import pytest

from tests.counters import counters, moved
from tests.hosts import ThreeHosts
from tests.packets import Flag, Watcher

pytestmark = pytest.mark.alone

PORT = 7000
Pair = tuple[socket.socket, socket.socket]


def connect(hosts: ThreeHosts, family: int) -> Pair:
    """(the client's end, the server's end)."""
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    with hosts.source.netns_entered():
        listener = socket.create_server((hosts.net.service(family), PORT), family=kind)
    with hosts.client.netns_entered():
        client = socket.create_connection((hosts.net.service(family), PORT), timeout=3)
    with listener:
        return client, listener.accept()[0]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("by", ["client", "server"])
def test_a_reset_is_seen_either_way(hosts: ThreeHosts, family: int, by: str) -> None:
    with Watcher(hosts.client, port=PORT) as watcher, Watcher(hosts.net, "tmh-source", port=PORT) as bridge:
        client, server = connect(hosts, family)
        with client, server:
            end = client if by == "client" else server
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()
            report = watcher.mark()
        assert [(p.outgoing, Flag.RST in p.flags) for p in report.rsts] == [(by == "client", True)]
        assert "RST" in watcher.log()
        # The port of the source: what the bridge sends out there is what the client sent.
        assert [p.outgoing for p in bridge.mark().rsts] == [by == "client"]


@pytest.mark.parametrize("family", [4, 6])
def test_nothing_is_seen_where_nothing_is_wrong(hosts: ThreeHosts, family: int) -> None:
    before = counters(hosts.client)
    with Watcher(hosts.client, port=PORT) as watcher:
        client, server = connect(hosts, family)
        with client, server:
            for _ in range(50):
                client.sendall(os.urandom(20_000))
                received(server, 20_000)
                server.sendall(b"thank you")
                received(client, 9)
        report = watcher.mark()
    assert (report.rsts, report.resent_out, report.resent_in, report.syns_resent, report.missed) == ([], 0, 0, 0, 0)
    assert report.packets > 100
    assert moved(before, counters(hosts.client)) == {}


def received(end: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        piece = end.recv(count - len(got))
        assert piece
        got += piece
    return got


def test_a_timeout_of_the_client_is_counted_and_its_retransmissions_are_seen(hosts: ThreeHosts) -> None:
    client, server = connect(hosts, 4)
    with client, server, Watcher(hosts.client, port=PORT) as watcher:
        before = counters(hosts.client)
        with hosts.source.loss(100, port=PORT, outgoing=False):
            client.sendall(bytes(100))
            time.sleep(0.8)
        received(server, 100)
        report = watcher.mark()
        changed = moved(before, counters(hosts.client))
    assert changed["TcpExtTCPTimeouts"] >= 1
    assert report.resent_out >= 1
    assert report.resent_out == changed["TcpRetransSegs"]


def test_a_repeated_syn_is_seen(hosts: ThreeHosts) -> None:
    with hosts.client.netns_entered():
        client = socket.socket()
    with client, Watcher(hosts.client, port=PORT, data=False) as watcher:
        client.setblocking(False)
        with hosts.client.loss(100, port=PORT, outgoing=False):
            with hosts.source.netns_entered():
                listener = socket.create_server((hosts.net.service4, PORT))
            client.connect_ex((hosts.net.service4, PORT))
            time.sleep(1.3)
        assert select.select([], [client], [], 5)[1]
        listener.close()
        report = watcher.mark()
    assert report.syns_resent >= 1
    assert counters(hosts.client)["TcpExtTCPSynRetrans"] >= 1


def test_full_speed_is_watched_without_missing(hosts: ThreeHosts) -> None:
    client, server = connect(hosts, 6)
    total = 100 << 20
    with client, server, Watcher(hosts.client, port=PORT) as watcher:
        piece, got = bytes(1 << 20), 0
        client.setblocking(False)
        sent = 0
        while got < total:
            readable, writable, _ = select.select([server], [client] if sent < total else [], [])
            if writable:
                sent += client.send(piece)
            if readable:
                got += len(server.recv(1 << 20))
        report = watcher.mark()
    assert report.missed == 0
    assert report.packets > 1000
    assert report.rsts == []
