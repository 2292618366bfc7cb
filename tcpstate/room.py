"""Room in receive buffers for segments that are replayed.

A window once offered cannot be taken back, so whatever the peer sent into it must find room.  The kernel offers as much
as its buffer holds of packets like those that came before: merged ones of 64 KiB, of which nearly all is data.  What is
replayed comes in single segments, each with the overhead of a packet: the same data takes half as much memory again,
and does not fit a buffer that is nearly full.  The kernel would drop the end of it, and the peer, which believes that
it has arrived, would run into its time-out.

So buffers grow by that overhead.  A buffer whose size the kernel tunes stays so large, as if it had been tuned; one
whose size the application fixed has that size again afterwards.

Source: net/ipv4/tcp_input.c tcp_try_rmem_schedule, tcp_clamp_window; include/linux/skbuff.h SKB_TRUESIZE.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Iterator
from typing import Final

from tcpstate.kernel.sockets import SO, BufferLock, Level

__all__ = ["overhead", "room_for"]

#: what the kernel adds to a packet: struct sk_buff and skb_shared_info, headers and the room before them, at most
_PACKET: Final = 256 + 320 + 128 + 100
#: what SO_RCVBUFFORCE takes at most, before it doubles it
_LARGEST: Final = (1 << 30) - 1


def overhead(data: int, size: int) -> int:
    """Bytes of memory that ``data`` bytes take beyond themselves in packets of ``size``.

    The kernel hands out memory in powers of two (mm/slab_common.c kmalloc_caches).
    """
    packets = -(-data // size)
    return max(0, packets * (1 << (size + _PACKET - 1).bit_length()) - data)


@contextlib.contextmanager
def room_for(more: Iterable[tuple[socket.socket, int]]) -> Iterator[None]:
    """Receive buffers are larger by so many bytes as long as the block lasts. OSError."""
    fixed = []
    for sock, count in more:
        size = sock.getsockopt(Level.SOCKET, SO.RCVBUF)
        try:
            lock = sock.getsockopt(Level.SOCKET, SO.BUF_LOCK)
        except OSError:
            lock = None  # before 5.14 nobody knows who fixed it, and what was set stays fixed
        # it is told what the kernel counts with, and takes half of it
        sock.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, min((size + count) // 2, _LARGEST))
        if lock is not None and not lock & BufferLock.RECEIVE:
            sock.setsockopt(Level.SOCKET, SO.BUF_LOCK, lock)
        else:
            fixed.append((sock, size))
    try:
        yield
    finally:
        for sock, size in fixed:
            sock.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, size // 2)
