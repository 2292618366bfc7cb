"""A server of 100 processes, a master and 99 workers with one listener, moves there and back with its connections."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.counters import counters, moved
from tests.hosts import Host, ThreeHosts
from tests.hosts.tcpmig import migrate
from tests.workloads.crowds import Crowds
from tests.workloads.many import ask, opened
from tests.workloads.servers import wait_listening

WORKERS, MOST, PORT = 99, 4, 7009
CONNECTIONS, LATER = 300, 60  # those that move, and those that come afterwards
PATIENCE = 30.0


def family(host: Host) -> dict[int, tuple[int, int]]:
    """Of each process of the server its parent, and how many sockets it has."""
    found = {}
    for pid in host.processes():
        folder = host.path(f"/proc/{pid}")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"tests.workloads.prefork_server" in (folder / "cmdline").read_bytes():
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                links = [os.readlink(entry) for entry in (folder / "fd").iterdir()]
                found[pid] = parent, sum(link.startswith("socket:") for link in links)
    return found


@pytest.mark.long
def test_hundred_processes_there_and_back(hosts: ThreeHosts, tmp_path: Path) -> None:
    address = hosts.net.service4
    argv = [sys.executable, "-m", "tests.workloads.prefork_server", WORKERS, MOST, PORT, address]
    master = hosts.source.popen(argv)
    wait_listening(hosts.client, master, address, PORT)
    pid, here, there = master.pid, hosts.source, hosts.target
    with contextlib.ExitStack() as ends:
        crowds = Crowds(hosts.client, ends, CONNECTIONS)
        crowds.add(address, PORT)
        crowds.hear()
        crowds.ask("backlog")
        crowds.ask("speak")
        before, was = counters(hosts.client), family(here)
        assert len(was) == WORKERS + 1
        assert sum(sockets > 1 for _, sockets in was.values()) >= CONNECTIONS // MOST
        for _ in range(2):
            told = migrate(here, pid, there, timeout=120)
            print(json.dumps({name: told[name] for name in ("connections", "ahead", "stop_ms", "total_ms", "phases")}))
            assert told["connections"] == CONNECTIONS
            assert {one: sockets for one, (_, sockets) in family(there).items()} == {o: n for o, (_, n) in was.items()}
            assert family(here) == {}
            pid, here, there = told["target_pid"], there, here
        assert {one for one, (parent, _) in family(here).items() if parent == pid} == set(was) - {pid}
        crowds.checked()
        changed = moved(before, counters(hosts.client))
        assert not changed.get("TcpEstabResets", 0), changed
        with hosts.client.netns_entered():
            ask(opened(ends, (address, PORT), LATER), b"new ones, which any of them may take")
    # the master hears of a child that ends, and makes another one
    victim = max(was)
    here.kill(victim, signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while victim in (now := family(here)) or len(now) != WORKERS + 1:
        assert time.monotonic() < end, now
        time.sleep(0.05)
    here.kill(pid, signal.SIGKILL)
