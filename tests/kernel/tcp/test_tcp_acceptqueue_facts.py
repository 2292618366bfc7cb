"""Connections that wait to be accepted: taken out of a listener's queue, and put into another one."""

import random
import socket

import pytest

from tcpstate import acceptqueue, halfopen
from tcpstate.kernel.bpf.handshake import cookies_allowed
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TCP, TcpInfo
from tcpstate.locate import accept_queues
from tests.tscnet import PREFIX, SERVICE, Watcher, net, sh, until_local, wait_until

V4, V6 = socket.AF_INET, socket.AF_INET6
CHANCE = random.Random(8)


@pytest.fixture(scope="module")
def hosts():
    with net() as made:
        yield made


def listen(host, kind, address, port=0, backlog=256):
    listener = host.socket(kind, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(backlog)
    listener.settimeout(10)
    return listener


def info(sock):
    return TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, 280))


def take(host, family):
    flags = "nodad" if family == V6 else ""
    sh(f"ip -n {host.name} addr replace {SERVICE[family]}/{PREFIX[family]} dev eth0 {flags}")
    until_local(host.name, SERVICE[family], "eth0")
    host.announce(family)


@pytest.mark.parametrize(("family", "mapped"), [(V4, False), (V6, False), (V4, True)], ids=["IPv4", "IPv6", "mapped"])
def test_a_queue_moves_with_early_data_and_exact_sequence_numbers(hosts, family, mapped):
    take(hosts.a, family)
    kind, address = (V6, "::") if mapped else (family, SERVICE[family])
    old = listen(hosts.a, kind, address)
    old.setblocking(True)
    port = old.getsockname()[1]
    early = [b"", b"GET / HTTP/1.1\r\n\r\n", CHANCE.randbytes(5000), CHANCE.randbytes(60_000), b"and the end"]
    clients = []
    for data in early:
        client = hosts.c.socket(family, socket.SOCK_STREAM)
        client.settimeout(10)
        client.connect((SERVICE[family], port))
        client.sendall(data)
        clients.append(client)
    clients[-1].shutdown(socket.SHUT_WR)
    wait_until(lambda: accept_queues([old]) == [len(early)] and all(info(c).unacked == 0 for c in clients))
    with Watcher(hosts.c) as seen:
        with hosts.a:
            (queue,) = acceptqueue.capture([old])
        assert [r.receive_queue for r in queue.records] == early
        hosts.a.remove(family)
        acceptqueue.discard([queue])
        old.close()
        new = listen(hosts.b, kind, "::" if mapped else address, port) if mapped else None
        take(hosts.b, family)
        new = new or listen(hosts.b, kind, address, port)
        before = new.getsockopt(Level.SOCKET, SO.RCVBUF), new.getsockopt(Level.SOCKET, SO.BUF_LOCK)
        with hosts.b:
            assert acceptqueue.refill(queue.records, new, elapsed=0.1) == []
        assert (new.getsockopt(Level.SOCKET, SO.RCVBUF), new.getsockopt(Level.SOCKET, SO.BUF_LOCK)) == before
        assert accept_queues([new]) == [len(early)]
        by_port = {c.getsockname()[1]: (c, data) for c, data in zip(clients, early, strict=True)}
        for record in queue.records:
            sock, peer = new.accept()
            sock.settimeout(10)
            assert peer[1] == record.conn_id.peer_port  # in the order of the queue
            client, data = by_port[peer[1]]
            got = b""
            while len(got) < len(data):
                got += sock.recv(1 << 20)
            assert got == data
            found, n = info(sock), record.negotiated
            assert (found.snd_wscale, found.rcv_wscale) == (n.snd_wscale, n.rcv_wscale)
            assert found.options & 7 == 7
            sock.sendall(b"answer")
            assert client.recv(100) == b"answer"
            if record.peer_fin:
                assert sock.recv(100) == b""
            else:
                client.sendall(data + b"more")
                got = b""
                while len(got) < len(data) + 4:
                    got += sock.recv(1 << 20)
                assert got == data + b"more"
            sock.close()
        # connections of other tests may still be dying
        ours = {c.getsockname()[1] for c in clients}
        assert [s for s in seen.resets() if s.destination_port in ours] == []
    new.close()
    sh(f"ip -n {hosts.b.name} addr del {SERVICE[family]}/{PREFIX[family]} dev eth0")
    for client in clients:
        client.close()


def test_one_that_was_reset_while_it_waited_is_left_out(hosts):
    with listen(hosts.a, V4, hosts.a.own(V4)) as listener:
        listener.setblocking(True)
        client = hosts.c.socket(V4, socket.SOCK_STREAM)
        client.connect(listener.getsockname())
        stays = hosts.c.socket(V4, socket.SOCK_STREAM)
        stays.connect(listener.getsockname())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wait_until(lambda: accept_queues([listener]) == [2])
        gone = client.getsockname()[1]
        client.close()
        wait_until(lambda: f":{gone}" not in hosts.a.sh("ss -tnH"))
        with hosts.a:
            (queue,) = acceptqueue.capture([listener])
        assert [r.conn_id.peer_port for r in queue.records] == [stays.getsockname()[1]]
        acceptqueue.discard([queue])
        stays.close()


def test_without_syn_cookies_it_is_told_that_it_cannot_be(hosts):
    with hosts.b:
        assert cookies_allowed()
        assert acceptqueue.missing() is None
    hosts.b.sh("sysctl -qw net.ipv4.tcp_syncookies=0")
    try:
        with hosts.b:
            assert not cookies_allowed()
            assert "tcp_syncookies" in acceptqueue.missing().message
    finally:
        hosts.b.sh("sysctl -qw net.ipv4.tcp_syncookies=1")


def test_a_listener_of_an_interface_cannot_be_refilled(hosts):
    with listen(hosts.a, V4, hosts.a.own(V4)) as listener:
        assert acceptqueue.keeps(listener)
        listener.setsockopt(Level.SOCKET, SO.BINDTODEVICE, b"eth0")
        assert not acceptqueue.keeps(listener)


@pytest.mark.parametrize("family", [V4, V6], ids=["IPv4", "IPv6"])
def test_a_half_open_connection_is_completed_by_its_ack_elsewhere(hosts, family):
    take(hosts.a, family)
    old = listen(hosts.a, family, SERVICE[family])
    port = old.getsockname()[1]
    # the clients' last ACKs are lost, and so is their data
    hosts.c.sh("nft add table inet dark")
    hosts.c.sh("nft add chain inet dark out '{ type filter hook output priority 0; }'")
    hosts.c.sh(f"nft add rule inet dark out tcp dport {port} tcp flags '&' '(syn|ack)' == ack drop")
    clients = []
    for number in range(3):
        client = hosts.c.socket(family, socket.SOCK_STREAM)
        client.settimeout(10)
        client.connect((SERVICE[family], port))
        client.sendall(b"early %d" % number)
        clients.append(client)
    with Watcher(hosts.c) as seen:
        with hosts.a:
            found = halfopen.capture({port})
        assert {one.conn_id.peer_port for one in found} == {c.getsockname()[1] for c in clients}
        assert all((one.sack, one.timestamps, one.snd_wscale, one.rcv_wscale) == (True, True, 10, 10) for one in found)
        hosts.a.remove(family)
        old.close()
        take(hosts.b, family)
        new = listen(hosts.b, family, SERVICE[family], port)
        with hosts.b, halfopen.expect(found) as vouching:
            hosts.c.sh("nft delete table inet dark")  # their retransmissions get through now
            by_port = {c.getsockname()[1]: (n, c) for n, c in enumerate(clients)}
            for _ in clients:
                sock, peer = new.accept()
                sock.settimeout(10)
                number, client = by_port[peer[1]]
                assert sock.recv(100) == b"early %d" % number
                sock.sendall(b"answer")
                assert client.recv(100) == b"answer"
                assert info(sock).options & 7 == 7
                sock.close()
            assert not any(vouching.expects(one.conn_id) for one in found)
        # connections of other tests may still be dying
        ours = {c.getsockname()[1] for c in clients}
        assert [s for s in seen.resets() if s.destination_port in ours] == []
    new.close()
    sh(f"ip -n {hosts.b.name} addr del {SERVICE[family]}/{PREFIX[family]} dev eth0")
    for client in clients:
        client.close()
