"""The two ends of a forwarding, made and taken away: a tunnel's interface, programs at its mouths, and away the route
back into it.

Everything is named after the forwarding's ID, so that each step finds what an earlier one, or another program, has
made: all of them may be repeated, also by `tcpmig recover`.

Source: drivers/net/vxlan/vxlan_core.c, net/ipv4/ip_output.c (a packet of the tunnel that is longer than the way is sent
in fragments, as it has no DF bit), net/ipv6/ip6_output.c (it is not, over IPv6).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from migrate import forwardstore
from migrate.addresses import AddressRecord
from migrate.errors import ForwardChangeFailed, ForwardPathBroken, ForwardUnavailable
from migrate.forwardstore import ForwardRecord
from migrate.rtnetlink import Netlink
from tcpstate.connid import ConnId
from tcpstate.kernel.bpf import call, steer
from tcpstate.kernel.bpf.steer import Role, Steering
from tcpstate.kernel.route import mtu_towards, refusals
from tcpstate.kernel.rtnetlink import AddressFlag

__all__ = [
    "PORT",
    "Mouth",
    "arrivals",
    "build",
    "dismantle",
    "fill",
    "missing",
    "prove",
    "sweep",
]

#: UDP port of the tunnels; the protocol's own may be in use by tunnels of another kind, and the kernel lets a port have
#: but one kind
PORT = 47474
#: of the rules that lead into the tunnel: after those that silence frozen sockets
RULE_PRIORITY = 4200
#: what a tunnel adds to a packet, bytes: Ethernet, VXLAN, UDP, IP
_ADDED = {4: 50, 6: 70}
#: IPv6 is not spoken on an interface whose packets are shorter
_LEAST_MTU = 1280
_LONGEST_MTU = 65535
#: seconds for a probe to come back, and between two of them
PROBE_WAIT, _AGAIN = 2.0, 0.2
#: seconds without a segment after which a connection that was closed is forgotten
LINGER = 3.0
#: seconds after which one that was not is
IDLE = 5 * 86400.0
_PINS = Path("/sys/fs/bpf")
_ETHERNET = 14


def missing() -> ForwardUnavailable | None:
    """Why this host can have no end of a forwarding; None if it can. A tunnel is made and ended to find out."""
    record = _trial()
    try:
        with _pinned_somewhere(), Netlink() as netlink:
            _add_tunnel(netlink, record, up=False)
            try:
                with contextlib.closing(Steering.make(1, 1)) as maps:
                    index = socket.if_nametoindex(record.device)
                    for link in steer.attach(Role.HOME, maps, index, [], _LEAST_MTU).values():
                        os.close(link)
            finally:
                _delete_tunnel(netlink, record)
    except OSError as error:
        return ForwardUnavailable(f"connections cannot be forwarded: {error}", object="vxlan, tcx")
    return None


def _trial() -> ForwardRecord:
    return ForwardRecord(
        forward=os.urandom(16).hex(),
        role=Role.HOME,
        boot_id="",
        network=0,
        since=0.0,
        host="",
        near="127.0.0.1",
        far="127.0.0.2",
        addresses=(),
    )


@contextlib.contextmanager
def _pinned_somewhere() -> Iterator[None]:
    """OSError if nothing can be pinned here."""
    if not os.path.ismount(_PINS):
        raise OSError(errno.ENOENT, f"no BPF file system is mounted at {_PINS}")
    yield


def build(record: ForwardRecord, *, connections: int = 0, ports: int = 0, devices: Iterable[int] = ()) -> None:
    """Make one end, switched off. The record is written first. ForwardChangeFailed: nothing is left then.

    connections, ports  how many there will be, at home
    devices             interfaces (indices) by which the addresses are reached: all Ethernet interfaces
    """
    forwardstore.write(record)
    try:
        with Netlink() as netlink:
            _add_tunnel(netlink, record, up=True)
            if record.role is Role.AWAY:
                for address in record.addresses:
                    _lead(netlink, record, address)
        with contextlib.closing(Steering.make(connections, ports)) as maps:
            for address in record.addresses:
                maps.admit(address)
            tunnel = socket.if_nametoindex(record.device)
            links = steer.attach(record.role, maps, tunnel, devices, _fits(record))
            try:
                folder = _folder(record)
                folder.mkdir(mode=0o700, parents=True)
                for name, fd in (*maps.fds.items(), *links.items()):
                    call.pin(fd, str(folder / name))
            finally:
                for fd in links.values():
                    os.close(fd)
    except OSError as error:
        with contextlib.suppress(OSError):
            dismantle(record)
        raise ForwardChangeFailed(f"an end of the tunnel cannot be made: {error}", object=record.device) from error


def _folder(record: ForwardRecord) -> Path:
    # the file system may be shared with other network namespaces
    return _PINS / f"tcpmig-forward-{record.network}-{record.role.value}-{record.forward}"


def _add_tunnel(netlink: Netlink, record: ForwardRecord, *, up: bool) -> None:
    """The tunnel's interface. OSError."""
    version = ipaddress.ip_address(record.near).version
    ends = ("vxlan_local", "vxlan_group") if version == 4 else ("vxlan_local6", "vxlan_group6")
    mac = steer.HOME_MAC if record.role is Role.HOME else steer.AWAY_MAC
    with refusals():
        netlink.iproute.link(
            "add",
            ifname=record.device,
            kind="vxlan",
            address=mac.hex(":"),
            vxlan_id=record.number,
            vxlan_port=PORT,
            vxlan_learning=0,
            **dict(zip(ends, (record.near, record.far), strict=True)),
        )
        index = socket.if_nametoindex(record.device)
        # no addresses of its own, nobody to resolve
        netlink.iproute.link("set", index=index, arp=False, IFLA_AF_SPEC=_no_own_addresses())
        if up:
            netlink.iproute.link("set", index=index, mtu=_mtu(record), state="up")


def _no_own_addresses() -> dict[str, Any]:
    return {"attrs": [["AF_INET6", {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", 1]]}]]}


def _mtu(record: ForwardRecord) -> int:
    """Away, what fits the way without fragments: new connections then agree on segments that do.  At home all that
    comes goes in."""
    return _LONGEST_MTU if record.role is Role.HOME else _fits(record)


def _fits(record: ForwardRecord) -> int:
    """Bytes of the longest packet that goes the way in one piece."""
    return max(_LEAST_MTU, mtu_towards(record.far) - _ADDED[ipaddress.ip_address(record.far).version])


def _delete_tunnel(netlink: Netlink, record: ForwardRecord) -> None:
    with contextlib.suppress(OSError), refusals():
        # gone already
        netlink.iproute.link("del", ifname=record.device)


def _rule(record: ForwardRecord, address: str) -> dict[str, Any]:
    version = ipaddress.ip_address(address).version
    return {
        "family": socket.AF_INET if version == 4 else socket.AF_INET6,
        "src": address,
        "src_len": 32 if version == 4 else 128,
        "table": record.table,
        "priority": RULE_PRIORITY,
    }


def _lead(netlink: Netlink, record: ForwardRecord, address: str) -> None:
    """What has this source goes into the tunnel. OSError."""
    index = socket.if_nametoindex(record.device)
    family = _rule(record, address)["family"]
    with refusals():
        netlink.iproute.route("replace", family=family, dst="default", oif=index, table=record.table)
        netlink.iproute.rule("add", **_rule(record, address))


def arrivals(record: ForwardRecord) -> tuple[AddressRecord, ...]:
    """The addresses as they are added away, on the tunnel's interface."""
    return tuple(
        AddressRecord(
            address=address,
            prefixlen=32 if ipaddress.ip_address(address).version == 4 else 128,
            interface=record.device,
            flags=AddressFlag.NODAD | AddressFlag.PERMANENT,
        )
        for address in record.addresses
    )


class Mouth:
    """The maps of one end, until :meth:`close`. OSError."""

    def __init__(self, record: ForwardRecord) -> None:
        folder = _folder(record)
        self.maps = Steering({})
        try:
            for name in Steering.NAMES:
                self.maps.fds[name] = call.pinned(str(folder / name))
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors."""
        self.maps.close()

    def __enter__(self) -> Steering:
        return self.maps

    def __exit__(self, *_: object) -> None:
        self.close()


def fill(
    record: ForwardRecord, connections: Iterable[tuple[ConnId, int]], ports: Iterable[tuple[str, int, int]]
) -> None:
    """What is forwarded once it is switched on: connections and (address, port), each with the interface by which its
    answers leave. ForwardChangeFailed."""
    try:
        with Mouth(record) as maps:
            for connection, device in connections:
                maps.forward(connection, device)
            for address, port, device in ports:
                maps.forward_port(address, port, device)
    except OSError as error:
        raise ForwardChangeFailed(f"telling what is to be forwarded failed: {error}", object=record.device) from error


def prove(record: ForwardRecord, size: int) -> None:
    """Send packets of a few bytes and of ``size`` bytes through the tunnel: the other end, which stands, returns them.
    ForwardPathBroken."""
    head = steer.AWAY_MAC + steer.PROBE_MAC + steer.PROBE.to_bytes(2, "big")
    try:
        with Mouth(record) as maps, socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as out:
            out.bind((record.device, 0))
            for length in (64, size):
                if not _comes_back(maps, out, head.ljust(_ETHERNET + length, b"\0")):
                    what = "nothing comes through the tunnel" if length < size else f"no packet of {size} bytes does"
                    ends = f"UDP port {PORT}, {record.near} to {record.far}"
                    raise ForwardPathBroken(f"{what}, or nothing comes back", object=ends)
    except OSError as error:
        raise ForwardPathBroken(f"a probe cannot be sent: {error}", object=record.device) from error


def _comes_back(maps: Steering, out: socket.socket, frame: bytes) -> bool:
    end = time.monotonic() + PROBE_WAIT
    again = 0.0
    while (now := time.monotonic()) < end:
        if now >= again:
            out.send(frame)
            again = now + _AGAIN
        if maps.echoed >= len(frame):
            return True
        time.sleep(0.001)
    return False


def sweep(record: ForwardRecord) -> bool:
    """At home: forget connections that were closed, and those of which nothing was heard for five days. Whether nothing
    was left to forward, and the end was taken away. FileNotFoundError if it does not stand; OSError."""
    if record.role is not Role.HOME:
        return False
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    with Mouth(record) as maps:
        for entry in maps.entries():
            # one that has not spoken yet counts from the beginning
            silent = now - entry.last / 1e9 if entry.last else record.age
            if silent > (LINGER if entry.over else IDLE):
                maps.drop(entry)
        left = bool(maps.entries() or maps.ports())
    if not left:
        dismantle(record)
    return not left


def dismantle(record: ForwardRecord) -> None:
    """Take the end away; what is not there is no error. What comes for its connections from now on is home's own.
    OSError."""
    folder = _folder(record)
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        folder.rmdir()
    with Netlink() as netlink:
        if record.role is Role.AWAY:
            for address in record.addresses:
                with contextlib.suppress(OSError), refusals():
                    netlink.iproute.rule("del", **_rule(record, address))
        _delete_tunnel(netlink, record)
    forwardstore.forget(record)
