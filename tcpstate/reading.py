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
import functools
import itertools
import operator
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from tcpstate import options
from tcpstate.closed import peer_name
from tcpstate.early import COUNTED, Early, consumed
from tcpstate.errors import StillMoving, UnsupportedState, UrgentData
from tcpstate.kernel.columns import Column, Field, Reusable, RowResult, Rows, numbers_of
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import CONGESTION_NAME_SIZE, TCP, WINDOW_SIZE, RepairQueue, TcpState
from tcpstate.preflight import NOT_CONNECTED, STATES, supported
from tcpstate.record import LOCALLY_FINISHED, State
from tcpstate.rows import describe, failures, portions
from tcpstate.scratch import Scratch

__all__ = [
    "PEEK",
    "SMALL",
    "Numbers",
    "Raw",
    "peek_from",
    "peeking_on",
    "read_all",
    "read_live",
    "read_numbers",
    "read_queues",
]

#: how often a connection is read again whose state changed while it was read
_TRIES = 5
PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
#: bytes of a queue up to which queues are read in one batch
SMALL = 64 << 10
_STATES = {int(number): state for number, state in STATES.items()}
_ESTABLISHED = int(TcpState.ESTABLISHED)
_MOVING = ("bytes_acked", "bytes_received", "segments_in", "unsent")


class Numbers(NamedTuple):
    """What one connection's calls gave, in the order of :func:`_build_reading`. TCP_INFO is read before all else.

    The ends are cut in three, so that all but the ports is the same for many connections; ports are in network order.
    """

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
    bytes_acked: int
    bytes_received: int
    segments_in: int
    unsent: int
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
    local_family: bytes
    local_port: int
    local_rest: bytes
    peer_family: bytes
    peer_port: int
    peer_rest: bytes


#: a Numbers of a tuple: its _make() without a look at the length, which the reader's format fixes
_numbers: Final = functools.partial(tuple.__new__, Numbers)
#: of TCP_INFO: what changes if anything arrives, is acknowledged, or is sent for the first time
_position_of: Final = operator.itemgetter(0, *map(Numbers._fields.index, _MOVING))


class Raw:
    """One connection as the kernel's calls gave it.

    told             the numbers
    nsd, inq         of the queues, corrected
    send_queue, receive_queue  their bytes
    urgent, taken    where the urgent byte stands in the receive queue, and whether the application has it already
    peer             struct sockaddr of the peer where getpeername() does not tell it
    """

    __slots__ = ("inq", "nsd", "peer", "receive_queue", "send_queue", "taken", "told", "urgent")

    def __init__(self, told: Numbers) -> None:
        self.told = told
        self.nsd, self.inq = told.nsd, told.inq
        self.send_queue = self.receive_queue = b""
        self.urgent: int | None = None
        self.taken = False
        self.peer: bytes | None = None

    @property
    def state(self) -> State:
        """In the record's words."""
        return _STATES[self.told.number]

    @property
    def consumed(self) -> int | None:
        """Bytes that the application has taken, by the kernel's count; None on a kernel that does not count."""
        if self.told.info_length < COUNTED:
            return None
        return consumed(TcpState(self.told.number), self.told.bytes_received, self.inq)


def read_all(socks: Sequence[socket.socket], saved: Sequence[options.Saved], early: list[Early | None]) -> list[Raw]:
    """Read until nothing moves; SO_OOBINLINE and SO_PEEK_OFF are given back in any case."""
    peeked = [(s, o.numbers["so.peek_off"][0]) for s, o in zip(socks, saved, strict=True) if "so.peek_off" in o.numbers]
    inlined: set[int] = set()
    for sock, _ in peeked:
        # else peeking would begin at the application's offset
        sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, -1)
    try:
        raw = read_numbers(socks)
        todo: Sequence[int] = range(len(socks))
        for _ in range(_TRIES):
            _see_marks([i for i in todo if raw[i].inq or raw[i].told.at_mark], socks, raw, inlined)
            read_queues(todo, socks, raw, early)
            again = _positions(socks if len(todo) == len(socks) else [socks[i] for i in todo])
            todo = [i for i, new in zip(todo, again, strict=True) if _position_of(raw[i].told) != new]
            if not todo:
                return raw
            for i, fresh in zip(todo, read_numbers([socks[i] for i in todo]), strict=True):
                raw[i] = fresh
        raise StillMoving("its queues keep changing although it is frozen", object=describe(socks[todo[0]]))
    finally:
        _set_inline([(socks[i], saved[i].numbers.get("so.oobinline", (0,))[0]) for i in inlined])
        for sock, offset in peeked:
            sock.setsockopt(Level.SOCKET, SO.PEEK_OFF, offset)


def _see_marks(indices: Sequence[int], socks: Sequence[socket.socket], raw: Sequence[Raw], inlined: set[int]) -> None:
    """How much there is to read, and where the urgent mark stands in it. SO_OOBINLINE is set afterwards.

    Otherwise SIOCINQ stops at the mark and hides what is behind it: the difference is where it stands.  A queue in
    which it says nothing, and whose head is not at a mark, is empty.
    """
    if not indices:
        return
    mine = [socks[i] for i in indices]
    inlined.update(indices)
    rows, (fd, before, whole) = _marking.of(len(mine))
    fd.set(numbers_of(mine))
    with failures(mine):
        rows.run()
    for i, ahead, unread in zip(indices, before.u32(), whole.u32(), strict=True):
        raw[i].inq = unread
        if ahead < unread:
            raw[i].urgent = ahead
            raw[i].taken = _taken(socks[i])


def _build_marking(rows: Rows) -> tuple[Column, Field, Field]:
    fd = rows.column()
    rows.setsockopt(fd, Level.SOCKET, SO.OOBINLINE, 0)
    before = _ioctl(rows, fd, Ioctl.SIOCINQ)
    rows.setsockopt(fd, Level.SOCKET, SO.OOBINLINE, 1)
    return fd, before, _ioctl(rows, fd, Ioctl.SIOCINQ)


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


def _set_inline(pairs: Sequence[tuple[socket.socket, int]]) -> None:
    if not pairs:
        return
    socks = [sock for sock, _ in pairs]
    rows, (fd, value) = _inline.of(len(socks))
    fd.set(numbers_of(socks))
    value.set(number for _, number in pairs)
    with failures(socks):
        rows.run()


def _ioctl(rows: Rows, fd: Column, request: Ioctl) -> Field:
    value = rows.room(4)
    rows.call(SYS.ioctl, fd, request, value, label=request.name)
    return value


def _queue_seq(rows: Rows, fd: Column, queue: RepairQueue) -> Field:
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, queue)
    return rows.getsockopt(fd, Level.TCP, TCP.QUEUE_SEQ, 4)


def _build_reading(rows: Rows, *, repair: bool = True) -> tuple[Column, struct.Struct]:
    """``repair``: they are in repair mode; else what only that tells stays 0: MSS, windows, ends of the queues."""
    fd = rows.column()
    # The first of all: what moves after it is seen.
    info = rows.getsockopt(fd, Level.TCP, TCP.INFO, _INFO_SIZE)
    mss = rows.getsockopt(fd, Level.TCP, TCP.MAXSEG, 4) if repair else rows.room(4)
    timestamp = rows.getsockopt(fd, Level.TCP, TCP.TIMESTAMP, 4)
    window = rows.getsockopt(fd, Level.TCP, TCP.REPAIR_WINDOW, WINDOW_SIZE) if repair else rows.room(WINDOW_SIZE)
    congestion = rows.getsockopt(fd, Level.TCP, TCP.CONGESTION, CONGESTION_NAME_SIZE)
    sndbuf = rows.getsockopt(fd, Level.SOCKET, SO.SNDBUF, 4)
    rcvbuf = rows.getsockopt(fd, Level.SOCKET, SO.RCVBUF, 4)
    # before 5.14 there is none: as if the application had fixed nothing
    lock = rows.getsockopt(fd, Level.SOCKET, SO.BUF_LOCK, 4, ignore=True)
    requests = (Ioctl.SIOCATMARK, Ioctl.SIOCOUTQ, Ioctl.SIOCOUTQNSD, Ioctl.SIOCINQ)
    queues = [_ioctl(rows, fd, request) for request in requests]
    write_seq = _queue_seq(rows, fd, RepairQueue.SEND) if repair else rows.room(4)
    rcv_nxt = _queue_seq(rows, fd, RepairQueue.RECEIVE) if repair else rows.room(4)
    if repair:
        rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    names = []
    for number, label in ((SYS.getsockname, "getsockname"), (SYS.getpeername, "getpeername")):
        address, length = rows.room(_NAME_SIZE), rows.constant(struct.pack("i", _NAME_SIZE))
        rows.call(number, fd, address, length, ignore=True, label=label)
        names.append(address)
    numbers = [(field, "I") for field in (sndbuf, rcvbuf, lock, *queues, write_seq, rcv_nxt)]
    if info.length_field is None:
        raise RuntimeError("a getsockopt without a length")
    return fd, rows.reader(
        (info, _INFO),
        (info.length_field, "I"),
        (mss, "I"),
        (timestamp, "I"),
        (window, "5I"),
        (congestion, f"{CONGESTION_NAME_SIZE}s"),
        *numbers,
        *((name, "2sH24s") for name in names),
    )


#: of struct tcp_info: state, options, scales, rto, pmtu, rtt and what follows, pacing_rate, bytes_acked and
#: bytes_received, segs_in, notsent_bytes, min_rtt (all there since 4.6; TCP_REPAIR_WINDOW came later)
_INFO: Final = "B4xBBxI48xI4xIIIIII12xQ8xQQ4xIII"
_INFO_SIZE: Final = struct.calcsize("=" + _INFO)
#: and of these again the ones that move
_MOVES: Final = "B119xQQ4xII"
#: struct sockaddr_in6, the larger of both
_NAME_SIZE: Final = 28

_reading = Reusable(_build_reading)
_reading_live = Reusable(functools.partial(_build_reading, repair=False))


def read_numbers(socks: Sequence[socket.socket]) -> list[Raw]:
    """All but the queues' bytes. UnsupportedState, ConnectionCallFailed."""
    rows, (fd, reader) = _reading.of(len(socks))
    fd.set(numbers_of(socks))
    with failures(socks):
        rows.run()
    found = list(map(Raw, map(_numbers, reader.iter_unpack(rows.memory))))
    for sock, raw in zip(socks, found, strict=True):
        if raw.told.number == _ESTABLISHED:
            continue
        state = _STATES.get(raw.told.number)
        if state is None or not supported(state):
            kind = "LISTEN" if state is None else state.value
            raise UnsupportedState(f"its state is {kind}", object=describe(sock))
        if state in NOT_CONNECTED:
            # getpeername() does not tell it
            raw.peer = peer_name(sock)
            if not raw.peer:
                raise UnsupportedState("it was never connected", object=describe(sock))
    return found


def read_live(socks: Sequence[socket.socket]) -> list[Numbers]:
    """The numbers of connections that go on, but for those that only repair mode tells, which are 0: ``mss``, windows,
    ``write_seq``, ``rcv_nxt``. ConnectionCallFailed."""
    rows, (fd, reader) = _reading_live.of(len(socks))
    fd.set(numbers_of(socks))
    with failures(socks):
        rows.run()
    return list(map(_numbers, reader.iter_unpack(rows.memory)))


def _build_position(rows: Rows) -> tuple[Column, struct.Struct]:
    fd = rows.column()
    info = rows.getsockopt(fd, Level.TCP, TCP.INFO, struct.calcsize("=" + _MOVES))
    return fd, rows.reader((info, _MOVES))


_position = Reusable(_build_position)


def _positions(socks: Sequence[socket.socket]) -> list[tuple[int, ...]]:
    rows, (fd, reader) = _position.of(len(socks))
    fd.set(numbers_of(socks))
    with failures(socks):
        rows.run()
    return list(reader.iter_unpack(rows.memory))


def read_queues(
    indices: Iterable[int], socks: Sequence[socket.socket], raw: Sequence[Raw], early: list[Early | None]
) -> None:
    """Read the queues' bytes into ``raw``."""
    small: dict[RepairQueue, list[tuple[int, int]]] = {RepairQueue.SEND: [], RepairQueue.RECEIVE: []}
    for i in indices:
        one, known = raw[i], early[i]
        outq = one.told.outq
        if one.told.number == _ESTABLISHED and known is None and one.urgent is None and max(outq, one.inq) <= SMALL:
            if outq:
                small[RepairQueue.SEND].append((i, outq))
            if one.inq:
                small[RepairQueue.RECEIVE].append((i, one.inq))
            continue
        sock = socks[i]
        out = 0 if one.state in NOT_CONNECTED else outq - (1 if _sent_fin(one) and outq else 0)
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
                    if len(data) < raw[i].inq:
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


_memory = Scratch()


def _peek_small(socks: Sequence[socket.socket], sizes: Sequence[tuple[int, int]], queue: RepairQueue) -> list[bytes]:
    found: list[bytes] = []
    for part in portions([size for _, size in sizes]):
        found += _peek_portion(socks[part], [size for _, size in sizes[part]], queue)
    return found


def _peek_portion(socks: Sequence[socket.socket], lengths: Sequence[int], queue: RepairQueue) -> list[bytes]:
    starts = list(itertools.accumulate(lengths, initial=0))
    memory = _memory.of(starts[-1])
    base = ctypes.addressof(memory)
    rows, (fd, which, at, size, got) = _peeking.of(len(socks))
    fd.set(numbers_of(socks))
    which.set([queue] * len(socks))
    at.set([base + start for start in starts[:-1]])
    size.set(lengths)
    with failures(socks):
        rows.run()
    view = memoryview(memory)
    return [bytes(view[start : start + max(0, count)]) for start, count in zip(starts, got.values(), strict=False)]


def _sent_fin(raw: Raw) -> bool:
    return raw.state in LOCALLY_FINISHED
