"""Whole containers, with a network of their own: moved, checkpointed, and what is left when a tool dies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.hosts import ThreeHosts
from tests.hosts.tcpmig import from_host
from tests.system.test_cli_bad_input import connected
from tests.workloads import deaths, steps
from tests.workloads.contained import (
    CONTAINER,
    MOUNTS,
    PYTHON,
    in_container,
    inside,
    make_root,
    networked,
    of_this_host,
)
from tests.workloads.move import Stage


@pytest.mark.long
def test_a_network_namespace_moves_there_and_back(hosts: ThreeHosts) -> None:
    with networked(hosts) as server:
        before = server.ask()
        for _ in range(2):
            server.move()
            assert of_this_host(server.ask()) == of_this_host(before)
            assert "02:00:00:00:77:01" in inside(server, "ip", "link", "show", "eth0")
            assert f"default via {hosts.client.ip4}" in inside(server, "ip", "route")
            assert inside(server, "cat", "/proc/sys/net/ipv4/tcp_fin_timeout") == "7\n"
            assert hosts.net.service4 not in server.host.run(["ip", "addr"]).stdout


@pytest.mark.long
def test_a_container_moves_there_and_back(hosts: ThreeHosts, tmp_path: Path) -> None:
    """All kinds at once but users, with redis and our program inside, each with a client outside."""
    service = hosts.net.service4
    redis = f"redis-server --port 7032 --protected-mode no --bind {service} --save '' --dir /tmp >/dev/null 2>&1 &"
    with networked(hosts, *CONTAINER, script=f"{redis}\n{MOUNTS} env SYSTEM_V=yes", names=("inside", "")) as server:
        before = server.ask()
        assert (before["me"]["self"], before["child"]["self"]) == ("1", str(before["number"]))
        assert [line for line in before["me"]["mounts"] if " /opt ro" in line]
        with hosts.client.netns_entered():
            sock = connected((service, 7032))
        with sock:
            for number in range(3):
                sock.sendall(b"INCR moves\r\n")
                assert sock.recv(100) == f":{number + 1}\r\n".encode()
                if number < 2:
                    server.move()
                else:
                    server.rest(tmp_path / "image")
                assert server.ask() == before
            sock.sendall(b"INCR moves\r\n")
            assert sock.recv(100) == b":4\r\n"


@pytest.mark.long
def test_a_container_of_its_own_users(hosts: ThreeHosts) -> None:
    """All kinds at once, as `unshare` makes them for somebody who is root only inside."""
    with networked(hosts, "--user", "--map-root-user", *CONTAINER, script=f"{MOUNTS} env SYSTEM_V=yes") as server:
        before = server.ask()
        assert before["me"]["identity"]["ours"] == ["cgroup", "ipc", "mnt", "net", "pid", "uts"]
        for _ in range(2):
            server.move()
            assert server.ask() == before


@pytest.mark.long
@pytest.mark.parametrize("users", [(), ("--user", "--map-root-user")])
@pytest.mark.parametrize(("place", "number", "status"), [("freeze", 5, -9), ("release", 4, 5)])
def test_a_death_in_a_network_namespace(
    hosts: ThreeHosts, tmp_path: Path, place: str, number: int, status: int, users: tuple[str, ...]
) -> None:
    """`recover`, outside of it, finds the namespace and settles in there; here alone, and with the other host."""
    with networked(hosts, *users) as server:
        before = server.ask()
        stage = SimpleNamespace(here=hosts.source, there=hosts.target, pid=server.pid)
        assert steps.run(cast("Stage", stage), tmp_path, place, number)[0] == status, (
            tmp_path / "tool.log"
        ).read_text()
        done, items = deaths.settle(hosts.source)
        assert done == 0, items
        if place == "release":
            server.host = hosts.target
        assert of_this_host(server.ask()) == of_this_host(before)


@pytest.mark.long
@pytest.mark.parametrize("users", [(), ("--user", "--map-root-user")])
def test_a_container_comes_back_elsewhere(hosts: ThreeHosts, tmp_path: Path, users: tuple[str, ...]) -> None:
    with networked(hosts, *users, *CONTAINER) as server:
        before = server.ask()
        server.rest(tmp_path / "image", hosts.target, *from_host(hosts.source))
        assert of_this_host(server.ask()) == of_this_host(before)


@pytest.mark.parametrize(
    ("users", "back"),
    [
        pytest.param((), True, marks=pytest.mark.long),
        (("--user", "--map-root-user"), False),
        pytest.param(("--user", "--map-root-user"), True, marks=pytest.mark.long),
    ],
)
def test_a_container_with_all_it_has_open(
    hosts: ThreeHosts, tmp_path: Path, users: tuple[str, ...], back: bool
) -> None:
    """With a root of its own: files in its memory and on its root, terminals, sockets, watches. Also of somebody who is
    root only inside."""
    root = make_root(tmp_path / "root")
    kinds = [one for one in CONTAINER if one != "--mount-proc"]
    options = ["bound"] if users else ["slave"]
    unshare = (*users, *kinds, *map(str, in_container(root, *options)))
    with networked(hosts, *unshare, python=PYTHON, program="/srv/furnished.py") as server:
        before = server.ask()
        assert before["typed"].startswith("line\r\nenil /dev/pts/0 True True"), before
        server.move()
        assert server.ask() == before
        if back:
            server.rest(tmp_path / "image", hosts.source, *from_host(hosts.target))
            assert server.ask() == before
