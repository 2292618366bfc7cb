"""What can be told of a connection while it flows: nothing is frozen, and its owner runs on.

Sequence numbers, windows and the bytes of the queues take repair mode, and so a stopped owner: :mod:`tcpstate.export`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Collection
from typing import Any

from tcpstate import frozen, options
from tcpstate.connid import ConnId
from tcpstate.errors import NoSuchConnection
from tcpstate.kernel.sockets import Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import INFO_SIZE, TCP, TcpInfo
from tcpstate.locate import find, take

__all__ = ["observe", "observe_socket"]

_FAMILIES = {socket.AF_INET: "ipv4", socket.AF_INET6: "ipv6"}
_CONGESTION_NAME_SIZE = 16  # TCP_CA_NAME_MAX, include/net/tcp.h


def observe(conn_id: ConnId, keywords: Collection[str] = ()) -> dict[str, Any]:
    """Items of the connection by keyword: numbers, text, bytes, tuples of them.

    ``info.NAME``: a field of TCP_INFO; ``LEVEL.NAME``: a socket option of :data:`tcpstate.options.TABLE`. Of the
    options those that differ from a fresh socket's, and those in ``keywords`` that this kernel has. Of a connection
    that :mod:`tcpstate.frozen` keeps, mark, keepalive and user timeout are the originals.
    NoSuchConnection (also: no process has it open), NotPermitted.
    """
    located = find(conn_id)
    if not located.owners:
        raise NoSuchConnection("no process has this connection open", object=str(conn_id))
    owner = located.owners[0]
    with take(owner.pid, owner.fd) as sock:
        items: dict[str, Any] = {
            "connection": str(located.conn_id),
            "state": located.state.name,
            "owners": located.owners,
            "frozen": located.frozen,
            "receive_queue": located.receive_queue,
            "send_queue": located.send_queue,
        }
        items |= observe_socket(sock, keywords)
    return items | (_originals(conn_id) if located.frozen else {})


def observe_socket(sock: socket.socket, keywords: Collection[str] = ()) -> dict[str, Any]:
    """What the socket itself tells: family, unsent bytes, congestion control, TCP_INFO and options, as in
    :func:`observe`. OSError."""
    info = TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))
    congestion = sock.getsockopt(Level.TCP, TCP.CONGESTION, _CONGESTION_NAME_SIZE)
    items: dict[str, Any] = {
        "family": _FAMILIES[socket.AddressFamily(sock.family)],
        "unsent": ioctl_int(sock.fileno(), Ioctl.SIOCOUTQNSD),
        "congestion": congestion.split(b"\0")[0].decode(errors="replace"),
    }
    items |= {f"info.{name}": value for name, value in _known(info).items()}
    return items | _options(sock, keywords)


def _known(info: TcpInfo) -> dict[str, int]:
    values = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    # the state has an item of its own; what this kernel does not tell is None
    return {name: int(value) for name, value in values.items() if value is not None and name != "state"}


def _options(sock: socket.socket, keywords: Collection[str]) -> dict[str, Any]:
    saved = options.save([sock])[0]
    found: dict[str, Any] = {name: _single(value) for name, value in saved.numbers.items()} | saved.data
    for keyword in keywords:
        option = options.BY_KEYWORD.get(keyword)
        if option is None or keyword in found:
            continue
        # without the option this kernel, or a socket of this family, has no such item
        with contextlib.suppress(OSError):
            data = sock.getsockopt(option.level, option.number, option.size)
            found[keyword] = data if option.format is options.Format.BYTES else _single(option.decode(data))
    return found


def _single(value: tuple[int, ...]) -> int | tuple[int, ...]:
    return value[0] if len(value) == 1 else value


def _originals(conn_id: ConnId) -> dict[str, int]:
    """What the freeze changed, as the connection will have it again; {} if it was not :mod:`tcpstate.frozen`'s."""
    kept = next((entry.state for entry in frozen.frozen() if entry.conn_id == conn_id), None)
    if kept is None:
        return {}
    return {"so.mark": kept.mark, "so.keepalive": int(kept.keepalive), "tcp.user_timeout": kept.user_timeout}
