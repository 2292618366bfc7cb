"""Which interface has which address, in one message each way: within the stop. Source: linux/if_addr.h."""

from __future__ import annotations

import socket

from tcpstate.kernel import netlink
from tcpstate.kernel.rtnetlink import ADDRESS_HEADER, AddressAttribute, MessageType, attributes

__all__ = ["interface_of"]


def interface_of(address: str) -> str:
    """Name of the interface of this network namespace that has the address; "" if none has. OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    wanted = socket.inet_pton(family, address.partition("%")[0])
    with netlink.Netlink() as channel:
        for body in channel.dump(MessageType.GETADDR, ADDRESS_HEADER.pack(family, 0, 0, 0, 0)):
            index = ADDRESS_HEADER.unpack_from(body)[4]
            told = attributes(body, ADDRESS_HEADER.size)
            # the former where there is a peer's address, too
            if told.get(AddressAttribute.LOCAL, told.get(AddressAttribute.ADDRESS)) == wanted:
                return socket.if_indextoname(index)
    return ""
