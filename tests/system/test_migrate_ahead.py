"""Idle connections are built before the stop: whatever happens to them until then is found, and none is mistaken."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpstate.md5keys import listeners_keys
from tests.hosts import HostProcess, ThreeHosts
from tests.hosts.tcpmig import migrate
from tests.system.moves import moved
from tests.workloads import scenes
from tests.workloads.many import ask, hear, opened
from tests.workloads.option_server import PARTNER
from tests.workloads.servers import wait_listening

pytestmark = pytest.mark.alone

PORT = 7200
ROOT = Path(__file__).parent.parent.parent
RESET = struct.pack("ii", 1, 0)


class Client:
    """One connection to the option server, and what the server last said of it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sock = socket.create_connection((address, PORT), timeout=60)
        self.said = self.ask("state")

    def ask(self, line: str) -> str:
        self.sock.sendall(line.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            part = self.sock.recv(4096)
            assert part, f"the connection ended instead of an answer to {line}"
            answer += part
        return answer.decode().rstrip("\n")

    def act(self, chance: random.Random) -> Client:
        """Something at random; the connection that is there afterwards."""
        what = chance.choice(["echo", "echo", "option", "option", "again", "reopen", "reset", "half"])
        if what == "echo":
            text = f"{chance.random()}" * chance.randrange(1, 40)
            assert self.ask(f"echo {text}") == text
        elif what == "option":
            name, value = chance.choice(
                [("nodelay", 1), ("nodelay", 0), ("keepalive", 1), ("keepalive", 0), ("oobinline", 1), ("rcvlowat", 1),
                 ("linger", 7), ("priority", 3), ("watch", 1), ("watch", 0), ("nonblocking", 1), ("nonblocking", 0)]
            )  # fmt: skip
            self.said = self.ask(f"{name} {value}")
            assert f"{name}={value}" in self.said
        elif what == "again":
            self.said = self.ask("again")
        else:
            if what == "reset":
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            elif what == "half":
                self.sock.shutdown(socket.SHUT_WR)
                assert self.sock.recv(10) == b""
            self.sock.close()
            return Client(self.address)
        return self


@contextlib.contextmanager
def option_server(hosts: ThreeHosts, *options: str) -> Iterator[HostProcess]:
    both = [hosts.net.service4, hosts.net.service6]
    argv = [sys.executable, "-m", "tests.workloads.option_server", *options, PORT, *both]
    process = hosts.source.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    for address in both:
        wait_listening(hosts.client, process, address, PORT)
    yield process


def busy(
    hosts: ThreeHosts, clients: list[Client], seed: int, until: threading.Event, wrong: list[BaseException]
) -> None:
    chance = random.Random(seed)
    try:
        with hosts.client.netns_entered():
            while not until.is_set():
                at = chance.randrange(len(clients))
                clients[at] = clients[at].act(chance)
                time.sleep(chance.choice([0, 0, 0.001, 0.01]))
    except BaseException as error:  # the test tells it
        wrong.append(error)


@pytest.mark.parametrize("loss", [pytest.param(0, id="clean"), pytest.param(2, id="2 % loss", marks=pytest.mark.long)])
def test_connections_that_change_until_the_last_moment(hosts: ThreeHosts, loss: int) -> None:
    with option_server(hosts) as process, hosts.client.netns_entered():
        both = hosts.net.service4, hosts.net.service6
        still = [Client(both[n % 2]) for n in range(40)]
        lively = [Client(both[n % 2]) for n in range(12)]
    pid, here, there = process.pid, hosts.source, hosts.target
    with contextlib.ExitStack() as ends:
        if loss:
            ends.enter_context(hosts.client.loss(loss, port=PORT))
        for move in range(2):
            end, wrong = threading.Event(), list[BaseException]()
            thread = threading.Thread(target=busy, args=(hosts, lively, move, end, wrong))
            thread.start()
            try:
                summary = moved(here, pid, there, "/fdinfo/")
                time.sleep(0.2)
            finally:
                end.set()
                thread.join()
            assert wrong == []
            # those that nobody touched were built before the stop
            assert 40 <= summary["ahead"] <= summary["connections"]
            pid, here, there = summary["target_pid"], there, here
            for client in (*still, *lively):
                assert client.ask("state") == client.said
    for client in (*still, *lively):
        client.sock.close()


def test_a_listener_that_shares_its_port_with_nobody(hosts: ThreeHosts) -> None:
    """Its connections are at the target before it, and have its port."""
    with option_server(hosts, "--exclusive") as process, hosts.client.netns_entered():
        clients = [Client(hosts.net.service4), Client(hosts.net.service6)]
        pid, here, there = process.pid, hosts.source, hosts.target
        for _ in range(2):
            summary = migrate(here, pid, there)
            assert summary["ahead"] >= len(clients)
            pid, here, there = summary["target_pid"], there, here
            clients += [Client(hosts.net.service4), Client(hosts.net.service6)]
            for client in clients:
                assert client.ask("state") == client.said
    for client in clients:
        client.sock.close()


def test_listeners_that_sign_beside_connections_that_do_not(hosts: ThreeHosts) -> None:
    """Their keys are read in the stop, and the look at what was told ahead, which tells whether anybody signs, is
    beside it."""
    with option_server(hosts, "--signed") as process, hosts.client.netns_entered():
        clients = [Client(address) for address in (hosts.net.service4, hosts.net.service6) for _ in range(3)]
        pid, here, there = process.pid, hosts.source, hosts.target
        for _ in range(2):
            summary = migrate(here, pid, there)
            assert summary["ahead"] >= len(clients)
            pid, here, there = summary["target_pid"], there, here
            for client in clients:
                assert client.ask("state") == client.said
            with here.netns_entered():
                found = listeners_keys()
            assert sorted(found.values(), key=str) == sorted([(key,) for key in PARTNER.values()], key=str)
    for client in clients:
        client.sock.close()


def test_what_arrives_in_the_stop_is_delivered(hosts: ThreeHosts, tmp_path: Path) -> None:
    """Messages to idle connections all through the move: none is lost, none waits for a time-out."""
    with scenes.echo(hosts, tmp_path) as stage, contextlib.ExitStack() as ends:
        with hosts.client.netns_entered():
            clients = opened(ends, (hosts.net.service4, 7000), 60) + opened(ends, (hosts.net.service6, 7000), 60)
        ask(clients, b"before")
        for _ in range(2):
            sent = [0]

            def send(sent: list[int] = sent) -> None:
                while sent[0] < len(clients):
                    clients[sent[0]].send(b"during")
                    sent[0] += 1
                    time.sleep(0.004)

            thread = threading.Thread(target=send)
            thread.start()
            report = stage.move()
            thread.join()
            hear(clients, b"during")
            assert report.problems == [], report.log
            assert report.summary["ahead"] > 0
        ask(clients, b"after!")
        assert stage.finish() == []
