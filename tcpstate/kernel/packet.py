"""Packet sockets. Source: include/uapi/linux/if_packet.h, if_ether.h, if_arp.h."""

from __future__ import annotations

import ctypes
import enum
import socket
import struct

from tcpstate.kernel import batch
from tcpstate.kernel.machine import SYS

__all__ = [
    "ARPHRD_LOOPBACK",
    "AUXDATA_SPACE",
    "ETH_P_ALL",
    "PACKET_HOST",
    "PACKET_OUTGOING",
    "SOL_PACKET",
    "Packet",
    "PacketStatus",
    "bind_packet",
]

SOL_PACKET = 263

ETH_P_ALL = 3
ARPHRD_LOOPBACK = 772
#: sll_pkttype of what is for this host; on a bridge's port only the bridge's own copy is, if their addresses differ
PACKET_HOST = 0
#: and of what this host sends
PACKET_OUTGOING = 4


class Packet(enum.IntEnum):
    """Options of level SOL_PACKET."""

    STATISTICS = 6
    AUXDATA = 8


class PacketStatus(enum.IntFlag):
    """tp_status of struct tpacket_auxdata, its first u32."""

    CSUM_NOT_READY = 1 << 3  # nobody has computed it: it never was on a wire, or the interface checked and merged
    CSUM_VALID = 1 << 7


#: what a control message with struct tpacket_auxdata takes
AUXDATA_SPACE = socket.CMSG_SPACE(20)


def bind_packet(sock: socket.socket, protocol: int, interface: int) -> None:
    """Bind to an interface by index; 0 for all, which socket.bind() cannot say. Now packets arrive. OSError."""
    # struct sockaddr_ll
    address = (
        struct.pack("=H", socket.AF_PACKET) + struct.pack("!H", protocol) + struct.pack("=iHBB8x", interface, 0, 0, 0)
    )
    memory = ctypes.create_string_buffer(address, len(address))
    batch.syscall(SYS.bind, sock.fileno(), ctypes.addressof(memory), len(address))
