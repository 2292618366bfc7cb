"""``tcpmig drain``: a host is emptied, and filled again, with nobody disconnected."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path

from tests.hosts import Host, ThreeHosts
from tests.hosts.tcpmig import RSH, TCPMIG, tcpmig
from tests.system.test_migrate_several import judged
from tests.workloads import servers
from tests.workloads.load import Load, ask_all

EVERYWHERE = "import socket; s = socket.create_server(('', 7100)); s.accept()"


def drain(host: Host, to: Host, *arguments: object):
    line = ["--rsh", shlex.join(RSH), "--remote-command", shlex.join([*TCPMIG, "receive"])]
    return tcpmig(host, "drain", *line, *arguments, to.name, timeout=120)


def test_all_that_serves_moves_and_comes_back(hosts: ThreeHosts, tmp_path: Path) -> None:
    others = [hosts.net.address4(101), hosts.net.address4(102)]
    places = [(hosts.net.service4, 7000), (hosts.net.service4, 7001), (others[0], 7000), (others[1], 7077)]
    for address in others:
        hosts.source.add_address(f"{address}/24")
    with contextlib.ExitStack() as ends:
        pids, loads = [], []
        for number, (address, port) in enumerate(places):
            folder = tmp_path / str(number)
            folder.mkdir()
            pids.append(servers.echo_server(hosts.source, folder, [address], port=port).pid)
            loads.append(Load(hosts.client, f"echo {number}", "echo_client", port, address))
            ends.callback(loads[-1].close)
        *moving, kept = pids
        idle = hosts.source.popen([sys.executable, "-IS", "-c", EVERYWHERE])
        ask_all(loads, "mark")
        keep = ["--keep", "echo_server 7077"]

        status, summary, log = drain(hosts.source, hosts.target, *keep, "--dry-run")
        assert status == 0, (summary, log)
        assert [sorted(one["pids"]) for one in summary["would_move"]] == [sorted(moving[:2]), [moving[2]]]
        assert [one["pid"] for one in summary["stay"]] == [idle.pid]
        assert all(hosts.source.state(pid) in ("R", "S") for pid in (*pids, idle.pid))

        status, summary, log = drain(hosts.source, hosts.target, *keep)
        assert status == 0, (summary, log)
        assert summary["moved"] == 2
        assert all(hosts.target.state(pid) in ("R", "S") for pid in moving)
        assert all(hosts.source.state(pid) in ("", "Z") for pid in moving)
        assert all(hosts.source.state(pid) in ("R", "S") for pid in (kept, idle.pid))

        # one that was there before does not come along
        hosts.target.add_address(f"{hosts.net.address4(103)}/24")
        own = servers.echo_server(hosts.target, tmp_path, [hosts.net.address4(103)], port=7000).pid
        identity = summary["drain"]
        _, listed, _ = tcpmig(hosts.target, "drain", "--list")
        (one,) = listed["drains"]
        assert (one["drain"], one["host"], sorted(one["roots"])) == (identity, "source", sorted(moving))
        status, summary, log = drain(hosts.target, hosts.source, "--back", identity)
        assert status == 0, (summary, log)
        assert all(hosts.source.state(pid) in ("R", "S") for pid in pids)
        assert hosts.target.state(own) in ("R", "S")
        assert judged(loads) == []

        status, summary, _ = drain(hosts.target, hosts.source, "--back", identity)
        assert (status, summary["code"]) == (3, "TM-0653")
        _, listed, _ = tcpmig(hosts.target, "drain", "--list")
        assert listed["drains"] == []


def test_a_host_that_serves_nobody(hosts: ThreeHosts) -> None:
    status, summary, _ = drain(hosts.source, hosts.target)
    assert (status, summary["code"]) == (3, "TM-0653")
    status, summary, _ = tcpmig(hosts.source, "drain")
    assert (status, summary["code"]) == (2, "TM-0110")
