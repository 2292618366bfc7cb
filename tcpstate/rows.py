"""Failures of batches in terms of connections."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Protocol, overload

from tcpstate.closed import peer_name
from tcpstate.connid import ConnId
from tcpstate.errors import AddressInUse, ConnectionCallFailed
from tcpstate.kernel.columns import RowError
from tcpstate.kernel.sockets import unpack_address

__all__ = ["Names", "conn_id_of", "describe", "failures", "portions"]

#: bytes of queues that are read or written in one batch: about what stays in a processor's cache
_PORTION = 8 << 20
_IN_USE = (errno.EADDRNOTAVAIL, errno.EADDRINUSE)


def conn_id_of(sock: socket.socket) -> ConnId | None:
    """The socket's conn-ID; None if it has none (any more)."""
    try:
        local = sock.getsockname()
        raw = peer_name(sock)
        if not raw:
            return None
        peer, port, _, scope = unpack_address(raw)
        suffix = f"%{socket.if_indextoname(scope)}" if scope else ""
        return ConnId.tcp(local[0], local[1], peer + suffix, port)
    except (OSError, ValueError):
        return None


def describe(sock: socket.socket) -> str:
    """The socket's conn-ID, as far as it has one, for messages; else its number must do."""
    return str(conn_id_of(sock) or f"fd {sock.fileno()}")


class HasConnId(Protocol):
    """A record, or what else belongs to one connection."""

    @property
    def conn_id(self) -> ConnId:
        """Which."""
        ...


class Names(Sequence[str]):
    """The conn-IDs of records as text, each made when it is asked for: only errors want them. ``places``: of those."""

    def __init__(self, records: Sequence[HasConnId], places: Sequence[int] | None = None) -> None:
        self._records = records
        self._places = range(len(records)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        if isinstance(at, slice):
            return Names(self._records, self._places[at])
        return str(self._records[self._places[at]].conn_id)


def portions(lengths: Sequence[int]) -> Iterator[slice]:
    """Cut many queues of these lengths into batches that need little memory at a time, which is quicker as well."""
    start = total = 0
    for at, length in enumerate(lengths):
        if total + length > _PORTION and at > start:
            yield slice(start, at)
            start, total = at, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))


@contextlib.contextmanager
def failures(socks: Sequence[socket.socket], names: Sequence[str] | None = None) -> Iterator[None]:
    """Turn the failure of a row into the error of its connection: AddressInUse or ConnectionCallFailed.

    names: what the rows are called, if not by their sockets.
    """
    try:
        yield
    except RowError as error:
        name = names[error.row] if names is not None else describe(socks[error.row])
        number = error.errno or errno.EIO
        message = f"{error.label}: {os.strerror(number)}"
        if number in _IN_USE and error.label in ("bind", "connect"):
            raise AddressInUse(message, object=name) from None
        raise ConnectionCallFailed(message, object=name) from None
