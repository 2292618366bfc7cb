"""Trees in namespaces of their own, as `unshare` and containers make them: moved, checkpointed, refused."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, ThreeHosts, tcpmig
from tests.hosts.tcpmig import TCPMIG, from_host
from tests.hosts.tcpmig import tcpmig as command
from tests.system.test_cli_bad_input import connected

PROGRAM = Path(__file__).parent / "programs/contained.py"
PORT = 7031


@dataclass(slots=True)
class Contained:
    """The program, in namespaces of its own, and a client of it."""

    hosts: ThreeHosts
    host: Host
    pid: int  #: of its first process, on ``host``
    sock: socket.socket
    last: dict[str, Any] = field(default_factory=dict)

    def ask(self) -> dict[str, Any]:
        """What it sees; the count goes on, and its clock."""
        self.sock.settimeout(20)
        self.sock.sendall(b"\n")
        told: dict[str, Any] = json.loads(self.sock.makefile("rb").readline())
        assert told["count"] == self.last.get("count", 0) + 1
        assert told["clock"] >= self.last.get("clock", 0.0)
        self.last = told
        return {name: value for name, value in told.items() if name not in ("count", "clock")}

    def end(self) -> None:
        """It is killed, with all that it has begun."""
        for pid in [*children(self.host, self.pid), self.pid]:
            # the death of one of them may be that of others
            self.host.run(["kill", "-9", "--", pid], check=False)

    def move(self, *options: object) -> dict[str, Any]:
        """To the other host."""
        to = self.hosts.target if self.host is self.hosts.source else self.hosts.source
        summary = tcpmig.migrate(self.host, self.pid, to, options=options)
        self.host.wait_until_gone(self.pid)
        self.host, self.pid = to, summary["target_pid"]
        return summary


def children(host: Host, pid: int) -> list[int]:
    try:
        return [int(one) for one in host.path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def contained(
    hosts: ThreeHosts, *unshare: str, session: bool = False, names: tuple[str, str] = ("", "")
) -> Iterator[Contained]:
    """The program below `unshare` with these options; it is the child of `unshare`."""
    null = subprocess.DEVNULL
    address = hosts.net.service4
    setsid = ["setsid"] if session else []
    argv = ["unshare", "--fork", *unshare, *setsid, sys.executable, "-IS", PROGRAM, address, PORT, *filter(None, names)]
    with hosts.source.popen(argv, stdin=null, stdout=null, stderr=None) as process:
        with hosts.client.netns_entered():
            sock = connected((address, PORT))
        with sock:
            (pid,) = children(hosts.source, process.pid)
            server = Contained(hosts, hosts.source, pid, sock)
            try:
                yield server
            finally:
                server.end()


def of_this_host(told: dict[str, Any]) -> dict[str, Any]:
    """What the program says, but for what it shares with its host."""
    shared = ("host", "domain")
    return {
        name: {key: one for key, one in value.items() if key not in shared} if isinstance(value, dict) else value
        for name, value in told.items()
    }


def inner_number(host: Host, pid: int) -> int:
    """The number of a process in the innermost PID namespace that it is in."""
    status = host.path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[-1]) for line in status.splitlines() if line.startswith("NSpid"))


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
        assert server.ask() == before
        assert server.host.run(["hostname"]).stdout.strip() == "target"


@pytest.mark.parametrize("where", ["source", "target"])
def test_a_pid_namespace_in_an_image(hosts: ThreeHosts, tmp_path: Path, where: str) -> None:
    with contained(hosts, "--pid", "--uts", names=("inside", "")) as server:
        before = server.ask()
        image = tmp_path / "image"
        done = command(hosts.source, "checkpoint", server.pid, "-o", image)
        assert done[0] == 0, done
        hosts.source.wait_until_gone(server.pid)
        host = getattr(hosts, where)
        origin = () if where == "source" else from_host(hosts.source)
        status, back, printed = command(host, "restore", image, *origin)
        assert status == 0, printed
        assert inner_number(host, back["pid"]) == 1
        assert server.ask() == before
        server.host, server.pid = host, back["pid"]


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


def refused(host: Host, *pids: int) -> str:
    """The code with which these trees are refused, before anything is stopped."""
    status, told, _ = command(host, "checkpoint", *pids, "-o", "/run/never")
    assert status == 3
    return str(told["code"])
