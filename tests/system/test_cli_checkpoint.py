"""`checkpoint` and `restore`: a server with a client goes into a file and comes back; a bad image is refused."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import Host, Net, ThreeHosts
from tests.hosts.process import HostProcess
from tests.hosts.tcpmig import TCPMIG, from_host, tcpmig
from tests.system.test_cli_bad_input import assert_told, connected

PORT = 7011
# counts what it has echoed: a restored server goes on counting
SERVER = f"""
import socket, sys
kept = open(sys.argv[2])
listener = socket.create_server((sys.argv[1], {PORT}))
connection, _ = listener.accept()
total = 0
while data := connection.recv(65536):
    total += len(data)
    connection.sendall(b"%8d" % total + data)
sys.exit(7)
"""
REFUSED = 3


@dataclass(frozen=True, slots=True)
class Service:
    hosts: ThreeHosts
    server: HostProcess
    sock: socket.socket
    image: Path
    data: Path

    def say(self, data: bytes) -> int:
        """The server's count after ``data``, which must come back."""
        self.sock.settimeout(20)
        self.sock.sendall(data)
        answer = self.sock.recv(8 + len(data), socket.MSG_WAITALL)
        assert answer[8:] == data
        return int(answer[:8])

    def checkpoint(self, *options: object) -> dict[str, object]:
        done = tcpmig(self.hosts.source, "checkpoint", self.server.pid, "-o", self.image, *options)
        assert done[0] == 0, done
        return done[1]


@pytest.fixture
def service(hosts: ThreeHosts, net: Net, tmp_path: Path) -> Iterator[Service]:
    null = subprocess.DEVNULL
    data = tmp_path / "data"
    data.write_text("data")
    argv = [sys.executable, "-IS", "-c", SERVER, net.service4, data]
    with hosts.source.popen(argv, stdin=null, stdout=null, stderr=null) as server:
        with hosts.client.netns_entered():
            sock = connected((net.service4, PORT))
        with sock:
            found = Service(hosts, server, sock, tmp_path / "image", data)
            assert found.say(b"hello") == 5
            yield found


def test_it_runs_on_and_the_image_is_whole(service: Service) -> None:
    before = service.hosts.source.addresses()
    found = service.checkpoint("-R")
    assert (found["pid"], found["running"], found["connections"]) == (service.server.pid, True, 1)
    assert service.image.stat().st_mode & 0o777 == 0o600
    assert service.image.stat().st_size == found["bytes"]
    assert service.say(b"and on") == 11
    assert service.hosts.source.addresses() == before
    assert tcpmig(service.hosts.source, "verify", service.image)[0] == 0
    status, shown, _ = tcpmig(service.hosts.source, "inspect", service.image)
    assert status == 0
    assert len(shown["connections"]) == 1
    assert len(shown["processes"]) >= 1


@pytest.mark.parametrize("where", ["source", "target"])
def test_it_comes_back_with_its_connection(service: Service, where: str) -> None:
    source, pid = service.hosts.source, service.server.pid
    addresses = source.addresses()
    found = service.checkpoint()
    assert found["running"] is False
    source.wait_until_gone(pid)
    assert source.addresses() == addresses
    host: Host = getattr(service.hosts, where)
    origin = () if where == "source" else from_host(source)
    status, back, _ = tcpmig(host, "restore", service.image, "--pid-file", service.image.with_suffix(".pid"), *origin)
    assert (status, back["pid"], back["connections"]) == (0, pid, 1)
    assert back["held"] == (1 if where == "source" else 0)
    assert service.image.with_suffix(".pid").read_text() == f"{pid}\n"
    assert host.state(pid) in ("S", "R")
    assert host.path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] == "1", "its parent is init"
    assert service.say(b"again") == 10
    host.kill(pid, 9)


def test_foreground_passes_on_the_exit_status(service: Service) -> None:
    service.checkpoint()
    service.hosts.source.wait_until_gone(service.server.pid)
    command = [*TCPMIG, "restore", service.image, "--foreground"]
    with service.hosts.source.popen(command, stdout=subprocess.PIPE) as restore:
        assert restore.stdout is not None
        assert int(restore.stdout.readline()) == service.server.pid
        assert service.say(b"x") == 6
        service.sock.close()
        assert restore.wait(20) == 7


# --- images that are none


@pytest.fixture
def image(service: Service) -> Path:
    service.checkpoint("-R")
    service.server.kill()
    service.hosts.source.wait_until_gone(service.server.pid)
    return service.image


def refused(host: Host, image: Path, code: str, *options: object) -> dict[str, object]:
    """Restoring is refused, and leaves nothing."""
    processes, addresses = set(host.processes()), host.addresses()
    found = assert_told(tcpmig(host, "restore", image, *options), REFUSED, code)
    # one that was there may have been about to end: the checkpoint's witness outlives it by a moment
    assert set(host.processes()) <= processes
    assert host.addresses() == addresses
    return found


def test_a_truncated_image(service: Service, image: Path) -> None:
    whole = image.read_bytes()
    for length, code in ((0, "TM-0402"), (len(whole) // 2, "TM-0402"), (len(whole) - 1, "TM-0402")):
        image.write_bytes(whole[:length])
        refused(service.hosts.source, image, code)


def test_a_byte_that_flipped(service: Service, image: Path) -> None:
    whole = bytearray(image.read_bytes())
    # in the first record, in a page, in the index
    for place in (100, len(whole) // 3, len(whole) - 100):
        whole[place] ^= 1
        image.write_bytes(whole)
        whole[place] ^= 1
        refused(service.hosts.source, image, "TM-0403")


def test_what_is_no_image(service: Service, image: Path) -> None:
    source = service.hosts.source
    image.write_bytes(b"#!/bin/sh\necho this is a script\n" * 100)
    refused(source, image, "TM-0404")
    refused(source, image.parent, "TM-0409")
    refused(source, image.parent / "missing", "TM-0409")


def test_an_image_of_another_version(service: Service, image: Path) -> None:
    whole = bytearray(image.read_bytes())
    whole[8] += 1
    image.write_bytes(whole)
    refused(service.hosts.source, image, "TM-0405")


def test_a_file_that_is_missing_or_another(service: Service, image: Path) -> None:
    service.data.rename(service.data.with_suffix(".away"))
    assert refused(service.hosts.source, image, "TM-0345")["object"] == str(service.data)
    service.data.write_text("something else altogether")
    assert refused(service.hosts.source, image, "TM-0346")["object"] == str(service.data)


def test_a_pid_that_is_taken(service: Service, image: Path) -> None:
    source, pid = service.hosts.source, service.server.pid
    source.run(["sh", "-c", f"echo {pid - 1} >/proc/sys/kernel/ns_last_pid"])
    with source.popen(["sleep", "60"]) as sleeper:
        assert sleeper.pid == pid
        found = refused(source, image, "TM-0381")
        assert found["object"] == f"pid {pid}"
        sleeper.kill()


def test_a_pid_file_that_cannot_be_written(service: Service, image: Path) -> None:
    refused(service.hosts.source, image, "TM-0114", "--pid-file", image.parent / "missing" / "pid")


def test_an_image_that_cannot_be_written(service: Service) -> None:
    nowhere = service.image.parent / "missing" / "image"
    done = tcpmig(service.hosts.source, "checkpoint", service.server.pid, "-o", nowhere)
    assert done[0] == 1
    assert done[1]["code"] == "TM-0410"
    time.sleep(0.1)
    assert service.say(b"untouched") == 14
