"""Reading state items: each keyword from the first source that this host has for it.

The sources differ in what they take.  Names, sock_diag, TCP_INFO, options, ioctls and the BPF iterator read a
connection while it flows, and it notices nothing.  Repair mode is asked last, and only of a connection that is frozen:
its owner is stopped for that moment.  A source that this host does not have tells nothing, and its keywords are
uninitialized.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Callable, Collection, Mapping
from typing import Final

from tcpstate import options
from tcpstate.access import capable
from tcpstate.attach import Attached
from tcpstate.errors import KernelFeatureMissing, NotFrozen, TcpmigError
from tcpstate.export import export_connections
from tcpstate.freeze import QuietState, leave_repair
from tcpstate.frozen import FrozenConnection, entry_of
from tcpstate.kernel.bpf import tcpsock
from tcpstate.kernel.capability import Cap
from tcpstate.kernel.sockets import SO, Ioctl, Level, ioctl_int
from tcpstate.kernel.tcp import CONGESTION_NAME_SIZE, INFO_SIZE, TCP, InfoOption, TcpState
from tcpstate.kernel.tcpinfo import unpack_fields
from tcpstate.keywords import KEYWORDS, TABLE, Keyword, Kind
from tcpstate.preflight import STATES
from tcpstate.record import ConnectionRecord
from tcpstate.silence import MARK
from tcpstate.standstill import standstill
from tcpstate.stateitem import Value

__all__ = ["Reader", "field_of", "frozen_record", "memory_of", "plug_iterator", "read_values"]

log = logging.getLogger(__name__)

#: what a plugged iterator is: numbers of struct tcp_sock by field name, of one connection; {} where it cannot tell
Iterator = Callable[[Attached], Mapping[str, int]]
_MEMORY: Final = (
    "rmem_alloc",
    "rcvbuf",
    "wmem_alloc",
    "sndbuf",
    "fwd_alloc",
    "wmem_queued",
    "optmem",
    "backlog",
    "drops",
)
_INFO_BITS: Final[Mapping[str, InfoOption]] = {
    "sack": InfoOption.SACK,
    "timestamps": InfoOption.TIMESTAMPS,
    "usec_timestamps": InfoOption.USEC_TS,
    "ecn": InfoOption.ECN,
    "syn_data": InfoOption.SYN_DATA,
}
_OTHER_OPTIONS: Final[Mapping[str, tuple[Level, int]]] = {
    "send_buffer": (Level.SOCKET, SO.SNDBUF),
    "receive_buffer": (Level.SOCKET, SO.RCVBUF),
    "buffer_locks": (Level.SOCKET, SO.BUF_LOCK),
    "so.reuseaddr": (Level.SOCKET, SO.REUSEADDR),
}


def _kernel_iterator(found: Attached) -> Mapping[str, int]:
    names = {name for k in TABLE if (name := k.source(Kind.ITERATOR)) is not None}
    try:
        told = tcpsock.read(names, wanted=found.conn_id.__eq__)
    except (KernelFeatureMissing, OSError) as error:
        log.debug("the iterator tells nothing: %s", error)
        return {}
    return told[found.conn_id].values if found.conn_id in told else {}


_iterators: list[Iterator] = [_kernel_iterator]


def plug_iterator(iterator: Iterator) -> None:
    """Let another iterator tell what it knows, before that of :mod:`tcpstate.kernel.bpf.tcpsock`. Without any, its
    keywords are read in repair mode, or not at all."""
    _iterators.insert(0, iterator)


def memory_of(sock: socket.socket) -> dict[str, int]:
    """SO_MEMINFO by name, bytes (include/uapi/linux/sock_diag.h, SK_MEMINFO_*)."""
    size = len(_MEMORY) * 4
    data = sock.getsockopt(Level.SOCKET, SO.MEMINFO, size)
    return dict(zip(_MEMORY, struct.unpack(f"{len(data) // 4}I", data), strict=False))


class Reader:
    """What is read of one connection; each source once, when the first keyword wants it."""

    def __init__(self, found: Attached) -> None:
        self.found = found
        self.sock = found.sock
        self._sources: dict[Kind, Mapping[str, Value]] = {}
        self._entry: FrozenConnection | None = None
        if self.sock.getsockopt(Level.SOCKET, SO.MARK) == MARK:
            try:
                self._entry = entry_of(found.conn_id)
            except NotFrozen:
                log.debug("%s is frozen, but not by a freeze of its own", found.conn_id)

    def value(self, keyword: Keyword) -> Value:
        """Of the first source that tells; None if none does."""
        for source in keyword.sources:
            if source.kind is Kind.OPTION:
                value = self._option(keyword)
            else:
                value = self._source(source.kind, keyword).get(keyword.name)
            if value is not None and value != keyword.unset:
                return value
        return None

    def _source(self, kind: Kind, keyword: Keyword) -> Mapping[str, Value]:
        if kind not in self._sources:
            self._sources[kind] = _READERS[kind](self)
        return self._sources[kind]

    def names(self) -> Mapping[str, Value]:
        """What the connection's name says."""
        name = self.found.conn_id
        mapped = self.sock.family == socket.AF_INET6 and not name.v6
        peer = self.sock.getpeername()
        return {
            "protocol": name.protocol,
            "family": "v4-mapped" if mapped else "ipv6" if name.v6 else "ipv4",
            "local_address": name.local,
            "local_port": name.local_port,
            "peer_address": name.peer,
            "peer_port": name.peer_port,
            "scope": name.local.partition("%")[2],
            "flow_info": socket.htonl(peer[2]) if len(peer) > 2 else 0,
        }

    def diag(self) -> Mapping[str, Value]:
        """What sock_diag tells."""
        return {} if self.found.located is None else {"uid": self.found.located.uid}

    def info(self) -> Mapping[str, Value]:
        """What TCP_INFO tells, by keyword."""
        fields = unpack_fields(self.sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))
        told: dict[str, Value] = {}
        for keyword in TABLE:
            name = keyword.source(Kind.INFO)
            if name in fields:
                told[keyword.name] = fields[name]
        bits = fields.get("options", 0)
        told |= {keyword: int(bool(bits & bit)) for keyword, bit in _INFO_BITS.items()}
        if not bits & InfoOption.WSCALE:
            told["snd_wscale"] = told["rcv_wscale"] = None
        if not bits & InfoOption.TIMESTAMPS:
            told["usec_timestamps"] = None
        told["state"] = STATES[TcpState(fields["state"])].value
        return told

    def memory(self) -> Mapping[str, Value]:
        """What SO_MEMINFO tells."""
        told = memory_of(self.sock)
        return {k.name: told.get(name) for k in TABLE if (name := k.source(Kind.MEMORY)) is not None}

    def queues(self) -> Mapping[str, Value]:
        """What ioctls tell of the queues."""
        return {
            k.name: ioctl_int(self.sock.fileno(), Ioctl[name])
            for k in TABLE
            if (name := k.source(Kind.IOCTL)) is not None
        }

    def iterated(self) -> Mapping[str, Value]:
        """What the iterator that is plugged in tells."""
        for iterator in _iterators:
            if told := iterator(self.found):
                return {k.name: told.get(name) for k in TABLE if (name := k.source(Kind.ITERATOR)) is not None}
        return {}

    def repaired(self) -> Mapping[str, Value]:
        """What repair mode tells, of a frozen connection."""
        if self._entry is None or not capable(Cap.NET_ADMIN):
            return {}
        try:
            record = frozen_record(self.sock, self._entry)
        except TcpmigError as error:
            # it is a look, no transaction: what cannot be read is not initialized, and says so
            log.info("the hard state of %s was not read: %s", self.found.conn_id, error)
            return {}
        return {k.name: field_of(record, name) for k in TABLE if (name := k.source(Kind.REPAIR)) is not None}

    def _option(self, keyword: Keyword) -> Value:
        if self._entry is not None and (original := _original(self._entry.state, keyword.name)) is not None:
            return original
        try:
            if keyword.name == "congestion":
                raw = self.sock.getsockopt(Level.TCP, TCP.CONGESTION, CONGESTION_NAME_SIZE)
                return raw.split(b"\0")[0].decode("ascii", "replace")
            if keyword.name in _OTHER_OPTIONS:
                return self.sock.getsockopt(*_OTHER_OPTIONS[keyword.name])
            option = options.BY_KEYWORD[keyword.name]
            data = self.sock.getsockopt(option.level, option.number, option.size)
        except OSError as error:
            # this kernel, or a socket of this family, does not have it
            log.debug("%s: %s", keyword.name, error)
            return None
        if option.format is options.Format.BYTES:
            return data.rstrip(b"\0") if keyword.name == "so.bindtodevice" else data
        numbers = option.decode(data)
        return numbers[0] if len(numbers) == 1 else numbers


_READERS: Final[Mapping[Kind, Callable[[Reader], Mapping[str, Value]]]] = {
    Kind.NAME: Reader.names,
    Kind.DIAG: Reader.diag,
    Kind.INFO: Reader.info,
    Kind.MEMORY: Reader.memory,
    Kind.IOCTL: Reader.queues,
    Kind.ITERATOR: Reader.iterated,
    Kind.REPAIR: Reader.repaired,
}


def _original(state: QuietState, keyword: str) -> int | None:
    """What a frozen connection will have again, of an option that the freeze changed."""
    return {
        "so.mark": state.mark,
        "so.keepalive": int(state.keepalive),
        "tcp.user_timeout": state.user_timeout,
        "ip.minttl": state.minimum_ttl,
        "so.reuseaddr": int(state.reuse_address),
    }.get(keyword)


def frozen_record(sock: socket.socket, entry: FrozenConnection) -> ConnectionRecord:
    """The whole state of a frozen connection; it is out of repair mode afterwards, and its owner runs on.

    One that is being put together is what its note says. OwnerNotStill, UnsupportedState and what
    :func:`~tcpstate.export.export_connections` raises.
    """
    if entry.record:
        return ConnectionRecord.from_bytes(entry.record)
    with standstill(owner.pid for owner in entry.other_owners):
        (record,) = export_connections([sock], [entry.state])
        leave_repair([sock], [entry.state.reuse_address], probe=False)
    return record


def field_of(record: ConnectionRecord, path: str) -> Value:
    """The value of a field, by its path: ``windows.rcv_wnd``."""
    value: object = record
    for name in path.split("."):
        if value is None:
            return None
        value = getattr(value, name, None)
    if isinstance(value, bool):
        return int(value)
    if value is None or isinstance(value, int | str | bytes):
        return value
    # an enumeration's word
    return str(getattr(value, "value", value))


def read_values(found: Attached, wanted: Collection[str]) -> dict[str, Value]:
    """The values of these keywords, in this order; None where this host cannot tell."""
    reader = Reader(found)
    return {name: reader.value(KEYWORDS[name]) for name in wanted}


def applies(keyword: Keyword, sock: socket.socket) -> bool:
    """Whether sockets of this family can have it at all."""
    option = options.BY_KEYWORD.get(keyword.name)
    where = options.Where.IPV6 if sock.family == socket.AF_INET6 else options.Where.IPV4
    return option is None or bool(option.where & where)
