"""Programs in namespaces of their own, on the hosts of the tests: started, asked, moved."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hosts import Host, ThreeHosts, tcpmig
from tests.hosts.tcpmig import tcpmig as command
from tests.system.test_cli_bad_input import connected

__all__ = [
    "CONTAINER",
    "MOUNTS",
    "PORT",
    "PYTHON",
    "Contained",
    "bridged",
    "children",
    "contained",
    "in_container",
    "inner_number",
    "inside",
    "make_root",
    "networked",
    "of_this_host",
    "refused",
]

PROGRAM = Path(__file__).parents[1] / "system/programs/contained.py"
PORT = 7031


#: makes a container (see there), and a Python that is there in every root
MAKER = PROGRAM.with_name("container.py")
PYTHON = "/usr/bin/python3"


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


def command_line(
    address: str, names: tuple[str, str], python: str = sys.executable, program: object = PROGRAM
) -> list[object]:
    return [python, "-IS", program, address, PORT, *filter(None, names)]


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
    program: object = PROGRAM,
) -> Iterator[Contained]:
    """The program below `unshare` with these options; it is the child of `unshare`."""
    null = subprocess.DEVNULL
    address = hosts.net.service4
    setsid = ["setsid"] if session else []
    argv = ["unshare", "--fork", *unshare, *setsid, *command_line(address, names, python, program)]
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
    hosts: ThreeHosts,
    *unshare: str,
    script: str = "exec",
    names: tuple[str, str] = ("", ""),
    python: str = sys.executable,
    program: object = PROGRAM,
) -> Iterator[Contained]:
    """The program with a network namespace of its own, whose link leads into br0."""
    net = hosts.net
    address = net.service4
    hosts.source.sh(f"ip addr del {address}/24 dev eth0; ip addr del {net.service6}/64 dev eth0", check=False)
    setup = NETWORK.format(address=address, address6=net.service6, gateway=hosts.client.ip4)
    wait = "while ! ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done"
    whole = f'{wait}\n{setup}\n{script or "exec"} "$@"'
    argv = [
        "unshare",
        "--fork",
        "--net",
        *unshare,
        "sh",
        "-c",
        whole,
        "sh",
        *command_line(address, names, python, program),
    ]
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


def refused(host: Host, *pids: int) -> str:
    """The code with which these trees are refused, before anything is stopped."""
    status, told, _ = command(host, "checkpoint", *pids, "-o", "/run/never")
    assert status == 3
    return str(told["code"])


def make_root(root: Path) -> Path:
    """A root directory for a container, with our program in it; beside it the directories of an overlay."""
    for name in ("usr", "proc", "dev", "sys", "tmp", "var/log", "run", "srv", "etc"):
        (root / name).mkdir(parents=True)
    for name in ("upper", "work"):
        root.with_name(f"{root.name}.{name}").mkdir()
    for name in ("bin", "sbin", "lib", "lib64"):
        if Path("/", name).is_symlink():
            (root / name).symlink_to(Path("/", name).readlink())
    for name in ("passwd", "group", "ld.so.cache"):
        shutil.copy(Path("/etc", name), root / "etc")
    for program in (PROGRAM, PROGRAM.with_name("furnished.py")):
        shutil.copy(program, root / "srv")
    return root


def in_container(root: Path, *options: str) -> list[object]:
    """What `unshare` is to run, so that the command after it is in a container with this root."""
    return [PYTHON, "-IS", MAKER, root, *options, "--"]
