"""Which interface has which address, in one message each way: within the stop. Source: linux/if_addr.h."""

from __future__ import annotations

import socket
import struct
from typing import Final

from tcpstate.kernel import netlink

__all__ = ["interface_of"]

_GET_ADDRESSES: Final = 22  # RTM_GETADDR
_HEAD: Final = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, interface
_ADDRESS, _LOCAL = 1, 2  # IFA_ADDRESS, IFA_LOCAL: the latter where there is a peer's address, too


def interface_of(address: str) -> str:
    """Name of the interface of this network namespace that has the address; "" if none has. OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    wanted = socket.inet_pton(family, address.partition("%")[0])
    with netlink.Netlink() as channel:
        for body in channel.dump(_GET_ADDRESSES, _HEAD.pack(family, 0, 0, 0, 0)):
            index = _HEAD.unpack_from(body)[4]
            told = dict(netlink.attributes(body, _HEAD.size))
            if told.get(_LOCAL, told.get(_ADDRESS)) == wanted:
                return socket.if_indextoname(index)
    return ""
