"""What the kernel tells of connections in repair mode: numbers in one batch, then the bytes of their queues.

::

    send queue   snd_una ........ snd_nxt ........ write_seq     outq = write_seq - snd_una, nsd = write_seq - snd_nxt
                     sent, unacked      not yet sent  [FIN]      our FIN counts for one in all three
    recv queue   copied_seq ..... rcv_nxt                        inq  = rcv_nxt - copied_seq
                     not yet read        [FIN]                   the peer's FIN counts for one in rcv_nxt

A segment that was past the filter when it was attached may still be at work: what was read is read again, and once more
if it changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tcpstate import options
from tcpstate.closed import peer_name
from tcpstate.early import COUNTED, Early, consumed
from tcpstate.errors import StillMoving, UnsupportedState, UrgentData
from tcpstate.kernel import sockets
from tcpstate.kernel.columns import Column, Field, Reusable, RowResult, Rows
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import CONGESTION_NAME_SIZE, INFO_SIZE, TCP, WINDOW_SIZE, RepairQueue, TcpState
from tcpstate.preflight import NOT_CONNECTED, STATES, supported
from tcpstate.record import LOCALLY_FINISHED, State
from tcpstate.rows import describe, failures

__all__ = ["PEEK", "SMALL", "Raw", "peek_from", "peeking_on", "read_all", "read_numbers", "read_queues"]

#: how often a connection is read again whose state changed while it was read
_TRIES = 5
PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
#: bytes of a queue up to which queues are read in one batch
SMALL = 64 << 10
_STATES = {int(number): state for number, state in STATES.items()}


@dataclass(slots=True)
class Raw:
    """One connection as the kernel's calls gave it; up to ``mss`` in the order of :func:`_build_reading`."""

    number: int
    info_options: int
    scales: int
    rto: int
    path_mtu: int
    srtt: int
    rttvar: int
    ssthresh: int
    cwnd: int
    advertised_mss: int
    reordering: int
    pacing_rate: int
    bytes_received: int
    min_rtt: int
    info_length: int
    mss: int
    timestamp: int
    snd_wl1: int
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int
    congestion: bytes
    sndbuf: int
    rcvbuf: int
    lock: int
    at_mark: int
    outq: int
    nsd: int
    inq: int
    write_seq: int
    rcv_nxt: int
    local: bytes
    peer: bytes
    send_queue: bytes = b""
    receive_queue: bytes = b""
    #: bytes at the head of the receive queue that were read early, and are not read again
    early: int = 0
    #: where the urgent byte stands in the receive queue, and whether the application has it already
    urgent: int | None = None
    taken: bool = False

    @property
    def position(self) -> tuple[int, ...]:
        """What must not change while it is read."""
        return self.number, self.outq, self.nsd, self.inq, self.write_seq, self.rcv_nxt

    @property
    def state(self) -> State:
        """In the record's words."""
        return _STATES[self.number]

    @property
    def consumed(self) -> int | None:
        """Bytes that the application has taken, by the kernel's count; None on a kernel that does not count."""
        if self.info_length < COUNTED:
            return None
        return consumed(TcpState(self.number), self.bytes_received, self.inq)


def read_all(socks: Sequence[socket.socket], saved: Sequence[options.Saved], early: list[Early | None]) -> list[Raw]:
    """Read until nothing moves; SO_OOBINLINE and SOPEEK_OFF are given back in any case."""
    peeked = [(s, o.numbers["so.peek_off"][0]) for s, o in zip(socks, saved, strict=True) if "so.peek_off" in o.numbers]
    inline = [o.numbers.get("so.oobinline", (0,))[0] for o in saved]
    for sock, _ in peeked:
        # else peeking would begin at the application's offset
        sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, -1)
    try:
        raw = _read_inline(socks)
        todo = list(range(len(socks)))
        for _ in range(_TRIES):
            read_queues(todo, socks, raw, early)
            again = _positions([socks[i] for i in todo])
            todo = [i for i, position in zip(todo, again, strict=True) if position != raw[i].position]
            if not todo:
                return raw
            for i, fresh in zip(todo, _read_inline([socks[i] for i in todo]), strict=True):
                raw[i] = fresh
        raise StillMoving("its queues keep changing although it is frozen", object=describe(socks[todo[0]]))
    finally:
        _set_inline(socks, inline)
        for sock, offset in peeked:
            sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, offset)


def _read_inline(socks: Sequence[socket.socket]) -> list[Raw]:
    """All but the queues' bytes, with the place of the urgent mark; SO_OOBINLINE is set afterwards.

    Otherwise SIOCINQ stops at the mark and hides what is behind it: the difference is where it stands.
    """
    rows, (fd, unread) = _marking.of(len(socks))
    fd.set(s.fileno() for s in socks)
    with failures(socks):
        rows.run()
    raw = read_numbers(socks)
    for sock, one, ahead in zip(socks, raw, unread.u32(), strict=True):
        if ahead < one.inq:
            one.urgent = ahead
            one.taken = _taken(sock)
    return raw


def _build_marking(rows: Rows) -> tuple[Column, Field]:
    fd = rows.column()
    rows.setsockopt(fd, Level.SOCKET, SO.OOBINLINE, 0)
    unread = _ioctl(rows, fd, Ioctl.SIOCINQ)
    rows.setsockopt(fd, Level.SOCKET, SO.OOBINLINE, 1)
    return fd, unread


_marking = Reusable(_build_marking)


def _taken(sock: socket.socket) -> bool:
    """Whether the urgent byte was read out of band already: its place in the queue only waits to be skipped."""
    sock.setsockopt(Level.SOCKET, SO.OOBINLINE, 0)
    try:
        sock.recv(1, PEEK | socket.MSG_OOB)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return True
    finally:
        sock.setsockopt(Level.SOCKET, SO.OOBINLINE, 1)
    return False


def _build_inline(rows: Rows) -> tuple[Column, Field]:
    fd, value = rows.column(), rows.room(4)
    rows.setsockopt(fd, Level.SOCKET, SO.OOBINLINE, value)
    return fd, value


_inline = Reusable(_build_inline)


def _set_inline(socks: Sequence[socket.socket], values: Sequence[int]) -> None:
    rows, (fd, value) = _inline.of(len(socks))
    fd.set(s.fileno() for s in socks)
    value.set(values)
    with failures(socks):
        rows.run()


def _ioctl(rows: Rows, fd: Column, request: Ioctl) -> Field:
    value = rows.room(4)
    rows.call(SYS.ioctl, fd, request, value, label=request.name)
    return value


def _queue_seq(rows: Rows, fd: Column, queue: RepairQueue) -> Field:
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, queue)
    return rows.getsockopt(fd, Level.TCP, TCP.QUEUE_SEQ, 4)


def _build_reading(rows: Rows) -> tuple[Column, struct.Struct]:
    fd = rows.column()
    info = rows.getsockopt(fd, Level.TCP, TCP.INFO, INFO_SIZE)
    mss = rows.getsockopt(fd, Level.TCP, TCP.MAXSEG, 4)
    timestamp = rows.getsockopt(fd, Level.TCP, TCP.TIMESTAMP, 4)
    window = rows.getsockopt(fd, Level.TCP, TCP.REPAIR_WINDOW, WINDOW_SIZE)
    congestion = rows.getsockopt(fd, Level.TCP, TCP.CONGESTION, CONGESTION_NAME_SIZE)
    sndbuf = rows.getsockopt(fd, Level.SOCKET, SO.SNDBUF, 4)
    rcvbuf = rows.getsockopt(fd, Level.SOCKET, SO.RCVBUF, 4)
    # before 5.14 there is none: as if the application had fixed nothing
    lock = rows.getsockopt(fd, Level.SOCKET, SO.BUF_LOCK, 4, ignore=True)
    requests = (Ioctl.SIOCATMARK, Ioctl.SIOCOUTQ, Ioctl.SIOCOUTQNSD, Ioctl.SIOCINQ)
    queues = [_ioctl(rows, fd, request) for request in requests]
    write_seq = _queue_seq(rows, fd, RepairQueue.SEND)
    rcv_nxt = _queue_seq(rows, fd, RepairQueue.RECEIVE)
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    names = []
    for number, label in ((SYS.getsockname, "getsockname"), (SYS.getpeername, "getpeername")):
        address, length = rows.room(sockets.ADDRESS_SIZE), rows.constant(struct.pack("i", sockets.ADDRESS_SIZE))
        rows.call(number, fd, address, length, ignore=True, label=label)
        names.append(address)
    numbers = [(field, "I") for field in (sndbuf, rcvbuf, lock, *queues, write_seq, rcv_nxt)]
    if info.length_field is None:
        raise RuntimeError("a getsockopt without a length")
    # In struct tcp_info: state, options, scales, rto, pmtu, rtt and what follows, pacing_rate, bytes_received, min_rtt.
    return fd, rows.reader(
        (info, "B4xBBxI48xI4xIIIIII12xQ16xQ12xI"),
        (info.length_field, "I"),
        (mss, "I"),
        (timestamp, "I"),
        (window, "5I"),
        (congestion, f"{CONGESTION_NAME_SIZE}s"),
        *numbers,
        *((name, f"{sockets.ADDRESS_SIZE}s") for name in names),
    )


_reading = Reusable(_build_reading)


def read_numbers(socks: Sequence[socket.socket]) -> list[Raw]:
    """All but the queues' bytes. UnsupportedState, ConnectionCallFailed."""
    rows, (fd, reader) = _reading.of(len(socks))
    fd.set(s.fileno() for s in socks)
    with failures(socks):
        rows.run()
    found = [Raw(*parts) for parts in reader.iter_unpack(rows.memory)]
    for sock, raw in zip(socks, found, strict=True):
        state = _STATES.get(raw.number)
        if state is None or not supported(state):
            kind = "LISTEN" if state is None else state.value
            raise UnsupportedState(f"its state is {kind}", object=describe(sock))
        if state in NOT_CONNECTED:
            # getpeername() does not tell it
            raw.peer = peer_name(sock)
            if not raw.peer:
                raise UnsupportedState("it was never connected", object=describe(sock))
    return found


def _build_position(rows: Rows) -> tuple[Column, struct.Struct]:
    fd = rows.column()
    # the first byte of TCP_INFO is the state
    info = rows.getsockopt(fd, Level.TCP, TCP.INFO, 8)
    queues = [_ioctl(rows, fd, request) for request in (Ioctl.SIOCOUTQ, Ioctl.SIOCOUTQNSD, Ioctl.SIOCINQ)]
    ends = [_queue_seq(rows, fd, RepairQueue.SEND), _queue_seq(rows, fd, RepairQueue.RECEIVE)]
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    return fd, rows.reader((info, "B"), *((part, "I") for part in (*queues, *ends)))


_position = Reusable(_build_position)


def _positions(socks: Sequence[socket.socket]) -> list[tuple[int, ...]]:
    rows, (fd, reader) = _position.of(len(socks))
    fd.set(s.fileno() for s in socks)
    with failures(socks):
        rows.run()
    return list(reader.iter_unpack(rows.memory))


def read_queues(
    indices: Iterable[int], socks: Sequence[socket.socket], raw: Sequence[Raw], early: list[Early | None]
) -> None:
    """Read the queues' bytes into ``raw``."""
    small: dict[RepairQueue, list[tuple[int, int]]] = {RepairQueue.SEND: [], RepairQueue.RECEIVE: []}
    for i in indices:
        one, sock, known = raw[i], socks[i], early[i]
        one.send_queue = one.receive_queue = b""
        out = 0 if one.state in NOT_CONNECTED else one.outq - (1 if _sent_fin(one) and one.outq else 0)
        if one.state is State.SYN_SENT and peek_from(sock, RepairQueue.SEND, 1):
            raise UnsupportedState("its SYN carries data (TCP Fast Open)", object=describe(sock))
        if out > SMALL:
            one.send_queue = peek_from(sock, RepairQueue.SEND, out)
        elif out:
            small[RepairQueue.SEND].append((i, out))
        if known is not None and (known.consumed != one.consumed or known.count > one.inq or one.urgent is not None):
            # somebody has read from it; or its mark is told by a place in the whole queue
            known = early[i] = None
        if one.urgent is not None:
            one.receive_queue = _peek_past(sock, one.inq, one.urgent)
            continue
        if known is not None or one.inq > SMALL:
            done = 0 if known is None else known.count
            one.receive_queue = peek_from(sock, RepairQueue.RECEIVE, one.inq, done) if one.inq > done else b""
            _whole(sock, one, done + len(one.receive_queue))
        elif one.inq:
            small[RepairQueue.RECEIVE].append((i, one.inq))
    for queue, sizes in small.items():
        if sizes:
            for (i, _), data in zip(sizes, _peek_small([socks[i] for i, _ in sizes], sizes, queue), strict=True):
                if queue is RepairQueue.SEND:
                    raw[i].send_queue = data
                else:
                    raw[i].receive_queue = data
                    _whole(socks[i], raw[i], len(data))


def _peek_past(sock: socket.socket, size: int, mark: int) -> bytes:
    """The bytes of a receive queue on both sides of its urgent mark, where peeking stops. UrgentData.

    A peek that begins at the mark goes past it (SO_OOBINLINE is set).
    """
    head = peek_from(sock, RepairQueue.RECEIVE, mark) if mark else b""
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.RECEIVE)
    try:
        with peeking_on(sock, mark) as moves:
            if mark and not moves:
                raise UrgentData(f"an urgent mark stands {mark} bytes into it", object=describe(sock))
            return head + sock.recv(size - mark, PEEK)
    except BlockingIOError:
        # nothing there any more: a short queue, and the connection is read again
        return head
    finally:
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)


def _whole(sock: socket.socket, raw: Raw, position: int) -> None:
    """UrgentData if peeking stopped in the middle of the queue although nothing else can stop it: at the mark."""
    if position < raw.inq and ioctl_int(sock.fileno(), Ioctl.SIOCINQ) > position:
        raise UrgentData(f"an urgent mark stands {position} bytes into it", object=describe(sock))


def peek_from(sock: socket.socket, queue: RepairQueue, size: int, start: int = 0) -> bytes:
    """The bytes of a queue from ``start`` up to ``size``, with one copy."""
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, queue)
    try:
        if not start:
            return sock.recv(size, PEEK)
        with peeking_on(sock, start) as moves:
            return sock.recv(size - start, PEEK) if moves else sock.recv(size, PEEK)[start:]
    except BlockingIOError:
        # nothing there any more: a short queue, and the connection is read again
        return b""
    finally:
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)


@contextlib.contextmanager
def peeking_on(sock: socket.socket, start: int = 0) -> Iterator[bool]:
    """In the block peeking begins at ``start`` and goes on where it ended; whether this kernel can (TCP since 6.10)."""
    try:
        sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, start)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        yield False
        return
    try:
        yield True
    finally:
        sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, -1)


def _build_peeking(rows: Rows) -> tuple[Column, Field, Column, Column, RowResult]:
    fd, queue, at, size = rows.column(), rows.room(4), rows.column(), rows.column()
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, queue)
    # an error (nothing there any more) shows as a short queue, and the connection is read again
    got = rows.call(SYS.recvfrom, fd, at, size, PEEK, 0, 0, ignore=True, label="peeking a queue")
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    return fd, queue, at, size, got


_peeking = Reusable(_build_peeking)


def _peek_small(socks: Sequence[socket.socket], sizes: Sequence[tuple[int, int]], queue: RepairQueue) -> list[bytes]:
    lengths = [size for _, size in sizes]
    starts = list(itertools.accumulate(lengths, initial=0))
    memory = ctypes.create_string_buffer(starts[-1])
    base = ctypes.addressof(memory)
    rows, (fd, which, at, size, got) = _peeking.of(len(socks))
    fd.set(s.fileno() for s in socks)
    which.set([queue] * len(socks))
    at.set(base + start for start in starts[:-1])
    size.set(lengths)
    with failures(socks):
        rows.run()
    view = memoryview(memory)
    return [bytes(view[start : start + max(0, count)]) for start, count in zip(starts, got.values(), strict=False)]


def _sent_fin(raw: Raw) -> bool:
    return raw.state in LOCALLY_FINISHED
