"""Packets as they lie in kernel memory: a header, a linear part, fragments of pages, further packets in a list.

Where pages lie in the kernel's address space is found out once, by bytes of ours in a socket's queue: no symbol and no
constant of a machine is needed, only that the direct map and the array of struct page begin at multiples of 1 GiB (so
they do under KASLR).

What is read must rest: a queue that changes meanwhile is told as what was found, or as an error.

Source: include/linux/skbuff.h (struct sk_buff, skb_shared_info, skb_frag), net/core/skbuff.c.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections.abc import Iterator
from typing import ClassVar, Final

from tcpstate.errors import KernelReadRefused
from tcpstate.kernel.bpf import opensock
from tcpstate.kernel.bpf.layout import Layout
from tcpstate.kernel.bpf.memory import KernelMemory
from tcpstate.slotted import dataclass

__all__ = ["PACKETS_MAX", "Packet", "PacketReader", "Shape"]

_GIB: Final = 30
_PAGE_SHIFT: Final = os.sysconf("SC_PAGE_SIZE").bit_length() - 1
#: how far below a socket's own GiB the direct map may begin
_GIBS: Final = 64
_PROBE: Final = 60_000
#: a queue never holds more: more would be a walk that went astray
PACKETS_MAX: Final = 1 << 16
_FRAGMENTS_MAX: Final = 64  # MAX_SKB_FRAGS is 17 by default, 45 at most
_BYTES_MAX: Final = 1 << 31
_FIELDS: Final = ("len", "data_len", "data", "head", "end", "next", "transport_header")


class Shape:
    """Where everything lies in this kernel's packets. BadBtf, OSError."""

    def __init__(self, known: Layout) -> None:
        self.fields = {name: known.place("sk_buff", name) for name in _FIELDS}
        self.size = known.size("sk_buff")
        self.control = known.offset("sk_buff", "cb")
        self.receive_queue = known.offset("sock", "sk_receive_queue")
        self.count = known.place("skb_shared_info", "nr_frags")
        self.frags = known.offset("skb_shared_info", "frags")
        self.frag_list = known.offset("skb_shared_info", "frag_list")
        self.page_size = known.size("page")
        #: struct skb_frag: the page, length, offset
        self.frag = struct.Struct("=QII")


@dataclass(frozen=True, slots=True)
class Packet:
    """One header.

    header     its bytes, struct sk_buff
    next       address of the packet behind it in its queue
    length     bytes of data, of which ``paged`` lie in fragments
    data, end  addresses of the first byte, and of struct skb_shared_info
    transport  address of the transport header
    """

    header: bytes
    next: int
    length: int
    paged: int
    data: int
    end: int
    transport: int


class PacketReader:
    """Reads packets. KernelReadRefused where something does not read as one; OSError."""

    #: what :meth:`_find_pages` has found: the same for all, until the machine is started anew
    _pages: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, shape: Shape, memory: KernelMemory) -> None:
        self._shape = shape
        self._memory = memory

    def packet(self, at: int) -> Packet:
        """The packet at an address."""
        header = self._memory.read(at, self._shape.size)
        field = {
            n: int.from_bytes(header[p.offset : p.offset + p.size], "little") for n, p in self._shape.fields.items()
        }
        if not 0 <= field["data_len"] <= field["len"] < _BYTES_MAX:
            raise KernelReadRefused("this is no packet")
        head = field["head"]
        end, transport = head + field["end"], head + field["transport_header"]
        return Packet(header, field["next"], field["len"], field["data_len"], field["data"], end, transport)

    def queue(self, head: int, most: int = PACKETS_MAX) -> Iterator[Packet]:
        """The packets of a queue (struct sk_buff_head), in order."""
        at = self._memory.word(head)
        for _ in range(most):
            if at == head:
                return
            found = self.packet(at)
            yield found
            at = found.next
        raise KernelReadRefused("the queue has no end")

    def data(self, packet: Packet, depth: int = 0) -> bytes:
        """All its data."""
        parts = [self._memory.read(packet.data, packet.length - packet.paged)]
        if packet.paged:
            if depth > 1:
                raise KernelReadRefused("this is no packet")
            parts += [self._fragment(*one) for one in self._fragments(packet)]
            inner = self._memory.word(packet.end + self._shape.frag_list)
            while inner and sum(map(len, parts)) < packet.length:
                more = self.packet(inner)
                parts.append(self.data(more, depth + 1))
                inner = more.next
        return b"".join(parts)

    def _fragments(self, packet: Packet) -> list[tuple[int, int, int]]:
        count = self._memory.read(packet.end + self._shape.count.offset, self._shape.count.size)[0]
        if count > _FRAGMENTS_MAX:
            raise KernelReadRefused("this is no packet")
        table = self._memory.read(packet.end + self._shape.frags, count * self._shape.frag.size)
        return list(self._shape.frag.iter_unpack(table))

    def _fragment(self, page: int, length: int, offset: int) -> bytes:
        if not self._pages:
            self._pages.append(self._find_pages())
        array, direct = self._pages[0]
        return self._memory.read(self._place(page, offset, array, direct), length)

    def _place(self, page: int, offset: int, array: int, direct: int) -> int:
        return direct + ((page - array) // self._shape.page_size << _PAGE_SHIFT) + offset

    def _find_pages(self) -> tuple[int, int]:
        """Where the array of struct page and the direct map begin: told by bytes of ours in a receive queue."""
        known = secrets.token_bytes(_PROBE)
        sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with sender, receiver:
            sender.sendall(known)
            sock = opensock.address(receiver)
            for packet in self.queue(sock + self._shape.receive_queue):
                found = self._locate(packet, sock, known)
                if found is not None:
                    return found
        raise KernelReadRefused("where this kernel's pages lie could not be found out")

    def _locate(self, packet: Packet, sock: int, known: bytes) -> tuple[int, int] | None:
        for page, length, offset in self._fragments(packet)[:1]:
            array = page >> _GIB << _GIB
            for gib in range(_GIBS):
                direct = (sock >> _GIB) - gib << _GIB
                try:
                    there = self._memory.read(self._place(page, offset, array, direct), min(64, length))
                except OSError:
                    # nothing is mapped there
                    continue
                if there in known:
                    return array, direct
        return None
