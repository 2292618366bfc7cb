"""Connections that wait in a listener's accept queue, moved into the accept queue of a listener elsewhere.

They have no descriptor yet, so a frozen owner cannot be asked for them; but whoever holds the listener can accept
them::

    queues = capture(listeners)               # owners stopped; nothing reaches the listeners any more
    ...                                       # the address moves
    refill(records, listener, elapsed=...)    # its address is local, it listens: they are in its queue
    discard(queues)                           # the originals end without a packet

In the queue's place an accept() finds them with early data and exact sequence numbers: an ACK of the peer is injected
over loopback, and a BPF program vouches for it (:mod:`tcpstate.kernel.bpf.handshake`); what they had received follows
as segments of the peer.

Where the kernel cannot, a policy decides, by name: ``keep`` and ``refuse`` give the move up before anything is stopped,
``reset`` lets it go on without them.

What comes through: addresses, sequence numbers, everything received, options of the handshake, our timestamp clock, the
peer's FIN.  What does not: a connection that was reset while it waited (accept() would give a dead socket); more early
data than a listener's buffer can be made to hold.
"""

from __future__ import annotations

import contextlib
import enum
import ipaddress
import logging
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Final

from tcpstate.capture import Injector
from tcpstate.connid import ConnId
from tcpstate.discard import discard_connections
from tcpstate.errors import KernelFeatureMissing
from tcpstate.export import export_connections, later
from tcpstate.freeze import Gate, QuietState, quiet, shut
from tcpstate.kernel import diag
from tcpstate.kernel.bpf.handshake import Agreed, Vouching, cookies_allowed
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import INFO_SIZE, TCP, TcpInfo, TcpState
from tcpstate.locate import accept_queues
from tcpstate.record import ConnectionRecord
from tcpstate.segment import SEQ_MASK, Flag, Segment, timestamp_option
from tcpstate.shelf import Shelf
from tcpstate.slotted import dataclass

__all__ = ["Policy", "Queue", "capture", "discard", "keeps", "missing", "put_back", "refill"]

_log = logging.getLogger(__name__)

#: bytes of early data in one injected segment: as much as a packet over loopback may have, less headers
_SEGMENT: Final = 32 << 10
#: bytes of early data that an ordinary listener's first window takes in any case
_SMALL: Final = 32 << 10
_WINDOW_MAX: Final = 0xFFFF
#: SO_RCVBUFFORCE takes an int and doubles it
_BUFFER_MAX: Final = (1 << 30) - 1
_LOOPBACK: Final = "lo"
#: injected segments are usually processed before sendto() returns; if not, they are looked for, and sent again
_TRIES: Final = 50
_PAUSE: Final = 0.001
#: what a connection is that nobody has accepted yet
_FRESH: Final = QuietState(
    filter=(), filter_locked=False, mark=0, user_timeout=0, keepalive=False, reuse_address=False, minimum_ttl=0,
    minimum_hops=0, gate=Gate.FILTER,
)  # fmt: skip


class Policy(enum.Enum):
    """What becomes of connections that wait to be accepted and that the application does not accept in time."""

    KEEP = "keep"  # they move, in the queue; where a kernel cannot, as REFUSE
    RESET = "reset"  # they move where they can; else their peers are reset
    REFUSE = "refuse"  # nothing moves


@dataclass(slots=True)
class Queue:
    """What waited in one listener's queue, in its order.

    records  the connections
    socks    their sockets, in repair mode
    """

    records: list[ConnectionRecord]
    socks: list[socket.socket]


def missing() -> KernelFeatureMissing | None:
    """Why connections cannot be put into an accept queue in the calling thread's network namespace; None if they
    can."""
    if not cookies_allowed():
        return KernelFeatureMissing(
            "net.ipv4.tcp_syncookies is 0: connections cannot be put into an accept queue",
            object="tcp_syncookies",
            fix="Set net.ipv4.tcp_syncookies to 1.",
        )
    try:
        Vouching([socket.if_nametoindex(_LOOPBACK)]).close()
    except KernelFeatureMissing as error:
        return error
    except OSError as error:
        return KernelFeatureMissing(f"no loopback interface: {error.strerror}", object=_LOOPBACK)
    return None


def keeps(listener: socket.socket) -> bool:
    """Whether what waits in this listener's queue can be kept: one of an interface does not hear what comes over
    loopback; one that takes no filter (Multipath TCP, SO_LOCK_FILTER) would take more meanwhile."""
    if listener.getsockopt(Level.SOCKET, SO.PROTOCOL) != socket.IPPROTO_TCP:
        return False
    return not any(listener.getsockopt(Level.SOCKET, option) for option in (SO.BINDTOIFINDEX, SO.LOCK_FILTER))


def capture(listeners: Sequence[socket.socket], shelf: Shelf | None = None) -> list[Queue]:
    """Take what waits out of the queues of listening sockets; it is in repair mode afterwards.

    shelf  where it lies as well, so that our death does not lose it (:func:`put_back`)

    Their owners must be stopped. No segment reaches the listeners any more, until their filters are given back
    (:func:`tcpstate.filters.undo_drop_syns`).  OSError, ForeignFilter, ConnectionCallFailed and what an export raises:
    what was taken by then is closed, and its peers are reset.
    """
    # a handshake that completes now would begin a connection that nobody exports
    shut(listeners)
    taken: list[list[socket.socket]] = [[] for _ in listeners]
    try:
        for mine, listener, count in zip(taken, listeners, accept_queues(listeners), strict=True):
            for _ in range(count):
                # no more than there are: one more would wait for ever
                sock, _ = listener.accept()
                if shelf is not None:
                    shelf.put(sock)
                if _state(sock) is TcpState.CLOSE:
                    _log.debug("a connection was reset while it waited to be accepted")
                    sock.close()
                else:
                    mine.append(sock)
        flat = [sock for mine in taken for sock in mine]
        records = iter(export_connections(flat, quiet(flat)))
    except BaseException:
        for mine in taken:
            for sock in mine:
                sock.close()
        raise
    return [Queue([next(records) for _ in mine], mine) for mine in taken]


def discard(queues: Sequence[Queue]) -> None:
    """End what :func:`capture` took, without a packet."""
    socks = [sock for queue in queues for sock in queue.socks]
    for queue in queues:
        queue.socks = []
    discard_connections(socks)


def put_back(socks: Sequence[socket.socket], listeners: Sequence[socket.socket]) -> list[tuple[ConnectionRecord, str]]:
    """Back into the queues of their listeners, which have their own filters again, what :func:`capture` of a program
    that was killed had taken out of them; those that could not be, with the reason. Their owners are stopped.

    What was given back already has ended. OSError, and what an export raises.
    """
    living = [sock for sock in socks if _state(sock) is not TcpState.CLOSE]
    # quiet or not yet; they never had anything but what they have from their listeners, and have it from these again
    begun = time.monotonic()
    records = export_connections(living, quiet(living, [_FRESH] * len(living)))
    left: list[tuple[ConnectionRecord, str]] = []
    waiting = list(zip(records, living, strict=True))
    for listener in listeners:
        address, port = listener.getsockname()[:2]
        mine = [one for one in waiting if _is_for(one[0].conn_id, address, port)]
        waiting = [one for one in waiting if one not in mine]
        originals = [sock for _, sock in mine]
        left += refill([r for r, _ in mine], listener, elapsed=time.monotonic() - begun, originals=originals)
    return left + [(record, "its listener is gone") for record, _ in waiting]


def _is_for(conn: ConnId, address: str, port: int) -> bool:
    if conn.local_port != port:
        return False
    bound = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(bound, ipaddress.IPv6Address) and bound.ipv4_mapped is not None:
        bound = bound.ipv4_mapped
    return bound.is_unspecified or bound == ipaddress.ip_address(conn.local.partition("%")[0])


def _state(sock: socket.socket) -> TcpState:
    return TcpState(TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE)).state)


def refill(
    records: Sequence[ConnectionRecord],
    listener: socket.socket,
    *,
    elapsed: float,
    originals: Sequence[socket.socket] = (),
) -> list[tuple[ConnectionRecord, str]]:
    """Put connections into the accept queue of a listener whose address is local; those that could not be, with the
    reason.

    elapsed    seconds since the export returned, rather too much than too little
    originals  sockets in repair mode that are these connections still (everything is undone): they end first, when
               what comes for them is not answered any more

    Of several listeners that share a port (SO_REUSEPORT) the kernel chooses one, as for any new connection. OSError.
    """
    if not records:
        return []
    try:
        # at all: what the peers send before their connections are here must not be answered with resets
        vouching = Vouching([index for index, _ in socket.if_nameindex()])
    except KernelFeatureMissing as error:
        return [(record, error.message) for record in records]
    if not cookies_allowed():
        vouching.close()
        return [(record, "net.ipv4.tcp_syncookies is 0") for record in records]
    largest = max(len(record.receive_queue) for record in records)
    with vouching, _roomy(listener, largest), Injector() as injector:
        for record in records:
            vouching.expect(record.conn_id, _agreed(record, elapsed))
        discard_connections(originals)
        left = list(records)
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE)
            for record in left:
                for segment in _segments(record, elapsed):
                    injector.send(segment)
            there = _there({record.conn_id.local_port for record in left})
            left = [record for record in left if there.get(record.conn_id) != _received(record)]
            if not left:
                return []
            for record in left:
                if record.conn_id not in there:
                    # the queue was full, or memory short: without an entry its ACK would be answered with a reset
                    vouching.expect(record.conn_id, _agreed(record, elapsed))
    return [(record, "its listener did not take it") for record in left]


@contextlib.contextmanager
def _roomy(listener: socket.socket, size: int) -> Iterator[None]:
    """In the block the listener's children have receive buffers for ``size`` bytes of early data."""
    if size <= _SMALL:
        yield
        return
    before = listener.getsockopt(Level.SOCKET, SO.RCVBUF), listener.getsockopt(Level.SOCKET, SO.BUF_LOCK)
    # the kernel doubles it, and offers half of that at most
    listener.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, min(2 * size + _SMALL, _BUFFER_MAX))
    # else the children would not tune theirs
    listener.setsockopt(Level.SOCKET, SO.BUF_LOCK, before[1])
    try:
        yield
    finally:
        listener.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, before[0] // 2)
        listener.setsockopt(Level.SOCKET, SO.BUF_LOCK, before[1])


def _received(record: ConnectionRecord) -> int:
    """What its socket must count as unread: the peer's FIN counts as one."""
    return len(record.receive_queue) + record.peer_fin


def _there(ports: Collection[int]) -> dict[ConnId, int]:
    """The connections of these ports that nobody has open, and what they count as unread."""
    states = 1 << TcpState.ESTABLISHED | 1 << TcpState.CLOSE_WAIT
    found = [one for port in ports for one in diag.dump(states, local_port=port) if not one.inode]
    return {one.conn_id: one.rqueue for one in found}


def _clock(record: ConnectionRecord, elapsed: float) -> int:
    clock = record.timestamps
    return 0 if clock is None else later(clock.value, clock.microseconds, elapsed) & ~1


def _agreed(record: ConnectionRecord, elapsed: float) -> Agreed:
    n = record.negotiated
    return Agreed(
        seq=record.copied_seq,
        ack=record.snd_una,
        mss=n.mss,
        snd_wscale=n.snd_wscale,
        rcv_wscale=n.rcv_wscale,
        sack=n.sack,
        ecn=n.ecn,
        # 0: nothing is known of the peer's clock, so that whatever it sends next is no older
        timestamps=(0, _clock(record, elapsed)) if record.timestamps is not None else None,
        microseconds=record.timestamps is not None and record.timestamps.microseconds,
    )


def _segments(record: ConnectionRecord, elapsed: float) -> Iterator[Segment]:
    """What the peer would have sent: the ACK of the handshake with the first data, the rest of the data, its FIN."""
    conn = record.conn_id
    data = record.receive_queue
    options = timestamp_option(0, _clock(record, elapsed)) if record.timestamps is not None else b""
    pieces = [(start, Flag.ACK, data[start : start + _SEGMENT]) for start in range(0, len(data) or 1, _SEGMENT)]
    if record.peer_fin:
        # apart: the program vouches for no ACK that ends a connection as well
        pieces.append((len(data), Flag.ACK | Flag.FIN, b""))
    for start, flags, piece in pieces:
        yield Segment(
            source=conn.peer.partition("%")[0],
            source_port=conn.peer_port,
            destination=conn.local.partition("%")[0],
            destination_port=conn.local_port,
            seq=(record.copied_seq + start) & SEQ_MASK,
            ack=record.snd_una,
            flags=flags,
            window=min(_WINDOW_MAX, record.windows.snd_wnd >> (record.negotiated.snd_wscale or 0)),
            options=options,
            payload=piece,
        )
