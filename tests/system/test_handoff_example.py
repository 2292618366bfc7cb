"""docs/examples/http_handoff.py: live HTTP connections go from host to host, and no process of the servers is root."""

from __future__ import annotations

import hashlib
import http.client
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.hosts import Host, ThreeHosts
from tests.hosts.agent import as_user, open_to_all
from tests.hosts.host import ROOT
from tests.hosts.process import HostProcess
from tests.packets import Watcher
from tests.system.test_chaperone import OWNER, start
from tests.workloads.servers import wait_listening

EXAMPLE = ROOT / "docs/examples/http_handoff.py"
PORT, CONTROL = 8080, 8081
SIZE = 6_000_000


def heard(process: HostProcess, pattern: str) -> str:
    """The next line that the process says which looks so."""
    assert process.stdout is not None
    said = ""
    while line := process.stdout.readline().decode():
        if re.search(pattern, line):
            return line
        said += line
    raise AssertionError(f"{process.args} ended with {process.wait(5)}: {said}")


@pytest.fixture
def servers(hosts: ThreeHosts) -> Iterator[tuple[HostProcess, HostProcess]]:
    """The server that serves, and the one that will."""
    with ExitStack() as stack:
        made = []
        for host, other in ((hosts.source, hosts.target), (hosts.target, hosts.source)):
            open_to_all(host)
            stack.enter_context(start(host, "--address", hosts.net.service4))
            command = [*as_user(OWNER), sys.executable, EXAMPLE, "--listen", PORT, "--control", CONTROL]
            made.append(host.popen([*command, "--to", f"{other.ip4}:{CONTROL}"], stdout=subprocess.PIPE))
            stack.enter_context(made[-1])
            heard(made[-1], "ready")
        yield made[0], made[1]


def move_address(hosts: ThreeHosts) -> None:
    """What keepalived would do."""
    address = f"{hosts.net.service4}/24"
    hosts.source.remove_address(address)
    hosts.target.add_address(address)
    hosts.client.sh("ip neigh flush all")


def uid(host: Host, process: HostProcess) -> set[str]:
    status = host.sh(f"grep -E '^(Uid|Cap(Prm|Eff|Bnd))' /proc/{process.pid}/status")
    return set(status.split()[1:5]) | set(re.findall(r"Cap\w+:\s+(\w+)", status))


def test_clients_notice_nothing(hosts: ThreeHosts, servers: tuple[HostProcess, HostProcess]) -> None:
    here, there = servers
    url = f"http://{hosts.net.service4}:{PORT}"
    assert uid(hosts.source, here) == uid(hosts.target, there) == {str(OWNER), "0" * 16}
    wait_listening(hosts.source, here, hosts.net.service4, PORT)
    kept = http.client.HTTPConnection(hosts.net.service4, PORT, timeout=20)
    with Watcher(hosts.client, port=PORT) as watcher, hosts.client.netns_entered():
        kept.request("GET", "/")
        assert kept.getresponse().read() == b"this is source\n"
        port = kept.sock.getsockname()[1]
        # a download, by a program that knows nothing, and a request of which one half has come
        command = ["curl", "-sS", "-o", "/run/download", "-w", "%{http_code} %{num_connects} %{size_download}"]
        with hosts.client.popen([*command, f"{url}/bytes/{SIZE}"], stdout=subprocess.PIPE) as curl:
            begun = hosts.client.path("/run/download")
            deadline = time.monotonic() + 10
            while not begun.exists() or begun.stat().st_size < SIZE // 10:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            kept.sock.sendall(b"GET / HT")
            here.send_signal(signal.SIGUSR1)
            heard(here, "may move")
            assert begun.stat().st_size < SIZE, "it is in the middle"
            move_address(hosts)
            heard(there, "took over 2")
            heard(here, "handed over")
            kept.sock.sendall(b"TP/1.1\r\n\r\n")
            response = http.client.HTTPResponse(kept.sock)
            response.begin()
            assert (response.headers["Server"], response.read()) == ("target", b"this is target\n")
            kept.request("GET", "/")
            assert kept.getresponse().read() == b"this is target\n"
            assert kept.sock.getsockname()[1] == port, "the client has its first connection still"
            out, _ = curl.communicate(timeout=60)
            assert (curl.wait(), out.decode()) == (0, f"200 1 {SIZE}")
        kept.close()
        assert watcher.mark().rsts == []
    expected = hashlib.sha256(b"".join(hashlib.sha256(n.to_bytes(8, "big")).digest() for n in range(SIZE // 32)))
    assert hashlib.sha256(begun.read_bytes()).digest() == expected.digest()


def test_what_cannot_be_handed_over_is_served_on(hosts: ThreeHosts, servers: tuple[HostProcess, HostProcess]) -> None:
    here, there = servers
    wait_listening(hosts.source, here, hosts.net.service4, PORT)
    kept = http.client.HTTPConnection(hosts.net.service4, PORT, timeout=20)
    with hosts.client.netns_entered():
        kept.request("GET", "/")
        assert kept.getresponse().read() == b"this is source\n"
        here.send_signal(signal.SIGUSR1)
        heard(there, "built")
        there.kill()
        heard(here, "not handed over")
        kept.request("GET", "/")
        assert kept.getresponse().read() == b"this is source\n"
        kept.close()
