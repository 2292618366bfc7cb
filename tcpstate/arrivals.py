"""When packets of a connection arrived, and how long they were (paper, 5.5).

An AF_PACKET socket on the interface towards the peer sees each arriving segment of the connection before TCP does, with
the kernel's time of arrival; a thread keeps the latest in a ring.  Only headers are copied.  The connection itself is
neither slowed nor touched.

Source: net/packet/af_packet.c; SO_TIMESTAMPNS, Documentation/networking/timestamping.rst.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
from collections import deque
from types import TracebackType
from typing import Final, Self

from tcpstate.capture import Capture
from tcpstate.connid import ConnId
from tcpstate.kernel import route
from tcpstate.kernel.sockets import SO, Level
from tcpstate.slotted import dataclass
from tcpstate.tuplefilter import arriving

__all__ = ["Arrival", "ArrivalRing"]

_HEADERS: Final = 256  # IP and TCP with all their options
_CONTROL: Final = 256
_TIMESPEC: Final = struct.Struct("qq")
_NANO: Final = 1_000_000_000
_V4: Final = 4
_V6_HEADER: Final = 40
_TCP_HEADER: Final = 20


@dataclass(frozen=True, slots=True)
class Arrival:
    """One packet of the peer.

    time    nanoseconds since the epoch, as the kernel took it in
    length  of the IP packet, bytes; an interface may have merged several into one
    data    bytes of the stream in it
    seq     its sequence number
    """

    time: int
    length: int
    data: int
    seq: int


class ArrivalRing:
    """The latest arrivals of one connection. Runs from its making until :meth:`close`; a context manager.

    capacity  how many are kept: the older ones give way

    OSError: EPERM without CAP_NET_RAW.
    """

    def __init__(self, conn_id: ConnId, capacity: int = 128) -> None:
        if capacity < 1:
            raise ValueError("a ring has room for at least one")
        self.conn_id = conn_id
        self._ring: deque[Arrival] = deque(maxlen=capacity)
        # one interface only: a bridge and its port would both bring each packet
        device = route.device_towards(conn_id.peer)
        program = arriving(conn_id, loopback=True, length=_HEADERS)
        self._capture = Capture([device] if device else None, program=program)
        self._capture.start()
        (self._sock,) = self._capture.sockets
        self._sock.setsockopt(Level.SOCKET, SO.TIMESTAMPNS_NEW, 1)
        self._end, self._ended = os.pipe()
        self._thread = threading.Thread(target=self._run, name=f"arrivals {conn_id}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        waiting = select.poll()
        waiting.register(self._sock, select.POLLIN)
        waiting.register(self._end, select.POLLIN)
        while not any(fd == self._end for fd, _ in waiting.poll()):
            self._fetch()
        self._fetch()

    def _fetch(self) -> None:
        while True:
            try:
                packet, control, _, _ = self._sock.recvmsg(_HEADERS, _CONTROL, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                # the interface went down, or away: what is here stays
                if error.errno == errno.ENETDOWN:
                    continue
                raise
            arrival = _arrival(packet, control)
            if arrival is not None:
                self._ring.append(arrival)

    def read(self) -> list[Arrival]:
        """What the ring holds, oldest first. Nothing is taken out."""
        return list(self._ring)

    @property
    def lost(self) -> int:
        """Packets that came faster than they were noted, since the start."""
        return self._capture.lost

    def close(self) -> None:
        """Stop; what the ring holds can still be read. May be called again."""
        if self._ended < 0:
            return
        os.close(self._ended)
        self._thread.join()
        os.close(self._end)
        self._ended = self._end = -1
        self._capture.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _arrival(packet: bytes, control: list[tuple[int, int, bytes]]) -> Arrival | None:
    """Of the headers of a packet and what the kernel says of it."""
    when = next((_TIMESPEC.unpack_from(data) for level, _, data in control if level == Level.SOCKET), (0, 0))
    version = packet[0] >> 4
    if version == _V4:
        start, (length,) = 4 * (packet[0] & 15), struct.unpack_from("!H", packet, 2)
    else:
        start, (length,) = _V6_HEADER, struct.unpack_from("!H", packet, 4)
        length += _V6_HEADER
    if len(packet) < start + _TCP_HEADER:
        return None
    (seq,) = struct.unpack_from("!I", packet, start + 4)
    data = length - start - 4 * (packet[start + 12] >> 4)
    return Arrival(time=when[0] * _NANO + when[1], length=length, data=max(0, data), seq=seq)
