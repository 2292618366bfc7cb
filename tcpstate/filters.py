"""The application's own socket filters: read, given back, and listeners that take no new connections for a while.

Source: net/core/filter.c (sk_get_filter).  A filter of a TCP socket sees each segment from its TCP header on; what a
listener has, its children inherit.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence

from tcpstate.errors import ConnectionCallFailed, ForeignFilter, ListenerFilterRefused
from tcpstate.kernel import bpf
from tcpstate.kernel.bpf import Instruction, Op
from tcpstate.kernel.columns import Column, Field, Reusable, Rows
from tcpstate.kernel.sockets import SO, Level
from tcpstate.rows import describe, failures
from tcpstate.silence import MARK
from tcpstate.slotted import dataclass

__all__ = [
    "ListenerState",
    "drop_syns",
    "give_filter",
    "own_filter",
    "own_mark",
    "read_filters",
    "remove_syn_filter",
    "undo_drop_syns",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerState:
    """What :func:`drop_syns` changed on a listening socket.

    filter  its own filter
    mark    its own SO_MARK, if that was changed instead of the filter
    """

    filter: tuple[Instruction, ...]
    mark: int | None = None


#: Multipath TCP listeners; SO_LOCK_FILTER
_NO_FILTER = (errno.EOPNOTSUPP, errno.EPERM)
#: inode of a listener that :func:`drop_syns` has marked: its own mark
_marks: dict[int, int] = {}
_FLAGS_OFFSET = 13
_SYN_AND_ACK = 0x12
_SYN = 0x02
#: drops a SYN without ACK; whatever follows decides about the rest
_SYN_PREFIX: tuple[Instruction, ...] = (
    (Op.LOAD_BYTE, 0, 0, _FLAGS_OFFSET),
    (Op.AND, 0, 0, _SYN_AND_ACK),
    (Op.JUMP_EQUAL, 0, 1, _SYN),
    (Op.RETURN, 0, 0, 0),
)
#: our own "accept the rest"; no application spells it so, which tells "no filter" from one that accepts all
_REST: tuple[Instruction, ...] = ((Op.RETURN, 0, 0, 0x7FFFFFFE),)


def own_filter(instructions: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    """The application's own filter where :func:`drop_syns` stands before it (children of a listener inherit that)."""
    prefix = len(_SYN_PREFIX)
    if instructions[:prefix] != _SYN_PREFIX:
        return instructions
    rest = instructions[prefix:]
    return () if rest == _REST else rest


def _count_instructions(rows: Rows) -> tuple[Column, Field]:
    fd = rows.column()
    # SO_GET_FILTER counts instructions, not bytes, and with a length of 0 only tells how many there are
    return fd, rows.getsockopt(fd, Level.SOCKET, SO.ATTACH_FILTER, 0, ignore=True)


_counts = Reusable(_count_instructions)


def read_filters(socks: Sequence[socket.socket]) -> list[tuple[Instruction, ...]]:
    """The classic filter of each socket, byte-exact; () for none. ForeignFilter if one has an eBPF filter."""
    rows, (fd, count) = _counts.of(len(socks))
    fd.set(s.fileno() for s in socks)
    rows.run()
    filters: list[tuple[Instruction, ...]] = []
    lengths = count.length_field.u32() if count.length_field is not None else []
    for sock, length, result in zip(socks, lengths, count.results(), strict=True):
        if result < 0:
            if result == -errno.EACCES:
                raise ForeignFilter("an eBPF filter is attached to the socket", object=describe(sock))
            raise ConnectionCallFailed(f"reading its filter: {os.strerror(-result)}", object=describe(sock))
        filters.append(_read_filter(sock, length) if length else ())
    return filters


def _read_filter(sock: socket.socket, count: int) -> tuple[Instruction, ...]:
    rows = Rows(1)
    code = rows.getsockopt(sock.fileno(), Level.SOCKET, SO.ATTACH_FILTER, count * bpf.INSTRUCTION_SIZE)
    if code.length_field is not None:
        code.length_field.fill(struct.pack("i", count))
    with failures([sock]):
        rows.run()
    return bpf.unpack(code.whole(0))


def give_filter(sock: socket.socket, instructions: tuple[Instruction, ...]) -> None:
    """Attach the filter, or detach what is there if it is (). OSError as the kernel says."""
    if instructions:
        bpf.attach(sock, instructions)
        return
    try:
        sock.setsockopt(Level.SOCKET, SO.DETACH_FILTER, 0)
    except OSError as error:
        # ENOENT: there was none, as it should be
        if error.errno != errno.ENOENT:
            raise


def drop_syns(listeners: Sequence[socket.socket]) -> list[ListenerState]:
    """Let listening sockets take no new connections: a SYN is dropped unanswered, and its sender tries again.

    Handshakes that have begun can complete, so that the queues drain (:func:`tcpstate.locate.listener_backlog`).  The
    filter stands before the application's own; connections accepted meanwhile inherit it: :func:`remove_syn_filter`, or
    a freeze and thaw, rid them of it.

    A listener that takes no filter (Multipath TCP; SO_LOCK_FILTER) gets the freeze's mark: no route leads back to the
    peer, so that the kernel drops its SYN (net/ipv4/tcp_input.c tcp_conn_request).  That takes a
    :func:`tcpstate.silence.blackhole`, and does not hold off connections over loopback.

    All or none; ListenerFilterRefused, ForeignFilter.
    """
    states: list[ListenerState] = []
    for listener, own in zip(listeners, read_filters(listeners), strict=True):
        own = own_filter(own)
        try:
            states.append(_hold_off(listener, own))
        except OSError as error:
            undo_drop_syns(listeners[: len(states)], states)
            raise ListenerFilterRefused(
                f"the listener takes neither filter nor mark: {error.strerror}", object=describe(listener)
            ) from None
    return states


def _hold_off(listener: socket.socket, own: tuple[Instruction, ...]) -> ListenerState:
    try:
        give_filter(listener, _SYN_PREFIX + (own or _REST))
        return ListenerState(filter=own)
    except OSError as error:
        if error.errno not in _NO_FILTER:
            raise
    mark = own_mark(listener)
    listener.setsockopt(Level.SOCKET, SO.MARK, MARK)
    _marks[os.fstat(listener.fileno()).st_ino] = mark
    return ListenerState(filter=own, mark=mark)


def own_mark(listener: socket.socket) -> int:
    """The application's own mark of a listener, also where :func:`drop_syns` has put another in its place."""
    found: int = listener.getsockopt(Level.SOCKET, SO.MARK)
    return _marks.get(os.fstat(listener.fileno()).st_ino, 0) if found == MARK else found


def undo_drop_syns(listeners: Sequence[socket.socket], states: Sequence[ListenerState]) -> None:
    """Let listeners take connections again. ConnectionCallFailed."""
    for listener, state in zip(listeners, states, strict=True):
        try:
            if state.mark is None:
                give_filter(listener, state.filter)
            else:
                listener.setsockopt(Level.SOCKET, SO.MARK, state.mark)
                _marks.pop(os.fstat(listener.fileno()).st_ino, None)
        except OSError as error:
            raise ConnectionCallFailed(f"giving its filter back: {error.strerror}", object=describe(listener)) from None


def remove_syn_filter(socks: Sequence[socket.socket]) -> int:
    """Give connections that inherited the filter of :func:`drop_syns` the application's own back; how many had it."""
    removed = 0
    for sock, present in zip(socks, read_filters(socks), strict=True):
        own = own_filter(present)
        if own != present:
            give_filter(sock, own)
            removed += 1
    return removed
