"""Out-of-order data: what has arrived behind a hole, read from the kernel as extents (paper, 4.1.2).

No socket call shows it, and nothing is lost without it: the peer still has it (a receiver may forget what it has only
reported by SACK, RFC 2018 8), and what it repeats in the freeze is captured and replayed.  Reading it saves the peer
that repetition, at the price of an arbitrary read of kernel memory (:mod:`tcpstate.kernel.bpf.memory`).  So it is
*off*: nothing calls :func:`read` by itself, and it does nothing without ``kernel_reads=True``.

The TCP iterator gives the address of a connection's socket; its out-of-order queue is a red-black tree of packets, each
with a linear part and page fragments.  Where pages lie in the kernel's address space is found out once, on a loopback
connection of ours whose bytes are known: no symbol and no constant of a machine is needed, only that the direct map and
the array of struct page begin at multiples of 1 GiB (so they do under KASLR).

The connection must be frozen: a queue that changes while it is walked is told as what was found, or as an error.

Source: include/linux/skbuff.h, include/net/tcp.h struct tcp_skb_cb, net/ipv4/tcp_input.c tcp_data_queue_ofo.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from tcpstate.connid import ConnId
from tcpstate.errors import KernelFeatureMissing, KernelReadRefused
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.kernel.bpf.memory import KernelMemory
from tcpstate.kernel.bpf.tcpsock import HEAD, conn_id_of, head, iterator_program
from tcpstate.segment import SEQ_MASK

__all__ = ["Piece", "read"]

_GIB: Final = 30
_PAGE_SHIFT: Final = os.sysconf("SC_PAGE_SIZE").bit_length() - 1
#: how far below the socket's own GiB the direct map may begin
_GIBS: Final = 64
_PROBE: Final = 60_000
#: a queue never holds more: more would be a walk that went astray
_PACKETS_MAX: Final = 1 << 16
_FRAGMENTS_MAX: Final = 64  # MAX_SKB_FRAGS is 17 by default, 45 at most
_BYTES_MAX: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that arrived behind a hole.

    offset  bytes from rcv_nxt, the next one expected
    data    the bytes
    """

    offset: int
    data: bytes


def read(wanted: Collection[ConnId], *, kernel_reads: bool = False) -> dict[ConnId, list[Piece]]:
    """The out-of-order queues of frozen connections in the calling thread's network namespace, in order.

    kernel_reads  must be True: that the caller knows that kernel memory is read

    KernelReadRefused without that, or where a queue does not read as one; KernelFeatureMissing; OSError.
    """
    if not kernel_reads:
        raise KernelReadRefused("out-of-order data can only be read from kernel memory, and that was not asked for")
    reader = _reader()
    with KernelMemory() as memory:
        walk = _Walk(reader, memory)
        return {
            conn_id: walk.queue(address, rcv_nxt)
            for conn_id, (address, rcv_nxt) in reader.sockets().items()
            if conn_id in wanted
        }


class _Reader:
    """The attached iterator, and where everything lies in this kernel's structures."""

    def __init__(self, known: Layout) -> None:
        offset = known.offset
        self.queue = offset("tcp_sock", "out_of_order_queue.rb_node")
        self.receive_queue = offset("tcp_sock", "inet_conn.icsk_inet.sk.sk_receive_queue")
        self.node = offset("sk_buff", "rbnode")
        self.left, self.right = offset("rb_node", "rb_left"), offset("rb_node", "rb_right")
        self.next = offset("sk_buff", "next")
        self.skb = {name: known.place("sk_buff", name) for name in ("len", "data_len", "data", "head", "end")}
        self.skb_size = known.size("sk_buff")
        control = offset("sk_buff", "cb")
        self.seq, self.end_seq = (control + offset("tcp_skb_cb", n) for n in ("seq", "end_seq"))
        self.count = known.place("skb_shared_info", "nr_frags")
        self.frags = offset("skb_shared_info", "frags")
        self.frag_list = offset("skb_shared_info", "frag_list")
        self.page_size = known.size("page")
        #: struct skb_frag: the page, length, offset
        self.frag = struct.Struct("=QII")
        self.link = iterator_program(self._program(known), known)

    @staticmethod
    def _program(known: Layout) -> bytes:
        size = HEAD.size + 16
        asm = Asm().mov(9, 1).load(8, 6, 9, 0).load(8, 7, 9, 8).jump_if(Jump.EQUAL, 7, 0, "out")
        asm.mov(1, 7).call(Helper.SKC_TO_TCP_SOCK).jump_if(Jump.EQUAL, 0, 0, "out").mov(8, 0)
        head(asm, known, 7, -size)
        asm.store(8, FRAME, -16, 7).load(4, 1, 8, known.offset("tcp_sock", "rcv_nxt")).store(8, FRAME, -8, 1)
        asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, -size).set(3, size).call(Helper.SEQ_WRITE)
        return asm.label("out").exit(0).code()

    def fields(self, header: bytes) -> dict[str, int]:
        """Numbers of a packet, by name."""
        return {n: int.from_bytes(header[p.offset : p.offset + p.size], "little") for n, p in self.skb.items()}

    def sockets(self) -> dict[ConnId, tuple[int, int]]:
        """Address of the socket and rcv_nxt, by connection."""
        size = HEAD.size + 16
        data = call.iterate(self.link)
        found = {}
        for at in range(0, len(data) - size + 1, size):
            found[conn_id_of(data[at : at + HEAD.size])] = struct.unpack_from("=QQ", data, at + HEAD.size)
        return found


@functools.cache
def _reader() -> _Reader:
    known = layout()
    try:
        return _Reader(known)
    except (OSError, BadBtf) as error:
        raise KernelFeatureMissing(f"out-of-order queues cannot be read: {error}", object="bpf_iter_tcp") from None
    finally:
        known.save()
        known.forget_btf()


class _Walk:
    """Through packets, in kernel memory."""

    def __init__(self, reader: _Reader, memory: KernelMemory) -> None:
        self._r = reader
        self._memory = memory
        self._pages: tuple[int, int] | None = None

    def queue(self, sock: int, rcv_nxt: int) -> list[Piece]:
        """The pieces of one socket's queue."""
        pieces: list[Piece] = []
        todo = [(self._memory.word(sock + self._r.queue), False)]
        steps = 0
        while todo:
            node, visited = todo.pop()
            if not node:
                continue
            steps += 1
            if steps > 2 * _PACKETS_MAX:
                raise KernelReadRefused("the out-of-order queue has no end")
            if not visited:
                # in order: what lies left of it, itself, what lies right of it
                todo.append((self._memory.word(node + self._r.right), False))
                todo.append((node, True))
                todo.append((self._memory.word(node + self._r.left), False))
                continue
            seq, data = self._packet(node - self._r.node)
            pieces.append(Piece((seq - rcv_nxt) & SEQ_MASK, data))
        return pieces

    def _packet(self, at: int) -> tuple[int, bytes]:
        header = self._memory.read(at, self._r.skb_size)
        field = self._r.fields(header)
        seq, end_seq = (struct.unpack_from("=I", header, place)[0] for place in (self._r.seq, self._r.end_seq))
        data = self._bytes(field, 0)
        # a FIN counts for one more
        if ((end_seq - seq) & SEQ_MASK) - len(data) not in (0, 1):
            raise KernelReadRefused(f"a packet of {len(data)} bytes covers {(end_seq - seq) & SEQ_MASK}")
        return seq, data

    def _bytes(self, field: dict[str, int], depth: int) -> bytes:
        length, paged = field["len"], field["data_len"]
        if not 0 <= paged <= length < _BYTES_MAX or depth > 1:
            raise KernelReadRefused("this is no packet")
        parts = [self._memory.read(field["data"], length - paged)]
        if paged:
            shared = field["head"] + field["end"]
            count = self._memory.read(shared + self._r.count.offset, self._r.count.size)[0]
            if count > _FRAGMENTS_MAX:
                raise KernelReadRefused("this is no packet")
            table = self._memory.read(shared + self._r.frags, count * self._r.frag.size)
            parts += [self._fragment(*one) for one in self._r.frag.iter_unpack(table)]
            inner = self._memory.word(shared + self._r.frag_list)
            while inner and sum(map(len, parts)) < length:
                header = self._memory.read(inner, self._r.skb_size)
                more = {
                    n: int.from_bytes(header[p.offset : p.offset + p.size], "little") for n, p in self._r.skb.items()
                }
                parts.append(self._bytes(more, depth + 1))
                inner = int.from_bytes(header[self._r.next : self._r.next + 8], "little")
        return b"".join(parts)

    def _fragment(self, page: int, length: int, offset: int) -> bytes:
        if self._pages is None:
            self._pages = self._calibrate()
        array, direct = self._pages
        return self._memory.read(direct + ((page - array) // self._r.page_size << _PAGE_SHIFT) + offset, length)

    def _calibrate(self) -> tuple[int, int]:
        """Where the array of struct page and the direct map begin: told by bytes of ours in a receive queue."""
        known = secrets.token_bytes(_PROBE)
        with contextlib.ExitStack() as ends:
            listener = ends.enter_context(socket.create_server(("127.0.0.1", 0)))
            sender = ends.enter_context(socket.create_connection(listener.getsockname()))
            receiver = ends.enter_context(listener.accept()[0])
            sender.sendall(known)
            receiver.recv(_PROBE, socket.MSG_PEEK | socket.MSG_WAITALL)
            mine = ConnId.tcp(*receiver.getsockname(), *receiver.getpeername())
            sock, _ = self._r.sockets()[mine]
            queue = sock + self._r.receive_queue
            at = self._memory.word(queue)
            for _ in range(_PACKETS_MAX):
                if at == queue:
                    break
                found = self._locate(at, sock, known)
                if found is not None:
                    return found
                at = self._memory.word(at + self._r.next)
        raise KernelReadRefused("where this kernel's pages lie could not be found out")

    def _locate(self, packet: int, sock: int, known: bytes) -> tuple[int, int] | None:
        header = self._memory.read(packet, self._r.skb_size)
        field = self._r.fields(header)
        shared = field["head"] + field["end"]
        if not self._memory.read(shared + self._r.count.offset, self._r.count.size)[0]:
            return None
        page, length, offset = self._r.frag.unpack(self._memory.read(shared + self._r.frags, self._r.frag.size))
        array = page >> _GIB << _GIB
        for gib in range(_GIBS):
            direct = (sock >> _GIB) - gib << _GIB
            try:
                there = self._memory.read(
                    direct + ((page - array) // self._r.page_size << _PAGE_SHIFT) + offset, min(64, length)
                )
            except OSError:
                # nothing is mapped there
                continue
            if there in known:
                return array, direct
        return None
