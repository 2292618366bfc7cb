"""Memory goes compressed over a slow line, and is the same at the other side."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys

import pytest

from tests.hosts import ThreeHosts
from tests.hosts.host import ROOT
from tests.hosts.tcpmig import migrate
from tests.workloads.servers import wait_listening

PORT = 7107
SIZE = 32 << 20
SERVER = """
import hashlib, random, socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
chance = random.Random(5)
# a part that shrinks, and a part that does not
big = bytearray(bytes(range(256)) * (int(sys.argv[3]) // 256) + chance.randbytes(8 << 20))
while True:
    peer, _ = listener.accept()
    while peer.recv(1): peer.sendall(hashlib.sha256(big).digest())
"""


@pytest.mark.parametrize("compress", ["auto", pytest.param("never", marks=pytest.mark.long)])
def test_a_slow_line_carries_less_than_there_is(hosts: ThreeHosts, compress: str) -> None:
    address = hosts.net.service4
    argv = [sys.executable, "-IS", "-c", SERVER, address, PORT, SIZE]
    process = hosts.source.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_listening(hosts.client, process, address, PORT)
    slow = shlex.join([sys.executable, "-IS", str(ROOT / "tests/hosts/slowline.py"), "15e6"])
    with hosts.client.netns_entered():
        sock = socket.create_connection((address, PORT), timeout=30)
    with sock:
        sock.sendall(b"?")
        before = sock.recv(32)
        options = ["--compress", compress, "--rsh", slow]
        summary = migrate(hosts.source, process.pid, hosts.target, options=options)
        sock.sendall(b"?")
        assert sock.recv(32) == before
        copied = sum(one["bytes"] for one in summary["rounds"])
        assert copied > SIZE
        if compress == "never":
            assert summary["bytes_sent"] > copied
        else:
            # what does not shrink goes as it is, and so does all until the line has shown itself
            assert 8 << 20 < summary["bytes_sent"] < copied * 3 // 4
        # back by another line
        migrate(hosts.target, summary["target_pid"], hosts.source)
        sock.sendall(b"?")
        assert sock.recv(32) == before
