"""Memory that is copied while its process changes it in every way: every page is right at the other side."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hosts import Host, HostProcess, ThreeHosts
from tests.hosts.tcpmig import MigrationFailed, migrate
from tests.workloads.servers import wait_listening

PORT = 7100
SHELL = """
import os, socket, sys, time
{first}
listener = socket.create_server((sys.argv[1], {port}))
big = bytearray(os.urandom(1 << 20) * {megabytes})
{more}
while True:
    peer, _ = listener.accept()
    while peer.recv(1): peer.sendall(big[-1:])
"""


@contextmanager
def talking(client: Host, address: str) -> Iterator[socket.socket]:
    with client.netns_entered():
        sock = socket.create_connection((address, PORT), timeout=30)
    with sock:
        yield sock


def start(hosts: ThreeHosts, megabytes: int, *, first: str = "", more: str = "") -> HostProcess:
    code = SHELL.format(port=PORT, megabytes=megabytes, first=first, more=more)
    return _start(hosts, [sys.executable, "-IS", "-c", code, hosts.net.service4])


def _start(hosts: ThreeHosts, argv: Sequence[object]) -> HostProcess:
    root = Path(__file__).parent.parent.parent
    process = hosts.source.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=root)
    # from the client: a connection whose both ends are on one host could not move
    wait_listening(hosts.client, process, hosts.net.service4, PORT)
    return process


def churn(hosts: ThreeHosts, seed: int) -> HostProcess:
    folder = hosts.net.directory
    module = "tests.workloads.churn_server"
    return _start(hosts, [sys.executable, "-m", module, PORT, hosts.net.service4, seed, 24, folder])


@pytest.mark.parametrize("seed", [2])
def test_memory_that_changes_in_every_way(hosts: ThreeHosts, seed: int) -> None:
    chance = random.Random(seed)
    here, there = hosts.source, hosts.target
    pid = churn(hosts, seed).pid
    with talking(hosts.client, hosts.net.service4) as sock:
        steps = 0
        for _ in range(2):
            time.sleep(chance.uniform(0.05, 0.3))
            # a budget of nothing: as many rounds as there can be
            summary = migrate(here, pid, there, options=["--max-downtime", 0])
            assert len(summary["rounds"]) > 1
            pid, here, there = summary["target_pid"], there, here
            sock.sendall(b"?")
            said = sock.recv(1000).decode().split()
            assert said[0] == "ok", f"seed {seed}: {said}"
            assert int(said[1]) > steps
            steps = int(said[1])


def test_shared_memory_is_copied_while_it_is_written(hosts: ThreeHosts) -> None:
    here, there = hosts.source, hosts.target
    megabytes, steps = 48, 0
    module = "tests.workloads.shared_server"
    pid = _start(hosts, [sys.executable, "-m", module, PORT, hosts.net.service4, 5, megabytes]).pid
    with talking(hosts.client, hosts.net.service4) as sock:
        for _ in range(2):
            summary = migrate(here, pid, there)
            *rounds, last = summary["rounds"]
            # nine of ten pages of both, while they ran
            assert sum(one["bytes"] for one in rounds) > 3 * megabytes << 19
            assert last["bytes"] < megabytes << 20
            pid, here, there = summary["target_pid"], there, here
            sock.sendall(b"?")
            said = sock.recv(1000).decode().rsplit(maxsplit=1)
            assert said[0] == "ok", said
            assert int(said[1]) > steps
            steps = int(said[1])


def test_the_stop_does_not_copy_what_was_copied_before(hosts: ThreeHosts) -> None:
    process = start(hosts, 200)
    with talking(hosts.client, hosts.net.service4) as sock:
        sock.sendall(b"?")
        byte = sock.recv(1)
        summary = migrate(hosts.source, process.pid, hosts.target)
        *rounds, last = summary["rounds"]
        assert sum(one["bytes"] for one in rounds) > 200 << 20
        assert last["bytes"] < 20 << 20
        sock.sendall(b"?")
        assert sock.recv(1) == byte


def test_without_rounds_all_is_copied_in_the_stop(hosts: ThreeHosts) -> None:
    process = start(hosts, 20)
    summary = migrate(hosts.source, process.pid, hosts.target, options=["--stop-and-copy"])
    (only,) = summary["rounds"]
    assert only["bytes"] > 20 << 20


WRITER = """
import threading
def write():
    byte = 0
    while True:
        byte = (byte + 1) % 256
        for at in range(0, len(big), 4096): big[at] = byte
threading.Thread(target=write, daemon=True).start()
"""


def test_who_writes_too_fast_is_named_and_may_stay(hosts: ThreeHosts) -> None:
    process = start(hosts, 64, more=WRITER)
    with pytest.raises(MigrationFailed) as failed:
        migrate(hosts.source, process.pid, hosts.target, options=["--max-downtime", 1, "--if-busy", "refuse"])
    assert failed.value.summary["code"] == "TM-0650"
    assert failed.value.summary["object"] == f"pid {process.pid}"
    assert hosts.source.state(process.pid) in ("R", "S")
    # nothing of the tracking is left
    assert "uw" not in hosts.source.sh(f"grep -h VmFlags /proc/{process.pid}/smaps")
    assert migrate(hosts.source, process.pid, hosts.target, options=["--max-downtime", 1])["outcome"] == "done"


def test_who_writes_too_fast_is_slowed_down_and_runs_freely_there(hosts: ThreeHosts) -> None:
    process = start(hosts, 64, more=WRITER)
    summary = migrate(hosts.source, process.pid, hosts.target, options=["--max-downtime", 1, "--if-busy", "throttle"])
    assert summary["outcome"] == "done"
    assert 0 < summary["share"] < 1
    assert hosts.target.state(process.pid) in ("R", "S")


def test_who_writes_too_fast_may_go_before_all_of_its_memory(hosts: ThreeHosts) -> None:
    process = start(hosts, 64, more=WRITER)
    with talking(hosts.client, hosts.net.service4) as sock:
        options = ["--max-downtime", 1, "--if-busy", "postcopy"]
        summary = migrate(hosts.source, process.pid, hosts.target, options=options)
        assert len(summary["rounds"]) > 1
        # what had come in a round, and was written since, came later
        assert summary["later"] > 1 << 20
        assert summary["rounds"][-1]["bytes"] < 16 << 20
        sock.sendall(b"?")
        assert len(sock.recv(1)) == 1


CHILDREN = """
if os.fork() == 0:
    while True:
        if os.fork() == 0: time.sleep(0.02); os._exit(0)
        os.wait()
"""


def test_a_tree_that_changes_all_the_time_moves_all_the_same(hosts: ThreeHosts) -> None:
    process = start(hosts, 20, first=CHILDREN)
    with talking(hosts.client, hosts.net.service4) as sock:
        sock.sendall(b"?")
        byte = sock.recv(1)
        summary = migrate(hosts.source, process.pid, hosts.target, options=["--max-downtime", 0])
        assert summary["outcome"] == "done"
        sock.sendall(b"?")
        assert sock.recv(1) == byte
