"""Portable records to sockets (paper, 5.2 and 5.4): in repair before the address is here, released once it is.

::

    socks = rebuild_connections(records, elapsed=...)    # silent, in repair; re-export and compare() them now
    ...                                                  # the address moves here, until route.is_local() says so
    release_connections(socks, records)                  # they leave repair, and send
    capture.replay(...)                                  # what arrived while nobody was home

Sent data of which no ACK came back is *not* put into the send queue as sent, as long as all of it fits a fresh
congestion window: a lost segment would then wait for a retransmission timeout of seconds.  It is sent again at the
release instead, and a peer that has it already acknowledges at once.  Beyond the congestion window that would deadlock
(an ACK of what we have not sent again yet is ignored), so there it is queued as sent.

Between rebuild and release the sockets are as quiet as frozen ones: the filter drops what arrives (the capture has it),
and their timers send nothing, as long as there is a :func:`tcpstate.freeze.blackhole` in this network namespace.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping, Sequence

from tcpstate import options
from tcpstate.comparison import Difference, compare, read_back
from tcpstate.errors import ConnectionCallFailed, QueueNotRestored, UnsupportedState
from tcpstate.export import advance
from tcpstate.fin import put_own_fins, take_peer_fins
from tcpstate.freeze import MARK, shut
from tcpstate.kernel import bpf
from tcpstate.kernel.columns import Rows
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import IP, IPV6, SO, BufferLock, Level, pack_address
from tcpstate.kernel.tcp import INFO_SIZE, TCP, USER_TIMEOUT_MAX, Repair, RepairQueue, RepairWindow, TcpInfo
from tcpstate.kernel.tcp import repair_options as pack_repair_options
from tcpstate.options import Stage, number
from tcpstate.preflight import state_of, supported
from tcpstate.record import ConnectionRecord, Family, State
from tcpstate.reopen import tell_windows
from tcpstate.rows import failures
from tcpstate.segment import SEQ_MASK

__all__ = ["Difference", "compare", "read_back", "rebuild_connections", "release_connections"]

#: room beside a queue's bytes in its buffer: the kernel counts its own bookkeeping
_BUFFER_SLACK = 64 << 10
#: SO_SNDBUFFORCE takes an int and doubles it
_BUFFER_MAX = (1 << 30) - 1
_CHUNK_FIRST = 1 << 20
_CHUNK_LEAST = 1 << 10
#: what send() says once the peer has reset the connection
_ENDED = frozenset({errno.EPIPE, errno.ECONNRESET})
#: what release gives back itself, so that the generic table must not
_OWN_HANDS = frozenset({"ip.transparent", "ipv6.transparent"})


def _family(record: ConnectionRecord) -> int:
    return socket.AF_INET if record.family is Family.IPV4 else socket.AF_INET6


def _fresh(records: Sequence[ConnectionRecord]) -> list[socket.socket]:
    made: list[socket.socket] = []
    try:
        for record in records:
            made.append(socket.socket(_family(record), socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
    except OSError:
        _close(made)
        raise
    return made


def _close(socks: Sequence[socket.socket]) -> None:
    for sock in socks:
        sock.close()


def rebuild_connections(
    records: Sequence[ConnectionRecord],
    socks: Sequence[socket.socket] | None = None,
    *,
    elapsed: float = 0.0,
    devices: Mapping[str, str] | None = None,
) -> list[socket.socket]:
    """Sockets in repair mode that continue the connections of ``records``, in the same order.

    socks    fresh TCP sockets of the right families, never bound or connected, that shall become them (the new owner
             may have their descriptors already); made here if None
    elapsed  seconds since the export returned, measured by one clock; never two hosts' wall clocks.  Rather too much
             than too little: a peer drops what comes with an older timestamp
    devices  interface names of the source and what they are called here (SO_BINDTODEVICE, link-local scopes)

    All or none: on failure sockets made here are closed silently, given ones are left in repair mode, to be closed.
    UnsupportedState, AddressInUse (the 4-tuple exists here), QueueNotRestored, ConnectionCallFailed.
    """
    if socks is not None and len(socks) != len(records):
        raise ValueError(f"{len(socks)} sockets for {len(records)} records")
    for record in records:
        if not supported(record.state):
            raise UnsupportedState(f"its state is {record.state.value}", object=str(record.conn_id))
    if not records:
        return []
    made = _fresh(records) if socks is None else list(socks)
    try:
        for family in (socket.AF_INET, socket.AF_INET6):
            mine = [i for i, record in enumerate(records) if _family(record) == family]
            if mine:
                _connect([made[i] for i in mine], [records[i] for i in mine], family, elapsed, devices or {})
        _fill(made, records)
        _finish(made, records)
    except BaseException:
        if socks is None:
            # in repair closing sends nothing
            _close(made)
        raise
    return made


def _renamed(record: ConnectionRecord, devices: Mapping[str, str]) -> dict[str, bytes]:
    """Its byte options, with the interface's name here."""
    data = dict(record.option_data)
    device = data.get("so.bindtodevice")
    if device is not None:
        name = device.decode("utf-8", "surrogateescape")
        data["so.bindtodevice"] = devices.get(name, name).encode("utf-8", "surrogateescape")
    return data


def _scope(record: ConnectionRecord, devices: Mapping[str, str]) -> int:
    return socket.if_nametoindex(devices.get(record.scope, record.scope)) if record.scope else 0


def _connect(
    socks: Sequence[socket.socket],
    records: Sequence[ConnectionRecord],
    family: int,
    elapsed: float,
    devices: Mapping[str, str],
) -> None:
    """Steps up to the queues: an established connection with the right numbers, and nothing in it."""
    names = [str(r.conn_id) for r in records]
    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    # Before bind: else the kernel finds the port taken by the listener.
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR, Repair.ON, label="entering repair mode")
    # Bind and connect work before the address is here (IP_FREEBIND would not do for connect).
    if family == socket.AF_INET6:
        rows.setsockopt(fd, Level.IPV6, IPV6.TRANSPARENT, 1)
    else:
        rows.setsockopt(fd, Level.IP, IP.TRANSPARENT, 1)
    sizes = [(_buffer(r.buffers.send, r.send_queue), _buffer(r.buffers.receive, r.receive_queue)) for r in records]
    rows.setsockopt(fd, Level.SOCKET, SO.SNDBUFFORCE, rows.u32([s for s, _ in sizes]))
    rows.setsockopt(fd, Level.SOCKET, SO.RCVBUFFORCE, rows.u32([r for _, r in sizes]))
    with failures(socks, names):
        rows.run()
        before = [_renamed(r, devices) for r in records]
        options.give(socks, [r.options for r in records], before, Stage.BEFORE_CONNECT)

    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    # The route is chosen at connect, and the application's mark may choose it.
    rows.setsockopt(fd, Level.SOCKET, SO.MARK, rows.u32([number(r, "so.mark") for r in records]))
    for queue, start in (
        (RepairQueue.SEND, [r.snd_una for r in records]),
        (RepairQueue.RECEIVE, [r.copied_seq for r in records]),
    ):
        rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, queue)
        rows.setsockopt(fd, Level.TCP, TCP.QUEUE_SEQ, rows.u32(start))
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    for call, label in ((SYS.bind, "bind"), (SYS.connect, "connect")):
        addresses = [_address(r, family, label == "connect", devices) for r in records]
        rows.call(call, fd, rows.data(addresses), len(addresses[0]), label=label)
    negotiated = [_repair_options(r) for r in records]
    rows.setsockopt(
        fd, Level.TCP, TCP.REPAIR_OPTIONS, rows.data(negotiated), size=rows.numbers([len(n) for n in negotiated])
    )
    # Whatever the options: setting them computes the MSS anew, which connect() in repair left at 524 bytes for good.
    rows.call(SYS.setsockopt, fd, Level.IP, IP.OPTIONS, 0, 0, label="computing the MSS anew")
    if family == socket.AF_INET6:
        rows.call(SYS.setsockopt, fd, Level.IPV6, IPV6.DSTOPTS, 0, 0, label="computing the MSS anew")
    clocks = [advance(r.timestamps, elapsed).value if r.timestamps else 0 for r in records]
    rows.setsockopt(fd, Level.TCP, TCP.TIMESTAMP, rows.u32(clocks))
    # From here on its timers must not be heard, nor end it.
    rows.setsockopt(fd, Level.SOCKET, SO.MARK, rows.shared(struct.pack("I", MARK)), label="setting the mark")
    rows.setsockopt(fd, Level.TCP, TCP.USER_TIMEOUT, USER_TIMEOUT_MAX)
    with failures(socks, names):
        rows.run()
        shut(socks)


def _buffer(reported: int, queue: bytes) -> int:
    """What to ask for: the kernel doubles it and reports the double."""
    return min(_BUFFER_MAX, max(reported // 2, 2 * len(queue) + _BUFFER_SLACK))


def _address(record: ConnectionRecord, family: int, of_peer: bool, devices: Mapping[str, str]) -> bytes:
    conn = record.conn_id
    address, port = (conn.peer, conn.peer_port) if of_peer else (conn.local, conn.local_port)
    return pack_address(
        address.partition("%")[0], port, family=family, flow_info=record.flow_info if of_peer else 0,
        scope=_scope(record, devices),
    )  # fmt: skip


def _repair_options(record: ConnectionRecord) -> bytes:
    agreed = record.negotiated
    scales = None
    if agreed.snd_wscale is not None and agreed.rcv_wscale is not None:
        scales = agreed.snd_wscale, agreed.rcv_wscale
    return pack_repair_options(agreed.mss, wscale=scales, sack=agreed.sack, timestamps=agreed.timestamps)


def _fits_again(record: ConnectionRecord, sock: socket.socket) -> bool:
    """Whether all that was sent can go out again at once: the peer takes it, the new congestion window lets it."""
    info = TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))
    return record.sent <= min(info.snd_cwnd * info.snd_mss, record.windows.snd_wnd)


def _fill(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    """Put the bytes back that had arrived, and those that must count as sent."""
    for sock, record in zip(socks, records, strict=True):
        if record.receive_queue:
            sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.RECEIVE)
            _put(sock, record.receive_queue, record)
        if record.sent and not (_fits_again(record, sock) and record.state is not State.CLOSING):
            sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
            _put(sock, memoryview(record.send_queue)[: record.sent], record)
        if record.receive_queue or record.sent:
            sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)


def _put(sock: socket.socket, data: bytes | memoryview, record: ConnectionRecord) -> None:
    """Write all of ``data``, in pieces as large as the kernel takes; QueueNotRestored."""
    view, at, chunk = memoryview(data), 0, _CHUNK_FIRST
    while at < len(view):
        try:
            at += sock.send(view[at : at + chunk], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            # memory comes in powers of two: a smaller piece may still fit
            if error.errno in (errno.ENOMEM, errno.ENOBUFS, errno.EMSGSIZE) and chunk > _CHUNK_LEAST:
                chunk //= 2
                continue
            if error.errno in _ENDED:
                # The peer reset it just now. Its owner will see that, as it would have without us.
                return
            raise QueueNotRestored(
                f"the kernel took {at} of {len(view)} bytes: {error.strerror}", object=str(record.conn_id)
            ) from None


def _finish(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    """Windows, congestion control and what else can be set before the address is here."""
    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    rows.setsockopt(
        fd, Level.TCP, TCP.REPAIR_WINDOW, rows.data([_window(r) for r in records]), size=20, label="setting the windows"
    )
    names = [r.congestion.encode("ascii") for r in records]
    rows.setsockopt(
        fd, Level.TCP, TCP.CONGESTION, rows.data(names), size=rows.numbers([len(n) for n in names]),
        label="setting the congestion control",
    )  # fmt: skip
    with failures(socks, [str(r.conn_id) for r in records]):
        rows.run()
        options.give(socks, [r.options for r in records], [r.option_data for r in records], Stage.REPAIRED)


def _window(record: ConnectionRecord) -> bytes:
    w = record.windows
    return RepairWindow(
        snd_wl1=w.snd_wl1, snd_wnd=w.snd_wnd, max_window=w.max_window, rcv_wnd=w.rcv_wnd, rcv_wup=w.rcv_wup
    ).pack()


# --- release ---------------------------------------------------------------------------------------------------------


def release_connections(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    """Let rebuilt connections live, once their addresses are local here: they leave repair mode, send what is to be
    sent and have their own options.

    Afterwards replay what was captured.  ConnectionCallFailed, QueueNotRestored; the other connections of the batch may
    be released or not then: call it again with those that are still in repair.
    """
    if len(socks) != len(records):
        raise ValueError(f"{len(socks)} sockets, {len(records)} records")
    if not socks:
        return
    names = [str(r.conn_id) for r in records]
    again = _to_send_again(socks, records, names)
    nodelay = [number(r, "tcp.nodelay") for r in records]
    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    # What goes out again must go out whole: Nagle would wait for the ACK of its first part.
    rows.setsockopt(
        fd, Level.TCP, TCP.NODELAY, rows.u32([int(n > 0) or d for n, d in zip(again, nodelay, strict=True)])
    )
    # The filter goes before repair does, else it would drop the answer to the probe.
    rows.setsockopt(fd, Level.SOCKET, SO.DETACH_FILTER, 0, ignore=True)
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

    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    # Until its own mark is back nothing it sends leaves this host.
    rows.setsockopt(fd, Level.SOCKET, SO.MARK, rows.u32([number(r, "so.mark") for r in records]))
    # The probe asks the peer for its window and for an ACK; data that goes out again does that by itself.
    leave = [Repair.OFF_NO_PROBE if n else Repair.OFF for n in again]
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR, rows.u32(leave), label="leaving repair mode")
    with failures(socks, names):
        rows.run()
    for sock, record, count, delay_off in zip(socks, records, again, nodelay, strict=True):
        if not record.send_queue or state_of(sock) is State.CLOSED:
            # The peer has reset it: send() would take the error that its owner is to see.
            continue
        if count:
            _put(sock, memoryview(record.send_queue)[:count], record)
        if len(record.send_queue) > record.sent:
            if count and not delay_off:
                sock.setsockopt(Level.TCP, TCP.NODELAY, 0)
            _put(sock, memoryview(record.send_queue)[record.sent :], record)
    put_own_fins(socks, records)
    _give_back(socks, records)
    tell_windows(records)


def _to_send_again(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], names: list[str]) -> list[int]:
    """How many of the bytes that were sent before the rebuild did not queue as sent.

    The end of the send queue tells. No ACK changes it; since the address is here, ACKs may have arrived already.
    """
    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
    end = rows.getsockopt(fd, Level.TCP, TCP.QUEUE_SEQ, 4)
    rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
    with failures(socks, names):
        rows.run()
    return [(record.snd_nxt - write_seq) & SEQ_MASK for record, write_seq in zip(records, end.u32(), strict=True)]


def _give_back(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    """The connection's own options, buffers and filter."""
    rows = Rows(len(socks))
    fd = rows.numbers([s.fileno() for s in socks])
    # Leaving repair cleared it, and the listener beside it could not be bound again.
    rows.setsockopt(fd, Level.SOCKET, SO.REUSEADDR, rows.u32([r.reuse_address for r in records]))
    rows.setsockopt(fd, Level.SOCKET, SO.SNDBUFFORCE, rows.u32([r.buffers.send // 2 for r in records]))
    rows.setsockopt(fd, Level.SOCKET, SO.RCVBUFFORCE, rows.u32([r.buffers.receive // 2 for r in records]))
    # Setting a size fixed it; this lets the kernel tune the sizes again that it tuned before. Before 5.14 it cannot be.
    rows.setsockopt(fd, Level.SOCKET, SO.BUF_LOCK, rows.u32([_lock(r) for r in records]), ignore=True)
    rows.setsockopt(fd, Level.IP, IP.TRANSPARENT, rows.u32([_transparent(r) for r in records]), ignore=True)
    rows.setsockopt(fd, Level.IPV6, IPV6.TRANSPARENT, rows.u32([_transparent(r) for r in records]), ignore=True)
    rows.setsockopt(fd, Level.TCP, TCP.NODELAY, rows.u32([number(r, "tcp.nodelay") for r in records]))
    # The largest value kept it alive; 0, the usual one, is not among the recorded options.
    rows.setsockopt(fd, Level.TCP, TCP.USER_TIMEOUT, rows.u32([number(r, "tcp.user_timeout") for r in records]))
    names = [str(r.conn_id) for r in records]
    with failures(socks, names):
        rows.run()
        numbers, data = [r.options for r in records], [r.option_data for r in records]
        options.give(socks, numbers, data, Stage.RELEASED, skip=_OWN_HANDS)
    for sock, record in zip(socks, records, strict=True):
        if record.filter_locked:
            sock.setsockopt(Level.SOCKET, SO.LOCK_FILTER, 1)


def _lock(record: ConnectionRecord) -> int:
    send = BufferLock.SEND if record.buffers.send_locked else 0
    return send | (BufferLock.RECEIVE if record.buffers.receive_locked else 0)


def _transparent(record: ConnectionRecord) -> int:
    return max(number(record, keyword) for keyword in _OWN_HANDS)
