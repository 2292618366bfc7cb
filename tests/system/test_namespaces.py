"""Trees in namespaces of their own, as `unshare` and containers make them: moved, checkpointed, refused."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.hosts import ThreeHosts
from tests.hosts.tcpmig import TCPMIG, from_host
from tests.hosts.tcpmig import tcpmig as command
from tests.workloads.contained import (
    OF_THE_HOST,
    PROGRAM,
    SHARED,
    children,
    contained,
    inner_number,
    of_this_host,
    refused,
)


@pytest.mark.parametrize("session", [False, True])
def test_a_pid_namespace_moves_there_and_back(hosts: ThreeHosts, session: bool) -> None:
    with contained(hosts, "--pid", session=session) as server:
        before = server.ask()
        assert before["me"]["pid"] == 1
        for _ in range(2):
            server.move()
            assert of_this_host(server.ask()) == of_this_host(before)
            assert inner_number(server.host, server.pid) == 1


def test_the_names_of_a_uts_namespace_move(hosts: ThreeHosts) -> None:
    with contained(hosts, "--pid", "--uts", names=("inside", "some.domain")) as server:
        before = server.ask()
        assert (before["me"]["host"], before["me"]["domain"]) == ("inside", "some.domain")
        server.move()
        assert of_this_host(server.ask(), SHARED) == of_this_host(before, SHARED)
        assert server.host.run(["hostname"]).stdout.strip() == "target"


@pytest.mark.parametrize("where", ["source", pytest.param("target", marks=pytest.mark.long)])
def test_a_pid_namespace_in_an_image(hosts: ThreeHosts, tmp_path: Path, where: str) -> None:
    with contained(hosts, "--pid", "--uts", names=("inside", "")) as server:
        before = server.ask()
        origin = () if where == "source" else from_host(hosts.source)
        server.rest(tmp_path / "image", getattr(hosts, where), *origin)
        assert inner_number(server.host, server.pid) == 1
        assert of_this_host(server.ask(), SHARED) == of_this_host(before, SHARED)


def test_numbers_that_are_taken_are_free_in_a_new_namespace(hosts: ThreeHosts, tmp_path: Path) -> None:
    with contained(hosts) as server:
        before = server.ask()
        image = tmp_path / "image"
        assert command(hosts.source, "checkpoint", server.pid, "-R", "-o", image)[0] == 0
        status, refused, _ = command(hosts.source, "restore", image, "--no-address")
        assert (status, refused["code"]) == (1, "TM-0552")
        assert server.ask() == before
        # the address and its connections are still the original's: at the target only the processes are rebuilt
        restore = [*TCPMIG, "restore", image, "--new-pid-namespace", "--foreground", "--json"]
        hosts.target.sh(
            f"for n in 1 2 3 4 5 6 7 8; do sh -c 'echo {server.pid - 1} >/proc/sys/kernel/ns_last_pid'; done"
        )
        with hosts.target.popen(restore, stdout=subprocess.PIPE) as foreground:
            assert foreground.stdout is not None
            back = json.loads(foreground.stdout.readline())
            assert inner_number(hosts.target, back["pid"]) == server.pid
            assert hosts.target.path(f"/proc/{back['pid']}/root/proc/{server.pid}/comm").read_text()
            hosts.target.kill(back["pid"], 9)
            assert foreground.wait(20) == 128 + 9
        assert hosts.target.state(back["init"]) == ""


def test_objects_and_settings_of_an_ipc_namespace_move(hosts: ThreeHosts, tmp_path: Path) -> None:
    with contained(hosts, "--ipc", "env", "SYSTEM_V=yes") as server:
        before = server.ask()
        assert ["9000\n"] in before["me"]["objects"]
        assert len(before["me"]["objects"]) == 3 + 3 + 1
        server.move()
        after = server.ask()
        assert [after[who]["objects"] for who in ("me", "child")] == [before["me"]["objects"]] * 2
        for host in (hosts.source, hosts.target):
            assert host.run(["cat", "/proc/sysvipc/shm", "/proc/sysvipc/msg"]).stdout.count("\n") == 2, "outside"


def test_a_user_namespace_moves_there_and_back(hosts: ThreeHosts, tmp_path: Path) -> None:
    with contained(hosts, "--user", "--map-root-user") as server:
        before = server.ask()
        assert before["me"]["identity"]["uid_map"] == ["0", "0", "1"]
        for number in range(2):
            if number:
                server.rest(tmp_path / "image")
            else:
                server.move()
            assert of_this_host(server.ask(), OF_THE_HOST) == of_this_host(before, OF_THE_HOST)
            told = server.host.path(f"/proc/{server.pid}/status").read_text()
            assert "CapEff:\t000001ffffffffff" in told
            spaces = [os.readlink(server.host.path(f"/proc/{pid}/ns/user")) for pid in (server.pid, 1)]
            assert spaces[0] != spaces[1]


@pytest.mark.long
def test_users_of_a_namespace_move(hosts: ThreeHosts, tmp_path: Path) -> None:
    """Many IDs, in use by processes and threads; the other namespaces belong to theirs."""
    system = "/usr/bin/python3"  # the one of our checkout is not everybody's to execute
    mapped = [system, "-IS", str(PROGRAM.with_name("mapped.py")), "100000", "1000"]
    options = ("unshare", "--fork", "--pid", "--ipc", "--uts", "--mount", "--mount-proc", "env", "OTHERS=yes")
    with contained(hosts, *mapped, *options, python=system) as server:
        (inner,) = children(hosts.source, server.pid)
        before = server.ask()
        assert before["child"]["identity"]["Uid"] == ["7", "7", "8", "7"]
        assert before["me"]["identity"]["ours"] == ["ipc", "mnt", "pid", "uts"]
        server.pid = inner
        server.move()
        assert of_this_host(server.ask(), ("host", "cgroup")) == of_this_host(before, ("host", "cgroup"))
        server.rest(tmp_path / "image")
        assert of_this_host(server.ask(), ("host", "cgroup")) == of_this_host(before, ("host", "cgroup"))
        told = server.host.path(f"/proc/{server.pid}/status").read_text()
        assert "Uid:\t100000\t" in told


def test_what_nobody_has_open_in_an_ipc_namespace(hosts: ThreeHosts) -> None:
    with contained(hosts, "--ipc", "sh", "-c", 'ipcmk -M 4096 >/dev/null; exec "$@"', "sh") as server:
        assert refused(hosts.source, server.pid) == "TM-0725"


def test_what_is_no_whole_namespace_is_refused(hosts: ThreeHosts) -> None:
    with contained(hosts, "--pid", "--uts") as server:
        (inner,) = [pid for pid in children(hosts.source, server.pid) if hosts.source.state(pid) != "Z"]
        assert refused(hosts.source, inner) == "TM-0721"
        with hosts.source.popen(["nsenter", "-t", server.pid, "--pid", "sleep", 1000]) as other:
            assert refused(hosts.source, server.pid) == "TM-0722"
            other.kill()
            other.wait(20)
        with hosts.source.popen(["sleep", 1000]) as other:
            assert refused(hosts.source, server.pid, other.pid) == "TM-0723"
    with contained(hosts, "--pid", "sh", "-c", 'unshare --uts "$@"; exit', "sh") as server:
        assert refused(hosts.source, server.pid) == "TM-0720"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("--user", "--map-root-user", "unshare", "--user", "--map-root-user"), "TM-0720"),
        (("--user",), "TM-0810"),
        (("--uts", "unshare", "--user", "--map-root-user"), "TM-0811"),
    ],
)
def test_user_namespaces_that_cannot_be_made_again(hosts: ThreeHosts, command: tuple[str, ...], code: str) -> None:
    with contained(hosts, *command) as server:
        assert refused(hosts.source, server.pid) == code
