"""Which addresses `--address auto` means: seen by `migrate --dry-run` for servers of every kind."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts import ThreeHosts, tcpmig

SERVER = """
import signal, socket, sys
kept = []
for word in sys.argv[2:]:
    kind, address, port = word.split(",")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kept.append(socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM))
    kept[-1].bind((address, int(port)))
    if kind == "tcp":
        kept[-1].listen()
open(sys.argv[1], "w").close()
signal.pause()
"""


@pytest.mark.parametrize(
    ("sockets", "moves", "said"),
    [
        (["tcp,{net.service4},80"], ["{net.service4}/24"], []),
        (["udp,{net.service4},53", "udp,{net.service6},53"], ["{net.service4}/24", "{net.service6}/64"], []),
        (["tcp,127.0.0.1,80", "udp,::1,53"], [], []),
        (["tcp,0.0.0.0,80", "udp,::,53"], [], ["tcp port 80, udp port 53"]),
        (["tcp,0.0.0.0,80", "tcp,{net.service6},81"], ["{net.service6}/64"], []),
    ],
    ids=["listener", "udp", "loopback", "wildcard", "wildcard and another"],
)
def test_what_auto_means(
    hosts: ThreeHosts, tmp_path: Path, sockets: list[str], moves: list[str], said: list[str]
) -> None:
    words = [word.format(net=hosts.net) for word in sockets]
    with hosts.source.popen(
        [sys.executable, "-c", SERVER, tmp_path / "up", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        deadline = time.monotonic() + 10
        while not (tmp_path / "up").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        rsh = ["--rsh", shlex.join(tcpmig.RSH), "--remote-command", shlex.join([*tcpmig.TCPMIG, "receive"])]
        _, answer, printed = tcpmig.tcpmig(hosts.source, "migrate", server.pid, "target", *rsh, "--dry-run")
    verdicts = answer.get("verdicts", [])
    assert verdicts, (answer, printed)
    landing = [v["subject"] for v in verdicts if v["kind"] == "address" and v["text"].startswith("lands on eth0")]
    assert sorted(landing) == sorted(m.format(net=hosts.net) for m in moves), verdicts
    assert [v["subject"] for v in verdicts if v["kind"] == "listener"] == said
