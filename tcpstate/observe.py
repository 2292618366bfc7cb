"""What a socket tells of its connection while it flows: TCP_INFO and options, by system calls that take no privilege.

For who may do no more than that with it, such as the chaperone; :mod:`tcpstate.stateread` has more sources.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Collection
from typing import Any

from tcpstate import options
from tcpstate.kernel.sockets import Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import CONGESTION_NAME_SIZE, INFO_SIZE, TCP, TcpInfo

__all__ = ["observe_socket"]

_FAMILIES = {socket.AF_INET: "ipv4", socket.AF_INET6: "ipv6"}


def observe_socket(sock: socket.socket, keywords: Collection[str] = ()) -> dict[str, Any]:
    """Items by keyword: numbers, text, bytes, tuples of numbers.

    ``family``, ``unsent`` (bytes), ``congestion``; ``info.NAME``: a field of TCP_INFO; ``LEVEL.NAME``: a socket option
    of :data:`tcpstate.options.TABLE`, those that differ from a fresh socket's and those in ``keywords`` that this
    kernel has. OSError.
    """
    info = TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))
    congestion = sock.getsockopt(Level.TCP, TCP.CONGESTION, CONGESTION_NAME_SIZE)
    items: dict[str, Any] = {
        "family": _FAMILIES[socket.AddressFamily(sock.family)],
        "unsent": ioctl_int(sock.fileno(), Ioctl.SIOCOUTQNSD),
        "congestion": congestion.split(b"\0")[0].decode(errors="replace"),
    }
    items |= {f"info.{name}": value for name, value in _known(info).items()}
    return items | _options(sock, keywords)


def _known(info: TcpInfo) -> dict[str, int]:
    values = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    # what this kernel does not tell is None
    return {name: int(value) for name, value in values.items() if value is not None}


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
