"""A busy server moves: connections with early data that it has not accepted are in its queue at the target."""

from __future__ import annotations

import os
import random
import signal
import socket
import time

import pytest

from checkpoint.dump import Dump
from checkpoint.files.listener import Listener
from tcpstate.locate import accept_queues
from tests.hosts import ThreeHosts, tcpmig
from tests.packets import Watcher
from tests.tscnet import Watcher as SegmentWatcher
from tests.tscnet import net, wait_until
from tests.workloads import servers
from tests.workloads.late_server import answer, message
from tests.workloads.move import RUNNING

PORT = 7002
CHANCE = random.Random(4)


def receive(sock, count):
    got = b""
    while len(got) < count:
        part = sock.recv(count - len(got))
        assert part, f"the connection ended after {len(got)} of {count} bytes"
        got += part
    return got


def connect(address, port):
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect((address, port))
    return sock


def queued(host):
    """How many connections wait on all listeners of the host."""
    lines = host.sh("ss -tlnH").splitlines()
    return sum(int(line.split()[1]) for line in lines)


def test_a_hundred_unaccepted_connections_move(hosts: ThreeHosts, tmp_path) -> None:
    both = [hosts.net.service4, hosts.net.service6]
    server = servers.late_server(hosts.source, tmp_path, both, port=PORT)
    early = [CHANCE.randbytes(CHANCE.choice([0, 1, 100, 1400, 5_000, 20_000])) for _ in range(100)]
    with Watcher(hosts.client, port=PORT) as watcher:
        with hosts.client.netns_entered():
            clients = [connect(both[i % 2], PORT) for i in range(len(early))]
        for sock, data in zip(clients, early, strict=True):
            sock.sendall(message(data))
        # and those by which the start was awaited: closed by now
        wait_until(lambda: queued(hosts.source) >= len(early))
        summary = tcpmig.migrate(hosts.source, server.pid, hosts.target)
        assert summary["outcome"] == "done"
        assert summary["connections"] >= len(early)
        assert hosts.target.state(summary["target_pid"]) in RUNNING
        assert queued(hosts.target) >= len(early)
        hosts.target.kill(summary["target_pid"], signal.SIGUSR1)
        for sock, data in zip(clients, early, strict=True):
            assert receive(sock, 32) == answer(data)
        # they live on
        for sock, data in zip(clients, early, strict=True):
            sock.sendall(message(data + b"again"))
            assert receive(sock, 32) == answer(data + b"again")
        with hosts.client.netns_entered(), connect(both[0], PORT) as fresh:
            fresh.sendall(message(b"new"))
            assert receive(fresh, 32) == answer(b"new")
        assert watcher.mark().rsts == []
    for sock in clients:
        sock.close()


def test_where_it_is_not_wanted_nothing_moves(hosts: ThreeHosts, tmp_path) -> None:
    server = servers.late_server(hosts.source, tmp_path, [hosts.net.service4], port=PORT)
    with hosts.client.netns_entered(), connect(hosts.net.service4, PORT) as client:
        client.sendall(message(b"early"))
        with pytest.raises(tcpmig.MigrationFailed) as failed:
            tcpmig.migrate(hosts.source, server.pid, hosts.target, options=["--accept-queue", "refuse"])
        assert "wait to be accepted" in failed.value.summary["message"]
        # nothing has changed
        hosts.source.kill(server.pid, signal.SIGUSR1)
        assert receive(client, 32) == answer(b"early")


@pytest.fixture
def waiting():
    """(host a, PID of a server there that accepts only when it gets SIGUSR1, its clients with early data)."""
    with net() as hosts:
        pid = os.fork()
        if not pid:
            try:
                with hosts.a:
                    os.setsid()
                    null = os.open("/dev/null", os.O_RDWR)
                    for fd in range(3):
                        os.dup2(null, fd)
                    os.closerange(3, 256)
                    os.execv(
                        "/proc/self/exe",
                        ["python3", "-m", "tests.workloads.late_server", str(PORT), hosts.a.own(socket.AF_INET)],
                    )
            finally:
                os._exit(1)
        clients = []
        try:
            wait_until(lambda: f":{PORT}" in hosts.a.sh("ss -tlnH"))
            with hosts.c:
                clients += [connect(hosts.a.own(socket.AF_INET), PORT) for _ in range(5)]
            for number, client in enumerate(clients):
                client.sendall(message(bytes([number]) * 3000))
            yield hosts, pid, clients
        finally:
            for client in clients:
                client.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_dump_that_is_undone_puts_them_back(waiting):
    hosts, pid, clients = waiting
    # one whose handshake is half done: its last ACK is lost
    hosts.c.sh("nft add table inet dark")
    hosts.c.sh("nft add chain inet dark out '{ type filter hook output priority 0; }'")
    hosts.c.sh(f"nft add rule inet dark out tcp dport {PORT} tcp flags '&' '(syn|ack)' == ack drop")
    with hosts.c:
        late = connect(hosts.a.own(socket.AF_INET), PORT)
    late_port = late.getsockname()[1]
    late.sendall(message(b"late"))
    hosts.c.sh(f"nft insert rule inet dark out tcp sport != {late_port} accept")
    with hosts.a, SegmentWatcher(hosts.c) as seen:
        dump = Dump([pid])
        dump.keep_queues = True
        dump.make_ready()
        dump.find_listeners()
        dump.hold_off()
        dump.drain()
        dump.stop()
        dump.secure()
        list(dump.early_queues())
        dump.freeze()
        assert dump.connections == len(clients)
        assert accept_queues(dump._connections.listeners) == [0]
        (told,) = [file for file in dump.delta().files.values() if isinstance(file, Listener)]
        assert [one.conn_id.peer_port for one in told.half_open] == [late_port]
        assert len(told.waiting) == len(clients)
        # a peer that sends meanwhile
        clients[0].sendall(message(b"meanwhile"))
        time.sleep(0.01)
        dump.resume()
        hosts.c.sh("nft delete table inet dark")
        os.kill(pid, signal.SIGUSR1)
        assert receive(late, 32) == answer(b"late")
        late.close()
        for number, client in enumerate(clients):
            assert receive(client, 32) == answer(bytes([number]) * 3000)
        assert receive(clients[0], 32) == answer(b"meanwhile")
        for client in clients:
            client.sendall(message(b"and on"))
            assert receive(client, 32) == answer(b"and on")
        assert seen.resets() == []


def test_an_image_does_not_keep_them_and_that_is_said_before_the_stop(hosts: ThreeHosts, tmp_path) -> None:
    server = servers.late_server(hosts.source, tmp_path, [hosts.net.service4], port=PORT)
    image = tmp_path / "image"
    with hosts.client.netns_entered(), connect(hosts.net.service4, PORT) as client:
        client.sendall(message(b"early"))
        status, told, said = tcpmig.tcpmig(hosts.source, "checkpoint", server.pid, "-o", image)
        assert (status, told["code"]) == (1, "TM-0590"), said
        assert told["object"] == f"listener {hosts.net.service4}:{PORT}"
        assert not image.exists()
        assert hosts.source.state(server.pid) in RUNNING
        hosts.source.kill(server.pid, signal.SIGUSR1)
        assert receive(client, 32) == answer(b"early")
