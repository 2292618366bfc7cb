"""50,000 established connections over five servers move at the same time, and every byte comes.

One tool holds 20,000 descriptors where RLIMIT_NOFILE is that; each tree has a tool of its own, as its address is its
own, so that more than one of them can hold move together.
"""

import contextlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

from tests.counters import counters, moved
from tests.hosts import HostProcess, ThreeHosts
from tests.hosts.tcpmig import RSH, TCPMIG, tcpmig
from tests.workloads import servers

SERVERS, EACH = 5, 10_000
PORT = 7000
PIPE = subprocess.PIPE


def hear(crowds: list[HostProcess]) -> None:
    for crowd in crowds:
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == b"ok\n"


def say(crowds: list[HostProcess], word: str) -> None:
    for crowd in crowds:
        assert crowd.stdin is not None
        crowd.stdin.write(word.encode() + b"\n")
        crowd.stdin.flush()


def test_fifty_thousand_connections(hosts: ThreeHosts, tmp_path: Path) -> None:
    addresses = [hosts.net.service4, *(hosts.net.address4(101 + number) for number in range(SERVERS - 1))]
    with contextlib.ExitStack() as ends:
        crowds = []
        for number, address in enumerate(addresses):
            if address != hosts.net.service4:
                hosts.source.add_address(f"{address}/24")
            folder = tmp_path / str(number)
            folder.mkdir()
            servers.echo_server(hosts.source, folder, [address], port=PORT)
            argv = [sys.executable, "-m", "tests.workloads.crowd", address, PORT, EACH, number]
            crowds.append(ends.enter_context(hosts.client.popen(argv, stdin=PIPE, stdout=PIPE)))
        hear(crowds)
        say(crowds, "backlog")
        hear(crowds)
        before = counters(hosts.client)
        say(crowds, "send")
        line = ["--rsh", shlex.join(RSH), "--remote-command", shlex.join([*TCPMIG, "receive"])]
        arguments = [*line, "--all-matching", "tests.workloads.echo_server", hosts.target.name]
        status, summary, log = tcpmig(hosts.source, "migrate", *arguments, timeout=900)
        told = [{name: move.get(name) for name in ("connections", "ahead", "stop_ms")} for move in summary["moves"]]
        print(json.dumps(told))
        assert status == 0, (summary, log)
        assert summary["moved"] == SERVERS
        assert summary["connections"] == SERVERS * EACH
        hear(crowds)
        say(crowds, "check")
        hear(crowds)
        changed = moved(before, counters(hosts.client))
        print(json.dumps(changed))
        assert not changed.get("TcpExtTCPAbortOnData", 0)
        assert not changed.get("TcpEstabResets", 0)
