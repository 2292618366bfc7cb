"""Reading an AF_PACKET ring: TCP headers of an interface, without a system call for each packet.

Source: Linux uapi linux/if_packet.h (TPACKET_V3), linux/filter.h; Documentation/networking/packet_mmap.rst.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import select
import socket
import struct
from collections.abc import Callable

__all__ = ["PacketRing"]

SOL_PACKET = 263
ETH_P_ALL = 3
PACKET_OUTGOING = 4  # sll_pkttype of what this host sends
TPACKET_V3 = 2
BLOCK_OF_USER = 1  # TP_STATUS_USER
BLOCK_SIZE, BLOCKS, RETIRE_MS = 1 << 18, 64, 10  # 16 MiB: at 128 bytes a packet, more than 100,000 of them
SNAP = 120  # the longest IPv6 and TCP headers


class PacketOption(enum.IntEnum):
    """Socket options of level SOL_PACKET."""

    RX_RING = 5
    STATISTICS = 6
    VERSION = 10


BLOCK = struct.Struct("=8xIII")  # tpacket_block_desc: block_status, num_pkts, offset_to_first_pkt
PACKET = struct.Struct("=6IHH")  # tpacket3_hdr: next, sec, nsec, snaplen, len, status, mac, net
PACKET_TYPE = 48 + 10  # the sockaddr_ll follows at 48; sll_pkttype in it

LD_B, LD_B_X, LDX_MSH, JEQ, JSET, RSH, RET = 0x30, 0x50, 0xB1, 0x15, 0x45, 0x74, 0x06


def _program(flags: int) -> bytes:
    """Classic BPF on the network header: TCP only, over IPv4 or IPv6; with `flags`, only segments with one of them."""
    code = [
        (LD_B, 0, 0, 0),  # 0   version
        (RSH, 0, 0, 4),
        (JEQ, 0, 5, 4),  # 2    not 4: to 8
        (LD_B, 0, 0, 9),
        (JEQ, 0, 10, 6),  # 4   not TCP: drop at 15
        (LDX_MSH, 0, 0, 0),
        (LD_B_X, 0, 0, 13),  # 6
        (JSET, 6, 7, flags),  # 7  keep at 14, drop at 15
        (JEQ, 0, 6, 6),  # 8    not 6: drop
        (LD_B, 0, 0, 6),
        (JEQ, 0, 4, 6),  # 10   not TCP: drop
        (LD_B, 0, 0, 53),
        (JSET, 1, 2, flags),  # 12
        (RET, 0, 0, 0),
        (RET, 0, 0, SNAP),  # 14
        (RET, 0, 0, 0),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


class PacketRing:
    """The TCP headers that pass an interface of the calling thread's network namespace.

    flags   only segments with one of these TCP flags; 0xFF = all
    """

    def __init__(self, interface: str, flags: int = 0xFF) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        try:
            self.socket.setsockopt(SOL_PACKET, PacketOption.VERSION, TPACKET_V3)
            frames = BLOCK_SIZE // 2048 * BLOCKS
            request = struct.pack("=7I", BLOCK_SIZE, BLOCKS, 2048, frames, RETIRE_MS, 0, 0)
            self.socket.setsockopt(SOL_PACKET, PacketOption.RX_RING, request)
            code = ctypes.create_string_buffer(_program(flags))
            program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(code))
            self.socket.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER
            self._memory = mmap.mmap(self.socket.fileno(), BLOCK_SIZE * BLOCKS)
            self.socket.bind((interface, ETH_P_ALL))  # last: from here on the ring fills, filtered
        except BaseException:
            self.socket.close()
            raise
        self._next = 0
        self._poll = select.poll()
        self._poll.register(self.socket, select.POLLIN)

    def read(self, timeout_ms: int, take: Callable[[float, bool, int, bytes], None]) -> bool:
        """Hand all packets that are there to ``take(time, outgoing, length, header)``; False if none came in time.

        time     by the machine's real-time clock, seconds
        length   of the whole IP packet (several segments in one where the kernel has not cut it yet)
        header   its first bytes
        """
        if not self._full() and not (self._poll.poll(timeout_ms) and self._full()):
            return False
        memory = self._memory
        while self._full():
            start = self._next * BLOCK_SIZE
            _, packets, first = BLOCK.unpack_from(memory, start)
            at = start + first
            for _ in range(packets):
                following, seconds, nanoseconds, snapped, length, _, _, net = PACKET.unpack_from(memory, at)
                header = memory[at + net : at + net + snapped]
                take(seconds + nanoseconds * 1e-9, memory[at + PACKET_TYPE] == PACKET_OUTGOING, length, header)
                at += following
            struct.pack_into("=I", memory, start + 8, 0)  # the block is the kernel's again
            self._next = (self._next + 1) % BLOCKS
        return True

    def _full(self) -> bool:
        return bool(BLOCK.unpack_from(self._memory, self._next * BLOCK_SIZE)[0] & BLOCK_OF_USER)

    def dropped(self) -> int:
        """Packets that the ring had no room for since the last call."""
        return int(struct.unpack("=3I", self.socket.getsockopt(SOL_PACKET, PacketOption.STATISTICS, 12))[1])

    def close(self) -> None:
        """Give the ring back."""
        self._memory.close()
        self.socket.close()
