"""The chaperone's requests, for one client: who may, what is checked, what is done."""

from __future__ import annotations

import socket
from collections.abc import Callable

from tcpstate.chaperone.holding import Held, Holding
from tcpstate.chaperone.identity import Holder, Peer, found, others_at, passed
from tcpstate.chaperone.messages import (
    Answer,
    Discard,
    Done,
    Export,
    Exported,
    Freeze,
    Get,
    Items,
    Rebuild,
    Release,
    Request,
    Resume,
    items_of,
)
from tcpstate.chaperone.policy import ROOT, Host, Policy, checked_record
from tcpstate.chaperone.protocol import HELLO_MAX, Received
from tcpstate.connid import ConnId
from tcpstate.errors import (
    AddressInUse,
    AddressNotMoved,
    AddressStillHere,
    AlreadyFrozen,
    BadRecord,
    ChaperoneLimit,
    ConnectionCallFailed,
    ForbiddenEndpoint,
    NoSuchConnection,
    NotExported,
    NotFrozen,
    NotYours,
    OwnerRuns,
    RecordOfAnother,
    UnsupportedSocket,
)
from tcpstate.kernel.columns import RowError
from tcpstate.kernel.route import is_local
from tcpstate.kernel.sockets import SO, Level
from tcpstate.observe import observe_socket
from tcpstate.record import ConnectionRecord
from tcpstate.silence import MARK
from tcpstate.slotted import dataclass

__all__ = ["Outcome", "perform"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a request.

    answer  to be sent, with ``sock`` if there is one, which is ours to close
    conn    which connection it was about, for the audit log
    """

    answer: Answer
    conn: ConnId
    sock: socket.socket | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """For whom, by what rules, when (monotonic seconds)."""

    peer: Peer
    session: int
    policy: Policy
    holding: Holding
    now: float


def perform(received: Received, context: Context) -> Outcome:
    """Do what was asked. TcpmigError: it was not done; the descriptor that came with the request is closed."""
    request = received.request
    try:
        return _PERFORM[type(request)](request, received.descriptor, context)
    except RowError as error:
        raise ConnectionCallFailed(str(error), object=request.conn) from error
    except (ValueError, OverflowError) as error:
        # a value out of a record that no socket takes
        raise BadRecord(f"the request or its record holds what cannot be: {error}", object=request.conn) from error
    except OSError as error:
        raise ConnectionCallFailed(f"the kernel refused: {error.strerror}", object=request.conn) from error


def _holder(request: Request, descriptor: int, context: Context) -> Holder:
    """Our own descriptor of the connection, which is the client's."""
    if request.passes_socket:
        return passed(descriptor, context.peer)
    return found(ConnId.parse(request.conn), context.peer)


def _held(request: Request, descriptor: int, context: Context) -> Held:
    """The connection as it is held, for this user. NotFrozen, NotYours."""
    if request.passes_socket:
        holder = passed(descriptor, context.peer)
        holder.sock.close()
        conn_id = holder.conn_id
    else:
        conn_id = ConnId.parse(request.conn)
    held = context.holding.held.get(conn_id)
    if held is None:
        raise NotFrozen(
            "the chaperone has not frozen this connection",
            object=str(conn_id),
            fix="Freeze it first; what was frozen for too long, or for a client that vanished, flows again by itself.",
        )
    if not context.peer.may_use(held.uid):
        raise NotYours(f"the connection is of uid {held.uid}", object=str(conn_id))
    return held


def _room(context: Context, uid: int) -> None:
    most = context.policy.limits.frozen
    if context.holding.of_user(uid) >= most:
        raise ChaperoneLimit(f"{most} connections of uid {uid} are frozen or being rebuilt already")


def _get(request: Get, descriptor: int, context: Context) -> Outcome:
    holder = _holder(request, descriptor, context)
    with holder.sock as sock:
        values = observe_socket(sock, request.keywords)
    held = context.holding.held.get(holder.conn_id)
    if held is not None and held.state is not None:
        # as it will have them again
        kept = held.state
        values |= {"so.mark": kept.mark, "so.keepalive": kept.keepalive, "tcp.user_timeout": kept.user_timeout}
    values |= {"connection": str(holder.conn_id), "uid": holder.uid, "pid": holder.pid, "frozen": held is not None}
    if request.keywords:
        values = {keyword: values[keyword] for keyword in request.keywords if keyword in values}
    return Outcome(answer=Items(number=request.number, items=items_of(values)), conn=holder.conn_id)


def _freeze(request: Freeze, descriptor: int, context: Context) -> Outcome:
    holder = _holder(request, descriptor, context)
    try:
        name = str(holder.conn_id)
        if holder.conn_id in context.holding.held or holder.sock.getsockopt(Level.SOCKET, SO.MARK) == MARK:
            raise AlreadyFrozen("the connection is frozen", object=name)
        if is_local(holder.conn_id.peer):
            raise UnsupportedSocket(
                "both ends are on this host: what is sent over loopback cannot be held back", object=name
            )
        _room(context, holder.uid)
    except BaseException:
        holder.sock.close()
        raise
    context.holding.freeze(holder, context.session, context.now + context.policy.limits.seconds)
    return _done(request, holder.conn_id)


def _resume(request: Resume, descriptor: int, context: Context) -> Outcome:
    held = _held(request, descriptor, context)
    if held.state is None:
        raise NotFrozen("the connection is being rebuilt", object=str(held.conn_id))
    context.holding.resume(held)
    return _done(request, held.conn_id)


def _export(request: Export, descriptor: int, context: Context) -> Outcome:
    held = _held(request, descriptor, context)
    if held.state is None:
        raise NotFrozen("the connection is being rebuilt", object=str(held.conn_id))
    if not request.passes_socket:
        # whose process it is now, and whether that stands still
        holder = found(held.conn_id, context.peer)
        holder.sock.close()
        if not holder.stopped:
            raise OwnerRuns(f"pid {holder.pid} has it open and runs", object=str(held.conn_id))
    record = context.holding.export(held).to_bytes()
    if context.policy.sign is not None:
        record = context.policy.sign(record, held.uid)
    if len(record) > context.policy.limits.frame - HELLO_MAX:
        raise ChaperoneLimit(f"the record has {len(record)} bytes", object=str(held.conn_id))
    answer = Exported(number=request.number, conn=str(held.conn_id), record=record)
    return Outcome(answer=answer, conn=held.conn_id)


def _discard(request: Discard, descriptor: int, context: Context) -> Outcome:
    held = _held(request, descriptor, context)
    name = str(held.conn_id)
    if held.state is not None and not held.exported:
        raise NotExported("it was frozen, and not exported", object=name)
    # one that was rebuilt and never lived has said nothing to its peer
    if held.state is not None and not request.anyway and is_local(held.conn_id.local):
        raise AddressStillHere("its address is still configured here", object=name)
    context.holding.discard(held)
    return _done(request, held.conn_id)


def _rebuild(request: Rebuild, descriptor: int, context: Context) -> Outcome:
    record, uid = _trusted(request.record, context)
    conn = record.conn_id
    name = str(conn)
    local = is_local(conn.local)
    record = checked_record(record, context.peer.uid, context.policy, Host.read(), local=local)
    if is_local(conn.peer):
        raise UnsupportedSocket("both ends would be on this host", object=name)
    if conn in context.holding.held:
        raise AddressInUse("the chaperone holds a connection of this name", object=name)
    if context.peer.uid != ROOT and others_at(conn.local_port, uid):
        raise ForbiddenEndpoint(f"another user has a socket on port {conn.local_port}", object=name)
    _room(context, uid)
    until = context.now + context.policy.limits.seconds
    context.holding.rebuild(
        record, uid, context.peer.pid, context.session, until=until, elapsed=request.elapsed
    )  # fmt: skip
    return _done(request, conn)


def _trusted(data: bytes, context: Context) -> tuple[ConnectionRecord, int]:
    """The record, and for whom it is built: the client, or, for root, its owner where it was exported."""
    uid = context.peer.uid
    if context.policy.verify is not None:
        data, signed_for = context.policy.verify(data)
        if not context.peer.may_use(signed_for):
            raise RecordOfAnother(f"it was exported for uid {signed_for}, the client is uid {uid}")
        uid = signed_for
    return ConnectionRecord.from_bytes(data), uid


def _release(request: Release, descriptor: int, context: Context) -> Outcome:
    held = _held(request, descriptor, context)
    name = str(held.conn_id)
    if held.record is None:
        raise NoSuchConnection("the connection is frozen, not rebuilt", object=name)
    if not is_local(held.conn_id.local):
        raise AddressNotMoved("its address is not configured here yet", object=name)
    sock = context.holding.release(held)
    return Outcome(answer=Done(number=request.number, conn=name), conn=held.conn_id, sock=sock)


def _done(request: Request, conn_id: ConnId) -> Outcome:
    return Outcome(answer=Done(number=request.number, conn=str(conn_id)), conn=conn_id)


_PERFORM: dict[type[Request], Callable[..., Outcome]] = {
    Get: _get,
    Freeze: _freeze,
    Resume: _resume,
    Export: _export,
    Discard: _discard,
    Rebuild: _rebuild,
    Release: _release,
}
