"""The paper's interface to a connection's state, under its names (Mogul et al., "Unveiling the Transport", section 5).

::

    transport_state_get(conn, keywords)       5.2  items of the state; ALL, ALL_HARD, ALL_SOFT
    transport_state_set(conn, items)               several at once, or none
    transport_freeze(conn)                    5.3  nothing in, nothing out, until
    transport_resume(conn)                         it goes on; what arrived meanwhile arrives now
    transport_progress(conn)                       in progress, quiescing, or frozen
    transport_read_pending(conn)              5.4  what waits to be read, holes included
    transport_restore_pending(conn, extents)
    transport_buffer_purge(conn)
    transport_bind_tuple(fd, conn_id)         5.1  a new socket becomes this connection
    transport_arrivals(conn)                  5.5  when the latest packets arrived

A connection is named by its conn-ID, the text of that, or a socket: anybody's connection, if the caller is its owner's
user or has CAP_NET_ADMIN; the kernel asks for more where it must (repair mode takes CAP_NET_ADMIN, another process's
descriptor ptrace access).  A frozen connection survives the process that froze it and the process that owned it, and
every function here works on it as well::

    items = transport_state_get(conn, ALL_HARD)               # at the source, frozen
    extents = transport_read_pending(conn)
    ...
    transport_bind_tuple(sock, conn_id)                       # at the target: it is frozen
    transport_state_set(sock, settable(items))
    transport_restore_pending(sock, extents)
    ...                                                       # the address moves
    transport_resume(sock)

Everything works on the calling thread's network namespace.
"""

from __future__ import annotations

import contextlib
import enum
import os
import secrets
import socket
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

from tcpstate import frozen, pending
from tcpstate.arrivals import Arrival, ArrivalRing
from tcpstate.attach import Attached, Conn, attached, name_of
from tcpstate.connid import ConnId
from tcpstate.errors import UnknownStateKeyword, UnsupportedSocket
from tcpstate.frozen import FrozenConnection
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import CONGESTION_NAME_SIZE, TCP
from tcpstate.keywords import KEYWORDS, TABLE, Keyword
from tcpstate.pending import Extent, Purged
from tcpstate.rebuild import rebuild_connections
from tcpstate.record import Buffers, ConnectionRecord, Family, Negotiated, State, Windows
from tcpstate.replacement import originals
from tcpstate.silence import MARK
from tcpstate.stateitem import Datatype, StateFlag, StateItem
from tcpstate.stateread import applies, memory_of, read_values
from tcpstate.statewrite import checked, settable, write_values

__all__ = [
    "ALL",
    "ALL_HARD",
    "ALL_SOFT",
    "Arrival",
    "ArrivalRing",
    "Conn",
    "Datatype",
    "Extent",
    "Progress",
    "Purged",
    "StateFlag",
    "StateItem",
    "settable",
    "transport_arrivals",
    "transport_bind_tuple",
    "transport_buffer_purge",
    "transport_freeze",
    "transport_progress",
    "transport_read_pending",
    "transport_restore_pending",
    "transport_resume",
    "transport_state_get",
    "transport_state_set",
]

#: wild cards: every keyword of this stack, known to the caller or not
ALL: Final = "*"
ALL_HARD: Final = "*hard"
ALL_SOFT: Final = "*soft"

#: data of the application, which transport_read_pending tells, and marks in it, which can only be set once it is there
_BY_NAME_ONLY: Final = frozenset({"receive_queue", "urgent_in", "urgent_taken"})
_PORT_ADDRESSES: Final = {socket.AF_INET: Family.IPV4, socket.AF_INET6: Family.IPV6}
#: what a connection starts from that has only a name yet (RFC 9293 3.7.1; a window without scaling)
_MSS_DEFAULT: Final = 536
_WINDOW_DEFAULT: Final = 0xFFFF


class Progress(enum.Enum):
    """The paper's meta-state of a connection (section 3)."""

    IN_PROGRESS = "in progress"
    QUIESCING = "quiescing"  # frozen, but something of it is still on its way through this host
    FROZEN = "frozen"


def _wanted(keywords: str | Collection[str], sock: socket.socket) -> list[Keyword]:
    """The keywords of a request, wild cards among them, each once. UnknownStateKeyword."""
    found: dict[str, Keyword] = {}
    for name in [keywords] if isinstance(keywords, str) else keywords:
        if name in (ALL, ALL_HARD, ALL_SOFT):
            for keyword in TABLE:
                fits = name == ALL or keyword.hard == (name == ALL_HARD)
                if fits and keyword.name not in _BY_NAME_ONLY and applies(keyword, sock):
                    found[keyword.name] = keyword
        elif name in KEYWORDS:
            found[name] = KEYWORDS[name]
        else:
            raise UnknownStateKeyword("there is no such keyword", object=name)
    return list(found.values())


def transport_state_get(conn: Conn, keywords: str | Collection[str]) -> list[StateItem]:
    """Items of a connection's state, by keyword or wild card. It is neither frozen nor disturbed.

    What only repair mode tells (``StateFlag.INITIALIZED`` is not set otherwise) is read if the connection is frozen;
    its owner is stopped for that moment. UnknownStateKeyword, NoSuchConnection, NotPermitted, ConnIdSyntax.
    """
    with attached(conn) as found:
        wanted = _wanted(keywords, found.sock)
        values = read_values(found, [keyword.name for keyword in wanted])
    return [
        StateItem(k.name, k.datatype, value, k.flags | (StateFlag.INITIALIZED if value is not None else 0))
        for k, value in zip(wanted, values.values(), strict=True)
    ]


def transport_state_set(conn: Conn, items: Iterable[StateItem]) -> None:
    """Set items of a connection's state: all of them, or none.

    Hard state is written in repair mode, with the owner stopped for that moment; a connection that is not frozen is
    frozen for it. :func:`settable` leaves out of another connection's items what cannot be set. UnknownStateKeyword,
    NotSettable, BadStateItem, NotPermitted, KernelFeatureMissing, OwnerNotStill, StateNotSet: nothing was changed.
    """
    with attached(conn) as found:
        write_values(found, checked(items, found))


def transport_freeze(conn: Conn) -> FrozenConnection:
    """Freeze a connection: nothing of it leaves this host, nothing gets in, no timer ends it, until it is resumed.

    Its owner runs on, and only waits. AlreadyFrozen; NoSuchConnection (also: nobody has it open); UnsupportedSocket
    (the peer is on this host); ForeignFilter, ConnectionCallFailed, NotPermitted. The connection is as it was after any
    of them.
    """
    return frozen.freeze(conn)


def transport_resume(conn: Conn) -> FrozenConnection:
    """Let a frozen connection go on: its timers run, what has arrived meanwhile arrives now.

    One whose owner has died is closed as the owner's end would have closed it, unless somebody else has it open.
    NotFrozen, NoSuchConnection, AddressNotMoved, ConnectionCallFailed, ConnectionLost.
    """
    return frozen.resume(conn)


def transport_progress(conn: Conn) -> Progress:
    """Whether it is in progress, quiescing or frozen.

    A frozen connection quiesces as long as packets of it are in this host's queues: those that it sent and no
    interface has taken yet count in its memory (sk_wmem_alloc, net/core/sock.c), those that have arrived and were not
    looked at yet in its backlog. NoSuchConnection, NotPermitted.
    """
    with attached(conn) as found:
        if found.sock.getsockopt(Level.SOCKET, SO.MARK) != MARK:
            return Progress.IN_PROGRESS
        memory = memory_of(found.sock)
        return Progress.QUIESCING if memory["wmem_alloc"] or memory["backlog"] else Progress.FROZEN


@contextlib.contextmanager
def _frozen(conn: Conn) -> Iterator[tuple[Attached, FrozenConnection]]:
    """A frozen connection, and its note. NotFrozen."""
    with attached(conn) as found:
        yield found, frozen.entry_of(found.conn_id)


def transport_read_pending(conn: Conn) -> list[Extent]:
    """What the owner of a frozen connection has not read, and what has arrived since the freeze, with holes.

    Offset 0 is the first unread byte. The extent there was acknowledged; those behind it were not, and the peer would
    send them again. NotFrozen, NoSuchConnection, NotPermitted, OwnerNotStill, UrgentData.
    """
    with _frozen(conn) as (found, entry):
        return pending.read_pending(found.sock, entry)


def transport_restore_pending(conn: Conn, extents: Sequence[Extent]) -> None:
    """Put data into the unread part of a frozen connection: what begins at offset 0 before all that is unread, what
    lies behind it as if it arrived at the resume. The sequence number that is expected next stays the same.

    BadExtents, NotFrozen, NoSuchConnection, NotPermitted, OwnerNotStill, StateNotSet: nothing was changed;
    ConnectionLost.
    """
    with _frozen(conn) as (found, entry):
        pending.restore_pending(found.sock, entry, extents)


def transport_buffer_purge(conn: Conn) -> Purged:
    """Forget what a frozen connection's buffers hold, as if it had been read, and as if it had never been written.

    What was sent and not acknowledged stays: the peer may lack it, and its place in the stream cannot be given to other
    bytes. NotFrozen, NoSuchConnection, NotPermitted, OwnerNotStill, StateNotSet: nothing was changed; ConnectionLost.
    """
    with _frozen(conn) as (found, entry):
        return pending.purge(found.sock, entry)


def transport_bind_tuple(fd: int | socket.socket, conn_id: ConnId | str) -> FrozenConnection:
    """Make a fresh TCP socket this connection: established, frozen, without any of its state yet.

    ``transport_state_set`` and ``transport_restore_pending`` give it that, ``transport_resume`` lets it live once the
    address is local. UnsupportedSocket (no TCP socket, of the wrong family, or used already), AlreadyFrozen,
    AddressInUse, ConnectionCallFailed.
    """
    name = ConnId.parse(conn_id) if isinstance(conn_id, str) else conn_id
    sock = fd if isinstance(fd, socket.socket) else socket.socket(fileno=os.dup(fd))
    try:
        record = _bare_record(sock, name)

        def build() -> None:
            rebuild_connections([record], [sock])

        return frozen.adopt(sock, record, originals(record), build)
    finally:
        if sock is not fd:
            sock.close()


def _bare_record(sock: socket.socket, name: ConnId) -> ConnectionRecord:
    """Of a connection of which only the name is known. UnsupportedSocket."""
    what = f"fd {sock.fileno()}"
    if (
        sock.family not in _PORT_ADDRESSES
        or sock.type != socket.SOCK_STREAM
        or sock.proto not in (0, socket.IPPROTO_TCP)
    ):
        raise UnsupportedSocket("this is not a TCP socket", object=what)
    if name.v6 and sock.family == socket.AF_INET:
        raise UnsupportedSocket("an IPv4 socket cannot carry an IPv6 connection", object=what)
    if sock.getsockname()[1]:
        raise UnsupportedSocket("the socket is bound or connected already", object=what)
    family = Family.MAPPED if sock.family == socket.AF_INET6 and not name.v6 else _PORT_ADDRESSES[sock.family]
    # numbers that no peer expects: until they are set it is nobody's connection
    ours, theirs = secrets.randbits(32), secrets.randbits(32)
    return ConnectionRecord(
        conn_id=name,
        family=family,
        state=State.ESTABLISHED,
        snd_una=ours,
        snd_nxt=ours,
        send_queue=b"",
        rcv_nxt=theirs,
        receive_queue=b"",
        windows=Windows(snd_wl1=theirs, snd_wnd=0, max_window=_WINDOW_DEFAULT, rcv_wnd=_WINDOW_DEFAULT, rcv_wup=theirs),
        negotiated=Negotiated(mss=_MSS_DEFAULT, snd_wscale=None, rcv_wscale=None, sack=False, timestamps=False),
        buffers=Buffers(
            send=sock.getsockopt(Level.SOCKET, SO.SNDBUF),
            receive=sock.getsockopt(Level.SOCKET, SO.RCVBUF),
            send_locked=False,
            receive_locked=False,
        ),
        congestion=_congestion(sock),
        scope=name.local.partition("%")[2],
    )


def _congestion(sock: socket.socket) -> str:
    return sock.getsockopt(Level.TCP, TCP.CONGESTION, CONGESTION_NAME_SIZE).split(b"\0")[0].decode("ascii")


def transport_arrivals(conn: Conn, capacity: int = 128) -> ArrivalRing:
    """A ring of the connection's latest arrivals: it fills from now on, until it is closed.

    NoSuchConnection, NotPermitted; OSError without CAP_NET_RAW.
    """
    if isinstance(conn, socket.socket):
        return ArrivalRing(name_of(conn), capacity)
    with attached(conn) as found:
        return ArrivalRing(found.conn_id, capacity)
