"""Held connections: the processes end, nobody is answered and nobody is reset, until they are restored or released."""

from __future__ import annotations

import errno
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, ThreeHosts, three_hosts
from tests.hosts.process import HostProcess
from tests.hosts.shared import at_home, hosts
from tests.hosts.tcpmig import TCPMIG, from_host
from tests.hosts.warm import tcpmig
from tests.packets import Watcher
from tests.system.test_cli_bad_input import assert_told, connected
from tests.workloads import scenes
from tests.workloads.hold import groups_left, held, left_at_last, left_behind

__all__ = ["at_home", "hosts"]

PORT = 7012
# echoes on every connection, in one thread: what it has counted it remembers
SERVER = f"""
import select, socket, sys
def read(sock):
    try:
        return sock.recv(65536)
    except ConnectionResetError:
        return b""
listener = socket.create_server((sys.argv[1], {PORT}))
open_, total = [listener], 0
while True:
    for sock in select.select(open_, [], [])[0]:
        if sock is listener:
            open_.append(sock.accept()[0])
        elif data := read(sock):
            total += len(data)
            sock.sendall(b"%8d" % total + data)
        else:
            open_.remove(sock)
"""
REFUSED, FAILED = 3, 1


@dataclass(slots=True)
class Service:
    """The server in the source's host, its clients, and a watch over what reaches them."""

    hosts: ThreeHosts
    server: HostProcess
    watcher: Watcher
    image: Path
    clients: list[socket.socket] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    @property
    def source(self) -> Host:
        return self.hosts.source

    @property
    def pid(self) -> int:
        return self.server.pid

    def connect(self) -> socket.socket:
        with self.hosts.client.netns_entered():
            self.clients.append(connected((self.hosts.net.service4, PORT)))
        return self.clients[-1]

    def hold(self, *options: object) -> dict[str, Any]:
        """Checkpoint it; what `tcpmig holds` tells of the hold."""
        status, found, told = tcpmig(self.source, "checkpoint", self.pid, "-o", self.image, *options)
        assert status == 0, (found, told)
        self.source.wait_until_gone(self.pid)
        (hold,) = self.holds()
        assert hold["hold"] == found["hold"]
        self.made.append(hold["hold"])
        assert (hold["state"], hold["rule"], hold["image"]) == ("held", True, str(self.image))
        return dict(hold)

    def holds(self) -> list[dict[str, Any]]:
        status, found, told = tcpmig(self.source, "holds")
        assert status == 0, told
        return list(found["holds"])

    def restore(self, host: Host | None = None, *options: object) -> dict[str, Any]:
        status, found, told = tcpmig(host or self.source, "restore", self.image, *options)
        assert status == 0, (found, told)
        assert "failed" not in told, "a step that is not vital"
        return found

    def send(self) -> None:
        """Each client says something; nobody may hear it now."""
        for client in self.clients:
            client.sendall(b"ping")

    def hear(self) -> None:
        """Each client gets its answer."""
        for client in self.clients:
            client.settimeout(30)
            assert client.recv(12, socket.MSG_WAITALL)[8:] == b"ping"

    def assert_silent(self, seconds: float) -> None:
        """Nothing at all comes for the clients while something arrives for the server again and again."""
        readable = select.select(self.clients, [], [], seconds)[0]
        assert readable == []
        assert self.watcher.mark().rsts == []

    def assert_reset(self) -> None:
        """All clients are told, and new ones refused."""
        for client in self.clients:
            client.settimeout(30)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        with self.hosts.client.netns_entered():
            late = socket.socket()
        with late:
            late.settimeout(20)
            assert late.connect_ex((self.hosts.net.service4, PORT)) == errno.ECONNREFUSED

    def resets(self) -> int:
        return len(self.watcher.mark().rsts)


@pytest.fixture
def service(hosts: ThreeHosts, tmp_path: Path) -> Iterator[Service]:
    null = subprocess.DEVNULL
    argv = [sys.executable, "-IS", "-c", SERVER, hosts.net.service4]
    before = [left_behind(host) for host in (hosts.source, hosts.target)]
    with hosts.source.popen(argv, stdin=null, stdout=null, stderr=null) as server:
        with Watcher(hosts.client, port=PORT) as watcher:
            found = Service(hosts, server, watcher, tmp_path / "image")
            for _ in range(3):
                found.connect()
            found.send()
            found.hear()
            # until it listened, it refused
            watcher.mark()
            yield found
            for client in found.clients:
                client.close()
    assert [left_at_last(host, was) for host, was in zip((hosts.source, hosts.target), before, strict=True)] == before
    assert [groups_left(hold) for hold in found.made] == [[]] * len(found.made)


# --- under load


@pytest.mark.parametrize("where", ["source", "target"])
def test_clients_go_on_and_new_ones_wait(tmp_path: Path, where: str) -> None:
    """redis with pipelines, waiting clients and new connections all the time: every byte is right, no RST."""
    with three_hosts() as hosts, scenes.redis(hosts, tmp_path) as stage:
        report = held(stage, tmp_path / "image", seconds=1, where=getattr(hosts, where))
        assert report.problems == [], report.log
        assert report.restore["held"] == (report.restore["connections"] if where == "source" else 0)
        assert stage.finish() == []
        getattr(hosts, where).kill(stage.pid, signal.SIGKILL)
    assert report.left == []


# --- one thing each


def test_a_killed_holder_resets_nobody(service: Service) -> None:
    hold = service.hold()
    service.send()
    for pid in hold["holders"]:
        service.source.kill(pid, signal.SIGKILL)
        service.source.wait_until_gone(pid)
    (dead,) = service.holds()
    assert (dead["state"], dead["rule"]) == ("dead", True)
    # a new connection is not refused
    with service.hosts.client.netns_entered():
        late = socket.socket()
    with late:
        late.setblocking(False)
        assert late.connect_ex((service.hosts.net.service4, PORT)) == errno.EINPROGRESS
        service.assert_silent(1.0)
        back = service.restore()
        assert (back["connections"], back["held"]) == (3, 0)
        assert sum(back["phases"].values()) == pytest.approx(back["run_ms"])
        assert 0 < back["run_ms"] < back["total_ms"]
        service.hear()
        assert select.select([], [late], [], 20)[1] == [late]
        assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert service.resets() == 0
    service.source.kill(service.pid, signal.SIGKILL)


def test_the_holder_has_nothing_of_its_callers(service: Service) -> None:
    """`ssh HOST tcpmig checkpoint` returns: no stream, session, terminal, control group of the caller is left."""
    pipe = subprocess.PIPE
    command = [*TCPMIG, "checkpoint", service.pid, "-o", service.image]
    with service.source.popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as checkpoint:
        # as sshd does: until nobody has the other end any more
        checkpoint.communicate(timeout=60)
        assert checkpoint.wait() == 0
    (hold,) = service.holds()
    proc = service.source.path(f"/proc/{hold['holders'][0]}")
    streams = {os.readlink(proc / "fd" / name) for name in "012"}
    assert streams == {"/dev/null"}
    kinds = {os.readlink(entry).partition(":")[0] for entry in (proc / "fd").iterdir()}
    assert kinds - {"socket", "/dev/null"} <= {_log(service.source, hold)}
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    assert fields[1] == "1", "its parent is init"
    assert fields[3] == str(hold["holders"][0]), "it leads a session of its own"
    assert fields[4] == "0", "no terminal"
    assert f"/tcpmig-hold-{hold['hold']}" in (proc / "cgroup").read_text()
    assert tcpmig(service.source, "release", hold["hold"])[0] == 0
    service.assert_reset()


def _log(host: Host, hold: dict[str, Any]) -> str:
    """The path of the log of a hold's first holder, in the host."""
    (path,) = host.path("/var/lib/tcpmig/log").glob(f"*-hold-{hold['holders'][0]}.log")
    return f"/var/lib/tcpmig/log/{path.name}"


def test_a_silent_release(service: Service) -> None:
    """Nobody is told; who speaks again is answered as by any host that does not know the connection."""
    hold = service.hold()
    assert tcpmig(service.source, "release", "0000")[1]["code"] == "TM-0622"
    status, released, _ = tcpmig(service.source, "release", hold["hold"][:8], "--silent")
    assert (status, released["connections"]) == (0, 3)
    assert service.resets() == 0
    service.send()
    service.assert_reset()


def test_a_hold_ends_by_itself(service: Service) -> None:
    hold = service.hold("--hold-timeout", 3)
    assert 0 < hold["left"] <= 3
    service.assert_reset()
    for pid in hold["holders"]:
        service.source.wait_until_gone(pid)
    assert service.holds() == []
    log = service.source.path(_log(service.source, hold)).read_text()
    assert f"the time of hold {hold['hold']} is up" in log


def test_many_holders(service: Service) -> None:
    """Two sockets each: the fourth, the listener, and the third connection are another's."""
    script = f"from migrate.snapshot import checkpoint; checkpoint([{service.pid}], {str(service.image)!r}, capacity=2)"
    service.source.run([sys.executable, "-c", script])
    (hold,) = service.holds()
    assert len(hold["holders"]) == 2
    service.send()
    service.source.kill(hold["holders"][0], signal.SIGKILL)
    service.source.wait_until_gone(hold["holders"][0])
    assert service.holds()[0]["state"] == "partial"
    # what one has lost is rebuilt, what the other has is taken
    back = service.restore()
    assert (back["connections"], back["held"]) == (3, 1)
    service.hear()
    assert service.resets() == 0
    service.source.kill(service.pid, signal.SIGKILL)


def test_a_restore_that_fails_leaves_the_hold(service: Service) -> None:
    service.hold()
    service.send()
    source, target = service.source, service.hosts.target
    source.run(["sh", "-c", f"echo {service.pid - 1} >/proc/sys/kernel/ns_last_pid"])
    with source.popen(["sleep", "60"]) as sleeper:
        assert sleeper.pid == service.pid
        assert_told(tcpmig(source, "restore", service.image), REFUSED, "TM-0381")
        sleeper.kill()
    source.wait_until_gone(service.pid)
    service.assert_silent(0.3)
    # elsewhere without a word to the origin: it has the address
    assert_told(tcpmig(target, "restore", service.image), REFUSED, "TM-0704")
    # here, as if it were elsewhere
    assert tcpmig(source, "restore", service.image, *from_host(source))[1]["code"] == "TM-0629"
    (hold,) = service.holds()
    assert hold["state"] == "held"
    assert service.restore()["held"] == 3
    service.hear()
    assert service.resets() == 0
    service.source.kill(service.pid, signal.SIGKILL)


def test_a_line_cut_before_or_after_the_commit(service: Service) -> None:
    """Before it the hold is as it was; after it the same command, run again, goes on."""
    source, target = service.source, service.hosts.target
    service.hold()
    service.send()
    for when, code in (("hold_told", "TM-0605"), ("given_up", "TM-0628")):
        options = from_host(source)
        options[-1] = shlex.join([sys.executable, "-m", "tests.system.cut_handover", when])
        found = tcpmig(target, "restore", service.image, *options)
        assert (found[0], found[1]["code"]) == (FAILED, code), found
        assert service.pid not in target.processes()
        assert len(service.holds()) == (1 if when == "hold_told" else 0)
    service.assert_silent(0.3)
    assert service.restore(target, *from_host(source))["connections"] == 3
    service.hear()
    assert service.resets() == 0
    target.kill(service.pid, signal.SIGKILL)
