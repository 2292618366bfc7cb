"""The registry of state keywords: what each is, whether it is hard or soft, where it comes from, who may set it.

One table, from which everything else follows: :func:`tcpstate.transport.transport_state_get` reads by it,
``transport_state_set`` checks and writes by it, docs/reference/keywords.md is printed from it.  A keyword names state
of the connection, not of an implementation (paper, 5.2): several sources may know the same one, and the first that
this host has tells it.  Socket options follow from :data:`tcpstate.options.TABLE`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Final

from tcpstate import options
from tcpstate.kernel.sockets import SO
from tcpstate.options import Format, Option, Stage
from tcpstate.slotted import dataclass
from tcpstate.stateitem import Datatype, StateFlag

__all__ = ["BEFORE_BIND", "KEYWORDS", "TABLE", "Change", "Keyword", "Kind", "Life", "Source"]


class Life(enum.Enum):
    """When it may change (paper, section 3)."""

    FIXED = "fixed"
    VARYING = "varying"
    INITIALIZATION = "initialization"


class Kind(enum.Enum):
    """Where a value is read."""

    NAME = "the socket's names"
    DIAG = "sock_diag"
    INFO = "TCP_INFO"
    OPTION = "getsockopt"
    IOCTL = "ioctl"
    MEMORY = "SO_MEMINFO"
    ITERATOR = "BPF tcp iterator"
    REPAIR = "repair mode"  # the name is the field of a ConnectionRecord


class Change(enum.Enum):
    """How a value is written."""

    NONE = "no"
    OPTION = "setsockopt"
    SOFT = "repair mode, learned"
    REPAIR = "repair mode"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value is read: the kind, and its name there."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        if self.kind in (Kind.OPTION, Kind.IOCTL, Kind.NAME):
            return self.name
        return f"{self.kind.value} {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyword:
    """One line of the registry.

    name        the keyword
    datatype    of its value
    unit        "" where it has none
    hard        whether it must be preserved for the connection to go on unnoticed
    life        when it may change
    change      how it is set
    privileged  whether setting it takes CAP_NET_ADMIN
    sources     where it is read, the most particular last; the first that knows it tells
    meaning     one line
    unset       the number that stands for "no value yet", if there is one
    """

    name: str
    datatype: Datatype
    unit: str
    hard: bool
    life: Life
    change: Change
    privileged: bool
    sources: tuple[Source, ...]
    meaning: str
    unset: int | None = None

    @property
    def flags(self) -> StateFlag:
        """The flags of its items, but for INITIALIZED."""
        found = StateFlag.HARD if self.hard else StateFlag.SOFT
        found |= StateFlag[self.life.name]
        if self.change is not Change.NONE:
            found |= StateFlag.SETTABLE
            if self.privileged:
                found |= StateFlag.PRIVILEGED
        return found

    def source(self, kind: Kind) -> str | None:
        """Its name in a kind of source, if it is there."""
        return next((s.name for s in self.sources if s.kind is kind), None)


_KINDS: Final[Mapping[str, Kind]] = {
    "name": Kind.NAME,
    "diag": Kind.DIAG,
    "info": Kind.INFO,
    "so": Kind.OPTION,
    "ioctl": Kind.IOCTL,
    "mem": Kind.MEMORY,
    "bpf": Kind.ITERATOR,
    "repair": Kind.REPAIR,
}
_TYPES: Final[Mapping[str, Datatype]] = {t.value: t for t in Datatype} | {"seq": Datatype.SEQUENCE}


def _sources(text: str) -> tuple[Source, ...]:
    """Of "info.rtt bpf.srtt_us"."""
    return tuple(Source(_KINDS[kind], name) for kind, name in (each.split(".", 1) for each in text.split()))


def _line(
    name: str, datatype: str, unit: str, life: Life, sources: str, meaning: str, *, hard: bool, change: Change,
    unset: int | None = None,
) -> Keyword:  # fmt: skip
    return Keyword(
        name=name, datatype=_TYPES[datatype], unit=unit, hard=hard, life=life, change=change,
        privileged=change in (Change.REPAIR, Change.SOFT), sources=_sources(sources), meaning=meaning, unset=unset,
    )  # fmt: skip


def _hard(name: str, datatype: str, unit: str, life: Life, sources: str, meaning: str) -> Keyword:
    """Hard state: settable, in repair mode, where repair mode knows it, unless it is the connection's name."""
    repair = "repair." in sources and life is not Life.FIXED
    change = Change.REPAIR if repair else Change.NONE
    return _line(name, datatype, unit, life, sources, meaning, hard=True, change=change)


def _derived(name: str, datatype: str, sources: str, meaning: str) -> Keyword:
    """Hard state that follows from other hard state."""
    return _line(name, datatype, "", Life.VARYING, sources, meaning, hard=True, change=Change.NONE)


def _soft(
    name: str, datatype: str, unit: str, sources: str, meaning: str, change: Change = Change.NONE,
    unset: int | None = None,
) -> Keyword:  # fmt: skip
    return _line(name, datatype, unit, Life.VARYING, sources, meaning, hard=False, change=change, unset=unset)


_FIXED, _VARYING, _INITIAL = Life.FIXED, Life.VARYING, Life.INITIALIZATION

_PROTOCOL: Final[tuple[Keyword, ...]] = (
    _hard("protocol", "text", "", _FIXED, "name.conn-ID", "the transport protocol"),
    _hard("family", "text", "", _FIXED, "name.address", "`ipv4`, `ipv6`, or `v4-mapped`: an IPv6 socket with IPv4"),
    _hard("local_address", "text", "", _FIXED, "name.getsockname", "our address"),
    _hard("local_port", "u16", "", _FIXED, "name.getsockname", "our port"),
    _hard("peer_address", "text", "", _FIXED, "name.getpeername", "the peer's address"),
    _hard("peer_port", "u16", "", _FIXED, "name.getpeername", "the peer's port"),
    _hard("scope", "text", "", _FIXED, "name.getsockname", "interface of a link-local connection, else empty"),
    _hard("flow_info", "u32", "", _FIXED, "name.getpeername", "IPv6 flow label and traffic class"),
    _line("uid", "u32", "", _FIXED, "diag.idiag_uid", "user whose socket it is", hard=False, change=Change.NONE),
    _hard("state", "text", "", _VARYING, "info.state repair.state", "state of RFC 9293 3.3.2: `ESTABLISHED`, .."),
    _hard("local_fin", "text", "", _VARYING, "repair.local_fin", "our FIN: `none`, `queued`, `sent`, `acked`"),
    _hard("snd_una", "seq", "", _VARYING, "bpf.snd_una repair.snd_una", "oldest sequence number not acknowledged"),
    _hard("snd_nxt", "seq", "", _VARYING, "bpf.snd_nxt repair.snd_nxt", "next sequence number to send"),
    _derived("write_seq", "seq", "bpf.write_seq repair.write_seq", "sequence number after the send queue"),
    _derived("copied_seq", "seq", "bpf.copied_seq repair.copied_seq", "sequence number of the first unread byte"),
    _hard("rcv_nxt", "seq", "", _VARYING, "bpf.rcv_nxt repair.rcv_nxt", "next sequence number expected"),
    _hard("snd_wl1", "seq", "", _VARYING, "bpf.snd_wl1 repair.windows.snd_wl1", "segment that last updated snd_wnd"),
    _hard("snd_wnd", "u32", "bytes", _VARYING, "info.snd_wnd bpf.snd_wnd repair.windows.snd_wnd", "the peer's window"),
    _hard("max_window", "u32", "bytes", _VARYING, "bpf.max_window repair.windows.max_window", "its largest so far"),
    _hard("rcv_wnd", "u32", "bytes", _VARYING, "info.rcv_wnd bpf.rcv_wnd repair.windows.rcv_wnd", "our window"),
    _hard("rcv_wup", "seq", "", _VARYING, "bpf.rcv_wup repair.windows.rcv_wup", "rcv_nxt when we last told our window"),
    _hard("timestamp", "u32", "ticks", _VARYING, "repair.timestamps.value", "our timestamp clock (RFC 7323)"),
    _hard("timestamp_offset", "u32", "ticks", _VARYING, "bpf.tsoffset", "our clock's offset to the host's"),
    _hard("ts_recent", "u32", "ticks", _VARYING, "bpf.ts_recent", "the peer's latest timestamp"),
    _hard("send_queue", "bytes", "", _VARYING, "repair.send_queue", "bytes from snd_una on that we keep"),
    _hard("receive_queue", "bytes", "", _VARYING, "repair.receive_queue", "bytes before rcv_nxt not read yet"),
    _hard("urgent_in", "u32", "bytes", _VARYING, "repair.urgent_in", "unread bytes before the urgent byte"),
    _hard("urgent_taken", "bool", "", _VARYING, "repair.urgent_taken", "that byte was read out of band already"),
    _hard("urgent_out", "u32", "bytes", _VARYING, "repair.urgent_out", "bytes from snd_una on up to our urgent byte"),
    _hard("mss", "u16", "bytes", _INITIAL, "repair.negotiated.mss", "largest segment that the peer takes"),
    _hard("snd_wscale", "u8", "", _INITIAL, "info.snd_wscale repair.negotiated.snd_wscale", "shift of snd_wnd"),
    _hard("rcv_wscale", "u8", "", _INITIAL, "info.rcv_wscale repair.negotiated.rcv_wscale", "shift of rcv_wnd"),
    _hard("sack", "bool", "", _INITIAL, "info.options repair.negotiated.sack", "selective acknowledgements agreed"),
    _hard("timestamps", "bool", "", _INITIAL, "info.options repair.negotiated.timestamps", "timestamps agreed"),
    _hard("usec_timestamps", "bool", "", _INITIAL, "info.options repair.timestamps.microseconds",
          "the timestamp clock counts microseconds"),
    _line("ecn", "bool", "", _INITIAL, "info.options", "congestion is signalled (RFC 3168)", hard=False,
          change=Change.NONE),
    _line("syn_data", "bool", "", _INITIAL, "info.options", "the SYN's data was acknowledged", hard=False,
          change=Change.NONE),
    _line("advertised_mss", "u16", "bytes", _INITIAL, "info.advmss", "largest segment that we told the peer",
          hard=False, change=Change.NONE),
)  # fmt: skip

_LEARNED: Final[tuple[Keyword, ...]] = (
    _soft("cwnd", "u32", "segments", "info.snd_cwnd bpf.snd_cwnd", "congestion window", Change.SOFT),
    _soft("ssthresh", "u32", "segments", "info.snd_ssthresh bpf.snd_ssthresh", "slow start threshold", Change.SOFT,
          unset=0x7FFFFFFF),
    _soft("srtt", "u32", "us", "info.rtt", "smoothed round trip time", Change.SOFT, unset=0),
    _soft("rttvar", "u32", "us", "info.rttvar", "its mean deviation", Change.SOFT),
    _soft("rto", "u32", "us", "info.rto", "retransmission timeout; it follows from srtt and rttvar"),
    _soft("ato", "u32", "us", "info.ato", "delayed acknowledgement timeout", unset=0),
    _soft("min_rtt", "u32", "us", "info.min_rtt", "least round trip time", unset=0xFFFFFFFF),
    _soft("rcv_rtt", "u32", "us", "info.rcv_rtt", "round trip time as the receiver sees it", unset=0),
    _soft("rcv_space", "u32", "bytes", "info.rcv_space", "bytes read per round trip, for buffer tuning"),
    _soft("rcv_ssthresh", "u32", "bytes", "info.rcv_ssthresh", "limit of the receive window's growth"),
    _soft("snd_mss", "u32", "bytes", "info.snd_mss", "size of the segments that we send"),
    _soft("rcv_mss", "u32", "bytes", "info.rcv_mss", "size of the segments that arrive"),
    _soft("path_mtu", "u32", "bytes", "info.pmtu", "path MTU"),
    _soft("reordering", "u32", "segments", "info.reordering", "how far segments overtake each other"),
    _soft("ca_state", "u8", "", "info.ca_state", "0 open, 1 disorder, 2 CWR, 3 recovery, 4 loss"),
    _soft("retransmits", "u8", "", "info.retransmits", "time-outs in a row"),
    _soft("probes", "u8", "", "info.probes", "unanswered window probes or keepalives"),
    _soft("backoff", "u8", "", "info.backoff", "doublings of the timeout"),
    _soft("pacing_rate", "u64", "bytes/s", "info.pacing_rate", "rate of sending", unset=2**64 - 1),
    _soft("delivery_rate", "u64", "bytes/s", "info.delivery_rate", "latest rate of delivery", unset=0),
    _soft("delivery_rate_app_limited", "bool", "", "info.delivery_rate_app_limited", "the application set that rate"),
    _soft("congestion", "text", "", "so.TCP_CONGESTION repair.congestion", "congestion control", Change.OPTION),
)  # fmt: skip

_QUEUED: Final[tuple[Keyword, ...]] = (
    _soft("unread", "u32", "bytes", "ioctl.SIOCINQ", "arrived, not read; up to the urgent mark"),
    _soft("unacknowledged", "u32", "bytes", "ioctl.SIOCOUTQ", "written, not acknowledged (paper, 4.2.2)"),
    _soft("unsent", "u32", "bytes", "ioctl.SIOCOUTQNSD info.notsent_bytes", "written, not sent"),
    _soft("at_mark", "bool", "", "ioctl.SIOCATMARK", "the next byte to be read is the urgent one"),
    _soft("segments_out", "u32", "segments", "info.unacked", "sent, not acknowledged"),
    _soft("segments_sacked", "u32", "segments", "info.sacked", "of them, selectively acknowledged"),
    _soft("segments_lost", "u32", "segments", "info.lost", "of them, held for lost"),
    _soft("segments_retransmitted", "u32", "segments", "info.retrans", "of them, sent again"),
    _soft("send_buffer", "u32", "bytes", "so.SO_SNDBUF repair.buffers.send", "limit of the send buffer", Change.OPTION),
    _soft("receive_buffer", "u32", "bytes", "so.SO_RCVBUF repair.buffers.receive", "limit of the receive buffer",
          Change.OPTION),
    _soft("buffer_locks", "u8", "", "so.SO_BUF_LOCK", "1: send buffer fixed, 2: receive buffer fixed", Change.OPTION),
    _soft("memory_receive", "u32", "bytes", "mem.rmem_alloc", "memory of arrived data"),
    _soft("memory_in_host", "u32", "bytes", "mem.wmem_alloc", "memory of packets that have not left the host"),
    _soft("memory_send", "u32", "bytes", "mem.wmem_queued", "memory of the send queue"),
    _soft("memory_forward", "u32", "bytes", "mem.fwd_alloc", "memory reserved"),
    _soft("memory_options", "u32", "bytes", "mem.optmem", "memory of options and filters"),
    _soft("backlog", "u32", "bytes", "mem.backlog", "memory of segments that wait to be looked at"),
    _soft("drops", "u32", "segments", "mem.drops", "segments that the socket dropped"),
)  # fmt: skip

_COUNTED: Final[tuple[Keyword, ...]] = (
    _soft("last_data_sent", "u32", "ms", "info.last_data_sent", "since we last sent data"),
    _soft("last_data_received", "u32", "ms", "info.last_data_recv", "since data last arrived"),
    _soft("last_ack_received", "u32", "ms", "info.last_ack_recv", "since an acknowledgement last arrived"),
    _soft("retransmissions", "u32", "segments", "info.total_retrans", "sent again, ever"),
    _soft("bytes_acked", "u64", "bytes", "info.bytes_acked", "acknowledged by the peer, ever"),
    _soft("bytes_received", "u64", "bytes", "info.bytes_received", "arrived in order, ever"),
    _soft("bytes_sent", "u64", "bytes", "info.bytes_sent", "sent, ever, repetitions included"),
    _soft("bytes_retransmitted", "u64", "bytes", "info.bytes_retrans", "of them, repetitions"),
    _soft("segs_out", "u32", "segments", "info.segs_out", "sent, ever"),
    _soft("segs_in", "u32", "segments", "info.segs_in", "arrived, ever"),
    _soft("data_segs_out", "u32", "segments", "info.data_segs_out", "sent with data"),
    _soft("data_segs_in", "u32", "segments", "info.data_segs_in", "arrived with data"),
    _soft("delivered", "u32", "segments", "info.delivered", "delivered to the peer"),
    _soft("delivered_ce", "u32", "segments", "info.delivered_ce", "of them, marked as congested"),
    _soft("busy_time", "u64", "us", "info.busy_time", "with data to send"),
    _soft("rwnd_limited", "u64", "us", "info.rwnd_limited", "held up by the peer's window"),
    _soft("sndbuf_limited", "u64", "us", "info.sndbuf_limited", "held up by the send buffer"),
    _soft("dsack_dups", "u32", "segments", "info.dsack_dups", "repeated for nothing, as the peer told"),
    _soft("reord_seen", "u32", "", "info.reord_seen", "reorderings seen"),
    _soft("out_of_order", "u32", "segments", "info.rcv_ooopack", "arrived out of order"),
    _soft("rehash", "u32", "", "info.rehash", "changes of the flow's hash"),
    _soft("timeouts", "u16", "", "info.total_rto", "retransmission timeouts, ever"),
    _soft("timeout_recoveries", "u16", "", "info.total_rto_recoveries", "recoveries from them"),
    _soft("timeout_time", "u32", "ms", "info.total_rto_time", "spent in them"),
    _soft("received_ce", "u32", "segments", "info.received_ce", "arrived with a congestion mark (AccECN)"),
    _soft("delivered_e1_bytes", "u32", "bytes", "info.delivered_e1_bytes", "AccECN: delivered as ECT(1)"),
    _soft("delivered_e0_bytes", "u32", "bytes", "info.delivered_e0_bytes", "AccECN: delivered as ECT(0)"),
    _soft("delivered_ce_bytes", "u32", "bytes", "info.delivered_ce_bytes", "AccECN: delivered as CE"),
    _soft("received_e1_bytes", "u32", "bytes", "info.received_e1_bytes", "AccECN: arrived as ECT(1)"),
    _soft("received_e0_bytes", "u32", "bytes", "info.received_e0_bytes", "AccECN: arrived as ECT(0)"),
    _soft("received_ce_bytes", "u32", "bytes", "info.received_ce_bytes", "AccECN: arrived as CE"),
    _soft("accecn_fail_mode", "u16", "", "info.accecn_fail_mode", "AccECN: why it was given up, bits"),
    _soft("accecn_opt_seen", "u16", "", "info.accecn_opt_seen", "AccECN: whether its option was seen"),
)

#: options that only tune: without them the connection goes on the same for both sides
_TUNING: Final = frozenset(
    {
        "so.busy_poll", "so.prefer_busy_poll", "so.busy_poll_budget", "so.txrehash", "so.reserve_mem",
        "so.max_pacing_rate", "tcp.quickack", "tcp.thin_linear_timeouts", "tcp.rto_max_ms", "tcp.rto_min_us",
        "tcp.delack_max_us",
    }
)  # fmt: skip
#: options that the kernel lets only CAP_NET_ADMIN set (net/core/sock.c, net/ipv4/ip_sockglue.c), always or in part
_ADMIN: Final = frozenset(
    {
        "so.debug", "so.mark", "so.priority", "so.rcvmark", "so.busy_poll", "so.prefer_busy_poll",
        "so.busy_poll_budget", "so.bindtodevice", "ip.transparent", "ipv6.transparent", "ipv6.hopopts",
        "ipv6.rthdrdstopts", "ipv6.rthdr", "ipv6.dstopts",
    }
)  # fmt: skip
#: the kernel refuses it once the socket is bound
BEFORE_BIND: Final = frozenset({"ipv6.v6only"})
_FORMATS: Final[Mapping[Format, Datatype]] = {
    Format.INT: Datatype.INT,
    Format.UNSIGNED: Datatype.U32,
    Format.UNSIGNED_64: Datatype.U64,
    Format.PAIR: Datatype.NUMBERS,
    Format.TIME: Datatype.NUMBERS,
    Format.BYTES: Datatype.BYTES,
}
_UNITS: Final[Mapping[str, str]] = {
    "so.max_pacing_rate": "bytes/s",
    "so.rcvlowat": "bytes",
    "so.rcvtimeo_new": "s, us",
    "so.sndtimeo_new": "s, us",
    "so.busy_poll": "us",
    "so.reserve_mem": "bytes",
    "tcp.keepidle": "s",
    "tcp.keepintvl": "s",
    "tcp.linger2": "s",
    "tcp.window_clamp": "bytes",
    "tcp.user_timeout": "ms",
    "tcp.notsent_lowat": "bytes",
    "tcp.tx_delay": "us",
    "tcp.rto_max_ms": "ms",
    "tcp.rto_min_us": "us",
    "tcp.delack_max_us": "us",
}
_STAGES: Final[Mapping[Stage, str]] = {
    Stage.BEFORE_CONNECT: "given to a rebuilt socket before it has a name",
    Stage.REPAIRED: "given to a rebuilt socket while it is in repair",
    Stage.RELEASED: "given to a rebuilt socket once it lives",
}


def option_name(option: Option) -> str:
    """The kernel's name of an option: ``SO_KEEPALIVE``."""
    level, _, rest = option.keyword.partition(".")
    name = SO(option.number).name if level == "so" else rest.upper()
    return f"{level.upper()}_{name}"


def _option_lines() -> Iterator[Keyword]:
    for option in options.TABLE:
        keyword = option.keyword
        yield Keyword(
            name=keyword,
            datatype=_FORMATS[option.format],
            unit=_UNITS.get(keyword, ""),
            hard=keyword not in _TUNING,
            life=Life.FIXED if keyword in BEFORE_BIND else Life.VARYING,
            change=Change.NONE if keyword in BEFORE_BIND else Change.OPTION,
            privileged=keyword in _ADMIN,
            sources=(Source(Kind.OPTION, option_name(option)),),
            meaning="socket option, " + _STAGES[option.stage],
        )
    for keyword, name in (("so.reuseaddr", "SO_REUSEADDR"),):
        yield Keyword(
            name=keyword,
            datatype=Datatype.INT,
            unit="",
            hard=True,
            life=Life.VARYING,
            change=Change.OPTION,
            privileged=False,
            sources=(Source(Kind.OPTION, name), Source(Kind.REPAIR, "reuse_address")),
            meaning="socket option, hidden by repair mode",
        )


#: every keyword of this stack, in the order in which a listing shows them
TABLE: Final[tuple[Keyword, ...]] = (*_PROTOCOL, *_LEARNED, *_QUEUED, *_COUNTED, *_option_lines())
KEYWORDS: Final[Mapping[str, Keyword]] = {keyword.name: keyword for keyword in TABLE}
