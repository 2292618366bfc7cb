"""Routes and rules by rtnetlink: is an address local yet, and the rule that blackholes a mark.

Source: include/uapi/linux/rtnetlink.h, linux/fib_rules.h.
"""

from __future__ import annotations

import enum
import errno
import socket
import struct

from tcpstate.kernel import netlink
from tcpstate.kernel.sockets import is_v6

__all__ = ["add_blackhole_rule", "blackhole_rules", "is_local", "remove_blackhole_rule"]

_RTMSG = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_RULE = struct.Struct("=BBBBBBBBI")  # struct fib_rule_hdr
_ROUTE_TYPE_LOCAL = 2  # RTN_LOCAL
_ACTION_BLACKHOLE = 6  # FR_ACT_BLACKHOLE


class _Type(enum.IntEnum):
    NEWROUTE = 24
    GETROUTE = 26
    NEWRULE = 32
    DELRULE = 33
    GETRULE = 34


class _Rule(enum.IntEnum):
    PRIORITY = 6
    FWMARK = 10
    FWMASK = 16


_DESTINATION = 1  # RTA_DST


def is_local(address: str) -> bool:
    """Whether packets to ``address`` are delivered in this network namespace (a new IPv6 address takes a moment)."""
    bare = address.partition("%")[0]
    family = socket.AF_INET6 if is_v6(bare) else socket.AF_INET
    raw = socket.inet_pton(family, bare)
    body = _RTMSG.pack(family, len(raw) * 8, 0, 0, 0, 0, 0, 0, 0) + netlink.attribute(_DESTINATION, raw)
    with netlink.Netlink(netlink.Protocol.ROUTE) as channel:
        try:
            kind, answer = channel.get(_Type.GETROUTE, body)
        except OSError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
                return False
            raise
    return kind == _Type.NEWROUTE and _RTMSG.unpack_from(answer)[7] == _ROUTE_TYPE_LOCAL


def _rule(family: int, mark: int, priority: int) -> bytes:
    return (
        _RULE.pack(family, 0, 0, 0, 0, 0, 0, _ACTION_BLACKHOLE, 0)
        + netlink.attribute(_Rule.PRIORITY, struct.pack("=I", priority))
        + netlink.attribute(_Rule.FWMARK, struct.pack("=I", mark))
        + netlink.attribute(_Rule.FWMASK, struct.pack("=I", 0xFFFFFFFF))
    )


def add_blackhole_rule(family: int, mark: int, priority: int) -> bool:
    """Add the rule; False if the very same one is there already. OSError if the kernel refuses it."""
    with netlink.Netlink(netlink.Protocol.ROUTE) as channel:
        try:
            channel.request(_Type.NEWRULE, _rule(family, mark, priority), netlink.Flags.CREATE | netlink.Flags.EXCL)
        except OSError as error:
            if error.errno == errno.EEXIST:
                return False
            raise
    return True


def remove_blackhole_rule(family: int, mark: int, priority: int) -> bool:
    """Remove the rule; False if there is none."""
    with netlink.Netlink(netlink.Protocol.ROUTE) as channel:
        try:
            channel.request(_Type.DELRULE, _rule(family, mark, priority))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
    return True


def blackhole_rules(family: int, mark: int) -> list[int]:
    """Priorities of the rules that blackhole ``mark``."""
    found = []
    with netlink.Netlink(netlink.Protocol.ROUTE) as channel:
        for _, body in channel.dump(_Type.GETRULE, _RULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
            header = _RULE.unpack_from(body)
            extra = dict(netlink.attributes(body[_RULE.size :]))
            wanted = struct.pack("=I", mark)
            if header[0] == family and header[7] == _ACTION_BLACKHOLE and extra.get(_Rule.FWMARK) == wanted:
                found.append(struct.unpack("=I", extra.get(_Rule.PRIORITY, bytes(4)))[0])
    return sorted(found)
