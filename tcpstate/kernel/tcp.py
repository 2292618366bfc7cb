"""The TCP socket's ABI: options, states, repair, TCP_INFO. Source: include/uapi/linux/tcp.h, net/ipv4/tcp.c."""

from __future__ import annotations

import enum
import struct

from tcpstate.slotted import dataclass

__all__ = [
    "TCP",
    "InfoOption",
    "Repair",
    "RepairOption",
    "RepairQueue",
    "RepairWindow",
    "TcpInfo",
    "TcpState",
]


class TCP(enum.IntEnum):
    """Options of level IPPROTO_TCP (linux/tcp.h)."""

    NODELAY = 1
    MAXSEG = 2
    CORK = 3
    KEEPIDLE = 4
    KEEPINTVL = 5
    KEEPCNT = 6
    SYNCNT = 7
    LINGER2 = 8
    DEFER_ACCEPT = 9
    WINDOW_CLAMP = 10
    INFO = 11
    QUICKACK = 12
    CONGESTION = 13
    MD5SIG = 14
    THIN_LINEAR_TIMEOUTS = 16
    THIN_DUPACK = 17
    USER_TIMEOUT = 18
    REPAIR = 19
    REPAIR_QUEUE = 20
    QUEUE_SEQ = 21
    REPAIR_OPTIONS = 22
    FASTOPEN = 23
    TIMESTAMP = 24
    NOTSENT_LOWAT = 25
    CC_INFO = 26
    SAVE_SYN = 27
    REPAIR_WINDOW = 29
    FASTOPEN_CONNECT = 30
    ULP = 31
    MD5SIG_EXT = 32
    INQ = 36
    TX_DELAY = 37
    AO_INFO = 40
    IS_MPTCP = 43
    RTO_MAX_MS = 44
    RTO_MIN_US = 45
    DELACK_MAX_US = 46


class TcpState(enum.IntEnum):
    """States of a socket (include/net/tcp_states.h)."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11
    NEW_SYN_RECV = 12


class Repair(enum.IntEnum):
    """Values of TCP_REPAIR."""

    ON = 1
    OFF = 0  # sends a window probe
    OFF_NO_PROBE = -1  # since 4.18


class RepairQueue(enum.IntEnum):
    """Values of TCP_REPAIR_QUEUE: what TCP_QUEUE_SEQ, send() and recv() mean while in repair."""

    NONE = 0
    RECEIVE = 1
    SEND = 2


class RepairOption(enum.IntEnum):
    """opt_code of struct tcp_repair_opt: the option kinds of RFC 9293 3.1 and RFC 7323."""

    MSS = 2
    WINDOW_SCALE = 3
    SACK_PERMITTED = 4
    TIMESTAMP = 8


class InfoOption(enum.IntFlag):
    """tcpi_options."""

    TIMESTAMPS = 1
    SACK = 2
    WSCALE = 4
    ECN = 8
    ECN_SEEN = 16
    SYN_DATA = 32
    USEC_TS = 64


#: TCP_USER_TIMEOUT's largest value, milliseconds (25 days)
USER_TIMEOUT_MAX = 2**31 - 1
#: TCP_CA_NAME_MAX
CONGESTION_NAME_SIZE = 16
#: what we ask TCP_INFO for; the kernel returns what it has (6.1: 232, 6.12: 248, 6.18: 280)
INFO_SIZE = 280
#: the longest of :func:`repair_options`: four of struct tcp_repair_opt
REPAIR_OPTIONS_SIZE = 32


def repair_options(mss: int, *, wscale: tuple[int, int] | None, sack: bool, timestamps: bool) -> bytes:
    """An array of struct tcp_repair_opt. wscale: (peer's, ours), shifts 0 .. 14."""
    parts = []
    if sack:
        parts.append((RepairOption.SACK_PERMITTED, 0))
    if wscale is not None:
        parts.append((RepairOption.WINDOW_SCALE, wscale[0] | wscale[1] << 16))
    if timestamps:
        parts.append((RepairOption.TIMESTAMP, 0))
    parts.append((RepairOption.MSS, mss))
    return b"".join(struct.pack("II", code, value) for code, value in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairWindow:
    """struct tcp_repair_window. The kernel accepts exactly 20 bytes.

    snd_wl1     sequence number of the segment that last updated the send window
    snd_wnd     window that the peer offers, bytes
    max_window  largest window that the peer ever offered
    rcv_wnd     window that we offer
    rcv_wup     rcv_nxt at the last window update that we sent
    """

    snd_wl1: int
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int

    def pack(self) -> bytes:
        """The struct."""
        return _WINDOW.pack(self.snd_wl1, self.snd_wnd, self.max_window, self.rcv_wnd, self.rcv_wup)

    @classmethod
    def unpack(cls, data: bytes) -> RepairWindow:
        """Of the struct's bytes."""
        wl1, wnd, largest, rcv_wnd, rcv_wup = _WINDOW.unpack(data)
        return cls(snd_wl1=wl1, snd_wnd=wnd, max_window=largest, rcv_wnd=rcv_wnd, rcv_wup=rcv_wup)


_WINDOW = struct.Struct("5I")
#: :meth:`RepairWindow.pack` of the bare numbers
pack_window = _WINDOW.pack
WINDOW_SIZE = _WINDOW.size


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpInfo:
    """struct tcp_info, as much as this kernel returned. Times in microseconds, except rto and ato's kernel units (us).

    Of a listener, ``unacked`` is the length of its accept queue and ``sacked`` the queue's limit.
    Fields that this kernel does not return are None.
    """

    state: int
    options: InfoOption
    snd_wscale: int
    rcv_wscale: int
    rto: int
    ato: int
    snd_mss: int
    rcv_mss: int
    unacked: int
    sacked: int
    lost: int
    retrans: int
    pmtu: int
    rcv_ssthresh: int
    rtt: int
    rttvar: int
    snd_ssthresh: int
    snd_cwnd: int
    advmss: int
    reordering: int
    total_retrans: int
    min_rtt: int | None = None
    bytes_acked: int | None = None
    bytes_received: int | None = None
    snd_wnd: int | None = None
    rcv_wnd: int | None = None
    pacing_rate: int | None = None

    @classmethod
    def unpack(cls, data: bytes) -> TcpInfo:
        """Of what getsockopt(TCP_INFO) returned: 104 bytes (the first version) or more; ValueError if it is shorter."""
        if len(data) < _INFO_FIRST:
            raise ValueError(f"TCP_INFO of {len(data)} bytes")
        words = struct.unpack_from("24I", data, 8)
        return cls(
            state=data[0],
            options=InfoOption(data[5]),
            # two bit fields: the low half is snd_wscale on little-endian machines
            snd_wscale=data[6] & 15,
            rcv_wscale=data[6] >> 4,
            rto=words[0],
            ato=words[1],
            snd_mss=words[2],
            rcv_mss=words[3],
            unacked=words[4],
            sacked=words[5],
            lost=words[6],
            retrans=words[7],
            pmtu=words[13],
            rcv_ssthresh=words[14],
            rtt=words[15],
            rttvar=words[16],
            snd_ssthresh=words[17],
            snd_cwnd=words[18],
            advmss=words[19],
            reordering=words[20],
            total_retrans=words[23],
            bytes_acked=_later(data, "Q", 120),
            bytes_received=_later(data, "Q", 128),
            min_rtt=_later(data, "I", 148),
            snd_wnd=_later(data, "I", 228),
            rcv_wnd=_later(data, "I", 232),
            pacing_rate=_later(data, "Q", 104),
        )


_INFO_FIRST = 104


def _later(data: bytes, code: str, offset: int) -> int | None:
    """A field that younger kernels append."""
    if len(data) < offset + struct.calcsize(code):
        return None
    value: int = struct.unpack_from(code, data, offset)[0]
    return value
