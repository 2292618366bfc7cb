"""A way in for what we inject before its destination is local here.

Packets that carry :data:`MARK` are delivered in this network namespace whatever their destination (the usual way to
have a transparent proxy): a rule leads them to a table where everything is local.  Nothing else carries the mark.

Source: Documentation/networking/tproxy.rst; include/uapi/linux/fib_rules.h, rtnetlink.h.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from tcpstate.kernel.netlink import Netlink, Request, attribute

__all__ = ["MARK", "inward"]

#: SO_MARK of what is injected ("tcin"), and the number of the routing table that it leads to
MARK: Final = 0x7463696E
_TABLE: Final = MARK
#: behind the rule of the local table, before those that a host usually has and those of frozen sockets
_PRIORITY: Final = 4
_RULE: Final = struct.Struct("=8BI")  # struct fib_rule_hdr
_ROUTE: Final = struct.Struct("=8BI")  # struct rtmsg


class _Message(enum.IntEnum):
    NEWROUTE = 24
    DELROUTE = 25
    NEWRULE = 32
    DELRULE = 33


class _Rule(enum.IntEnum):
    PRIORITY = 6
    FWMARK = 10
    TABLE = 15
    FWMASK = 16


class _Route(enum.IntEnum):
    OIF = 4
    TABLE = 15


_TO_TABLE: Final = 1  # FR_ACT_TO_TBL
_LOCAL: Final = 2  # RTN_LOCAL
_HOST: Final = 254  # RT_SCOPE_HOST
_STATIC: Final = 4  # RTPROT_STATIC
_GONE: Final = (errno.ENOENT, errno.ESRCH)


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def _rule(family: int) -> bytes:
    head = _RULE.pack(family, 0, 0, 0, 0, 0, 0, _TO_TABLE, 0)
    return head + b"".join(
        _u32(*part)
        for part in (
            (_Rule.PRIORITY, _PRIORITY), (_Rule.FWMARK, MARK), (_Rule.FWMASK, 0xFFFFFFFF), (_Rule.TABLE, _TABLE),
        )
    )  # fmt: skip


def _route(family: int) -> bytes:
    head = _ROUTE.pack(family, 0, 0, 0, 0, _STATIC, _HOST, _LOCAL, 0)
    return head + _u32(_Route.TABLE, _TABLE) + _u32(_Route.OIF, socket.if_nametoindex("lo"))


#: who is in the block of :func:`inward` in this process, by network namespace and family
_users: collections.Counter[tuple[int, int]] = collections.Counter()
_lock = threading.Lock()


def _make(netlink: Netlink, families: Iterable[int]) -> None:
    """OSError. What is there already may stay."""
    fresh = Request.CREATE | Request.EXCLUSIVE
    changes = [
        change
        for family in families
        for change in ((_Message.NEWROUTE, fresh, _route(family)), (_Message.NEWRULE, fresh, _rule(family)))
    ]
    for error in netlink.change(changes):
        if error is not None and error.errno != errno.EEXIST:
            raise error


@contextlib.contextmanager
def inward(families: frozenset[int]) -> Iterator[Callable[[], None]]:
    """The way in, in the calling thread's network namespace, as long as the block lasts. OSError.

    Threads, and blocks in one another, may use it at the same time.  What a killed tool left of it is no hindrance, and
    harms nobody.  Of two processes the first that ends takes it away (several moves to one host), and the other's
    packets are then as if lost: who injects looks whether they arrived, and calls what the block is given, which makes
    the way anew where it is gone, before it sends them again.
    """
    space = os.stat("/proc/thread-self/ns/net").st_ino
    with Netlink() as netlink:

        def anew() -> None:
            with _lock:
                _make(netlink, sorted(families))

        try:
            with _lock:
                begin = [family for family in sorted(families) if not _users[space, family]]
                _users.update((space, family) for family in families)
                _make(netlink, begin)
            yield anew
        finally:
            with _lock:
                _users.subtract((space, family) for family in families)
                end = [
                    change
                    for family in sorted(families)
                    if not _users[space, family]
                    for change in (
                        (_Message.DELRULE, Request.REQUEST, _rule(family)),
                        (_Message.DELROUTE, Request.REQUEST, _route(family)),
                    )
                ]
                ended = netlink.change(end) if end else []
            for error in ended:
                if error is not None and error.errno not in _GONE:
                    raise error
