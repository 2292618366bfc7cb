"""Out-of-order data: what has arrived behind a hole, read from the kernel as extents (paper, 4.1.2).

No socket call shows it, and nothing is lost without it: the peer still has it (a receiver may forget what it has only
reported by SACK, RFC 2018 8), and what it repeats in the freeze is captured and replayed.  Reading it saves the peer
that repetition, at the price of an arbitrary read of kernel memory (:mod:`tcpstate.kernel.bpf.memory`).  So it is
*off*: nothing calls :func:`read` by itself, and it does nothing without ``kernel_reads=True``.

The TCP iterator gives the address of a connection's socket; its out-of-order queue is a red-black tree of packets, each
with a linear part and page fragments (:mod:`tcpstate.kernel.bpf.packets`).

The connection must be frozen: a queue that changes while it is walked is told as what was found, or as an error.

Source: include/linux/skbuff.h, include/net/tcp.h struct tcp_skb_cb, net/ipv4/tcp_input.c tcp_data_queue_ofo.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Collection

from tcpstate.connid import ConnId
from tcpstate.errors import KernelFeatureMissing, KernelReadRefused
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.kernel.bpf.memory import KernelMemory
from tcpstate.kernel.bpf.packets import PACKETS_MAX, PacketReader, Shape
from tcpstate.kernel.bpf.tcpsock import HEAD, conn_id_of, head, iterator_program
from tcpstate.segment import SEQ_MASK
from tcpstate.slotted import dataclass

__all__ = ["Piece", "read"]


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
        self.node = offset("sk_buff", "rbnode")
        self.left, self.right = offset("rb_node", "rb_left"), offset("rb_node", "rb_right")
        self.shape = Shape(known)
        self.seq, self.end_seq = (self.shape.control + offset("tcp_skb_cb", n) for n in ("seq", "end_seq"))
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


class _Walk:
    """Through packets, in kernel memory."""

    def __init__(self, reader: _Reader, memory: KernelMemory) -> None:
        self._r = reader
        self._memory = memory
        self._packets = PacketReader(reader.shape, memory)

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
            if steps > 2 * PACKETS_MAX:
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
        packet = self._packets.packet(at)
        seq, end_seq = (struct.unpack_from("=I", packet.header, place)[0] for place in (self._r.seq, self._r.end_seq))
        data = self._packets.data(packet)
        # a FIN counts for one more
        if ((end_seq - seq) & SEQ_MASK) - len(data) not in (0, 1):
            raise KernelReadRefused(f"a packet of {len(data)} bytes covers {(end_seq - seq) & SEQ_MASK}")
        return seq, data
