"""Socket options of a connection: one table, saved and given back by it.

Every option that an established socket gives out and takes back stands in ``TABLE``; each that does not stands in
``EXCLUDED`` with the reason (``tests/kernel/tcp`` tries all numbers on the running kernel against both).  What equals
the value of a fresh socket of the same host is not recorded: a host's own defaults (sysctls) hold for it.

What the freeze changes (mark, keepalive, user timeout, minimum TTL) or repair mode hides (SO_REUSEADDR) is kept in
:class:`~tcpstate.freeze.QuietState`; the export writes those originals over what it reads here.
"""

from __future__ import annotations

import enum
import errno
import functools
import socket
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field

from tcpstate.errors import UnsupportedSocket
from tcpstate.kernel.columns import Column, Field, Reusable, Rows, numbers_of
from tcpstate.kernel.sockets import IP, IPV6, SO, Level, family_of
from tcpstate.kernel.tcp import TCP
from tcpstate.record import ConnectionRecord
from tcpstate.rows import describe
from tcpstate.slotted import dataclass

__all__ = [
    "EXCLUDED",
    "TABLE",
    "VOLATILE",
    "Format",
    "Option",
    "Saved",
    "Stage",
    "number",
    "refresh",
    "save",
]


class Format(enum.Enum):
    """Datatype of a value: how its bytes are read. Numbers in the machine's byte order become plain numbers."""

    INT = "i"
    UNSIGNED = "I"
    UNSIGNED_64 = "Q"
    PAIR = "ii"
    TIME = "qq"  # seconds, microseconds
    BYTES = "s"


class Stage(enum.Enum):
    """When a rebuilt socket takes it."""

    BEFORE_CONNECT = "before bind and connect"  # it chooses the route, or the kernel refuses it later
    REPAIRED = "in repair, after the queues"
    RELEASED = "after repair"  # it would send, or kill the connection, before the address is here


class Where(enum.Flag):
    """Which sockets have it."""

    IPV4 = enum.auto()
    IPV6 = enum.auto()
    ANY = IPV4 | IPV6


@dataclass(frozen=True, slots=True)
class Option:
    """One line of the table.

    keyword          its name in records
    level, number    its name for the kernel
    format, size     datatype and largest length in bytes
    """

    keyword: str
    level: Level
    number: int
    format: Format
    stage: Stage
    where: Where
    size: int

    def decode(self, data: bytes) -> tuple[int, ...]:
        """Numbers of the value's bytes."""
        return struct.unpack_from(self.format.value, data)

    def encode(self, value: Sequence[int]) -> bytes:
        """Bytes of the numbers; ValueError if they do not fit."""
        try:
            return struct.pack(self.format.value, *value)
        except struct.error as error:
            raise ValueError(f"{self.keyword}: {error}") from None


@dataclass(frozen=True, slots=True)
class Saved:
    """What one socket's options differ in from a fresh socket's. Connections that are alike share one: look only."""

    numbers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)


_LEVELS: dict[type[enum.IntEnum], tuple[Level, str, Where]] = {
    SO: (Level.SOCKET, "so", Where.ANY),
    # an IPv6 socket that speaks IPv4 has both
    IP: (Level.IP, "ip", Where.ANY),
    IPV6: (Level.IPV6, "ipv6", Where.IPV6),
    TCP: (Level.TCP, "tcp", Where.ANY),
}


def _line(number: enum.IntEnum, form: Format = Format.INT, stage: Stage = Stage.REPAIRED, size: int = 0) -> Option:
    level, prefix, where = _LEVELS[type(number)]
    keyword = f"{prefix}.{number.name.lower().removesuffix('_old')}"
    return Option(keyword, level, number, form, stage, where, size or struct.calcsize(form.value))


#: IPv6 extension headers that all packets of a socket carry; those in use are far shorter
_EXTENSION_MAX = 256

# The order is the order of setting: the _NEW forms follow the older ones, which reset the choice between them.
TABLE: tuple[Option, ...] = (
    _line(SO.DEBUG),
    _line(SO.DONTROUTE, stage=Stage.BEFORE_CONNECT),
    _line(SO.BROADCAST),
    _line(SO.KEEPALIVE, stage=Stage.RELEASED),
    _line(SO.OOBINLINE),
    _line(SO.NO_CHECK),
    _line(SO.PRIORITY),
    _line(SO.LINGER, Format.PAIR),
    _line(SO.REUSEPORT),
    _line(SO.RCVLOWAT),
    _line(SO.RCVTIMEO_NEW, Format.TIME),
    _line(SO.SNDTIMEO_NEW, Format.TIME),
    _line(SO.TIMESTAMP_OLD),
    _line(SO.TIMESTAMPNS_OLD),
    _line(SO.TIMESTAMPING_OLD, Format.PAIR),
    _line(SO.TIMESTAMP_NEW),
    _line(SO.TIMESTAMPNS_NEW),
    _line(SO.TIMESTAMPING_NEW, Format.PAIR),
    _line(SO.MARK, Format.UNSIGNED, Stage.RELEASED),
    _line(SO.RXQ_OVFL),
    _line(SO.WIFI_STATUS),
    _line(SO.PEEK_OFF, stage=Stage.RELEASED),
    _line(SO.NOFCS),
    _line(SO.SELECT_ERR_QUEUE),
    _line(SO.BUSY_POLL),
    _line(SO.MAX_PACING_RATE, Format.UNSIGNED_64),
    _line(SO.ZEROCOPY),
    _line(SO.TXTIME, Format.PAIR),
    _line(SO.PREFER_BUSY_POLL),
    _line(SO.BUSY_POLL_BUDGET),
    _line(SO.RESERVE_MEM),
    _line(SO.TXREHASH),
    _line(SO.RCVMARK),
    _line(SO.RCVPRIORITY),
    _line(SO.BINDTODEVICE, Format.BYTES, Stage.BEFORE_CONNECT, 16),
    _line(IP.OPTIONS, Format.BYTES, Stage.REPAIRED, 40),
    _line(IP.TOS),
    _line(IP.TTL),
    _line(IP.RECVOPTS),
    _line(IP.RETOPTS),
    _line(IP.PKTINFO),
    _line(IP.MTU_DISCOVER),
    _line(IP.RECVERR),
    _line(IP.RECVTTL),
    _line(IP.RECVTOS),
    _line(IP.FREEBIND, stage=Stage.RELEASED),
    _line(IP.PASSSEC),
    _line(IP.TRANSPARENT, stage=Stage.RELEASED),
    _line(IP.RECVORIGDSTADDR),
    _line(IP.MINTTL, stage=Stage.RELEASED),
    _line(IP.CHECKSUM),
    _line(IP.BIND_ADDRESS_NO_PORT),
    _line(IP.RECVERR_RFC4884),
    _line(IP.MULTICAST_LOOP),
    _line(IP.MULTICAST_ALL),
    _line(IP.LOCAL_PORT_RANGE, Format.UNSIGNED),
    _line(IPV6.RECVPKTINFO_2292),
    _line(IPV6.RECVHOPOPTS_2292),
    _line(IPV6.RECVDSTOPTS_2292),
    _line(IPV6.RECVRTHDR_2292),
    _line(IPV6.RECVHOPLIMIT_2292),
    _line(IPV6.FLOWINFO),
    _line(IPV6.UNICAST_HOPS),
    _line(IPV6.MULTICAST_LOOP),
    _line(IPV6.MTU_DISCOVER),
    _line(IPV6.RECVERR),
    _line(IPV6.V6ONLY, stage=Stage.BEFORE_CONNECT),
    _line(IPV6.MULTICAST_ALL),
    _line(IPV6.ROUTER_ALERT_ISOLATE),
    _line(IPV6.RECVERR_RFC4884),
    _line(IPV6.FLOWINFO_SEND),
    _line(IPV6.RECVPKTINFO),
    _line(IPV6.RECVHOPLIMIT),
    _line(IPV6.RECVHOPOPTS),
    _line(IPV6.RECVRTHDR),
    _line(IPV6.RECVDSTOPTS),
    _line(IPV6.RECVPATHMTU),
    _line(IPV6.HOPOPTS, Format.BYTES, size=_EXTENSION_MAX),
    _line(IPV6.RTHDRDSTOPTS, Format.BYTES, size=_EXTENSION_MAX),
    _line(IPV6.RTHDR, Format.BYTES, size=_EXTENSION_MAX),
    _line(IPV6.DSTOPTS, Format.BYTES, size=_EXTENSION_MAX),
    _line(IPV6.DONTFRAG),
    _line(IPV6.RECVTCLASS),
    _line(IPV6.TCLASS),
    _line(IPV6.AUTOFLOWLABEL),
    _line(IPV6.ADDR_PREFERENCES),
    _line(IPV6.MINHOPCOUNT, stage=Stage.RELEASED),
    _line(IPV6.RECVORIGDSTADDR),
    _line(IPV6.TRANSPARENT, stage=Stage.RELEASED),
    _line(IPV6.RECVFRAGSIZE),
    _line(IPV6.FREEBIND, stage=Stage.RELEASED),
    _line(TCP.NODELAY),
    _line(TCP.KEEPIDLE),
    _line(TCP.KEEPINTVL),
    _line(TCP.KEEPCNT),
    _line(TCP.SYNCNT),
    _line(TCP.LINGER2),
    _line(TCP.DEFER_ACCEPT),
    _line(TCP.WINDOW_CLAMP),
    _line(TCP.THIN_LINEAR_TIMEOUTS),
    _line(TCP.USER_TIMEOUT, stage=Stage.RELEASED),
    # with it the kernel would not take all unsent data back
    _line(TCP.NOTSENT_LOWAT, Format.UNSIGNED, Stage.RELEASED),
    _line(TCP.INQ),
    _line(TCP.TX_DELAY),
    _line(TCP.RTO_MAX_MS),
    _line(TCP.RTO_MIN_US),
    _line(TCP.DELACK_MAX_US),
    # corking and quick ACKs come after the unsent data has left
    _line(TCP.CORK, stage=Stage.RELEASED),
    _line(TCP.QUICKACK, stage=Stage.RELEASED),
)

BY_KEYWORD: Mapping[str, Option] = {option.keyword: option for option in TABLE}

_DEVICE = "so.bindtodevice"
_LOW = {"so.rcvlowat": bytes(4)}
_OWN_FIELD = "has a field of its own in the record"
_DERIVED = "tells what follows from other state"
_SAME_STATE = "another form of an option that is in the table"
EXCLUDED: Mapping[tuple[Level, int], str] = {
    (Level.SOCKET, SO.REUSEADDR): _OWN_FIELD,
    (Level.SOCKET, SO.SNDBUF): _OWN_FIELD,
    (Level.SOCKET, SO.RCVBUF): _OWN_FIELD,
    (Level.SOCKET, SO.BUF_LOCK): _OWN_FIELD,
    (Level.SOCKET, SO.ATTACH_FILTER): _OWN_FIELD,
    (Level.SOCKET, SO.LOCK_FILTER): _OWN_FIELD,
    (Level.SOCKET, SO.ERROR): "reading it clears it",
    (Level.SOCKET, SO.RCVTIMEO_OLD): _SAME_STATE,
    (Level.SOCKET, SO.SNDTIMEO_OLD): _SAME_STATE,
    (Level.SOCKET, SO.BINDTOIFINDEX): "an interface index means nothing elsewhere; the name is kept",
    (Level.SOCKET, SO.INCOMING_CPU): "tells which CPU saw the last packet",
    (Level.SOCKET, 14): "SO_BSDCOMPAT has had no effect since Linux 2.6",
    (Level.SOCKET, 16): "SO_PASSCRED is of unix sockets",
    (Level.IP, 14): "IP_MTU: " + _DERIVED,
    (Level.IP, IP.UNICAST_IF): "an interface index means nothing elsewhere",
    (Level.IP, IP.MULTICAST_TTL): "a stream socket cannot set it",
    (Level.IP, IP.NODEFRAG): "of raw sockets",
    (Level.IPV6, 6): "IPV6_2292PKTOPTIONS holds what the last packet brought",
    (Level.IPV6, 24): "IPV6_MTU: " + _DERIVED,
    (Level.IPV6, IPV6.UNICAST_IF): "an interface index means nothing elsewhere",
    (Level.IPV6, IPV6.MULTICAST_HOPS): "a stream socket cannot set it",
    (Level.TCP, TCP.MAXSEG): "a connected socket's own limit cannot be set; the negotiated MSS is in the record",
    (Level.TCP, TCP.INFO): _DERIVED,
    (Level.TCP, TCP.CC_INFO): _DERIVED,
    (Level.TCP, TCP.CONGESTION): _OWN_FIELD,
    (Level.TCP, TCP.THIN_DUPACK): "has had no effect since Linux 4.12",
    (Level.TCP, TCP.FASTOPEN): "of listening and connecting sockets",
    (Level.TCP, TCP.SAVE_SYN): "of listening sockets",
    (Level.TCP, TCP.ULP): "connections with one are refused",
    (Level.TCP, TCP.IS_MPTCP): "connections that are are refused",
}


def _of_family(family: int) -> list[Option]:
    wanted = Where.IPV6 if family == socket.AF_INET6 else Where.IPV4
    return [option for option in TABLE if wanted & option.where]


@functools.cache
def _defaults(family: int) -> dict[str, bytes]:
    """Values of a fresh socket, by keyword, of the options that this kernel has."""
    with socket.socket(family, socket.SOCK_STREAM) as fresh:
        options = _of_family(family)
        values = {}
        for option in options:
            try:
                values[option.keyword] = fresh.getsockopt(option.level, option.number, option.size)
            except OSError as error:
                if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTCONN):
                    raise
        return values


#: what the kernel changes without the application (tests/kernel/tcp holds the others to it)
VOLATILE: frozenset[str] = frozenset({"tcp.quickack", "tcp.window_clamp", "ip.tos", "ipv6.tclass"})


@dataclass(frozen=True, slots=True)
class _Reading:
    """A table that reads options of sockets of one family: which, and where each has its value and its length."""

    table: Reusable[tuple[Column, list[Field]]]
    options: list[Option]
    defaults: Mapping[str, bytes]

    def read(self, socks: Sequence[socket.socket]) -> list[Saved]:
        """What each has of these options that a fresh socket has not."""
        rows, (fd, fields) = self.table.of(len(socks))
        fd.set(numbers_of(socks))
        rows.run()
        # connections of one server are mostly alike: each combination of values is looked at once
        known: dict[tuple[bytes, ...], Saved] = {}
        saved = []
        for row, record in enumerate(struct.iter_unpack(f"{rows.record_size}s", rows.memory)):
            same = known.get(record)
            if same is None:
                same = known[record] = self._look(fields, row, socks[row])
            saved.append(same)
        return saved

    def _look(self, fields: Sequence[Field], row: int, sock: socket.socket) -> Saved:
        found = Saved()
        for option, place in zip(self.options, fields, strict=True):
            if place.is_usual(row, self.defaults[option.keyword]):
                continue
            value = place.value(row)
            # a call that failed left the default in its place; SO_RCVLOWAT 0 is as good as 1, and cannot be set
            if value in (self.defaults[option.keyword], _LOW.get(option.keyword)) or place.failed(row):
                continue
            if option.format is not Format.BYTES:
                found.numbers[option.keyword] = option.decode(value)
            elif option.keyword == _DEVICE:
                found.data[_DEVICE] = value.rstrip(b"\0")
            elif len(value) < option.size or option.keyword == "ip.options":
                found.data[option.keyword] = value
            else:
                raise UnsupportedSocket(f"its {option.keyword} may be cut off", object=describe(sock))
        return found


@functools.cache
def _reading(family: int, volatile: bool) -> _Reading:
    """The options of this kernel that the kernel changes by itself, or all others."""
    defaults = _defaults(family)
    options = [o for o in _of_family(family) if o.keyword in defaults and (o.keyword in VOLATILE) == volatile]

    def build(rows: Rows) -> tuple[Column, list[Field]]:
        fd = rows.column()
        return fd, [
            rows.getsockopt(fd, o.level, o.number, o.size, ignore=True, initial=defaults[o.keyword]) for o in options
        ]

    return _Reading(Reusable(build), options, defaults)


def save(socks: Sequence[socket.socket]) -> list[Saved]:
    """The options of each socket that differ from a fresh one's.

    UnsupportedSocket if a value is longer than any we know; OSError if a descriptor is not a socket.
    """
    return refresh(socks, _by_family(socks, volatile=False))


def refresh(socks: Sequence[socket.socket], saved: Sequence[Saved]) -> list[Saved]:
    """What :func:`save` gave, as it is now, if the sockets' owners have been stopped since."""
    fresh = _by_family(socks, volatile=True)
    known: dict[tuple[int, int], Saved] = {}
    found = []
    for new, old in zip(fresh, saved, strict=True):
        key = id(new), id(old)
        both = known.get(key)
        if both is None:
            steady = {k: v for k, v in old.numbers.items() if k not in VOLATILE}
            both = known[key] = Saved(steady | new.numbers, old.data)
        found.append(both)
    return found


def _by_family(socks: Sequence[socket.socket], *, volatile: bool) -> list[Saved]:
    families = list(map(family_of, socks))
    if len(set(families)) == 1:
        return _reading(families[0], volatile).read(socks)
    saved = [Saved()] * len(socks)
    for family in (socket.AF_INET, socket.AF_INET6):
        mine = [i for i, one in enumerate(families) if one == family]
        if mine:
            for i, found in zip(mine, _reading(family, volatile).read([socks[i] for i in mine]), strict=True):
                saved[i] = found
    return saved


def take_back(sock: socket.socket, keywords: Iterable[str]) -> None:
    """Give options the values that they have on a fresh socket. OSError."""
    defaults = _defaults(family_of(sock))
    for keyword in keywords:
        option = BY_KEYWORD.get(keyword)
        if option is not None and keyword in defaults:
            sock.setsockopt(option.level, option.number, defaults[keyword])


def in_force(record: ConnectionRecord, keyword: str) -> int:
    """The first number of an option, recorded or not: then it is that of this host's fresh sockets."""
    told = record.options.get(keyword)
    if told is not None:
        return told[0]
    family = socket.AF_INET if record.conn_id.v6 is False else socket.AF_INET6
    return int.from_bytes(_defaults(family)[keyword][:4], sys.byteorder)


def number(record: ConnectionRecord, keyword: str) -> int:
    """The first number of a recorded option; 0 if it is not recorded (only for options that are 0 on fresh sockets)."""
    return record.options.get(keyword, (0,))[0]
