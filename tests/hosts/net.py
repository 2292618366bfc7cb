"""A bridge with hosts on it, and the usual three: source, target, client."""

from __future__ import annotations

import compileall
import contextlib
import dataclasses
import functools
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir

from tests.hosts.host import ROOT, Host
from tests.hosts.init import PRIVATE_TREES
from tests.hosts.kernel import in_namespace, new_netns, write_sysctl

__all__ = ["Net", "ThreeHosts", "three_hosts"]

DAY = 86400
SERVICE = 100  # the last part of the address that moves: 10.77.1.100, fd77:1::100
PREFIX4, PREFIX6 = 24, 64
_numbers = itertools.count(1)


class Net:
    """A bridge in a network namespace of its own, which is held by a descriptor and so ends with this process.

    directory   shared by its hosts, for the sockets of their inits and for files of tests; removed at the end
    number      the N of 10.77.N.0/24 and fd77:N::/64; nets do not see each other, so it may be the same for all
    """

    name = "bridge"

    def __init__(self, number: int = 1) -> None:
        if os.geteuid() != 0:
            raise PermissionError("test hosts are made of namespaces: run this as root (sudo make test)")
        _refuse_hidden()
        _compile()
        self.number = number
        self.hosts: dict[str, Host] = {}
        _sweep()
        # Not TMPDIR, which may lie in /run or /var: these are other directories in every host.
        self.directory = Path(tempfile.mkdtemp(prefix=f"tmh-{os.getpid()}-{next(_numbers)}-", dir="/tmp"))
        self.netns = new_netns()
        with in_namespace(self.netns):
            write_sysctl("net/ipv6/conf/default/disable_ipv6", 1)  # the bridge itself has no addresses
            self._ip("link set lo up", "link add tmh type bridge mcast_snooping 0", "link set tmh up")

    @staticmethod
    def _ip(*lines: str) -> None:
        subprocess.run(["ip", "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True)

    def host(self, name: str, *, uptime_offset: int = 0, first_pid: int = 300) -> Host:
        """A new host on this bridge, with eth0 = 10.77.N.k/24 and fd77:N::k/64, k = 1 for the first.

        uptime_offset   seconds that it has been up longer than this machine (below zero is not possible: a clock that
                        started after boot cannot be before it)
        first_pid       where its PIDs begin
        """
        host = Host(name, self.directory, uptime_offset=uptime_offset, first_pid=first_pid)
        self.hosts[name] = host
        k = len(self.hosts)
        host.ip4, host.ip6 = self.address4(k), self.address6(k)
        with in_namespace(self.netns):
            port = f"tmh-{name}"[:15]
            self._ip(
                f"link add {port} type veth peer name eth0 netns {host.init}",
                f"link set {port} master tmh",
                f"link set {port} up",
            )
        host.sysctl(
            net__ipv4__ip_forward=0,
            net__ipv6__conf__all__forwarding=0,
            net__ipv6__conf__all__accept_dad=0,
            net__ipv6__conf__default__accept_dad=0,
            net__ipv6__conf__eth0__accept_dad=0,
            net__ipv6__conf__eth0__accept_ra=0,
        )
        host.ip("link set lo up", "link set eth0 up")
        host.add_address(f"{host.ip4}/{PREFIX4}")
        host.add_address(f"{host.ip6}/{PREFIX6}")
        return host

    def address4(self, k: int) -> str:
        """The k-th IPv4 address of the net."""
        return f"10.77.{self.number}.{k}"

    def address6(self, k: int) -> str:
        """The k-th IPv6 address of the net."""
        return f"fd77:{self.number}::{k}"

    @property
    def service4(self) -> str:
        """The IPv4 address that the services listen on and that moves with them."""
        return self.address4(SERVICE)

    @property
    def service6(self) -> str:
        """The same for IPv6."""
        return self.address6(SERVICE)

    def service(self, family: int) -> str:
        """The address that moves, for 4 or 6."""
        return self.service6 if family == 6 else self.service4

    def add_service(self, host: Host) -> None:
        """Give the addresses that move to a host."""
        host.add_address(f"{self.service4}/{PREFIX4}")
        host.add_address(f"{self.service6}/{PREFIX6}")

    def close(self) -> None:
        """End all hosts and the bridge."""
        for host in self.hosts.values():
            host.close()
        self.hosts.clear()
        if self.netns >= 0:
            os.close(self.netns)
            self.netns = -1
        # The last keeper may have removed it already.
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Net:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True, slots=True)
class ThreeHosts:
    """Source and target of migrations, and where the clients live; the service address is on the source."""

    net: Net
    source: Host
    target: Host
    client: Host


@contextlib.contextmanager
def three_hosts(number: int = 1) -> Iterator[ThreeHosts]:
    """Three hosts on one bridge.

    Seen from the source, the target's uptime is a day less, and seen from the target the source's a day more: so a
    move and the move back prove both directions. The PIDs begin at 1000, 11000 and 21000.
    """
    with Net(number) as net:
        source = net.host("source", uptime_offset=2 * DAY, first_pid=1000)
        target = net.host("target", uptime_offset=DAY, first_pid=11000)
        client = net.host("client", uptime_offset=3 * DAY, first_pid=21000)
        net.add_service(source)
        yield ThreeHosts(net, source, target, client)


@functools.cache
def _compile() -> None:
    """Commands in the hosts write no bytecode: what nobody else has compiled, each of them would compile again."""
    for room in ("tcpstate", "checkpoint", "migrate", "cli", "tests"):
        compileall.compile_dir(ROOT / room, quiet=2)


def _refuse_hidden() -> None:
    """Raises RuntimeError when something that the hosts need lies where each of them has a directory of its own."""
    for what, path in (
        ("the checkout", ROOT),
        ("Python", sys.prefix),
        ("the folder for temporary files", gettempdir()),
    ):
        top = Path(path).resolve().parts[1:2]
        if f"/{''.join(top)}" in PRIVATE_TREES:
            raise RuntimeError(f"{what} is {path}, but test hosts have a /{top[0]} of their own: use another place")


def _sweep() -> None:
    """Remove directories of harnesses that were killed (their hosts ended with them; only files are left)."""
    for directory in Path("/tmp").glob("tmh-*-*-*"):
        owner = directory.name.split("-")[1]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(directory, ignore_errors=True)  # another harness may sweep at the same time
