"""A network namespace: its links into bridges of the host, and its settings.

Addresses and routes are not here: they move as those of a host do (:mod:`migrate.takeover`).  A new namespace is made
by the tool, which enters it; what it starts is in there.  Its links have their names, hardware addresses and MTUs;
their outer ends stay down, so that nobody sees two of them, until :meth:`NewNetwork.connect`.  The namespace and its
links end with the last process in it, also if the tool dies.

Source: network_namespaces(7), veth(4); include/uapi/linux/if_link.h.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Final

from checkpoint.errors import BridgeMissing, NamespaceNotMade, NetworkNotMovable
from checkpoint.kernel.clone import CloneFlag
from checkpoint.namespaces.users import Users, UserSpace
from tcpstate.errors import TcpmigError
from tcpstate.kernel.batch import syscall
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.nftables import NfTables
from tcpstate.kernel.route import iproute, refusals
from tcpstate.slotted import dataclass

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute

__all__ = ["Link", "Network", "NewNetwork", "entered", "judge", "silence"]

_NAME: Final = re.compile(r"[^/\s\0]{1,15}")
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_SETTING: Final = re.compile(r"(core|ipv4|ipv6)(/[A-Za-z0-9_.:@-]{1,64}){1,4}")
_ROOT: Final = "/proc/sys/net"
_FOLDERS: Final = ("core", "ipv4", "ipv6")
#: written by doing something, not a state; or secrets of this boot
_NOT_STATE: Final = frozenset({"flush", "tcp_fastopen_key", "stable_secret"})
_LONGEST: Final = 4096
_LOOPBACK: Final = 1  # its index in every namespace
_UP: Final = 0x1
#: the metric of a route that is taken if there is no other
_LAST_RESORT: Final = 0xFFFF_FFFE


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One veth.

    name, mac, mtu  of the end inside
    up              whether that is up
    outer           name of the end outside
    bridge          that the outer end is attached to; empty: to none
    """

    name: str
    mac: str
    mtu: int
    up: bool
    outer: str
    bridge: str

    def __post_init__(self) -> None:
        names = [self.name, self.outer, *filter(None, [self.bridge])]
        if not all(_NAME.fullmatch(name) for name in names) or not _MAC.fullmatch(self.mac):
            raise ValueError("the name or hardware address of a link is none")
        if not 68 <= self.mtu <= 65535:
            raise ValueError(f"a link cannot have an MTU of {self.mtu}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network namespace.

    loopback  whether the loopback interface is up
    links     into the host
    settings  values by their names below /proc/sys/net
    owner     the user namespace that it belongs to; None: the tool's
    """

    loopback: bool
    links: tuple[Link, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    owner: Users | None = None

    def __post_init__(self) -> None:
        if len({link.name for link in self.links}) != len(self.links):
            raise ValueError("two links of one name")
        for name, value in self.settings.items():
            if not _SETTING.fullmatch(name) or ".." in name or len(value) > _LONGEST or "\0" in value:
                raise ValueError(f"{name!r} is no setting of a network namespace, or its value is none")

    @classmethod
    def of(cls, home: int) -> Network:
        """That of the calling thread; ``home``: a descriptor of the namespace that the outer ends are in.
        NetworkNotMovable, OSError."""
        for error in judge(home):
            raise error
        with iproute() as inside, refusals():
            links = list(inside.get_links())
        outside = _outside(home)
        return cls(
            loopback=any(link["index"] == _LOOPBACK and link["flags"] & _UP for link in links),
            links=tuple(_link(link, outside) for link in links if link["index"] != _LOOPBACK),
            settings=read_settings(),
        )

    @property
    def names(self) -> dict[str, str]:
        """The links, for `--map-dev`: none has another name."""
        return {link.name: link.name for link in self.links}


def read_settings() -> dict[str, str]:
    """Those of the calling thread's network namespace that can be written."""
    found = {}
    for folder in _FOLDERS:
        for where, _, names in os.walk(f"{_ROOT}/{folder}"):
            for name in names:
                path = os.path.join(where, name)
                with contextlib.suppress(OSError, UnicodeDecodeError):
                    if name not in _NOT_STATE and os.stat(path).st_mode & 0o200:
                        with open(path, encoding="ascii") as file:
                            found[path[len(_ROOT) + 1 :]] = file.read().strip()
    return found


def _attribute(link: Any, name: str) -> Any:
    return link.get_attr(name)


def _kind(link: Any) -> str:
    info = _attribute(link, "IFLA_LINKINFO")
    return "" if info is None else str(info.get_attr("IFLA_INFO_KIND") or "")


def _outside(home: int) -> dict[int, Any]:
    """The links of another namespace, by index."""
    with entered(home), iproute() as channel, refusals():
        return {link["index"]: link for link in channel.get_links()}


@contextlib.contextmanager
def entered(space: int) -> Iterator[None]:
    """The calling thread is in a network namespace, by a descriptor, as long as the block lasts. OSError."""
    back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscall(SYS.setns, space, CloneFlag.NEWNET)
        try:
            yield
        finally:
            syscall(SYS.setns, back, CloneFlag.NEWNET)
    finally:
        os.close(back)


def _outer(link: Any, outside: Mapping[int, Any]) -> Any:
    """The other end of a veth; None if it is not in the other namespace."""
    other = outside.get(_attribute(link, "IFLA_LINK") or 0)
    if other is None or _kind(other) != "veth" or _attribute(other, "IFLA_LINK") != link["index"]:
        return None
    return other


def _link(link: Any, outside: Mapping[int, Any]) -> Link:
    other = _outer(link, outside)
    master = outside.get(_attribute(other, "IFLA_MASTER") or 0)
    return Link(
        name=_attribute(link, "IFLA_IFNAME"),
        mac=_attribute(link, "IFLA_ADDRESS"),
        mtu=_attribute(link, "IFLA_MTU"),
        up=bool(link["flags"] & _UP),
        outer=_attribute(other, "IFLA_IFNAME"),
        bridge="" if master is None else _attribute(master, "IFLA_IFNAME"),
    )


def judge(home: int) -> Iterator[NetworkNotMovable]:
    """What in the calling thread's network namespace cannot be made again. OSError."""
    with iproute() as inside, refusals():
        links = list(inside.get_links())
    outside = _outside(home)
    for link in links:
        name = _attribute(link, "IFLA_IFNAME")
        if link["index"] == _LOOPBACK:
            continue
        if _kind(link) != "veth":
            # what a module puts into every namespace, and nobody has set up, is there at the target, too
            if link["flags"] & _UP:
                yield NetworkNotMovable(f"an interface of the kind {_kind(link) or 'device'}", object=name)
        elif _outer(link, outside) is None:
            yield NetworkNotMovable("a veth whose other end is not in tcpmig's network namespace", object=name)
    with NfTables() as tables:
        names = tables.of_all_families()
    if names:
        yield NetworkNotMovable(f"packet filter tables ({', '.join(names[:3])})", object="nf_tables")
    for file in ("ip_tables_names", "ip6_tables_names", "arp_tables_names"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/thread-self/net/{file}", encoding="ascii") as found:
            legacy = found.read().split()
            if legacy:
                yield NetworkNotMovable(f"packet filter tables ({', '.join(legacy)})", object=file)


def silence() -> None:
    """The links of the calling thread's network namespace go down: another one with the same hardware addresses is in
    use now, and what this one would still say (the end of memberships, that an address is taken) would lead frames to
    it. OSError."""
    with iproute() as channel, refusals():
        for link in channel.get_links():
            if link["index"] != _LOOPBACK:
                channel.link("set", index=link["index"], state="down")


class NewNetwork:
    """A network namespace like another one, made and entered by the calling thread. Close it.

    bridges  ``--veth``: link to bridge here; else the bridge of the same name
    """

    def __init__(self, network: Network, bridges: Mapping[str, str]) -> None:
        self.network = network
        self._bridges = {link.name: bridges.get(link.name, link.bridge) for link in network.links}
        self._outer: dict[str, int] = {}
        self._ways: list[dict[str, Any]] = []
        self._home = -1

    def check(self) -> Iterator[TcpmigError]:
        """What is missing here; in the host's namespace, before :meth:`enter`. OSError."""
        with iproute() as channel, refusals():
            there = {_attribute(link, "IFLA_IFNAME"): _kind(link) for link in channel.get_links()}
        for name, bridge in self._bridges.items():
            if there.get(bridge) != "bridge":
                what = f"the bridge {bridge} is not here" if bridge else "its outer end was attached to no bridge"
                yield BridgeMissing(what, object=name)

    def enter(self) -> None:
        """Make it, with its links, their outer ends down. NamespaceNotMade."""
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._unshare()
            new = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                with entered(self._home), iproute() as channel, refusals():
                    for link in self.network.links:
                        self._outer[link.name] = _make(channel, link, new)
            finally:
                os.close(new)
            with iproute() as channel, refusals():
                if self.network.loopback:
                    channel.link("set", index=_LOOPBACK, state="up")
                self._give_settings()
                for link in self.network.links:
                    if link.up:
                        index = int(channel.link_lookup(ifname=link.name)[0])
                        channel.link("set", index=index, state="up")
                        self._add_ways(channel, index)
        except OSError as error:
            raise NamespaceNotMade(f"a network namespace: {error}", object="network namespace") from error

    def _unshare(self) -> None:
        if self.network.owner is None:
            syscall(SYS.unshare, CloneFlag.NEWNET)
            return
        with UserSpace(self.network.owner, network=True) as space:
            syscall(SYS.setns, space.pidfd, CloneFlag.NEWNET)

    def _add_ways(self, channel: IPRoute, link: int) -> None:
        """A connection can only be rebuilt if there is a way to its peer, and the addresses, which bring the routes,
        come later: the last resort, until then, is the first link."""
        if self._ways:
            return
        for family, everywhere in ((socket.AF_INET, "0.0.0.0/0"), (socket.AF_INET6, "::/0")):
            # a kernel without IPv6, or a link on which it is off
            with contextlib.suppress(OSError), refusals():
                way = {"family": family, "dst": everywhere, "oif": link, "priority": _LAST_RESORT}
                channel.route("add", **way)
                self._ways.append(way)

    def settle(self) -> None:
        """The addresses and their routes are there, and the connections: take away what stood in for the routes."""
        with iproute() as channel:
            while self._ways:
                with contextlib.suppress(OSError), refusals():
                    channel.route("del", **self._ways.pop())

    def _give_settings(self) -> None:
        now = read_settings()
        for name, value in self.network.settings.items():
            if name in now and now[name] != value:
                # one that the kernel refuses is one that depends on the machine
                with contextlib.suppress(OSError), open(f"{_ROOT}/{name}", "w", encoding="ascii") as file:
                    file.write(value)

    def connect(self) -> None:
        """The original is silent: the outer ends are attached and up. NamespaceNotMade."""
        try:
            with entered(self._home), iproute() as channel, refusals():
                for name, index in self._outer.items():
                    (bridge,) = channel.link_lookup(ifname=self._bridges[name])
                    channel.link("set", index=index, master=bridge, state="up")
        except (OSError, ValueError) as error:
            raise NamespaceNotMade(f"a link cannot be attached: {error}", object="network namespace") from error

    @contextlib.contextmanager
    def outside(self) -> Iterator[dict[str, str]]:
        """The calling thread is in the host's namespace, as long as the block lasts; the bridge of each link."""
        with entered(self._home):
            yield dict(self._bridges)

    def close(self) -> None:
        """Back to the host's namespace. May be repeated."""
        if self._home >= 0:
            syscall(SYS.setns, self._home, CloneFlag.NEWNET)
            os.close(self._home)
            self._home = -1


def _make(channel: IPRoute, link: Link, new: int) -> int:
    """A veth into another namespace; the index of its outer end."""
    outer = link.outer
    if channel.link_lookup(ifname=outer):
        outer = next(name for name in (f"veth{n}" for n in range(1, 1 << 16)) if not channel.link_lookup(ifname=name))
    peer = {"ifname": link.name, "net_ns_fd": new, "address": link.mac, "mtu": link.mtu}
    channel.link("add", ifname=outer, kind="veth", mtu=link.mtu, peer=peer)
    return int(channel.link_lookup(ifname=outer)[0])
