"""Connections that the server has just closed: the last segments of their peers find nobody, and are not reset."""

import socket
import threading
from pathlib import Path

from tests.hosts import ThreeHosts, tcpmig
from tests.packets import Flag, Watcher
from tests.tscnet import wait_until
from tests.workloads import servers

PORT = 6379


def test_the_last_segments_of_closed_connections_draw_no_reset(hosts: ThreeHosts, tmp_path: Path) -> None:
    service = hosts.net.service4
    server = servers.redis(hosts.source, tmp_path, [service])
    summary: list[dict] = []
    moving = threading.Thread(target=lambda: summary.append(tcpmig.migrate(hosts.source, server.pid, hosts.target)))
    with hosts.client.netns_entered():
        client = socket.create_connection((service, PORT))
    with client, Watcher(hosts.client, port=PORT, data=False) as watcher:
        client.sendall(b"PING\r\n")
        assert client.recv(7) == b"+PONG\r\n"
        with hosts.client.loss(100, port=PORT, incoming=False):
            # from another host: what this one sends to the server is lost
            address, port = client.getsockname()
            killed = hosts.target.run(["redis-cli", "-h", service, "client", "kill", f"{address}:{port}"])
            assert killed.stdout.strip() == "OK"
            assert client.recv(1) == b""
            orphan = hosts.source.sh(f"ss -Htan state fin-wait-1 dport = {port}").split()
            assert orphan[1] == "1", "the FIN, and nothing else, is not acknowledged"
            moving.start()
            wait_until(lambda: any(one.startswith(service + "/") for one in hosts.target.addresses()), 30)
        # as a peer far away would: its answer finds the address at the target
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: any(one.outgoing and one.flags & Flag.FIN for one in watcher.kept()))
        with hosts.client.loss(100, port=PORT, incoming=False):
            moving.join(60)
            assert [one["outcome"] for one in summary] == ["done"]
            seen = watcher.mark()
            assert seen.rsts == [], watcher.log()
    with hosts.client.netns_entered(), socket.create_connection((service, PORT)) as fresh:
        fresh.sendall(b"PING\r\n")
        assert fresh.recv(7) == b"+PONG\r\n"
