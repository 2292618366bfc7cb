"""Connections that the peer has not answered yet, or never did: SYN_SENT, and connects that failed.

A connecting socket begins anew at the target, with the same addresses and the same initial sequence number, so that the
peer sees its SYN once more::

    before the address is here    repair, the sequence number, bind; all options; the clock
    once it is                    out of repair, connect(): the SYN leaves.  connect() has begun another timestamp clock
                                  (net/ipv4/tcp_ipv4.c tcp_v4_connect): the old one is set again, in repair

An answer of the peer that came in the freeze echoes a timestamp that is older than the SYN of now, for which the kernel
would send a RST (tcp_rcv_synsent_state_process).  So it is injected here, with an echo of 0, which is not looked at;
what the peer says to the repeated SYN is dropped until then.  An answer that is still on its way when the address has
moved does get that RST: the peer forgets its half-open request, and our SYN comes again after a second.  Neither
application sees any of it.

connect() is called without waiting; the owner that was waiting in it waits again as its own call is restarted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from tcpstate import giving
from tcpstate.capture import Injector
from tcpstate.closed import error_to_set
from tcpstate.connid import ConnId
from tcpstate.errors import AddressInUse, ConnectNotRepeated
from tcpstate.export import later
from tcpstate.filters import give_filter
from tcpstate.kernel.bpf import DROP_ALL
from tcpstate.kernel.md5sig import OPTION_KIND
from tcpstate.kernel.sockets import IP, IPV6, SO, Level, is_v6
from tcpstate.kernel.tcp import TCP, Repair, RepairQueue
from tcpstate.md5keys import give_keys, signed
from tcpstate.options import Stage, number
from tcpstate.record import ConnectionRecord, Family, State
from tcpstate.segment import SEQ_MASK, Flag, OptionKind, Segment

__all__ = ["Difference", "differences", "open_again", "prepare"]

#: (what, expected, found)
Difference = tuple[str, object, object]
#: TCP_MSS_DEFAULT, and its like of IPv6: what the clamp is when the application has set none
_MSS_DEFAULTS: Final = frozenset({536, 1220})
log = logging.getLogger(__name__)

#: what connect() makes of the window clamp if the application has set none (net/ipv4/tcp_output.c
#: tcp_select_initial_window); set before, it would count as the application's
_CLAMP: Final = "tcp.window_clamp"
_CLAMPS_OF_KERNEL: Final = frozenset((0xFFFF << scale,) for scale in range(15))
_BOTH: Final = Flag.SYN | Flag.ACK
_U32: Final = struct.Struct("I")


def prepare(sock: socket.socket, record: ConnectionRecord, *, elapsed: float) -> None:
    """A fresh socket, bound and with all its options, in repair mode; nothing is sent. AddressInUse, OSError."""
    sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
    _transparent(sock, record, 1)
    sock.setsockopt(Level.SOCKET, SO.SNDBUFFORCE, record.buffers.send // 2)
    sock.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, record.buffers.receive // 2)
    # the window scale of the SYN follows from a size that is fixed; before 5.14 it cannot be told apart
    with contextlib.suppress(OSError):
        sock.setsockopt(Level.SOCKET, SO.BUF_LOCK, record.buffers.locks)
    if record.state is State.SYN_SENT:
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
        sock.setsockopt(Level.TCP, TCP.QUEUE_SEQ, _U32.pack((record.snd_una - 1) & SEQ_MASK))
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
        if record.negotiated.mss not in _MSS_DEFAULTS:
            sock.setsockopt(Level.TCP, TCP.MAXSEG, record.negotiated.mss)
    if record.timestamps is not None:
        value = later(record.timestamps.value, record.timestamps.microseconds, elapsed)
        sock.setsockopt(Level.TCP, TCP.TIMESTAMP, _U32.pack(value))
    give_keys(sock, record.signing_keys, str(record.conn_id))
    own = {k: v for k, v in record.options.items() if k != _CLAMP or v not in _CLAMPS_OF_KERNEL}
    for stage in (Stage.BEFORE_CONNECT, Stage.REPAIRED):
        giving.give([sock], [([0], own, record.option_data)], stage)
    try:
        sock.bind(_name(record, record.conn_id.local, record.conn_id.local_port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(f"bind: {error.strerror}", object=str(record.conn_id)) from None
        raise
    sock.setsockopt(Level.TCP, TCP.CONGESTION, record.congestion.encode("ascii"))


def differences(sock: socket.socket, record: ConnectionRecord) -> list[Difference]:
    """Where a prepared socket is not what its record says."""
    conn = record.conn_id
    found: list[Difference] = []
    name = sock.getsockname()
    address = name[0].partition("%")[0].removeprefix("::ffff:")
    expected = conn.local.partition("%")[0], conn.local_port
    if (address, name[1]) != expected:
        found.append(("local address", expected, (address, name[1])))
    if record.state is State.SYN_SENT:
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
        (start,) = _U32.unpack(sock.getsockopt(Level.TCP, TCP.QUEUE_SEQ, _U32.size))
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
        if start != (record.snd_una - 1) & SEQ_MASK:
            found.append(("initial sequence number", (record.snd_una - 1) & SEQ_MASK, start))
    own = {k: v for k, v in record.options.items() if k != _CLAMP}
    if giving.unlike([sock], [own]):
        found.append(("socket options", "as recorded", "others"))
    return found


def open_again(
    socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], arrived: Iterable[Segment] = ()
) -> None:
    """Their addresses are local: connecting sockets connect, refused ones are refused again, by this host.

    They leave repair mode and have their own marks and filters; other options that wait for the release are still to be
    given.

    arrived  what was captured at the source

    ConnectNotRepeated.
    """
    known = {_ends(record.conn_id): record.snd_una for record in records if record.state is State.SYN_SENT}
    answers = {
        _ends(s.conn_id): s for s in arrived if s.flags & _BOTH == _BOTH and known.get(_ends(s.conn_id)) == s.ack
    }
    for sock, record in zip(socks, records, strict=True):
        try:
            if record.state is not State.SYN_SENT:
                _refuse(sock, record)
                give_filter(sock, record.filter)
                continue
            answer = answers.get(_ends(record.conn_id))
            give_filter(sock, DROP_ALL if answer else record.filter)
            try:
                _connect(sock, record)
            except OSError as error:
                # no route to the peer, perhaps: the application learns that its connect() has failed
                log.warning("%s cannot be opened from here: %s", record.conn_id, error.strerror)
                _fail(sock, record)
                answer = None
            if answer:
                give_filter(sock, record.filter)
                with Injector() as injector:
                    injector.deliver(signed(_without_echo(answer), record.signing_keys), record)
        except OSError as error:
            raise ConnectNotRepeated(f"connect: {error.strerror}", object=str(record.conn_id)) from error


def _ends(conn: ConnId) -> tuple[str, int, str, int]:
    """Segments do not know the scopes of link-local addresses."""
    return conn.local.partition("%")[0], conn.local_port, conn.peer.partition("%")[0], conn.peer_port


def _without_echo(segment: Segment) -> Segment:
    """A SYN-ACK that claims to answer no timestamp of ours in particular."""
    told = bytearray()
    for kind, data in segment.each_option():
        if kind == OPTION_KIND:
            continue
        value = data[:4] + bytes(4) if kind == OptionKind.TIMESTAMP and len(data) == 8 else data
        told += bytes((kind, 2 + len(value))) + value
    return dataclasses.replace(segment, options=bytes(told) + bytes(-len(told) % 4))


def _connect(sock: socket.socket, record: ConnectionRecord) -> None:
    clock = sock.getsockopt(Level.TCP, TCP.TIMESTAMP, _U32.size)
    _leave(sock, record)
    conn = record.conn_id
    to = _name(record, conn.peer, conn.peer_port, record.flow_info)
    with _not_waiting(sock):
        with contextlib.suppress(BlockingIOError):
            sock.connect(to)
    if record.timestamps is not None:
        (value,) = _U32.unpack(clock)
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
        # the moments since it was read
        sock.setsockopt(Level.TCP, TCP.TIMESTAMP, _U32.pack(later(value, value & 1, 0.001)))
        _leave(sock, record)


def _leave(sock: socket.socket, record: ConnectionRecord) -> None:
    sock.setsockopt(Level.SOCKET, SO.MARK, number(record, "so.mark"))
    sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.OFF_NO_PROBE)
    sock.setsockopt(Level.SOCKET, SO.REUSEADDR, record.reuse_address)


def _refuse(sock: socket.socket, record: ConnectionRecord) -> None:
    """The error of a failed connect(), by one that fails now."""
    _leave(sock, record)
    # without an error its owner has seen it; what is left is a socket that may be used again
    if error_to_set(record):
        _fail(sock, record)


def _fail(sock: socket.socket, record: ConnectionRecord) -> None:
    """Have it refused, by a port of ours that is bound but does not listen."""
    with socket.socket(sock.family, socket.SOCK_STREAM) as deaf, _not_waiting(sock):
        deaf.bind(_name(record, record.conn_id.local, 0))
        try:
            sock.connect(deaf.getsockname())
        except (BlockingIOError, ConnectionRefusedError):
            # the error is pending, or (for a socket that waits) told at once
            return


@contextlib.contextmanager
def _not_waiting(sock: socket.socket) -> Iterator[None]:
    """O_NONBLOCK for the description that the owner has, too; given back."""
    flags = fcntl.fcntl(sock.fileno(), fcntl.F_GETFL)
    timeout = sock.gettimeout()
    fcntl.fcntl(sock.fileno(), fcntl.F_SETFL, flags | os.O_NONBLOCK)
    sock.settimeout(0)  # Python's own idea of it
    try:
        yield
    finally:
        sock.settimeout(timeout)
        fcntl.fcntl(sock.fileno(), fcntl.F_SETFL, flags)


def _transparent(sock: socket.socket, record: ConnectionRecord, value: int) -> None:
    if record.family is Family.IPV4:
        sock.setsockopt(Level.IP, IP.TRANSPARENT, value)
    else:
        sock.setsockopt(Level.IPV6, IPV6.TRANSPARENT, value)


def _name(
    record: ConnectionRecord, address: str, port: int, flow_info: int = 0
) -> tuple[str, int] | tuple[str, int, int, int]:
    bare = address.partition("%")[0]
    if record.family is Family.IPV4:
        return bare, port
    scope = socket.if_nametoindex(record.scope) if record.scope else 0
    return bare if is_v6(bare) else f"::ffff:{bare}", port, flow_info, scope
