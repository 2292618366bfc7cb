"""Trees in namespaces of their own, as `unshare` and containers make them: moved, checkpointed, refused."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.hosts import Host, ThreeHosts, tcpmig
from tests.hosts.tcpmig import TCPMIG, from_host
from tests.hosts.tcpmig import tcpmig as command
from tests.system.test_cli_bad_input import connected
from tests.workloads import deaths, steps
from tests.workloads.move import Stage

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

    def rest(self, image: Path, host: Host | None = None, *origin: object) -> None:
        """Into an image and out of it again, here or on another host."""
        done = command(self.host, "checkpoint", self.pid, "-o", image)
        assert done[0] == 0, done
        self.host.wait_until_gone(self.pid)
        self.host = host or self.host
        status, back, printed = command(self.host, "restore", image, *origin)
        assert status == 0, (back, printed)
        self.pid = back["pid"]

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


def command_line(address: str, names: tuple[str, str], python: str = sys.executable) -> list[object]:
    return [python, "-IS", PROGRAM, address, PORT, *filter(None, names)]


def first_child(host: Host, pid: int) -> int:
    """The child that a process is about to have."""
    end = time.monotonic() + 20
    while not (found := children(host, pid)):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found[0]


@contextlib.contextmanager
def contained(
    hosts: ThreeHosts,
    *unshare: str,
    session: bool = False,
    names: tuple[str, str] = ("", ""),
    python: str = sys.executable,
) -> Iterator[Contained]:
    """The program below `unshare` with these options; it is the child of `unshare`."""
    null = subprocess.DEVNULL
    address = hosts.net.service4
    setsid = ["setsid"] if session else []
    argv = ["unshare", "--fork", *unshare, *setsid, *command_line(address, names, python)]
    with hosts.source.popen(argv, stdin=null, stdout=null, stderr=None) as process:
        with hosts.client.netns_entered():
            sock = connected((address, PORT))
        with sock:
            pid = first_child(hosts.source, process.pid)
            server = Contained(hosts, hosts.source, pid, sock)
            try:
                yield server
            finally:
                server.end()


#: what the program shares with its host if its namespaces are a PID namespace alone, and one of names with it
SHARED = ("mounts", "objects", "self", "parent", "cgroup")


#: what it sees of its host if it has a user namespace alone
OF_THE_HOST = ("host", "mounts", "cgroup", "parent")


def of_this_host(told: dict[str, Any], shared: tuple[str, ...] = ("host", "domain", *SHARED)) -> dict[str, Any]:
    """What the program says, but for what it shares with its host."""
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


MOUNTS = "mount -t tmpfs -o size=1m,nosuid none /mnt; mount --bind -o ro /etc /opt; mount -t sysfs none /srv; exec"
CONTAINER = ("--pid", "--ipc", "--mount", "--uts", "--cgroup", "--time", "--boottime=77", "--mount-proc")


@contextlib.contextmanager
def bridged(hosts: ThreeHosts) -> Iterator[None]:
    """Source and target have a bridge br0 into which their eth0 leads."""
    for host in (hosts.source, hosts.target):
        host.ip("link add br0 type bridge mcast_snooping 0", "link set br0 up", "link set eth0 master br0")
    yield


NETWORK = """
ip link set lo up
ip link set eth0 up
ip addr add {address}/24 dev eth0
ip addr add {address6}/64 dev eth0 nodad
ip route add default via {gateway}
echo 7 >/proc/sys/net/ipv4/tcp_fin_timeout
"""


@contextlib.contextmanager
def networked(
    hosts: ThreeHosts, *unshare: str, script: str = "exec", names: tuple[str, str] = ("", "")
) -> Iterator[Contained]:
    """The program with a network namespace of its own, whose link leads into br0."""
    net = hosts.net
    address = net.service4
    hosts.source.sh(f"ip addr del {address}/24 dev eth0; ip addr del {net.service6}/64 dev eth0", check=False)
    setup = NETWORK.format(address=address, address6=net.service6, gateway=hosts.client.ip4)
    wait = "while ! ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done"
    whole = f'{wait}\n{setup}\n{script or "exec"} "$@"'
    argv = ["unshare", "--fork", "--net", *unshare, "sh", "-c", whole, "sh", *command_line(address, names)]
    null = subprocess.DEVNULL
    with bridged(hosts), hosts.source.popen(argv, stdin=null, stdout=null, stderr=None) as process:
        pid = first_child(hosts.source, process.pid)
        hosts.source.ip(
            f"link add vc0 type veth peer name eth0 address 02:00:00:00:77:01 netns {pid}",
            "link set vc0 master br0 up",
        )
        with hosts.client.netns_entered():
            sock = reached(address)
        with sock:
            server = Contained(hosts, hosts.source, pid, sock)
            try:
                yield server
            finally:
                server.end()


def reached(address: str) -> socket.socket:
    """A connection, as soon as the address is there."""
    end = time.monotonic() + 20
    while True:
        try:
            return connected((address, PORT))
        except OSError:
            assert time.monotonic() < end


def inside(server: Contained, *argv: object) -> str:
    """What a command prints in the network namespace of the program."""
    return server.host.run(["nsenter", "-t", server.pid, "--net", *argv]).stdout


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


IN_MEMORY = """
mount -t tmpfs -o size=1m none /mnt; mkdir -m 700 /mnt/own; echo inside >/mnt/own/file; chown -R 5:6 /mnt/own
mount -t overlay -o lowerdir=/run/a,upperdir=/run/b,workdir=/run/c none /srv; echo above >/srv/above
mkdir /mnt/point; mount --bind /etc /mnt/point; touch /mnt/bound; mount --bind /etc/hostname /mnt/bound
exec "$@"
"""


def test_file_systems_in_memory_and_overlays_move(hosts: ThreeHosts, tmp_path: Path) -> None:
    for host in (hosts.source, hosts.target):
        host.sh("mkdir /run/a /run/b /run/c; echo below >/run/a/below")
    with contained(hosts, "--mount", "sh", "-c", IN_MEMORY, "sh") as server:
        before = server.ask()
        for number in range(2):
            if number:
                server.rest(tmp_path / "image")
            else:
                server.move()
            assert server.ask()["me"]["mounts"] == before["me"]["mounts"]
            root = server.host.path(f"/proc/{server.pid}/root")
            assert (root / "mnt/own/file").read_text() == "inside\n"
            info = (root / "mnt/own").stat()
            assert (info.st_mode & 0o777, info.st_uid, info.st_gid) == (0o700, 5, 6)
            assert (root / "srv/below").read_text() == "below\n"
            assert (root / "mnt/bound").read_text() == Path("/etc/hostname").read_text()
            assert (root / "mnt/point/passwd").exists()


@pytest.mark.parametrize(
    "mounts",
    [
        "mount -t tmpfs none /mnt; mknod /mnt/disk b 7 0",
        "mount -t tmpfs none /mnt; mount -t tmpfs none /mnt",
        "mount -t tmpfs none /mnt; touch /mnt/file; mount -o remount,ro,bind /mnt",
        "mount --make-shared /",
        """mount -t tmpfs none /mnt; cd /mnt
        for one in /*; do [ -d $one ] && mkdir .$one && mount --rbind $one .$one; done
        pivot_root . mnt; cd /; umount -l /mnt""",
    ],
)
def test_mounts_that_cannot_be_made_again(hosts: ThreeHosts, mounts: str) -> None:
    with contained(hosts, "--mount", "sh", "-c", mounts + '; exec "$@"', "sh") as server:
        assert refused(hosts.source, server.pid) == "TM-0726"
        server.ask()


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


def refused(host: Host, *pids: int) -> str:
    """The code with which these trees are refused, before anything is stopped."""
    status, told, _ = command(host, "checkpoint", *pids, "-o", "/run/never")
    assert status == 3
    return str(told["code"])
