"""Both ends of a connection under our control (paper, 4.1.1): settled with each other, and given other addresses.

No address has to move then: each end is rebuilt wherever it shall go, under names of that place, and neither
application notices.  Both ends are frozen and exported first; what was in flight between them is in the sender's queue,
and the other end's record tells how much of that has arrived::

    one, other = settle(one, other)                    # nothing is in flight any more
    one = retuple(one, local=("10.0.0.7", 6379), peer=("10.0.0.9", 40001))
    other = retuple(other, local=("10.0.0.9", 40001), peer=("10.0.0.7", 6379))
    ...                                                # rebuild both, release both, replay at both

Capture at both places from before the first release on: what the one sends while the other is still frozen is then
replayed to it.
"""

from __future__ import annotations

import dataclasses

from tcpstate.connid import ConnId
from tcpstate.errors import NotOneConnection, TupleImpossible
from tcpstate.md5keys import SigningKey, key_for
from tcpstate.record import ConnectionRecord, Family, LocalFin, State, Windows
from tcpstate.segment import SEQ_MASK, before

__all__ = ["retuple", "settle"]


def settle(one: ConnectionRecord, other: ConnectionRecord) -> tuple[ConnectionRecord, ConnectionRecord]:
    """Both ends of one frozen connection, as if everything that was sent had arrived or was not sent yet.

    Each sends anew what the other has not got, and nothing else; what has arrived is acknowledged, FINs included, and
    each knows the other's window. NotOneConnection if the numbers of the two do not fit together.
    """
    if _bare(one.conn_id) != _bare(other.conn_id.reversed()):
        raise NotOneConnection(f"the other end is {other.conn_id}", object=str(one.conn_id))
    return _settled(one, other), _settled(other, one)


def _bare(conn: ConnId) -> tuple[str, int, str, int]:
    # each end names the interface of its own host
    return conn.local.partition("%")[0], conn.local_port, conn.peer.partition("%")[0], conn.peer_port


def _settled(mine: ConnectionRecord, theirs: ConnectionRecord) -> ConnectionRecord:
    if State.CLOSED in (mine.state, theirs.state) or mine.unopened or theirs.unopened:
        raise NotOneConnection("one end has no connection", object=str(mine.conn_id))
    arrived = (theirs.rcv_nxt - mine.snd_una) & SEQ_MASK
    if arrived > mine.sent:
        raise NotOneConnection(
            f"the other end expects number {theirs.rcv_nxt}, this one has sent {mine.snd_una} to {mine.snd_nxt}",
            object=str(mine.conn_id),
        )
    state, fin = mine.state, mine.local_fin
    if fin is not LocalFin.NONE and not theirs.peer_fin:
        # even if it was acknowledged, it cannot have been
        if fin is LocalFin.ACKED:
            raise NotOneConnection("the other end has not got the FIN that it acknowledged", object=str(mine.conn_id))
        fin = LocalFin.QUEUED
    elif theirs.peer_fin and fin is LocalFin.NONE:
        raise NotOneConnection("the other end has got a FIN that was not sent", object=str(mine.conn_id))
    elif state is State.FIN_WAIT_1:
        state, fin = State.FIN_WAIT_2, LocalFin.ACKED
    w = theirs.windows
    edge = (w.rcv_wup + w.rcv_wnd) & SEQ_MASK
    offered = 0 if before(edge, theirs.rcv_nxt) else (edge - theirs.rcv_nxt) & SEQ_MASK
    windows = Windows(
        # so that the next segment tells the window anew
        snd_wl1=(mine.rcv_nxt - 1) & SEQ_MASK,
        snd_wnd=offered,
        max_window=max(offered, mine.windows.max_window),
        rcv_wnd=mine.windows.rcv_wnd,
        rcv_wup=mine.windows.rcv_wup,
    )
    return dataclasses.replace(
        mine,
        state=state,
        local_fin=fin,
        snd_una=theirs.rcv_nxt,
        snd_nxt=theirs.rcv_nxt,
        send_queue=mine.send_queue[arrived:],
        windows=windows,
    )


def retuple(
    record: ConnectionRecord, *, local: tuple[str, int] | None = None, peer: tuple[str, int] | None = None
) -> ConnectionRecord:
    """The same connection under another name: (address, port) of either end, or of both; None leaves it.

    Addresses are of the IP version that it has; link-local ones carry ``%interface``.  What was learned about the path
    is dropped where an address changes, and a signing key for the old peer becomes one for the new. TupleImpossible.
    """
    old = record.conn_id
    ends = local or (old.local, old.local_port), peer or (old.peer, old.peer_port)
    try:
        conn = ConnId.tcp(*ends[0], *ends[1])
    except (ValueError, TypeError) as error:
        raise TupleImpossible(f"{ends[0]} and {ends[1]}: {error}", object=str(old)) from None
    if conn.v6 != old.v6:
        raise TupleImpossible("the IP version cannot change", object=str(old))
    scopes = {address.partition("%")[2] for address in (conn.local, conn.peer)}
    if len(scopes) > 1:
        raise TupleImpossible("both ends must be of the same link", object=str(old))
    moved = (conn.local, conn.peer) != (old.local, old.peer)
    return dataclasses.replace(
        record,
        conn_id=conn,
        family=Family.IPV6 if conn.v6 else record.family,
        scope=scopes.pop(),
        flow_info=0 if moved else record.flow_info,
        soft=None if moved else record.soft,
        signing_keys=_keys(record.signing_keys, old.peer, conn.peer),
    )


def _keys(keys: tuple[SigningKey, ...], old: str, new: str) -> tuple[SigningKey, ...]:
    used = key_for(keys, old)
    if used is None or old == new:
        return keys
    bare = new.partition("%")[0]
    own = dataclasses.replace(used, address=bare, prefix=128 if ":" in bare else 32)
    return (*(key for key in keys if key is not used and key.network != own.network), own)
