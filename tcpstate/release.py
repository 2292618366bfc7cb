"""Rebuilt connections let live, once their addresses are local: what :mod:`tcpstate.rebuild` began."""

from __future__ import annotations

import contextlib
import functools
import socket
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Self

from tcpstate import giving, softstate
from tcpstate.errors import ConnectionCallFailed
from tcpstate.fin import put_own_fins, take_peer_fins
from tcpstate.freeze import enter_repair, leave_repair, not_in_repair
from tcpstate.kernel import bpf
from tcpstate.kernel.columns import Column, Field, Reusable, Rows, numbers_of
from tcpstate.kernel.lanes import Together
from tcpstate.kernel.route import is_local
from tcpstate.kernel.sockets import IP, IPV6, SO, Level
from tcpstate.kernel.tcp import TCP, Repair, RepairQueue
from tcpstate.opening import open_again
from tcpstate.options import Stage, number
from tcpstate.preflight import state_of
from tcpstate.record import ConnectionRecord, State
from tcpstate.refill import put, put_sent
from tcpstate.reopen import tell_windows
from tcpstate.rows import Names, failures
from tcpstate.segment import SEQ_MASK, Segment
from tcpstate.slotted import dataclass
from tcpstate.urgent import put_marks

__all__ = [
    "Ready",
    "finish_release",
    "open_connections",
    "release_connections",
    "retire",
    "write_ends",
]

#: what release gives back itself, so that the generic table must not
_OWN_HANDS = frozenset({"ip.transparent", "ipv6.transparent"})


def _build_hearing(rows: Rows) -> tuple[Column, Field]:
    fd, whole = rows.column(), rows.room(4)
    # What goes out again must go out whole: Nagle would wait for the ACK of its first part.
    rows.setsockopt(fd, Level.TCP, TCP.NODELAY, whole)
    # The filter goes before repair does, else it would drop the answer to the probe.
    rows.setsockopt(fd, Level.SOCKET, SO.DETACH_FILTER, 0, ignore=True)
    return fd, whole


def _build_leaving(rows: Rows) -> tuple[Column, Field, Field]:
    fd, mark, leave = rows.column(), rows.room(4), rows.room(4)
    # Until its own mark is back nothing it sends leaves this host.
    rows.setsockopt(fd, Level.SOCKET, SO.MARK, mark)
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR, leave, label="leaving repair mode")
    return fd, mark, leave


def _build_ends(rows: Rows) -> tuple[Column, Field]:
    fd = rows.column()
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
    end = rows.getsockopt(fd, Level.TCP, TCP.QUEUE_SEQ, 4)
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    return fd, end


_hearing = Reusable(_build_hearing)
_leaving = Reusable(_build_leaving)
_ends = Reusable(_build_ends)


def release_connections(
    socks: Sequence[socket.socket],
    records: Sequence[ConnectionRecord],
    *,
    tell: bool = True,
    connect: bool = True,
) -> None:
    """Let rebuilt connections live, once their addresses are local here: they leave repair mode, send what is to be
    sent and have their own options.

    tell     let peers that may wait for room know that there is some (:mod:`tcpstate.reopen`).  False: the caller does,
             once the network knows where the address is now; they answer with all they have
    connect  also those that were connecting (:func:`open_connections`).  False: they stay as they are

    Afterwards replay what was captured.  ConnectionCallFailed, QueueNotRestored; the other connections of the batch may
    be released or not then: call it again with those that are still in repair.
    """
    if len(socks) != len(records):
        raise ValueError(f"{len(socks)} sockets, {len(records)} records")
    if not socks:
        return
    _let_live(*_those(socks, records, unopened=False))
    if connect:
        open_connections(socks, records)
    if tell:
        tell_windows(records)


def open_connections(
    socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], arrived: Iterable[Segment] = ()
) -> None:
    """Of rebuilt connections those that were connecting, or whose connect() had failed: they connect now, or fail.

    arrived  what was captured since the freeze: a peer may have answered (:mod:`tcpstate.opening`)

    The addresses must be local, and the network know it. ConnectNotRepeated, ConnectionCallFailed.
    """
    waiting, theirs = _those(socks, records, unopened=True)
    if waiting:
        open_again(waiting, theirs, arrived)
        _give_back(waiting, theirs)


def _those(
    socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], *, unopened: bool
) -> tuple[list[socket.socket], list[ConnectionRecord]]:
    chosen = [pair for pair in zip(socks, records, strict=True) if pair[1].unopened is unopened]
    return [sock for sock, _ in chosen], [record for _, record in chosen]


def _let_live(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    if not socks:
        return
    names = Names(records)
    put_marks(socks, records)
    again = _to_send_again(socks, records, names)
    nodelay = [number(r, "tcp.nodelay") for r in records]
    rows, (fd, whole) = _hearing.of(len(socks))
    fd.set(numbers_of(socks))
    whole.set(int(n > 0) or d for n, d in zip(again, nodelay, strict=True))
    with failures(socks, names):
        rows.run()
    for sock, record in zip(socks, records, strict=True):
        if record.filter:
            try:
                bpf.attach(sock, record.filter)
            except OSError as error:
                what = f"giving its filter back: {error.strerror}"
                raise ConnectionCallFailed(what, object=str(record.conn_id)) from None
    take_peer_fins(socks, records)

    rows, (fd, mark, leave) = _leaving.of(len(socks))
    fd.set(numbers_of(socks))
    mark.set(number(r, "so.mark") for r in records)
    # The probe asks the peer for its window and for an ACK; data that goes out again does that by itself.
    leave.set(Repair.OFF_NO_PROBE if n else Repair.OFF for n in again)
    with failures(socks, names):
        rows.run()
    with softstate.wide_open(socks, records, again):
        for sock, record, count, delay_off in zip(socks, records, again, nodelay, strict=True):
            if not record.send_queue or state_of(sock) is State.CLOSED:
                # The peer has reset it: send() would take the error that its owner is to see.
                continue
            if count:
                put_sent(sock, record, 0, count)
            if len(record.send_queue) > record.sent:
                if count and not delay_off:
                    sock.setsockopt(Level.TCP, TCP.NODELAY, 0)
                put_sent(sock, record, record.sent, len(record.send_queue))
    put_own_fins(socks, records)
    _give_back(socks, records)


def write_ends(socks: Sequence[socket.socket], names: Sequence[str] | None = None) -> list[int]:
    """The sequence numbers behind what their owners have written, and their FINs. They are in repair mode, and their
    owners stopped. ConnectionCallFailed; ``names``: what they are called in it."""
    rows, (fd, end) = _ends.of(len(socks))
    fd.set(numbers_of(socks))
    with failures(socks, names):
        rows.run()
    return end.u32()


def _to_send_again(
    socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], names: Sequence[str]
) -> list[int]:
    """How many of the bytes that were sent before the rebuild did not queue as sent.

    The end of the send queue tells. No ACK changes it; since the address is here, ACKs may have arrived already.
    """
    ends = write_ends(socks, names)
    missing = [(record.snd_nxt - write_seq) & SEQ_MASK for record, write_seq in zip(records, ends, strict=True)]
    # more than it has: its own FIN is in the queue already, of a release that was cut short
    return [n if n <= len(record.send_queue) else 0 for n, record in zip(missing, records, strict=True)]


def finish_release(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    """:func:`release_connections` for sockets of which some may be released, wholly or in part: it was cut short. The
    owners are stopped. Errors as there."""
    out = {id(sock) for sock in not_in_repair(socks)} if socks else set()
    pairs = list(zip(socks, records, strict=True))
    held = [pair for pair in pairs if id(pair[0]) not in out]
    release_connections([sock for sock, _ in held], [record for _, record in held], tell=False)
    begun = [(s, r) for s, r in pairs if id(s) in out and state_of(s) is not State.CLOSED]
    if not begun:
        return
    rest, told = [sock for sock, _ in begun], [record for _, record in begun]
    # the end of the queue can only be read in repair; nobody else writes to it
    enter_repair(rest)
    try:
        ends = write_ends(rest, Names(told))
    finally:
        leave_repair(rest, [r.reuse_address for r in told], probe=False)
    for sock, record, write_seq in zip(rest, told, ends, strict=True):
        left = (record.snd_una + len(record.send_queue) - write_seq) & SEQ_MASK
        if 0 < left <= len(record.send_queue):
            put(sock, memoryview(record.send_queue)[len(record.send_queue) - left :], record)
    put_own_fins(rest, told)
    _give_back(rest, told)


@dataclass(slots=True)
class _Own:
    """Calls that give the connection's own options and buffers back."""

    fd: Column
    reuse_address: Field
    send: Field
    lock: Field
    transparent: Field
    nodelay: Field
    user_timeout: Field

    @classmethod
    def build(cls, rows: Rows) -> Self:
        fd = rows.column()
        own = cls(fd, *(rows.room(4) for _ in range(6)))
        # Leaving repair cleared it, and the listener beside it could not be bound again.
        rows.setsockopt(fd, Level.SOCKET, SO.REUSEADDR, own.reuse_address)
        rows.setsockopt(fd, Level.SOCKET, SO.SNDBUFFORCE, own.send)
        # Setting a size fixed it; this lets the kernel tune the sizes again that it tuned before. Before 5.14 it
        # cannot be.
        rows.setsockopt(fd, Level.SOCKET, SO.BUF_LOCK, own.lock, ignore=True)
        rows.setsockopt(fd, Level.IP, IP.TRANSPARENT, own.transparent, ignore=True)
        rows.setsockopt(fd, Level.IPV6, IPV6.TRANSPARENT, own.transparent, ignore=True)
        rows.setsockopt(fd, Level.TCP, TCP.NODELAY, own.nodelay)
        # The largest value kept it alive; 0, the usual one, is not among the recorded options.
        rows.setsockopt(fd, Level.TCP, TCP.USER_TIMEOUT, own.user_timeout)
        return own


_own = Reusable(_Own.build)


def _give_back(
    socks: Sequence[socket.socket],
    records: Sequence[ConnectionRecord],
    *,
    skip: frozenset[str] = _OWN_HANDS,
    shared: bool = False,
) -> None:
    """The connection's own options, buffers and filter. ``shared``: a listener may still be bound to its port."""
    rows, own = _own.of(len(socks))
    own.fd.set(numbers_of(socks))
    own.reuse_address.set(shared or r.reuse_address for r in records)
    own.send.set(r.buffers.send // 2 for r in records)
    own.lock.set(r.buffers.locks for r in records)
    own.transparent.set(_transparent(r) for r in records)
    own.nodelay.set(number(r, "tcp.nodelay") for r in records)
    own.user_timeout.set(number(r, "tcp.user_timeout") for r in records)
    with failures(socks, Names(records)):
        rows.run()
        giving.give(socks, giving.alike(records), Stage.RELEASED, skip=skip)
    for sock, record in zip(socks, records, strict=True):
        if record.filter_locked:
            sock.setsockopt(Level.SOCKET, SO.LOCK_FILTER, 1)


#: of a connection that is made ready: its timers begin, and it may be heard, with the release
_LATER: Final = frozenset({"so.keepalive", "so.mark"})


def _build_ready(rows: Rows, *, deaf: bool) -> tuple[Column, Field]:
    fd, reuse_address = rows.column(), rows.room(4)
    if deaf:
        rows.setsockopt(fd, Level.SOCKET, SO.DETACH_FILTER, 0, ignore=True)
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE, label="leaving repair mode")
    # leaving repair cleared it
    rows.setsockopt(fd, Level.SOCKET, SO.REUSEADDR, reuse_address)
    return fd, reuse_address


def _build_number(option: SO) -> Callable[[Rows], tuple[Column, Field]]:
    def build(rows: Rows) -> tuple[Column, Field]:
        fd, value = rows.column(), rows.room(4)
        rows.setsockopt(fd, Level.SOCKET, option, value)
        return fd, value

    return build


def _build_listening(rows: Rows) -> Column:
    fd = rows.column()
    rows.setsockopt(fd, Level.SOCKET, SO.DETACH_FILTER, 0, ignore=True)
    return fd


_ready = {deaf: Reusable(functools.partial(_build_ready, deaf=deaf)) for deaf in (True, False)}
_listening = Reusable(_build_listening)
_marking = Reusable(_build_number(SO.MARK))
_keeping = Reusable(_build_number(SO.KEEPALIVE))


class Ready:
    """Rebuilt connections with nothing in their queues, made ready: all of the release that can be done while they are
    silent, and in repair mode. ConnectionCallFailed, OSError.

    Unless one of their addresses is local here already, they are without a filter then: nothing can arrive until the
    address does, and from then on it is theirs. It would take a third of the release's time to take it away.
    """

    def __init__(self, socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
        self._socks = socks
        self._records = records
        # as the table of calls wants them: peers wait when it is filled
        self._fds = numbers_of(socks)
        self._reuse_address = array("I", [r.reuse_address for r in records])
        self._places = array("Q", range(len(socks)))
        self._keepalive = frozenset(at for at, r in enumerate(records) if number(r, "so.keepalive"))
        self._deaf = any(map(is_local, {r.conn_id.local for r in records}))
        if socks:
            _give_back(socks, records, skip=_OWN_HANDS | _LATER, shared=True)
            # In repair, with nothing that arrives and without keepalive nothing makes it send.
            self._set(_marking, self._fds, [number(r, "so.mark") for r in records], range(len(socks)))
            if not self._deaf:
                rows, fd = _listening.of(len(socks))
                fd.set(self._fds)
                with failures(socks, Names(records)):
                    rows.run()

    def _set(
        self, table: Reusable[tuple[Column, Field]], fds: array[int], values: Iterable[int], places: Sequence[int]
    ) -> None:
        """A table's calls for ``fds``, those at ``places``."""
        rows, (fd, value) = table.of(len(fds))
        fd.set(fds)
        value.set(values)
        with failures(self._socks, Names(self._records, places)):
            rows.run()

    def release(self, without: Collection[int] = ()) -> Together:
        """Let them live, but for those at these places: begun now, by another thread if they are many. Their addresses
        are local. ConnectionCallFailed, when it is finished."""
        gaps = sorted(without)
        places, fds, again = (_cut(each, gaps) for each in (self._places, self._fds, self._reuse_address))
        keep = self._keepalive

        def some(part: slice) -> None:
            self._set(_ready[self._deaf], fds[part], again[part], places[part])
            if keeping := [at for at in places[part] if at in keep] if keep else []:
                self._set(_keeping, array("Q", [self._fds[at] for at in keeping]), [1] * len(keeping), keeping)

        return Together(len(places), some)


def _cut(values: array[int], gaps: Sequence[int]) -> array[int]:
    """Without those at the places of ``gaps``, in order: there are few, of thousands, and peers wait."""
    kept, start = array(values.typecode), 0
    for gap in gaps:
        kept += values[start:gap]
        start = gap + 1
    kept += values[start:]
    return kept


def retire(socks: Sequence[socket.socket]) -> None:
    """Sockets that were rebuilt and dissolved again: as ones without a connection. OSError."""
    for sock in socks:
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE)
        with contextlib.suppress(FileNotFoundError):  # it has none
            sock.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)
        sock.setsockopt(Level.SOCKET, SO.MARK, 0)
        sock.setsockopt(Level.TCP, TCP.USER_TIMEOUT, 0)


def _transparent(record: ConnectionRecord) -> int:
    return max(number(record, keyword) for keyword in _OWN_HANDS)
