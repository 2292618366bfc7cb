"""tcpmig killed when it had taken connections out of an accept queue: recover puts them back."""

from __future__ import annotations

import random
import shlex
import signal
import sys

import pytest

from tests.hosts import ThreeHosts
from tests.hosts.tcpmig import RSH, TCPMIG, tcpmig
from tests.packets import Watcher
from tests.system.test_migrate_acceptqueue import connect, queued, receive
from tests.tscnet import wait_until
from tests.workloads import servers
from tests.workloads.deaths import left_behind
from tests.workloads.late_server import answer, message
from tests.workloads.move import RUNNING

PORT = 7003
COUNT = 30
KILLED_IN = [sys.executable, "-m", "tests.workloads.killed_in"]


@pytest.mark.parametrize(
    "moment",
    [
        # taken, and one half quiet
        "tcpstate.acceptqueue:export_connections",
        "checkpoint.dump:Dump.delta",
    ],
)
def test_what_waited_to_be_accepted_waits_again(hosts: ThreeHosts, tmp_path, moment: str) -> None:
    both = [hosts.net.service4, hosts.net.service6]
    server = servers.late_server(hosts.source, tmp_path, both, port=PORT)
    chance = random.Random(9)
    early = [chance.randbytes(chance.choice([0, 1, 1400, 20_000])) for _ in range(COUNT)]
    with Watcher(hosts.client, port=PORT) as watcher:
        with hosts.client.netns_entered():
            clients = [connect(both[i % 2], PORT) for i in range(COUNT)]
        for sock, data in zip(clients, early, strict=True):
            sock.sendall(message(data))
        wait_until(lambda: queued(hosts.source) >= COUNT)
        command = ["migrate", server.pid, hosts.target.name, "--rsh", shlex.join(RSH)]
        command += ["--remote-command", shlex.join([*TCPMIG, "receive"])]
        done = hosts.source.run([*KILLED_IN, moment, *command], check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert queued(hosts.source) == 0
        for sock in clients[:5]:
            sock.sendall(message(b"meanwhile"))
        status, told, said = tcpmig(hosts.source, "recover")
        assert status == 0, (told, said)
        assert hosts.source.state(server.pid) in RUNNING
        assert queued(hosts.source) >= COUNT
        hosts.source.kill(server.pid, signal.SIGUSR1)
        for sock, data in zip(clients, early, strict=True):
            assert receive(sock, 32) == answer(data)
        for sock in clients[:5]:
            assert receive(sock, 32) == answer(b"meanwhile")
        assert watcher.mark().rsts == []
        assert left_behind(hosts.source, server.pid) == []
    for sock in clients:
        sock.close()
