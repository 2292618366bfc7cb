"""A frozen connection made anew in its place, with other hard state: the same socket, the same descriptors.

Most hard state can be given to a socket only before it is connected (sequence numbers, what the handshake settled, the
queues).  So the connection is exported, dissolved without a word (``connect(AF_UNSPEC)`` in repair) and rebuilt on the
same socket from the changed record; epoll registrations and duplicates survive.  Two things could go wrong meanwhile,
and do not: a segment that arrives while no socket has the tuple would draw a RST, which goes nowhere; and we may be
killed, for which the record as it was lies on disk, to be rebuilt by the resume.

Source: net/ipv4/tcp.c tcp_disconnect, do_tcp_setsockopt (TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS).
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import socket
import struct
import time
from collections.abc import Callable
from typing import Final

from tcpstate import frozen
from tcpstate.discard import discard_connections
from tcpstate.errors import BadStateItem, ConnectionLost, NotSettable, StateNotSet, TcpmigError
from tcpstate.export import export_connections
from tcpstate.freeze import Gate, QuietState, leave_repair, not_in_repair
from tcpstate.frozen import FrozenConnection
from tcpstate.kernel.route import is_local
from tcpstate.kernel.sockets import IP, IPV6, SO, Level
from tcpstate.kernel.tcp import TCP, USER_TIMEOUT_MAX, RepairWindow
from tcpstate.keywords import BEFORE_BIND
from tcpstate.options import number
from tcpstate.preflight import supported
from tcpstate.rebuild import rebuild_connections
from tcpstate.record import ConnectionRecord
from tcpstate.release import release_connections
from tcpstate.silence import MARK, PASSING_MARK, muted
from tcpstate.standstill import standstill
from tcpstate.tuplefilter import FROM_LOOPBACK

__all__ = ["Edit", "originals", "recover", "replace"]

log = logging.getLogger(__name__)

#: what makes the record anew; ValueError where it cannot be
Edit = Callable[[ConnectionRecord], ConnectionRecord]
#: what can be written without dissolving the connection
_IN_PLACE: Final = ("windows", "timestamps")


def replace(sock: socket.socket, entry: FrozenConnection, edit: Edit) -> FrozenConnection:
    """Give a frozen connection the state that ``edit`` makes of its record. It stays frozen.

    Its owner is stopped meanwhile and runs on. BadStateItem, NotSettable, OwnerNotStill, StateNotSet: nothing was
    changed; ConnectionLost.
    """
    if entry.record:
        return _assemble(sock, entry, edit)
    name = str(entry.conn_id)
    if not is_local(entry.conn_id.local):
        raise NotSettable("its address is no address of this host any more", object=name)
    with standstill(owner.pid for owner in entry.other_owners):
        (old,) = export_connections([sock], [entry.state])
        exported = time.monotonic()
        try:
            new = _edited(old, edit)
            if new == old:
                _leave(sock, entry)
                return entry
            if _same_but(old, new, _IN_PLACE):
                _write_in_place(sock, old, new)
                _leave(sock, entry)
                return entry
            if entry.state.gate is Gate.TTL:
                raise NotSettable("its filter is locked (SO_LOCK_FILTER): it cannot be made anew", object=name)
        except BaseException:
            _leave(sock, entry)
            raise
        entry = frozen.rewrite(entry, undo=old.to_bytes())
        try:
            _rebuild(sock, old, new, exported)
            _settle(sock, new)
        except (TcpmigError, OSError) as error:
            recover(sock, entry)
            frozen.rewrite(entry, undo=b"")
            raise StateNotSet(f"the kernel did not take it: {error}", object=name) from error
        return frozen.rewrite(entry, undo=b"")


def recover(sock: socket.socket, entry: FrozenConnection) -> None:
    """Make a connection anew that was being replaced, as it had been before. ConnectionLost."""
    old = ConnectionRecord.from_bytes(entry.undo)
    try:
        # how long ago it was exported is not known exactly: the clock may run ahead, never back
        _rebuild(sock, old, old, time.monotonic() - max(0.0, time.time() - entry.since))
        _settle(sock, old)
    except (TcpmigError, OSError) as error:
        raise ConnectionLost(f"it could not be made anew: {error}", object=str(entry.conn_id)) from error


def _edited(old: ConnectionRecord, edit: Edit) -> ConnectionRecord:
    try:
        new = edit(old)
    except ValueError as error:
        raise BadStateItem(str(error), object=str(old.conn_id)) from None
    if not supported(new.state):
        raise BadStateItem(f"a connection in state {new.state.value} cannot be made", object=str(old.conn_id))
    return new


def _assemble(sock: socket.socket, entry: FrozenConnection, edit: Edit) -> FrozenConnection:
    """As :func:`replace`, of a connection that is being put together: all of it is in the record."""
    old = ConnectionRecord.from_bytes(entry.record)
    new = _edited(old, edit)
    if new == old:
        return entry
    begun = time.monotonic()
    try:
        _rebuild(sock, old, new, begun)
    except (TcpmigError, OSError) as error:
        try:
            _rebuild(sock, old, old, begun)
        except (TcpmigError, OSError) as again:
            raise ConnectionLost(f"it could not be made anew: {again}", object=str(entry.conn_id)) from error
        raise StateNotSet(f"the kernel did not take it: {error}", object=str(entry.conn_id)) from error
    return frozen.rewrite(entry, record=new.to_bytes(), state=originals(new))


def originals(record: ConnectionRecord) -> QuietState:
    """What a connection with this record is given back when it is thawed."""
    return QuietState(
        filter=record.filter,
        filter_locked=record.filter_locked,
        mark=number(record, "so.mark"),
        user_timeout=number(record, "tcp.user_timeout"),
        keepalive=bool(number(record, "so.keepalive")),
        reuse_address=record.reuse_address,
        minimum_ttl=number(record, "ip.minttl"),
        minimum_hops=number(record, "ipv6.minhopcount"),
        gate=Gate.FILTER,
    )


def _rebuild(sock: socket.socket, old: ConnectionRecord, new: ConnectionRecord, exported: float) -> None:
    """Dissolve what there is and connect anew, in repair."""
    own_mark = number(old, "so.mark")
    with muted(old.conn_id, {0, own_mark}):
        discard_connections([sock], close=False)
        # dissolving leaves ECONNABORTED behind, which is not the owner's business
        sock.getsockopt(Level.SOCKET, SO.ERROR)
        _bind(sock, new)
        # what can only be set before bind the socket has had all the time
        options = {k: v for k, v in new.options.items() if k not in BEFORE_BIND} | {"so.mark": (PASSING_MARK,)}
        passing = dataclasses.replace(new, options=options)
        rebuild_connections([passing], [sock], elapsed=time.monotonic() - exported, bound=1)
        if sock.getsockname()[:2] != _name(sock, new):
            raise StateNotSet("it has another address now", object=str(new.conn_id))


def _bind(sock: socket.socket, record: ConnectionRecord) -> None:
    """Give it its own end again. OSError."""
    level, option = (Level.IPV6, IPV6.TRANSPARENT) if sock.family == socket.AF_INET6 else (Level.IP, IP.TRANSPARENT)
    sock.setsockopt(level, option, 1)
    scope = socket.if_nametoindex(record.scope) if record.scope else 0
    address, port = _name(sock, record)
    try:
        sock.bind((address, port, 0, scope) if sock.family == socket.AF_INET6 else (address, port))
    except OSError as error:
        # its owner had bound it to its port, and dissolving leaves it that (SOCK_BINDPORT_LOCK): nothing else tells
        if error.errno != errno.EINVAL:
            raise


def _name(sock: socket.socket, record: ConnectionRecord) -> tuple[str, int]:
    local = record.conn_id.local.partition("%")[0]
    mapped = sock.family == socket.AF_INET6 and not record.conn_id.v6
    return (f"::ffff:{local}" if mapped else local), record.conn_id.local_port


def _settle(sock: socket.socket, record: ConnectionRecord) -> None:
    """Out of repair, but frozen: what it sends goes nowhere, nothing gets in but what we inject."""
    if not is_local(record.conn_id.local):
        raise StateNotSet("its address is no address of this host any more", object=str(record.conn_id))
    options = {k: v for k, v in record.options.items() if k != "so.keepalive"}
    options |= {"so.mark": (MARK,), "tcp.user_timeout": (USER_TIMEOUT_MAX,)}
    silent = dataclasses.replace(record, options=options, filter=FROM_LOOPBACK, filter_locked=False)
    release_connections([sock], [silent], tell=False)


def _same_but(old: ConnectionRecord, new: ConnectionRecord, fields: tuple[str, ...]) -> bool:
    return dataclasses.replace(old, **{name: getattr(new, name) for name in fields}) == new


def _write_in_place(sock: socket.socket, old: ConnectionRecord, new: ConnectionRecord) -> None:
    """Windows and the timestamp clock, in repair. StateNotSet."""
    try:
        _write_windows(sock, new)
        if new.timestamps is not None and new.timestamps != old.timestamps:
            sock.setsockopt(Level.TCP, TCP.TIMESTAMP, struct.pack("I", new.timestamps.value))
    except OSError as error:
        _write_windows(sock, old)
        raise StateNotSet(f"the kernel did not take it: {error.strerror}", object=str(old.conn_id)) from None


def _write_windows(sock: socket.socket, record: ConnectionRecord) -> None:
    w = record.windows
    window = RepairWindow(
        snd_wl1=w.snd_wl1, snd_wnd=w.snd_wnd, max_window=w.max_window, rcv_wnd=w.rcv_wnd, rcv_wup=w.rcv_wup
    )
    sock.setsockopt(Level.TCP, TCP.REPAIR_WINDOW, window.pack())


def _leave(sock: socket.socket, entry: FrozenConnection) -> None:
    if not not_in_repair([sock]):
        leave_repair([sock], [entry.state.reuse_address], probe=False)
