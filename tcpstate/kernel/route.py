"""Routes and rules by pyroute2, outside the stop: docs/design/netlink.md tells what that costs, and what is done by
:mod:`tcpstate.kernel.netlink` instead.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tcpstate.kernel import netlink

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute

__all__ = [
    "add_blackhole_rule",
    "blackhole_rules",
    "iproute",
    "is_local",
    "refusals",
    "remove_blackhole_rule",
    "source_towards",
]

_ROUTE_TYPE_LOCAL = 2  # RTN_LOCAL
_ACTION_BLACKHOLE = 6  # FR_ACT_BLACKHOLE
_RULE = struct.Struct("=BBBBBBBBI")  # struct fib_rule_hdr


class _Type(enum.IntEnum):
    NEWRULE = 32
    DELRULE = 33


class _Rule(enum.IntEnum):
    PRIORITY = 6
    FWMARK = 10
    FWMASK = 16


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


def source_towards(address: str) -> str:
    """The source address that the kernel would choose towards ``address``, or nothing if there is no route."""
    route = _route_to(address)
    return "" if route is None else route.get("prefsrc") or ""


def _rule(family: int, mark: int, priority: int) -> bytes:
    return (
        _RULE.pack(family, 0, 0, 0, 0, 0, 0, _ACTION_BLACKHOLE, 0)
        + netlink.attribute(_Rule.PRIORITY, struct.pack("=I", priority))
        + netlink.attribute(_Rule.FWMARK, struct.pack("=I", mark))
        + netlink.attribute(_Rule.FWMASK, struct.pack("=I", 0xFFFFFFFF))
    )


def add_blackhole_rule(family: int, mark: int, priority: int) -> bool:
    """Add the rule; False if the very same one is there already. OSError if the kernel refuses it."""
    flags = netlink.Request.CREATE | netlink.Request.EXCLUSIVE
    return _changed(_Type.NEWRULE, flags, _rule(family, mark, priority), unless=errno.EEXIST)


def remove_blackhole_rule(family: int, mark: int, priority: int) -> bool:
    """Remove the rule; False if there is none."""
    return _changed(_Type.DELRULE, netlink.Request(0), _rule(family, mark, priority), unless=errno.ENOENT)


def _changed(kind: _Type, flags: netlink.Request, body: bytes, *, unless: int) -> bool:
    with netlink.Netlink() as channel:
        (error,) = channel.change([(kind, flags, body)])
    if error is not None and error.errno != unless:
        raise error
    return error is None


def blackhole_rules(family: int, mark: int) -> list[int]:
    """Priorities of the rules that blackhole ``mark``."""
    with iproute() as channel:
        found = list(channel.get_rules(family=family))
    ours = [rule for rule in found if rule["action"] == _ACTION_BLACKHOLE and rule.get("fwmark") == mark]
    return sorted(rule.get("priority") or 0 for rule in ours)
