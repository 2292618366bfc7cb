"""TCP connections with both ends in the tree: they move as pairs, and no address of theirs moves."""

from __future__ import annotations

import json
import random
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.counters import counters
from tests.hosts import Host, ThreeHosts
from tests.hosts.tcpmig import MigrationFailed, from_host, migrate, tcpmig
from tests.system.test_cli_bad_input import connected
from tests.workloads.servers import wait_listening

pytestmark = pytest.mark.alone

PORT = 7100
PATIENCE = 30.0


@dataclass(slots=True)
class Pair:
    """The two processes, and a client on another host who asks them how they are."""

    hosts: ThreeHosts
    pid: int
    sock: socket.socket
    here: Host
    there: Host
    figures: list[dict[str, Any]] = field(default_factory=list)

    def ask(self) -> list[dict[str, Any]]:
        self.sock.sendall(b"?\n")
        answer = b""
        while not answer.endswith(b"\n"):
            piece = self.sock.recv(65536)
            assert piece
            answer += piece
        told: list[dict[str, Any]] = json.loads(answer)
        assert [end["wrong"] for end in told] == [""] * len(told)
        return told

    def flows(self, least: int = 1 << 20) -> None:
        """Until every end has received so much more."""
        before = self.ask()
        end = time.monotonic() + PATIENCE
        while any(b["received"] - a["received"] < least for a, b in zip(before, self.ask(), strict=True)):
            assert time.monotonic() < end, f"it does not flow: {before} then {self.ask()}"
            time.sleep(0.01)

    def move(self) -> None:
        self.figures.append(migrate(self.here, self.pid, self.there))
        self.here, self.there = self.there, self.here


@pytest.fixture
def pair(hosts: ThreeHosts, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    service = hosts.net.service4
    addresses = [hosts.net.service4 if a == "service" else a for a in getattr(request, "param", ("127.0.0.1", "::1"))]
    argv = [sys.executable, "-m", "tests.workloads.loopback_pair", service, PORT, *addresses]
    log = tmp_path / "log"
    with hosts.source.popen(argv, cwd=Path(__file__).parents[2], stderr=log.open("wb")) as process:
        wait_listening(hosts.source, process, service, PORT, log)
        with hosts.client.netns_entered():
            sock = connected((service, PORT))
        with sock:
            sock.settimeout(PATIENCE)
            found = Pair(hosts, process.pid, sock, hosts.source, hosts.target)
            found.flows()
            yield found
            found.here.kill(found.pid, 9)


def resets(hosts: ThreeHosts) -> dict[str, int]:
    return {host.name: counters(host).get("TcpOutRsts", 0) for host in (hosts.source, hosts.target, hosts.client)}


def test_a_pair_moves_at_full_speed(pair: Pair) -> None:
    move_often(pair, 2, 7)


def move_often(pair: Pair, times: int, seed: int) -> None:
    """At random moments; nothing may be lost or reset."""
    before = resets(pair.hosts)
    moment = random.Random(seed)
    for _ in range(times):
        time.sleep(moment.uniform(0, 0.1))
        pair.move()
        pair.flows()
    assert resets(pair.hosts) == before
    stops = sorted(figure["stop_ms"] for figure in pair.figures)
    print(pair.figures[-1]["phases"], pair.figures[-1]["bytes_sent"])
    total = sum(end["received"] for end in pair.ask())
    print(f"stop_ms median {stops[len(stops) // 2]:.1f}, most {stops[-1]:.1f}; {total >> 20} MiB verified")


@pytest.mark.parametrize("pair", [("service", "127.0.0.1")], indirect=True)
def test_a_pair_on_the_address_that_moves(pair: Pair) -> None:
    before = resets(pair.hosts)
    pair.move()
    pair.flows()
    assert resets(pair.hosts) == before


def test_a_pair_in_an_image(pair: Pair, tmp_path: Path) -> None:
    before = resets(pair.hosts)
    image = tmp_path / "image"
    assert tcpmig(pair.here, "checkpoint", pair.pid, "-o", image)[0] == 0
    pair.here.wait_until_gone(pair.pid)
    assert tcpmig(pair.there, "restore", image, *from_host(pair.here))[0] == 0
    pair.here, pair.there = pair.there, pair.here
    pair.flows()
    assert resets(pair.hosts) == before


# A program with one end of connections on this host, each in a state; the arguments are states and addresses in turn.
# Asked on a line from the service address it reads from each until the end, and tells that, or the error.
ONE_END = f"""
import os, socket, sys
service, *wanted = sys.argv[1:]
status = socket.create_server((service, {PORT}))

def make(state, local):
    family = socket.AF_INET6 if ":" in local else socket.AF_INET
    listener = socket.create_server((local, {PORT} + 1), family=family)
    other = socket.create_connection((local, {PORT} + 1))
    end = listener.accept()[0]
    listener.close()
    if state == "half closed by us":
        end.send(b"last words")
        end.shutdown(socket.SHUT_WR)
        return [other, end]
    if state != "outside":
        other.send(b"unread")
    if state == "half closed by it":
        other.shutdown(socket.SHUT_WR)
    elif state == "closed":
        other.close()
    else:
        leave(other, end)
        other.close()
    return [end, other]

def leave(other, end):
    # the other end goes to a process that is not of this tree
    from_it, to_us = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            for sock in (status, end, *(sock for pair in ends for sock in pair)):
                sock.close()
            os.close(from_it)
            os.close(to_us)
            try:
                said = repr(other.recv(100))
            except OSError as error:
                said = error.strerror
            print(said, flush=True)
        os._exit(0)
    os.close(to_us)
    os.wait()
    assert os.read(from_it, 1) == b""
    os.close(from_it)

ends = []
for state, local in zip(wanted[::2], wanted[1::2]):
    ends.append(make(state, local))
asker = status.accept()[0]
asker.sendall(b"ready\\n")
while asker.recv(100):
    told = []
    for sock in (sock for pair in ends for sock in pair):
        if sock.fileno() < 0:
            continue
        got = b""
        try:
            while piece := sock.recv(100):
                got += piece
            told.append(got.decode() + ", end")
        except OSError as error:
            told.append(got.decode() + ", " + error.strerror)
        try:
            sock.sendall(b"answer")
        except OSError:
            told.append("nobody listens")
        sock.close()
    asker.sendall(("; ".join(told) + "\\n").encode())
"""


@dataclass(frozen=True, slots=True)
class OneEnd:
    """A running ONE_END, and its asker."""

    hosts: ThreeHosts
    pid: int
    sock: socket.socket
    said: Path

    def tells(self) -> str:
        self.sock.sendall(b"?\n")
        return self.hears()

    def hears(self) -> str:
        return self.sock.makefile().readline().rstrip("\n")


@pytest.fixture
def one_end(hosts: ThreeHosts, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OneEnd]:
    said, errors = tmp_path / "said", tmp_path / "errors"
    argv = [sys.executable, "-IS", "-c", ONE_END, hosts.net.service4, *request.param]
    with said.open("wb") as out, errors.open("wb") as err:
        process = hosts.source.popen(argv, stdout=out, stderr=err)
    with process:
        with hosts.client.netns_entered():
            sock = connected((hosts.net.service4, PORT))
        with sock:
            sock.settimeout(PATIENCE)
            found = OneEnd(hosts, process.pid, sock, said)
            assert found.hears() == "ready", errors.read_text()
            yield found


@pytest.mark.parametrize(
    "one_end", [["half closed by us", "127.0.0.1", "half closed by it", "::1", "closed", "127.0.0.1"]], indirect=True
)
def test_ends_in_other_states(one_end: OneEnd) -> None:
    migrate(one_end.hosts.source, one_end.pid, one_end.hosts.target)
    half = "answer, end; nobody listens"
    assert one_end.tells() == f"last words, end; {half}; unread, end; {half}; unread, end"
    one_end.hosts.target.kill(one_end.pid, 9)


OUTSIDE = ["outside, with data", "127.0.0.1", "outside", "::1"]
RESET = "Connection reset by peer"


@pytest.mark.parametrize("one_end", [OUTSIDE], indirect=True)
@pytest.mark.parametrize(
    ("policy", "told", "said"),
    [
        # a process that ends with unread data resets the connection: so the kernel does
        ("close", "unread, end; , end", [RESET, "b''"]),
        ("reset", f"unread, {RESET}; nobody listens; , {RESET}; nobody listens", [RESET, RESET]),
    ],
)
def test_an_end_outside(one_end: OneEnd, policy: str, told: str, said: list[str]) -> None:
    source = one_end.hosts.source
    with pytest.raises(MigrationFailed) as refused:
        migrate(source, one_end.pid, one_end.hosts.target)
    assert (refused.value.status, refused.value.summary["code"]) == (3, "TM-0383")
    assert f":{PORT + 1}" in refused.value.summary["object"]
    assert source.state(one_end.pid) == "S"
    assert one_end.said.read_text() == ""

    migrate(source, one_end.pid, one_end.hosts.target, options=["--local-peer", policy])
    assert one_end.tells() == told
    end = time.monotonic() + PATIENCE
    while len(found := one_end.said.read_text().splitlines()) < 2:
        assert time.monotonic() < end, "the other ends were not told"
        time.sleep(0.01)
    assert sorted(found) == sorted(said)
    one_end.hosts.target.kill(one_end.pid, 9)


# A program with a connection to itself that it has not accepted; on a line from the service address it evaluates it.
QUEUED = f"""
import errno, socket, sys
def told(call):
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno]
status = socket.create_server((sys.argv[1], {PORT}))
listener = socket.create_server(("127.0.0.1", {PORT} + 1))
own = socket.create_connection(("127.0.0.1", {PORT} + 1))
own.sendall(b"early")
ends = []
asker = status.accept()[0]
for line in asker.makefile():
    asker.sendall((repr(told(lambda: eval(line))) + "\\n").encode())
"""


@pytest.fixture
def queued(hosts: ThreeHosts, tmp_path: Path) -> Iterator[OneEnd]:
    errors = tmp_path / "errors"
    argv = [sys.executable, "-IS", "-c", QUEUED, hosts.net.service4]
    with errors.open("wb") as err:
        process = hosts.source.popen(argv, stdout=err, stderr=err)
    with process:
        wait_listening(hosts.source, process, "127.0.0.1", PORT + 1, errors)
        with hosts.client.netns_entered():
            sock = connected((hosts.net.service4, PORT))
        with sock:
            sock.settimeout(PATIENCE)
            yield OneEnd(hosts, process.pid, sock, errors)
            for host in (hosts.source, hosts.target):
                if host.state(process.pid):
                    host.kill(process.pid, 9)


def say(program: OneEnd, expression: str) -> object:
    program.sock.sendall(expression.encode() + b"\n")
    return eval(program.hears())


def test_an_end_in_the_queue(queued: OneEnd) -> None:
    """It cannot be kept, be its other end in the tree or not: refused before the stop, until it is accepted."""
    source, target = queued.hosts.source, queued.hosts.target
    client = say(queued, "own.getsockname()")
    with source.netns_entered():
        outside = connected(("127.0.0.1", PORT + 1))
    # what its peer has closed, as those by which the start was awaited, could wait
    with outside, pytest.raises(MigrationFailed) as raised:
        migrate(source, queued.pid, target)
    assert raised.value.summary["code"] == "TM-0590"
    assert raised.value.summary["message"].startswith("2 connections of processes of this host wait")
    assert source.state(queued.pid) == "S"
    say(queued, "ends.append(listener.accept()[0])")
    while say(queued, "ends[-1].getpeername()") != client:
        say(queued, "ends.append(listener.accept()[0])")
    migrate(source, queued.pid, target)
    assert say(queued, "ends[-1].recv(100)") == b"early"
    assert say(queued, "(ends[-1].send(b'late'), own.recv(100))") == (4, b"late")


def test_an_end_in_a_queue_that_is_let_go(queued: OneEnd) -> None:
    source, target = queued.hosts.source, queued.hosts.target
    target.sh("sysctl -qw net.ipv4.tcp_syncookies=0")
    migrate(source, queued.pid, target, options=["--accept-queue", "reset"])
    assert say(queued, "own.recv(100)") == "ECONNRESET"
    assert say(queued, "told(lambda: own.send(b'x'))") == "EPIPE"
