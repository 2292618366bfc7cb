"""`--takeover-hook` where announcements change nothing: the client's neighbour table is the cloud's, and only the hook
changes it."""

from __future__ import annotations

import contextlib
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import Host, ThreeHosts
from tests.hosts.tcpmig import MigrationFailed, migrate, tcpmig
from tests.system.test_cli_bad_input import connected
from tests.workloads import servers

PORT = 7410

# What it is called with is written down; `take` asks the cloud, which is the test, and waits for its answer.
HOOK = r"""
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
point = os.environ["TCPMIG_HOOK"]
with open(folder / "called", "a") as log:
    print(point, os.environ["TCPMIG_ADDRESSES"], file=log)
if (folder / f"refuse-{point}").exists():
    sys.exit("the API says no")
if point == "take":
    (folder / "asked").touch()
    while not (folder / "answered").exists():
        time.sleep(0.01)
"""


@dataclass(slots=True)
class Cloud:
    hosts: ThreeHosts
    folder: Path

    def bind(self, host: Host) -> None:
        """The address is at this host, and no announcement changes that."""
        mac = host.sh("cat /sys/class/net/eth0/address").strip()
        self.hosts.client.ip(f"neigh replace {self.hosts.net.service4} lladdr {mac} nud permanent dev eth0")

    def options(self) -> list[str]:
        words = [sys.executable, "-IS", str(self.folder / "hook.py"), str(self.folder)]
        return ["--takeover-hook", shlex.join(words), "--takeover-limit", "60", "--address", self.hosts.net.service4]

    def called(self) -> list[str]:
        return (self.folder / "called").read_text().splitlines()

    def await_question(self) -> None:
        end = time.monotonic() + 60
        while not (self.folder / "asked").exists():
            assert time.monotonic() < end, "the hook was not asked to take the address"
            time.sleep(0.01)


@pytest.fixture
def cloud(hosts: ThreeHosts, tmp_path: Path) -> Cloud:
    (tmp_path / "hook.py").write_text(HOOK)
    one = Cloud(hosts, tmp_path)
    one.bind(hosts.source)
    return one


@contextlib.contextmanager
def client_of(hosts: ThreeHosts) -> Iterator[socket.socket]:
    with hosts.client.netns_entered():
        sock = connected((hosts.net.service4, PORT))
    with sock:
        sock.settimeout(30)
        yield sock


def echoes(sock: socket.socket, text: bytes) -> bool:
    sock.sendall(text)
    found = b""
    while len(found) < len(text):
        part = sock.recv(len(text) - len(found))
        assert part, "the connection has ended"
        found += part
    return found == text


def test_nobody_is_reset_while_the_api_works(cloud: Cloud) -> None:
    hosts = cloud.hosts
    server = servers.echo_server(hosts.source, cloud.folder, [hosts.net.service4], port=PORT)
    with client_of(hosts) as sock:
        assert echoes(sock, b"before")
        with ThreadPoolExecutor(1) as executor:
            moving = executor.submit(migrate, hosts.source, server.pid, hosts.target, options=cloud.options())
            cloud.await_question()
            # they run there, and what is sent still comes here: it is passed on
            assert echoes(sock, b"meanwhile" * 1000)
            assert not moving.done()
            cloud.bind(hosts.target)
            (cloud.folder / "answered").touch()
            assert moving.result()["outcome"] == "done"
        assert echoes(sock, b"after" * 1000)
        with client_of(hosts) as another:
            assert echoes(another, b"anew")
    assert cloud.called() == [f"check {hosts.net.service4}", f"take {hosts.net.service4}"]
    status, told, said = tcpmig(hosts.source, "recover")
    assert (status, told["items"]) == (0, []), said


def test_a_failed_take_is_told_and_made_up_for_by_recover(cloud: Cloud) -> None:
    hosts = cloud.hosts
    server = servers.echo_server(hosts.source, cloud.folder, [hosts.net.service4], port=PORT)
    (cloud.folder / "refuse-take").touch()
    with client_of(hosts) as sock:
        assert echoes(sock, b"before")
        with pytest.raises(MigrationFailed, match="the API says no") as failed:
            migrate(hosts.source, server.pid, hosts.target, options=cloud.options())
        assert (failed.value.status, failed.value.summary["outcome"]) == (4, "partial")
        assert hosts.target.state(failed.value.summary["target_pid"])
        sock.sendall(b"waits")
        status, told, _ = tcpmig(hosts.source, "recover")
        assert (status, told["code"]) == (1, "TM-0639"), told
        (cloud.folder / "refuse-take").unlink()
        (cloud.folder / "answered").touch()
        cloud.bind(hosts.target)
        status, told, said = tcpmig(hosts.source, "recover")
        assert (status, [item["settled"] for item in told["items"]]) == (0, [True]), said
        assert sock.recv(5, socket.MSG_WAITALL) == b"waits"
        assert echoes(sock, b"after" * 1000)
    assert [line.split()[0] for line in cloud.called()] == ["check", "take", "take", "take"]


def test_what_is_not_permitted_is_refused_before_the_stop(cloud: Cloud) -> None:
    hosts = cloud.hosts
    server = servers.echo_server(hosts.source, cloud.folder, [hosts.net.service4], port=PORT)
    (cloud.folder / "refuse-check").touch()
    with client_of(hosts) as sock:
        with pytest.raises(MigrationFailed) as failed:
            migrate(hosts.source, server.pid, hosts.target, options=cloud.options())
        assert (failed.value.status, failed.value.summary["code"]) == (3, "TM-0790")
        assert "the API says no" in failed.value.summary["message"]
        assert echoes(sock, b"still here")
        with pytest.raises(MigrationFailed) as failed:
            migrate(hosts.source, server.pid, hosts.target, options=[*cloud.options(), "--address", "none"])
        assert (failed.value.status, failed.value.summary["code"]) == (3, "TM-0793")
        assert echoes(sock, b"still here")
    assert [line.split()[0] for line in cloud.called()] == ["check", "undo"]
