"""Routes and rules by pyroute2, outside the stop: docs/design/netlink.md tells what that costs, and what is done by
:mod:`tcpstate.kernel.netlink` instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute

__all__ = [
    "Flow",
    "add_blackhole_rule",
    "blackhole_rules",
    "device_towards",
    "iproute",
    "is_local",
    "local_addresses",
    "refusals",
    "remove_blackhole_rule",
    "source_towards",
]

#: (source, port, destination, port) of packets that leave
Flow = tuple[str, int, str, int]

_ROUTE_TYPE_LOCAL = 2  # RTN_LOCAL
_ACTION_BLACKHOLE = 6  # FR_ACT_BLACKHOLE
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What pyroute2 raises in the block for an error that the kernel told becomes the OSError that it is."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error


@contextlib.contextmanager
def iproute() -> Iterator[IPRoute]:
    """pyroute2 in the calling thread's network namespace, as long as the block lasts. OSError.

    Its socket and its event loop end with the block, and it starts no thread: processes may be cloned and namespaces
    entered afterwards. The first use imports it, 0.2 s. Not from within a coroutine.
    """
    from pyroute2.iproute.linux import IPRoute

    with refusals(), IPRoute() as channel:
        yield channel


def _route_to(address: str) -> Any:
    """The route that packets to ``address`` take, as pyroute2 tells it; None if there is none."""
    try:
        with iproute() as channel:
            return next(iter(channel.route("get", dst=address.partition("%")[0])))
    except OSError as error:
        if error.errno in _NO_WAY:
            return None
        raise


def is_local(address: str) -> bool:
    """Whether packets to ``address`` are delivered in this network namespace (a new IPv6 address takes a moment)."""
    route = _route_to(address)
    return route is not None and route["type"] == _ROUTE_TYPE_LOCAL


def local_addresses() -> set[str]:
    """The addresses that are configured in this network namespace, loopback included."""
    with iproute() as channel:
        found = list(channel.get_addr())
    return {address for one in found if (address := one.get("local") or one.get("address"))}


def device_towards(address: str) -> str:
    """The interface through which packets to ``address`` leave, loopback for our own; nothing if there is no route."""
    route = _route_to(address)
    return "" if route is None else socket.if_indextoname(route.get("oif"))


def source_towards(address: str) -> str:
    """The source address that the kernel would choose towards ``address``, or nothing if there is no route."""
    route = _route_to(address)
    return "" if route is None else route.get("prefsrc") or ""


def _rule(family: int, mark: int, priority: int, flow: Flow | None) -> dict[str, Any]:
    rule = {"family": family, "priority": priority, "fwmark": mark, "fwmask": 0xFFFFFFFF, "action": "blackhole"}
    if flow is not None:
        source, source_port, destination, destination_port = flow
        rule |= {
            "src": source,
            "dst": destination,
            "ip_proto": socket.IPPROTO_TCP,
            "sport_range": f"{source_port}:{source_port}",
            "dport_range": f"{destination_port}:{destination_port}",
        }
    return rule


def add_blackhole_rule(channel: IPRoute, family: int, mark: int, priority: int, flow: Flow | None = None) -> bool:
    """Add the rule, for all packets with the mark or only those of one TCP ``flow``; False if the very same one is
    there already. OSError if the kernel refuses it (ports: since 4.17)."""
    try:
        with refusals():
            channel.rule("add", **_rule(family, mark, priority, flow))
    except OSError as error:
        if error.errno == errno.EEXIST:
            return False
        raise
    return True


def remove_blackhole_rule(channel: IPRoute, family: int, mark: int, priority: int, flow: Flow | None = None) -> bool:
    """Remove the rule; False if there is none."""
    try:
        with refusals():
            channel.rule("del", **_rule(family, mark, priority, flow))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def blackhole_rules(family: int, mark: int) -> list[int]:
    """Priorities of the rules that blackhole ``mark``."""
    with iproute() as channel:
        found = list(channel.get_rules(family=family))
    ours = [rule for rule in found if rule["action"] == _ACTION_BLACKHOLE and rule.get("fwmark") == mark]
    return sorted(rule.get("priority") or 0 for rule in ours)
