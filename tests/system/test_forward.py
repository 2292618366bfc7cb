"""`--address forward`: the address stays, the process goes, and nobody notices; and back home."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, ThreeHosts
from tests.hosts.tcpmig import RSH, TCPMIG, MigrationFailed, migrate, tcpmig
from tests.system.test_cli_bad_input import connected
from tests.workloads import scenes, servers
from tests.workloads.deaths import left_behind
from tests.workloads.move import Mover, by_tcpmig

PORT = 7420
KILLED_IN = [sys.executable, "-m", "tests.workloads.killed_in"]


def options(hosts: ThreeHosts) -> list[str]:
    return ["--address", "forward", "--forward-to", hosts.target.ip4]


def forwarding(hosts: ThreeHosts) -> Mover:
    return by_tcpmig(*options(hosts))


def standing(host: Host) -> list[dict[str, Any]]:
    status, told, said = tcpmig(host, "holds")
    assert status == 0, said
    found: list[dict[str, Any]] = told["forwards"]
    return found


def nothing_left(*hosts: Host) -> None:
    for host in hosts:
        assert standing(host) == []
        # interfaces, rules, programs and maps
        assert "tmf" not in host.sh("ip -o link")
        assert "4200:" not in host.sh("ip rule; ip -6 rule")
        assert "tcpmig" not in host.sh("ls /sys/fs/bpf")


@contextlib.contextmanager
def client_of(hosts: ThreeHosts, family: int = 4) -> Iterator[socket.socket]:
    with hosts.client.netns_entered():
        sock = connected((hosts.net.service(family), PORT))
    with sock:
        sock.settimeout(20)
        yield sock


def echoes(sock: socket.socket, text: bytes = b"is anybody there") -> bool:
    sock.sendall(text)
    found = b""
    while len(found) < len(text):
        part = sock.recv(len(text) - len(found))
        assert part, "the connection has ended"
        found += part
    return found == text


def test_an_echo_server_goes_and_comes_home(hosts: ThreeHosts, tmp_path: Path) -> None:
    with scenes.echo(hosts, tmp_path, mover=forwarding(hosts)) as stage:
        report = stage.move()
        print(json.dumps(report.json()))
        assert report.problems == [], f"{report.problems}\n{report.log}"
        (home,) = standing(hosts.source)
        (away,) = standing(hosts.target)
        assert (home["role"], home["state"]) == ("home", "forwarding")
        assert (away["role"], away["state"]) == ("away", "forwarding")
        assert home["addresses"] == away["addresses"]
        assert len(home["connections"]) == len(home["ports"]) == 2
        report = stage.move()
        print(json.dumps(report.json()))
        assert report.problems == [], f"{report.problems}\n{report.log}"
        nothing_left(hosts.source, hosts.target)
        assert stage.finish() == []


@pytest.mark.long
def test_bulk_in_both_directions(hosts: ThreeHosts, tmp_path: Path) -> None:
    with scenes.stream(hosts, tmp_path, rate=20, mover=forwarding(hosts)) as stage:
        for _ in range(2):
            report = stage.move(calm=1.0)
            print(json.dumps(report.json()))
            assert report.problems == [], f"{report.problems}\n{report.log}"
        assert stage.finish() == []
    nothing_left(hosts.source, hosts.target)


def test_what_is_forwarded_ends_one_by_one(hosts: ThreeHosts, tmp_path: Path) -> None:
    both = [hosts.net.service4, hosts.net.service6]
    server = servers.echo_server(hosts.source, tmp_path, both, port=PORT)
    with client_of(hosts, 4) as four:
        with client_of(hosts, 6) as six:
            moved = migrate(hosts.source, server.pid, hosts.target, options=options(hosts))
            assert echoes(four)
            assert echoes(six)
            for family in (4, 6):
                with client_of(hosts, family) as another:
                    # bulk on a connection that has begun afterwards
                    assert all(echoes(another, bytes([n]) * 100_000) for n in range(20))
            (home,) = standing(hosts.source)
            assert home["forward"] == moved["forward"]
            assert len(home["connections"]) == 2
        deadline = time.monotonic() + 30
        while len(left := standing(hosts.source)[0]["connections"]) == 2:
            assert time.monotonic() < deadline
        assert left == [f"tcp:{both[0]}:{PORT}-{four.getsockname()[0]}:{four.getsockname()[1]}"], left
        assert echoes(four)
        status, _, said = tcpmig(hosts.source, "release", moved["forward"][:8])
        assert status == 0, said
        with pytest.raises(ConnectionResetError):
            echoes(four)
    hosts.target.kill(moved["target_pid"], signal.SIGKILL)
    status, _, said = tcpmig(hosts.target, "release", moved["forward"])
    assert status == 0, said
    nothing_left(hosts.source, hosts.target)
    assert {f"{both[0]}/24", f"{both[1]}/64"} <= hosts.source.addresses()


def refusal(source: Host, pid: int, target: Host, *more: object) -> str:
    with pytest.raises(MigrationFailed) as failed:
        migrate(source, pid, target, options=more)
    assert failed.value.status == 3, failed.value
    return str(failed.value.summary["code"])


@pytest.mark.long
def test_what_cannot_be_is_refused_before_the_stop(hosts: ThreeHosts, tmp_path: Path) -> None:
    source, target, client = hosts.source, hosts.target, hosts.client
    server = servers.echo_server(source, tmp_path, [hosts.net.service4], port=PORT)
    with client_of(hosts) as sock:
        # nobody knows where the target is; the address is another host's; packets of full size do not come through
        assert refusal(source, server.pid, target, "--address", "forward") == "TM-0798"
        assert refusal(source, server.pid, target, "--address", "forward", "--forward-to", client.ip4) == "TM-0798"
        assert refusal(source, server.pid, target, "--address", "forward", "--forward-to", target.ip6) == "TM-0795"
        target.sh("nft add table ip wall; nft add chain ip wall in '{type filter hook input priority 0;}'")
        target.sh("nft add rule ip wall in udp dport 47474 drop")
        assert refusal(source, server.pid, target, *options(hosts)) == "TM-0795"
        target.sh("nft delete table ip wall")
        assert echoes(sock)
        nothing_left(source, target)
        assert left_behind(source) == left_behind(target) == []

        pid = migrate(source, server.pid, target, options=options(hosts))["target_pid"]
        # from there it can only come home, with its address at home
        assert refusal(target, pid, client, "--address", "forward", "--forward-to", client.ip4) == "TM-0796"
        assert refusal(target, pid, client) == "TM-0796"
        # and nobody takes the address away from home
        other = servers.echo_server(source, tmp_path, [hosts.net.service4], port=PORT + 1)
        assert refusal(source, other.pid, client) == "TM-0713"
        assert echoes(sock)


# where and when tcpmig is killed, and where the processes are then; the others are in tests/campaign
MOMENTS = [
    ("source", "migrate.forwarding:SourceForward.fill", "here"),
    ("source", "migrate.forwarding:SourceForward.take_over", "asked"),
    ("target", "migrate.forwarding:TargetForward.take_over", "gone"),
    ("target", "checkpoint.restore:Restore.run", "gone"),
]


@pytest.mark.long
@pytest.mark.parametrize(("moment", "way"), [(0, "there"), (1, "there"), (2, "home")])
def test_a_death_is_settled_by_recover(hosts: ThreeHosts, tmp_path: Path, moment: int, way: str) -> None:
    die_and_recover(hosts, tmp_path, *MOMENTS[moment], way)


def die_and_recover(hosts: ThreeHosts, tmp_path: Path, side: str, moment: str, state: str, way: str) -> None:
    """A move that ``way`` whose tool dies on one side, and what `recover` makes of it."""
    source, target = hosts.source, hosts.target
    server = servers.echo_server(source, tmp_path, [hosts.net.service4], port=PORT)
    pid = server.pid
    with client_of(hosts) as sock:
        assert echoes(sock)
        if way == "home":
            pid = migrate(source, pid, target, options=options(hosts))["target_pid"]
            source, target = target, source
        receive = [*TCPMIG, "receive"] if side == "source" else [*KILLED_IN, moment, "receive"]
        command = TCPMIG if side == "target" else [*KILLED_IN, moment]
        rsh = ["--rsh", shlex.join(RSH), "--remote-command", shlex.join(receive)]
        done = source.run([*command, "migrate", pid, target.name, *rsh, *options(hosts)], check=False)
        assert done.returncode == (5 if side == "target" else -signal.SIGKILL), done.stderr
        if state == "here":
            deadline = time.monotonic() + 20
            while left_behind(target):
                assert time.monotonic() < deadline
        status, told, said = tcpmig(source, "recover")
        assert status == 0, (told, said)
        # COMMIT was written down, but may not be on its way yet: then the target says
        where = told["items"][0]["state"] if state == "asked" else state
        assert [(item["state"], item["settled"]) for item in told["items"]] == [(where, True)]
        assert echoes(sock)
        runs, empty = (source, target) if where == "here" else (target, source)
        assert runs.state(pid)
        assert not empty.state(pid)
        forwarded = runs is hosts.target
        assert [len(standing(host)) for host in (source, target)] == [forwarded, forwarded]
        if not forwarded:
            nothing_left(source, target)
