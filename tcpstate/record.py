"""The portable record of a connection: what is needed to go on with it anywhere.

::

    send queue   snd_una ........ snd_nxt ........ end of send_queue  [FIN]
                     sent, unacked      not yet sent
    recv queue   start of receive_queue .......... rcv_nxt            [peer's FIN]
                     arrived, acknowledged, not yet read

No structure of any kernel is inside: names, numbers with units, bytes of the streams.  ``to_bytes`` and ``from_bytes``
are the wire form.  Fields that a reader does not know are skipped; ``VERSION`` changes only when that is not enough.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any, NoReturn, Self

from tcpstate import codec
from tcpstate.connid import ConnId
from tcpstate.errors import BadRecord
from tcpstate.kernel.bpf import MAX_INSTRUCTIONS, Instruction
from tcpstate.kernel.sockets import BufferLock
from tcpstate.md5keys import SigningKey
from tcpstate.segment import SEQ_MASK, before
from tcpstate.slotted import dataclass

__all__ = [
    "DEVICE_OPTION",
    "Buffers",
    "ConnectionRecord",
    "Family",
    "LocalFin",
    "Negotiated",
    "SoftState",
    "State",
    "Timestamps",
    "Windows",
]

VERSION = 1
#: keyword of SO_BINDTODEVICE in option_data (tcpstate.options)
DEVICE_OPTION = "so.bindtodevice"
#: RFC 7323 2.3
_SHIFT_MAX = 14
#: no socket buffer is larger
_QUEUE_MAX = 1 << 31


class Family(enum.Enum):
    """What kind of socket carries the connection."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"
    MAPPED = "v4-mapped"  # an IPv6 socket that speaks IPv4


class State(enum.Enum):
    """RFC 9293 3.3.2, as far as a socket with an owner can be in it."""

    ESTABLISHED = "ESTABLISHED"
    SYN_SENT = "SYN_SENT"
    SYN_RECEIVED = "SYN_RECEIVED"
    FIN_WAIT_1 = "FIN_WAIT_1"
    FIN_WAIT_2 = "FIN_WAIT_2"
    CLOSE_WAIT = "CLOSE_WAIT"
    CLOSING = "CLOSING"
    LAST_ACK = "LAST_ACK"
    TIME_WAIT = "TIME_WAIT"
    CLOSED = "CLOSED"


class LocalFin(enum.Enum):
    """How far our own FIN has come."""

    NONE = "none"
    QUEUED = "queued"
    SENT = "sent"
    ACKED = "acked"


#: states in which the peer's FIN has arrived
PEER_FINISHED = frozenset({State.CLOSE_WAIT, State.CLOSING, State.LAST_ACK, State.TIME_WAIT})
#: what ends a connection (net/ipv4/tcp_input.c tcp_reset, tcp_timer.c tcp_write_err, tcp_ipv4.c tcp_v4_err)
_ERRORS = frozenset(errno.errorcode.values())
#: states in which our own FIN is in the send queue or behind it
LOCALLY_FINISHED = frozenset({State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSING, State.LAST_ACK, State.TIME_WAIT})


# Thousands of records are checked while peers wait: a message is put together only where there is something to say.


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _wide(*values: int) -> NoReturn:
    raise ValueError(f"{values} are not 32-bit numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Both windows, bytes and sequence numbers.

    snd_wl1     segment sequence number of the last update of the send window
    snd_wnd     what the peer offers
    max_window  the largest it ever offered
    rcv_wnd     what we offer
    rcv_wup     rcv_nxt when we last told the peer
    """

    snd_wl1: int
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int

    def __post_init__(self) -> None:
        # a bit above 31, or a sign, of any of them shows in all of them together
        if (self.snd_wl1 | self.snd_wnd | self.max_window | self.rcv_wnd | self.rcv_wup) & ~SEQ_MASK:
            _wide(self.snd_wl1, self.snd_wnd, self.max_window, self.rcv_wnd, self.rcv_wup)


@dataclass(frozen=True, slots=True, kw_only=True)
class Negotiated:
    """What the handshake settled.

    mss         largest segment that the peer takes (the clamp, before path MTU), bytes
    snd_wscale, rcv_wscale  shifts of the peer's and of our windows, None: no scaling
    sack, timestamps  whether both sides agreed
    ecn         whether congestion is signalled (informative: it cannot be given back)
    """

    mss: int
    snd_wscale: int | None
    rcv_wscale: int | None
    sack: bool
    timestamps: bool
    ecn: bool = False

    def __post_init__(self) -> None:
        _check(0 < self.mss <= 0xFFFF, f"MSS {self.mss} is out of range")
        _check((self.snd_wscale is None) == (self.rcv_wscale is None), "window scaling takes both sides")
        for shift in (self.snd_wscale, self.rcv_wscale):
            _check(shift is None or 0 <= shift <= _SHIFT_MAX, f"window scale {shift} is out of range")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timestamps:
    """Our timestamp clock at the export. It must go on, never back, else the peer drops everything (PAWS, RFC 7323 5).

    value         the 32-bit number
    microseconds  whether it counts microseconds, not milliseconds
    """

    value: int
    microseconds: bool

    def __post_init__(self) -> None:
        if not 0 <= self.value <= SEQ_MASK:
            raise ValueError(f"timestamp {self.value} is not a 32-bit number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """Socket buffers: limits as SO_SNDBUF and SO_RCVBUF report them, and whether the application fixed them."""

    send: int
    receive: int
    send_locked: bool
    receive_locked: bool

    def __post_init__(self) -> None:
        for size in (self.send, self.receive):
            _check(0 <= size < _QUEUE_MAX, f"buffer size {size} is out of range")

    @property
    def locks(self) -> int:
        """Which the application fixed, as SO_BUF_LOCK takes it."""
        send = BufferLock.SEND if self.send_locked else 0
        return send | (BufferLock.RECEIVE if self.receive_locked else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftState:
    """What the connection learned about its path, as read. Restoring it is optional (:mod:`tcpstate.softstate`).

    cwnd, ssthresh          congestion window and slow start threshold, segments
    srtt, rttvar, rto       smoothed round-trip time, its deviation, retransmission time-out, microseconds (RFC 6298)
    min_rtt                 smallest round-trip time, microseconds
    reordering              segments that may overtake each other
    path_mtu, advertised_mss  bytes
    pacing_rate             bytes per second; all 64 bits set: not limited
    """

    cwnd: int
    ssthresh: int
    srtt: int
    rttvar: int
    rto: int
    min_rtt: int | None = None
    reordering: int | None = None
    path_mtu: int | None = None
    advertised_mss: int | None = None
    pacing_rate: int | None = None

    def __post_init__(self) -> None:
        if (self.cwnd | self.ssthresh | self.srtt | self.rttvar | self.rto) & ~SEQ_MASK:
            _wide(self.cwnd, self.ssthresh, self.srtt, self.rttvar, self.rto)
        if self.pacing_rate is not None and not 0 <= self.pacing_rate < 1 << 64:
            raise ValueError("the pacing rate is no 64-bit number")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionRecord:
    """One end of one TCP connection.

    conn_id, family, state   which, and where in its life
    snd_una, snd_nxt         oldest unacknowledged and next sequence number to send, our SYN and FIN not counted
    send_queue               the bytes from snd_una on: the first (snd_nxt - snd_una) were sent at least once
    local_fin                how far our FIN has come
    rcv_nxt                  next sequence number expected from the peer, not counting its FIN
    receive_queue            the bytes before rcv_nxt that the application has not read
    windows, negotiated, timestamps, congestion   protocol state; ``congestion`` names the algorithm
    options                  socket options by keyword (:mod:`tcpstate.options`), numbers
    option_data              socket options by keyword whose values are bytes
    filter, filter_locked    the application's own classic filter (instructions code, jt, jf, k); whether it is locked
    buffers, soft            sizes; learned state (None if not read)
    urgent_in                offset in receive_queue of the byte that the peer called urgent; None: none is unread
    urgent_taken             the application has that byte already (MSG_OOB): its place in the queue is to be skipped
    urgent_out               bytes of send_queue up to and including our urgent byte; None: none, or not known
    required                 what a reader must know to go on with this connection, by name: others refuse it
    flow_info, scope         IPv6: flow label with traffic class; interface name of a link-local connection
    reuse_address            SO_REUSEADDR before repair mode hid it
    signing_keys             TCP MD5 keys, secret (:mod:`tcpstate.md5keys`)
    error                    closed connections: the name of the pending error, e.g. ``ECONNRESET``, "" for none;
                             without one both sides ended it, rcv_nxt and snd_nxt not counting their FINs
    version                  of this form

    Raises ValueError where the parts contradict each other.
    """

    conn_id: ConnId
    family: Family
    state: State
    snd_una: int
    snd_nxt: int
    send_queue: bytes
    rcv_nxt: int
    receive_queue: bytes
    windows: Windows
    negotiated: Negotiated
    buffers: Buffers
    congestion: str
    timestamps: Timestamps | None = None
    local_fin: LocalFin = LocalFin.NONE
    options: dict[str, tuple[int, ...]] = field(default_factory=dict)
    option_data: dict[str, bytes] = field(default_factory=dict)
    filter: tuple[Instruction, ...] = ()
    filter_locked: bool = False
    reuse_address: bool = False
    soft: SoftState | None = None
    flow_info: int = 0
    scope: str = ""
    signing_keys: tuple[SigningKey, ...] = ()
    error: str = ""
    urgent_in: int | None = None
    urgent_taken: bool = False
    urgent_out: int | None = None
    required: tuple[str, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        if (self.snd_una | self.snd_nxt | self.rcv_nxt | self.flow_info) & ~SEQ_MASK:
            _wide(self.snd_una, self.snd_nxt, self.rcv_nxt, self.flow_info)
        self.check()

    def check(self) -> None:
        """ValueError if parts contradict each other that are each in range. Part of making a record, not to be called
        otherwise; written out, because thousands of records are checked while peers wait."""
        plain = self.state is State.ESTABLISHED and self.local_fin is LocalFin.NONE
        if self.version != VERSION:
            raise ValueError(f"version {self.version} of a connection record is unknown, {VERSION} is known")
        if len(self.send_queue) >= _QUEUE_MAX or len(self.receive_queue) >= _QUEUE_MAX:
            raise ValueError("a queue is too long")
        if (self.snd_nxt - self.snd_una) & SEQ_MASK > len(self.send_queue):
            raise ValueError("more bytes were sent than there are")
        if (self.timestamps is not None) is not self.negotiated.timestamps and self.state is not State.SYN_SENT:
            # a SYN carries the clock before the peer has agreed to it
            raise ValueError("timestamps without a clock, or the reverse")
        if self.conn_id.v6 is not (self.family is Family.IPV6):
            raise ValueError("addresses and family disagree")
        if not (0 < len(self.congestion) < 16 and self.congestion.isascii()):
            raise ValueError("congestion control's name is malformed")
        if not plain:
            self._check_fin()
        if self.state is State.SYN_SENT and (self.send_queue or self.receive_queue):
            raise ValueError("data before the SYN")
        if self.error and (self.state is not State.CLOSED or self.error not in _ERRORS):
            raise ValueError("its error is impossible")
        if self.urgent_in is not None and not 0 <= self.urgent_in < len(self.receive_queue):
            raise ValueError("no urgent byte is there")
        if self.urgent_out is not None and not 0 < self.urgent_out <= len(self.send_queue):
            raise ValueError("our urgent byte is not there")
        if self.filter:
            self._check_filter()

    def _check_filter(self) -> None:
        _check(len(self.filter) <= MAX_INSTRUCTIONS, "the filter is too long")
        for code, jt, jf, k in self.filter:
            _check(0 <= code <= 0xFFFF and 0 <= jt <= 0xFF and 0 <= jf <= 0xFF, "a filter instruction is malformed")
            if not 0 <= k <= SEQ_MASK:
                _wide(k)

    def _check_fin(self) -> None:
        _check((self.state in LOCALLY_FINISHED) == (self.local_fin is not LocalFin.NONE), "state and FIN disagree")
        if self.local_fin is LocalFin.ACKED:
            _check(not self.send_queue, "data is unacknowledged before an acked FIN")

    @property
    def sent(self) -> int:
        """Bytes of the send queue that were sent at least once."""
        return (self.snd_nxt - self.snd_una) & SEQ_MASK

    @property
    def unopened(self) -> bool:
        """Whether the peer has never answered: it is connecting, or that failed."""
        if self.state is State.CLOSED:
            return not self.rcv_nxt and not self.windows.max_window
        return self.state is State.SYN_SENT

    @property
    def peer_fin(self) -> bool:
        """Whether the peer's FIN has arrived."""
        return self.state in PEER_FINISHED

    @property
    def write_seq(self) -> int:
        """The sequence number after the send queue, not counting our FIN."""
        return (self.snd_una + len(self.send_queue)) & SEQ_MASK

    @property
    def copied_seq(self) -> int:
        """The sequence number of the first byte that the application has not read."""
        return (self.rcv_nxt - len(self.receive_queue)) & SEQ_MASK

    def is_new(self, seq_end: int, ack: int) -> bool:
        """Whether a segment of the peer that ends before ``seq_end`` and acknowledges ``ack`` can tell us anything."""
        return before(self.rcv_nxt, seq_end) or not before(ack, self.snd_una)

    @property
    def device(self) -> str:
        """Name of the interface that it is bound to (SO_BINDTODEVICE), "" for none."""
        return self.option_data.get(DEVICE_OPTION, b"").decode("utf-8", "surrogateescape")

    def on_devices(self, devices: Mapping[str, str]) -> Self:
        """The same with the interface names of another host, where they are in ``devices``: link-local scopes and
        SO_BINDTODEVICE. For everything that is done with it there."""
        changes: dict[str, Any] = {}
        scope = devices.get(self.scope, self.scope)
        if scope != self.scope:
            local, peer = (f"{a.partition('%')[0]}%{scope}" for a in (self.conn_id.local, self.conn_id.peer))
            changes["scope"] = scope
            changes["conn_id"] = ConnId.tcp(local, self.conn_id.local_port, peer, self.conn_id.peer_port)
        device = devices.get(self.device, self.device)
        if device != self.device:
            changes["option_data"] = self.option_data | {DEVICE_OPTION: device.encode("utf-8", "surrogateescape")}
        return replace(self, **changes) if changes else self

    def to_bytes(self) -> bytes:
        """The wire form."""
        return codec.pack(self)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """Of the wire form; :class:`~tcpstate.errors.BadRecord` for anything that is not exactly one record."""
        try:
            return codec.unpack(cls, data)
        except (UnicodeError, OverflowError) as error:
            raise BadRecord(f"not a connection record: {error}") from None
