"""A receive queue read beforehand, while the socket still lives and its owner stands still.

Such a queue changes in one way only: bytes are appended.  So those that are there can be sent off before the freeze,
and only the rest waits for it; a peer at full speed fills tens of megabytes, which would take longer than its
retransmission timer waits.

Whether it is still the same queue at the freeze is told by what the application has taken: the bytes that ever came in
order (tcpi_bytes_received, which counts a FIN as well) less those that are in the queue.  Nothing is changed on the
socket.

Source: net/ipv4/tcp.c tcp_recvmsg_locked (MSG_PEEK), tcp_inq; net/ipv4/tcp_input.c tcp_rcv_nxt_update.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Final

from tcpstate.kernel.columns import Column, Field, Reusable, Rows
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import SO, Ioctl, Level
from tcpstate.kernel.tcp import INFO_SIZE, TCP, TcpState
from tcpstate.preflight import NOT_CONNECTED, STATES, supported
from tcpstate.record import PEER_FINISHED
from tcpstate.rows import failures
from tcpstate.slotted import dataclass

__all__ = ["COUNTED", "Early", "consumed", "read_early"]

#: bytes of TCP_INFO from which on bytes_received is among them (kernel 4.1)
COUNTED: Final = 136
_TRIES: Final = 5
_PEEK: Final = socket.MSG_PEEK | socket.MSG_DONTWAIT


@dataclass(frozen=True, slots=True)
class Early:
    """What was read of one receive queue.

    count     bytes from the queue's head on
    consumed  bytes that the application had taken before: :func:`consumed`
    """

    count: int
    consumed: int


def consumed(state: TcpState, bytes_received: int, unread: int) -> int:
    """Bytes that the application has taken, of all that came in order; the same as long as it takes nothing."""
    return bytes_received - (STATES.get(state) in PEER_FINISHED) - unread


def _build(rows: Rows) -> tuple[Column, struct.Struct]:
    fd = rows.column()
    info = rows.getsockopt(fd, Level.TCP, TCP.INFO, INFO_SIZE)
    unread = rows.room(4)
    rows.call(SYS.ioctl, fd, Ioctl.SIOCINQ, unread, label=Ioctl.SIOCINQ.name)
    again = rows.getsockopt(fd, Level.TCP, TCP.INFO, INFO_SIZE)
    # before 6.10 TCP has none
    offset = rows.getsockopt(fd, Level.SOCKET, SO.PEEK_OFF, 4, ignore=True, initial=struct.pack("i", -1))
    return fd, rows.reader((info, "B127xQ"), (_length(info), "I"), (unread, "I"), (again, "B127xQ"), (offset, "i"))


def _length(value: Field) -> Field:
    if value.length_field is None:
        raise RuntimeError("not the value of a getsockopt")
    return value.length_field


_places = Reusable(_build)


def _look(socks: Sequence[socket.socket]) -> list[tuple[int, int] | None]:
    """(consumed, unread) of each; None where it cannot be told, or where peeking would not begin at the head."""
    rows, (fd, reader) = _places.of(len(socks))
    fd.set(s.fileno() for s in socks)
    with failures(socks):
        rows.run()
    found: list[tuple[int, int] | None] = []
    for number, received, length, unread, number_again, again, offset in reader.iter_unpack(rows.memory):
        state = STATES.get(number)
        still = (number, received) == (number_again, again) and length >= COUNTED and offset < 0
        fine = still and state is not None and supported(state) and state not in NOT_CONNECTED
        found.append((consumed(TcpState(number), received, unread), unread) if fine else None)
    return found


def read_early(
    socks: Sequence[socket.socket], before: Sequence[Early | None], least: int
) -> dict[int, tuple[Early, memoryview]]:
    """Of each socket whose receive queue has at least ``least`` bytes more than ``before``: what is known of it now,
    and those bytes. By its place in ``socks``.

    The owners must have been stopped before, and all the time. ConnectionCallFailed.
    """
    found: dict[int, tuple[Early, memoryview]] = {}
    todo = list(range(len(socks)))
    for _ in range(_TRIES):
        unclear = []
        for i, place in zip(todo, _look([socks[i] for i in todo]), strict=True):
            known = before[i]
            if place is None:
                unclear.append(i)
            elif known is None or known.consumed == place[0]:
                count = 0 if known is None else known.count
                if place[1] - count >= least:
                    # one copy, into bytes that nobody zeroed
                    data = socks[i].recv(place[1], _PEEK)
                    found[i] = Early(len(data), place[0]), memoryview(data)[count:]
        todo = unclear
        if not todo:
            break
    return found
