"""The hosts and connections of these tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tcpstate import frozen
from tests.system.transport.ends import KINDS, V4, connected, end
from tests.tscnet import net


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    before = os.environ.get("TCPMIG_RUNTIME_DIR")
    os.environ["TCPMIG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("run"))
    try:
        with net() as made:
            yield made
    finally:
        if before is None:
            del os.environ["TCPMIG_RUNTIME_DIR"]
        else:
            os.environ["TCPMIG_RUNTIME_DIR"] = before


@pytest.fixture(params=KINDS)
def ends(request, hosts):
    """(our socket on a, the client's on c), and we are on a."""
    family, mapped = KINDS[request.param]
    with connected(hosts, family, mapped) as both:
        yield both


@pytest.fixture
def ends4(hosts):
    with connected(hosts, V4, False) as both:
        yield both


OWNER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
print("accepted", flush=True)
while data := connection.recv(65536):
    connection.sendall(data)
"""


@pytest.fixture
def owned(hosts):
    """(process, name of its connection, the client's socket): an echo server of another process."""
    address = hosts.a.own(V4)
    with hosts.a:
        process = subprocess.Popen([sys.executable, "-IS", "-c", OWNER, address], stdout=subprocess.PIPE)
        port = int(process.stdout.readline())
        client = hosts.c.socket(V4, socket.SOCK_STREAM)
        client.settimeout(5)
        client.connect((address, port))
        process.stdout.readline()
        yield process, f"tcp:{address}:{port}-{end(client.getsockname())}", client
        for entry in frozen.frozen():
            frozen.discard(entry.conn_id)
        process.kill()
        process.communicate()
        client.close()
