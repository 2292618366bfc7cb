"""50,000 established connections over five servers move together, and every byte comes.

One tool holds 20,000 descriptors where RLIMIT_NOFILE is that; each tree has a tool of its own, as its address is its
own, so more than one of them can hold move together.  TMH_CROWD: connections of each server (10,000);
TMH_AT_ONCE: how many of them move at a time (all).
"""

import contextlib
import json
import os
import resource
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.counters import counters, moved
from tests.hosts import ThreeHosts
from tests.hosts.tcpmig import RSH, TCPMIG, tcpmig
from tests.workloads import servers
from tests.workloads.crowds import Crowds

SERVERS, EACH = 5, int(os.environ.get("TMH_CROWD", "10000"))
AT_ONCE = int(os.environ.get("TMH_AT_ONCE", SERVERS))
PORT = 7000
TOLD = ("connections", "ahead", "stop_ms", "total_ms", "phases")


def migrate_all(hosts: ThreeHosts) -> dict[str, Any]:
    """All of them by one command; its summary."""
    line = ["--rsh", shlex.join(RSH), "--remote-command", shlex.join([*TCPMIG, "receive"])]
    arguments = [*line, "--at-once", AT_ONCE, "--all-matching", "tests.workloads.echo_server", hosts.target.name]
    status, summary, log = tcpmig(hosts.source, "migrate", *arguments, timeout=1800)
    print(json.dumps([{name: move.get(name) for name in TOLD} for move in summary["moves"]]))
    assert status == 0, log + json.dumps([move for move in summary["moves"] if move["outcome"] != "done"])
    return summary


@pytest.mark.timeout(3600)
def test_fifty_thousand_connections(hosts: ThreeHosts, tmp_path: Path) -> None:
    # the servers have their limit from us
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    addresses = [hosts.net.service4, *(hosts.net.address4(101 + number) for number in range(SERVERS - 1))]
    with contextlib.ExitStack() as ends:
        crowds, pids = Crowds(hosts.client, ends, EACH), []
        for number, address in enumerate(addresses):
            if address != hosts.net.service4:
                hosts.source.add_address(f"{address}/24")
            folder = tmp_path / str(number)
            folder.mkdir()
            pids.append(servers.echo_server(hosts.source, folder, [address], port=PORT).pid)
            crowds.add(address, PORT)
        crowds.hear()
        crowds.ask("backlog")
        crowds.ask("speak")
        before = counters(hosts.client)
        summary = migrate_all(hosts)
        assert summary["moved"] == SERVERS
        assert summary["connections"] == SERVERS * EACH
        found = crowds.checked()
        changed = moved(before, counters(hosts.client))
        print(json.dumps(changed), json.dumps(found))
        # each of those that speak, while they moved
        assert all(one["spoken"] > EACH // 3 for one in found), found
        assert not changed.get("TcpEstabResets", 0)
        assert not changed.get("TcpExtTCPAbortOnData", 0)
        assert all(hosts.target.state(pid) in ("R", "S") for pid in pids)
        assert all(hosts.source.state(pid) in ("", "Z") for pid in pids)
