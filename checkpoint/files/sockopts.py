"""Options of sockets that are not connections: local sockets, UDP sockets, listeners.

The lines come from the table of :mod:`tcpstate.options`; here are the few more that connections do not have. What
equals the value of a fresh socket of the same family, type and protocol is not recorded: a host's own defaults hold
for it.

Sources: include/uapi/asm-generic/socket.h, linux/in.h, linux/udp.h, linux/tcp.h.
"""

from __future__ import annotations

import enum
import errno
import functools
import logging
import socket
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Final, Protocol, Self, cast

from checkpoint.errors import FileRebuildFailed, InterfaceMissing, UnsupportedProtocol
from tcpstate.errors import ForeignFilter
from tcpstate.filters import give_filter, own_filter, own_mark, read_filters
from tcpstate.kernel.bpf import MAX_INSTRUCTIONS, Instruction
from tcpstate.kernel.sockets import IP, SO, BufferLock, Level
from tcpstate.options import TABLE, Format, Option, Stage, Where
from tcpstate.record import DEVICE_OPTION, Buffers
from tcpstate.slotted import dataclass

__all__ = [
    "IPPROTO_MPTCP",
    "Filtered",
    "SocketOptions",
    "before_bind",
    "give_late",
    "give_own_filter",
    "own_classic_filter",
    "save",
    "set_buffers",
    "sizes",
]

log = logging.getLogger(__name__)


class _Local(enum.IntEnum):
    """Options of AF_UNIX sockets (asm-generic/socket.h)."""

    PASSCRED = 16
    PASSSEC = 34
    PASSPIDFD = 76  # since 6.5
    PASSRIGHTS = 83  # since 6.16


class _Udp(enum.IntEnum):
    """Level SOL_UDP (linux/udp.h)."""

    CORK = 1
    NO_CHECK6_TX = 101
    NO_CHECK6_RX = 102
    SEGMENT = 103
    GRO = 104


class _Listener(enum.IntEnum):
    """Options that only a listener keeps (linux/tcp.h)."""

    MAXSEG = 2
    CONGESTION = 13
    FASTOPEN = 23
    SAVE_SYN = 27


_CONGESTION_SIZE: Final = 16
_ICMP: Final = (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6)


#: SOL_UDP: to the kernel levels are plain numbers
_UDP_LEVEL: Final = cast(Level, 17)


def _line(prefix: str, level: Level, number: enum.IntEnum, form: Format = Format.INT, size: int = 4) -> Option:
    return Option(f"{prefix}.{number.name.lower()}", level, number, form, Stage.REPAIRED, Where.ANY, size)


_MORE: Final[dict[str, list[Option]]] = {
    "unix": [_line("unix", Level.SOCKET, number) for number in _Local],
    "udp": [_line("udp", _UDP_LEVEL, number) for number in _Udp] + [_line("ip", Level.IP, IP.MULTICAST_TTL)],
    "raw": [_line("ip", Level.IP, IP.MULTICAST_TTL)],
    "listener": [
        _line("listener", Level.TCP, _Listener.MAXSEG),
        _line("listener", Level.TCP, _Listener.FASTOPEN),
        _line("listener", Level.TCP, _Listener.SAVE_SYN),
        _line("listener", Level.TCP, _Listener.CONGESTION, Format.BYTES, _CONGESTION_SIZE),
    ],
}
#: of connections only, or changed by being a listener
_NOT_HERE: Final = frozenset({"tcp.cork", "tcp.quickack", "tcp.window_clamp", "ipv6.flowinfo", "so.peek_off"})
#: options that are set to make a bind possible and are given back at the release, by family
_BORROWED: Final = {
    socket.AF_INET: ("ip.freebind", "ip.transparent"),
    socket.AF_INET6: ("ipv6.freebind", "ipv6.transparent"),
}
#: linux/in.h
IPPROTO_MPTCP: Final = 262
_UNKNOWN: Final = (errno.EOPNOTSUPP, errno.ENOPROTOOPT)
_MARK_OPTION: Final = "so.mark"
_BY_KEYWORD: Final = {option.keyword: option for option in TABLE} | {
    option.keyword: option for options in _MORE.values() for option in options
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """What a socket's options differ in from a fresh socket's.

    numbers, data   by keyword
    reuse_address   SO_REUSEADDR
    buffers         sizes, and whether the application fixed them
    filter          the application's classic filter; whether it is locked
    """

    numbers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    reuse_address: bool = False
    buffers: Buffers
    filter: tuple[Instruction, ...] = ()
    filter_locked: bool = False

    def on_devices(self, devices: Mapping[str, str]) -> Self:
        """The same with the interface name of another host (SO_BINDTODEVICE), if it is in ``devices``."""
        bound = self.data.get(DEVICE_OPTION, b"").rstrip(b"\0").decode("utf-8", "surrogateescape")
        if bound not in devices:
            return self
        name = devices[bound].encode("utf-8", "surrogateescape")
        return replace(self, data=self.data | {DEVICE_OPTION: name})

    def __post_init__(self) -> None:
        for keyword, value in self.numbers.items():
            option = _BY_KEYWORD.get(keyword)
            if option is not None:
                option.encode(value)
        for keyword, raw in self.data.items():
            option = _BY_KEYWORD.get(keyword)
            if option is not None and (option.format is not Format.BYTES or len(raw) > option.size):
                raise ValueError(f"{keyword}: {len(raw)} bytes do not fit")
        if len(self.filter) > MAX_INSTRUCTIONS:
            raise ValueError("the filter is too long")


@functools.cache
def _options(family: int, type: int, protocol: int) -> tuple[tuple[Option, bytes], ...]:
    """(option, value of a fresh socket) of every option that such a socket has on this kernel."""
    key = "unix" if family == socket.AF_UNIX else "raw" if type == socket.SOCK_RAW or protocol in _ICMP else ""
    key = key or ("udp" if type == socket.SOCK_DGRAM else "listener")
    levels = {Level.SOCKET} if family == socket.AF_UNIX else {Level.SOCKET, Level.IP}
    if family == socket.AF_INET6:
        levels.add(Level.IPV6)
    if family != socket.AF_UNIX and type == socket.SOCK_STREAM:
        levels.add(Level.TCP)
    found = []
    with socket.socket(family, type, protocol) as fresh:
        for option in [o for o in TABLE if o.level in levels and o.keyword not in _NOT_HERE] + _MORE[key]:
            try:
                found.append((option, fresh.getsockopt(option.level, option.number, option.size)))
            except OSError as error:
                if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTCONN):
                    raise
    return tuple(found)


def save(sock: socket.socket, object: str) -> SocketOptions:
    """The options of a socket; UnsupportedProtocol if it has an eBPF filter, which nobody can read."""
    numbers: dict[str, tuple[int, ...]] = {}
    data: dict[str, bytes] = {}
    for option, default in _options(sock.family, sock.type, sock.proto):
        try:
            value = sock.getsockopt(option.level, option.number, option.size)
        except OSError as error:
            if sock.proto == IPPROTO_MPTCP and error.errno in _UNKNOWN:
                # of the fresh one only: it has no subflow yet
                continue
            raise
        if option.keyword == _MARK_OPTION and sock.type == socket.SOCK_STREAM and sock.family in _BORROWED:
            value = option.encode([own_mark(sock)])
        if value == default:
            continue
        if option.format is Format.BYTES:
            data[option.keyword] = value.rstrip(b"\0") if option.size == _CONGESTION_SIZE else value
        else:
            numbers[option.keyword] = option.decode(value)
    return SocketOptions(
        numbers=numbers,
        data=data,
        reuse_address=bool(sock.getsockopt(Level.SOCKET, SO.REUSEADDR)),
        buffers=sizes(sock),
        filter=own_classic_filter(sock, object),
        filter_locked=bool(sock.getsockopt(Level.SOCKET, SO.LOCK_FILTER)),
    )


def sizes(sock: socket.socket) -> Buffers:
    """The sizes of its buffers, and whether the application fixed them."""
    locks = sock.getsockopt(Level.SOCKET, SO.BUF_LOCK)
    return Buffers(
        send=sock.getsockopt(Level.SOCKET, SO.SNDBUF),
        receive=sock.getsockopt(Level.SOCKET, SO.RCVBUF),
        send_locked=bool(locks & BufferLock.SEND),
        receive_locked=bool(locks & BufferLock.RECEIVE),
    )


def own_classic_filter(sock: socket.socket, object: str) -> tuple[Instruction, ...]:
    """The application's filter; UnsupportedProtocol if it is an eBPF program, which nobody can read."""
    try:
        return own_filter(read_filters([sock])[0])
    except ForeignFilter as error:
        raise UnsupportedProtocol("the socket has an eBPF filter", object=object) from error


def before_bind(sock: socket.socket, options: SocketOptions, object: str) -> None:
    """Everything that can be set on a fresh socket; a bind to an address that is not local yet is allowed."""
    set_buffers(sock, options.buffers)
    sock.setsockopt(Level.SOCKET, SO.REUSEADDR, options.reuse_address)
    _give(sock, options, object, late=False)
    for keyword in _BORROWED.get(socket.AddressFamily(sock.family), ()):
        option = _BY_KEYWORD[keyword]
        sock.setsockopt(option.level, option.number, 1)


def give_late(sock: socket.socket, options: SocketOptions, object: str) -> None:
    """What would act before the address is here, and what was borrowed for the bind."""
    for keyword in _BORROWED.get(socket.AddressFamily(sock.family), ()):
        option = _BY_KEYWORD[keyword]
        sock.setsockopt(option.level, option.number, options.numbers.get(keyword, (0,))[0])
    _give(sock, options, object, late=True)


def _give(sock: socket.socket, options: SocketOptions, object: str, *, late: bool) -> None:
    known = {option.keyword for option, _ in _options(sock.family, sock.type, sock.proto)}
    borrowed = _BORROWED.get(socket.AddressFamily(sock.family), ())
    values: dict[str, bytes] = dict(options.data)
    values.update((k, _BY_KEYWORD[k].encode(v)) for k, v in options.numbers.items() if k in _BY_KEYWORD)
    for keyword, value in values.items():
        option = _BY_KEYWORD.get(keyword)
        if option is None or keyword not in known:
            if not late:
                log.warning("socket option %s of %s is unknown here, and was left out", keyword, object)
            continue
        if (option.stage is Stage.RELEASED) is not late or keyword in borrowed:
            continue
        try:
            sock.setsockopt(option.level, option.number, value)
        except OSError as error:
            if sock.proto == IPPROTO_MPTCP and error.errno in _UNKNOWN:
                log.warning("a Multipath TCP listener does not take socket option %s of %s", keyword, object)
                continue
            if keyword == DEVICE_OPTION and error.errno == errno.ENODEV:
                name = value.rstrip(b"\0").decode("utf-8", "backslashreplace")
                raise InterfaceMissing(f"it is bound to interface {name}, which is not here", object=object) from None
            raise FileRebuildFailed(f"setting {keyword}: {error.strerror}", object=object) from error


def set_buffers(sock: socket.socket, buffers: Buffers) -> None:
    """Sizes as recorded (the kernel doubles what it is given), then whether autotuning may change them."""
    for option, size in ((SO.SNDBUFFORCE, buffers.send), (SO.RCVBUFFORCE, buffers.receive)):
        sock.setsockopt(Level.SOCKET, option, size // 2)
    if sock.proto != IPPROTO_MPTCP:  # which lets nobody change it
        sock.setsockopt(Level.SOCKET, SO.BUF_LOCK, buffers.locks)


class Filtered(Protocol):
    """What has an application's filter."""

    @property
    def filter(self) -> tuple[Instruction, ...]: ...
    @property
    def filter_locked(self) -> bool: ...


def give_own_filter(sock: socket.socket, options: Filtered) -> None:
    """The application's own filter, or none; last of all, as it decides about everything that arrives."""
    give_filter(sock, options.filter)
    if options.filter_locked:
        sock.setsockopt(Level.SOCKET, SO.LOCK_FILTER, 1)
