"""One pass over all TCP sockets of a network namespace: what the kernel keeps of each, with no freeze and no repair.

A BPF iterator program writes a record of fixed length for every socket with a connection; 10,000 of them take 10 to 30
ms.  Nothing is changed, and the connections go on: numbers of one socket belong together, those of two need not.

Source: net/ipv4/tcp_ipv4.c (bpf_iter_tcp), include/linux/tcp.h, include/net/inet_connection_sock.h.  Kernel 5.9.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

from tcpstate.connid import ConnId, canonical_address
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf, Kind
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.kernel.tcp import TcpState
from tcpstate.slotted import dataclass

__all__ = [
    "FIELDS",
    "HEAD",
    "Inner",
    "TcpField",
    "available",
    "conn_id_of",
    "head",
    "iterator_program",
    "read",
    "read_by_cookie",
]


class TcpField(NamedTuple):
    """One number.

    name  what it is called here: the kernel's own name, but for its prefixes
    path  member of struct tcp_sock
    unit  its unit, and what it is
    """

    name: str
    path: str
    unit: str


_SK = "inet_conn.icsk_inet.sk."
_ICSK = "inet_conn."
#: what is read, as far as this kernel has it. Sequence numbers and clocks are as on the wire, modulo 2**32.
FIELDS: Final = (
    TcpField("pacing_rate", _SK + "sk_pacing_rate", "bytes per second; all bits set: no limit"),
    TcpField("max_pacing_rate", _SK + "sk_max_pacing_rate", "bytes per second; all bits set: no limit"),
    TcpField("bytes_sent", "bytes_sent", "bytes, retransmissions included"),
    TcpField("bytes_acked", "bytes_acked", "bytes that the peer acknowledged"),
    TcpField("bytes_received", "bytes_received", "bytes that arrived in order"),
    TcpField("bytes_retrans", "bytes_retrans", "bytes sent again"),
    TcpField("out_of_order_queue", "out_of_order_queue.rb_node", "not 0: segments wait behind a hole"),
    TcpField("snd_una", "snd_una", "sequence number: oldest unacknowledged"),
    TcpField("snd_nxt", "snd_nxt", "sequence number: next to be sent"),
    TcpField("write_seq", "write_seq", "sequence number: end of the send queue"),
    TcpField("pushed_seq", "pushed_seq", "sequence number: last pushed"),
    TcpField("snd_sml", "snd_sml", "sequence number: end of the last small segment (Minshall)"),
    TcpField("rcv_nxt", "rcv_nxt", "sequence number: next expected"),
    TcpField("copied_seq", "copied_seq", "sequence number: next to be read by the application"),
    TcpField("rcv_wup", "rcv_wup", "sequence number: rcv_nxt at our last window update"),
    TcpField("snd_wl1", "snd_wl1", "sequence number of the peer's last window update"),
    TcpField("snd_up", "snd_up", "sequence number: after our urgent byte; snd_una if there is none"),
    TcpField("urg_seq", "urg_seq", "sequence number of urgent data"),
    TcpField("high_seq", "high_seq", "sequence number: snd_nxt when congestion began"),
    TcpField("undo_marker", "undo_marker", "sequence number: where an undo would begin; 0: none"),
    TcpField("rcv_wnd", "rcv_wnd", "bytes that we offer"),
    TcpField("snd_wnd", "snd_wnd", "bytes that the peer offers"),
    TcpField("max_window", "max_window", "bytes, the most that the peer ever offered"),
    TcpField("rcv_ssthresh", "rcv_ssthresh", "bytes, limit of the window that we offer"),
    TcpField("window_clamp", "window_clamp", "bytes, the most that we may ever offer"),
    TcpField("srtt_us", "srtt_us", "eighths of microseconds, smoothed round trip (RFC 6298)"),
    TcpField("mdev_us", "mdev_us", "quarters of microseconds, mean deviation"),
    TcpField("mdev_max_us", "mdev_max_us", "quarters of microseconds, largest of this round trip"),
    TcpField("rttvar_us", "rttvar_us", "quarters of microseconds, as the time-out uses it"),
    TcpField("rto", _ICSK + "icsk_rto", "kernel ticks, retransmission time-out"),
    TcpField("backoff", _ICSK + "icsk_backoff", "doublings of the time-out"),
    TcpField("retransmits", _ICSK + "icsk_retransmits", "time-outs without an answer"),
    TcpField("ca_state", _ICSK + "icsk_ca_state", "0 open, 1 disorder, 2 CWR, 3 recovery, 4 loss"),
    TcpField("pmtu", _ICSK + "icsk_pmtu_cookie", "bytes, path MTU last seen"),
    TcpField("snd_cwnd", "snd_cwnd", "segments, congestion window"),
    TcpField("snd_cwnd_cnt", "snd_cwnd_cnt", "segments acknowledged towards the next increase"),
    TcpField("snd_cwnd_clamp", "snd_cwnd_clamp", "segments, most that the window may be"),
    TcpField("snd_cwnd_used", "snd_cwnd_used", "segments of the window in use"),
    TcpField("snd_ssthresh", "snd_ssthresh", "segments, slow start threshold"),
    TcpField("prior_cwnd", "prior_cwnd", "segments, window before the last reduction"),
    TcpField("prior_ssthresh", "prior_ssthresh", "segments, threshold before the last reduction"),
    TcpField("packets_out", "packets_out", "segments in flight"),
    TcpField("retrans_out", "retrans_out", "segments retransmitted and in flight"),
    TcpField("lost_out", "lost_out", "segments held lost"),
    TcpField("sacked_out", "sacked_out", "segments that SACK reported"),
    TcpField("max_packets_out", "max_packets_out", "segments, most in flight in the last window"),
    TcpField("reordering", "reordering", "segments that may overtake each other"),
    TcpField("total_retrans", "total_retrans", "segments sent again"),
    TcpField("delivered", "delivered", "segments delivered, retransmissions included"),
    TcpField("delivered_ce", "delivered_ce", "segments delivered with a congestion mark"),
    TcpField("app_limited", "app_limited", "not 0: the application, not the network, sets the pace"),
    TcpField("segs_in", "segs_in", "segments received"),
    TcpField("segs_out", "segs_out", "segments sent"),
    TcpField("data_segs_in", "data_segs_in", "segments received with data"),
    TcpField("data_segs_out", "data_segs_out", "segments sent with data"),
    TcpField("mss_cache", "mss_cache", "bytes of a full segment"),
    TcpField("advmss", "advmss", "bytes, the segment size that we told the peer"),
    TcpField("mss_clamp", "rx_opt.mss_clamp", "bytes, the segment size that was negotiated"),
    TcpField("user_mss", "rx_opt.user_mss", "bytes, the segment size that the application set; 0: none"),
    TcpField("snd_wscale", "rx_opt.snd_wscale", "shift of the peer's window"),
    TcpField("rcv_wscale", "rx_opt.rcv_wscale", "shift of our window"),
    TcpField("wscale_ok", "rx_opt.wscale_ok", "whether windows are scaled"),
    TcpField("tstamp_ok", "rx_opt.tstamp_ok", "whether timestamps were negotiated"),
    TcpField("sack_ok", "rx_opt.sack_ok", "bits: 1 SACK was negotiated, 4 DSACK was seen"),
    TcpField("ts_recent", "rx_opt.ts_recent", "the peer's clock as it was last (RFC 7323)"),
    TcpField("ts_recent_stamp", "rx_opt.ts_recent_stamp", "seconds since boot when it was"),
    TcpField("tsoffset", "tsoffset", "our timestamp clock less the kernel's"),
    TcpField("ecn_flags", "ecn_flags", "bits: 1 negotiated, 2 and up the signals under way"),
    TcpField("urg_data", "urg_data", "urgent byte and whether it is there"),
    TcpField("mark", _SK + "sk_mark", "SO_MARK"),
    TcpField("priority", _SK + "sk_priority", "SO_PRIORITY"),
    TcpField("rcvbuf", _SK + "sk_rcvbuf", "bytes, limit of the receive buffer"),
    TcpField("sndbuf", _SK + "sk_sndbuf", "bytes, limit of the send buffer"),
    TcpField("wmem_queued", _SK + "sk_wmem_queued", "bytes of memory in the send queue"),
    TcpField("backlog", _SK + "sk_backlog.len", "bytes that wait for the owner to let the socket go"),
)  # fmt: skip

#: before the numbers: cookie, both ends as IPv6 and as IPv4, interface, our port, the peer's port (network order),
#: family, state
HEAD: Final = struct.Struct("=Q16s16s4s4sIH2sHB5x")
_HEAD_PARTS: Final = (
    ("skc_cookie", 8), ("skc_v6_rcv_saddr", 16), ("skc_v6_daddr", 16), ("skc_rcv_saddr", 4), ("skc_daddr", 4),
    ("skc_bound_dev_if", 4), ("skc_num", 2), ("skc_dport", 2), ("skc_family", 2), ("skc_state", 1),
)  # fmt: skip
#: without IPv6 in the kernel these two do not exist
_OPTIONAL: Final = frozenset({"skc_v6_rcv_saddr", "skc_v6_daddr"})
_FRAME_MAX: Final = 512


@dataclass(frozen=True, slots=True)
class Inner:
    """One socket.

    conn_id  its name
    cookie   its SO_COOKIE; 0 until somebody has asked for it
    family   AF_INET or AF_INET6 of the socket
    state    its state
    values   the numbers, by :class:`TcpField` name
    """

    conn_id: ConnId
    cookie: int
    family: int
    state: TcpState
    values: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Reader:
    """The attached program, and how its records read."""

    link: int
    names: tuple[str, ...]
    record: struct.Struct


def head(asm: Asm, known: Layout, base: int, start: int) -> None:
    """Instructions that write the head of a record at ``start`` in the frame, from the sock_common in ``base``."""
    at = start
    for name, size in _HEAD_PARTS:
        try:
            offset = known.offset("sock_common", name)
        except BadBtf:
            if name not in _OPTIONAL:
                raise
            offset = -1
        for done in range(0, size, 8):
            width = min(8, size - done)
            if offset < 0:
                asm.store_number(width, FRAME, at + done, 0)
            else:
                asm.load(width, 1, base, offset + done).store(width, FRAME, at + done, 1)
        at += size
    asm.store_number(1, FRAME, at, 0).store_number(4, FRAME, at + 1, 0)


def _program(known: Layout) -> tuple[bytes, tuple[str, ...], struct.Struct]:
    fields = []
    for field in FIELDS:
        try:
            fields.append((field.name, known.place("tcp_sock", field.path)))
        except BadBtf:
            # an older kernel has no such member: its keyword is then not there
            continue
    wide = [(n, p) for n, p in fields if p.size == 8 and not p.bits]
    narrow = [(n, p) for n, p in fields if p.size != 8 or p.bits]
    record = struct.Struct(f"{HEAD.format}{len(wide)}Q{len(narrow)}I{4 * (len(narrow) % 2)}x")
    start = -record.size
    if record.size > _FRAME_MAX:
        raise RuntimeError(f"a record of {record.size} bytes does not fit the frame")
    asm = Asm().mov(9, 1).load(8, 6, 9, 0).load(8, 7, 9, 8).jump_if(Jump.EQUAL, 7, 0, "out")
    asm.load(1, 1, 7, known.offset("sock_common", "skc_state")).jump_if(Jump.EQUAL, 1, TcpState.LISTEN, "out")
    asm.mov(1, 7).call(Helper.SKC_TO_TCP_SOCK).jump_if(Jump.EQUAL, 0, 0, "out").mov(8, 0)
    head(asm, known, 7, start)
    at = start + HEAD.size
    for _, place in wide:
        asm.load(8, 1, 8, place.offset).store(8, FRAME, at, 1)
        at += 8
    for _, place in narrow:
        if place.bits:
            shift = place.bit % 8
            asm.load(1 if shift + place.bits <= 8 else 2, 1, 8, place.bit // 8)
            asm.shift_right(1, shift).mask(1, (1 << place.bits) - 1)
        else:
            asm.load(place.size, 1, 8, place.offset)
        asm.store(4, FRAME, at, 1)
        at += 4
    if at:
        # the padding: the verifier wants every byte that is written out to have been set
        asm.store_number(4, FRAME, at, 0)
    seq = known.offset("bpf_iter_meta", "seq")
    asm.load(8, 1, 6, seq).frame(2, start).set(3, record.size).call(Helper.SEQ_WRITE)
    return asm.label("out").exit(0).code(), tuple(n for n, _ in (*wide, *narrow)), record


def iterator_program(code: bytes, known: Layout) -> int:
    """Load a program of the TCP iterator and attach it; the link's descriptor. Refused, BadBtf."""
    target = known.id(Kind.FUNCTION, "bpf_iter_tcp")
    program = call.load(
        call.ProgramType.TRACING, code, attach=call.Attach.TRACE_ITER, target=target, name="tcpmig_iter", gpl=True
    )
    try:
        return call.link(program, 0, call.Attach.TRACE_ITER)
    finally:
        os.close(program)


@functools.cache
def _reader() -> _Reader:
    known = layout()
    try:
        code, names, record = _program(known)
        link = iterator_program(code, known)
    except (OSError, BadBtf) as error:
        raise KernelFeatureMissing(
            f"no BPF iterator over TCP sockets: {error}",
            object="bpf_iter_tcp",
            fix="Run as root (CAP_BPF, CAP_PERFMON) on a kernel with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF.",
        ) from None
    known.save()
    return _Reader(link, names, record)


def available() -> KernelFeatureMissing | None:
    """None if this kernel lends us the iterator, else why not."""
    try:
        _reader()
    except KernelFeatureMissing as error:
        return error
    return None


def read(
    names: Collection[str] | None = None, *, wanted: Callable[[ConnId], bool] | None = None
) -> dict[ConnId, Inner]:
    """Every connection of the calling thread's network namespace that has a socket, by conn-ID.

    names   which :class:`TcpField` values are told; None: all that this kernel has
    wanted  chooses; None: all

    KernelFeatureMissing, with what is missing; OSError.  TIME_WAIT and half-open connections have no socket and are not
    among them; one whose conn-ID is there twice (bound to different interfaces) is told once.
    """
    reader = _reader()
    chosen = [(i, n) for i, n in enumerate(reader.names) if names is None or n in names]
    address = functools.cache(_address)
    found = {}
    for (
        cookie,
        local6,
        peer6,
        local4,
        peer4,
        device,
        port,
        peer_port,
        family,
        state,
        *values,
    ) in reader.record.iter_unpack(call.iterate(reader.link)):
        v6 = family == socket.AF_INET6
        local = address(local6 if v6 else local4, device)
        peer = address(peer6 if v6 else peer4, device)
        conn_id = ConnId("tcp", local, port, peer, int.from_bytes(peer_port, "big"))
        if wanted is None or wanted(conn_id):
            found[conn_id] = Inner(conn_id, cookie, family, TcpState(state), {n: values[i] for i, n in chosen})
    return found


def read_by_cookie(names: Collection[str]) -> dict[int, tuple[int, ...]]:
    """The values of ``names``, in this order, by SO_COOKIE; only sockets that have one (somebody asked for it).

    Quicker than :func:`read` where there are thousands. KernelFeatureMissing; KeyError for a name this kernel lacks.
    """
    reader = _reader()
    first = len(HEAD.unpack(bytes(HEAD.size)))
    places = [first + reader.names.index(n) if n in reader.names else _missing(n) for n in names]
    return {
        parts[0]: tuple([parts[i] for i in places])
        for parts in reader.record.iter_unpack(call.iterate(reader.link))
        if parts[0]
    }


def conn_id_of(record: bytes) -> ConnId:
    """The connection of a record's head (:func:`head`)."""
    _, local6, peer6, local4, peer4, device, port, peer_port, family, _ = HEAD.unpack(record)
    ends = (local6, peer6) if family == socket.AF_INET6 else (local4, peer4)
    local, peer = (_address(end, device) for end in ends)
    return ConnId("tcp", local, port, peer, int.from_bytes(peer_port, "big"))


def _missing(name: str) -> int:
    raise KeyError(name)


def _address(raw: bytes, device: int) -> str:
    text = canonical_address(socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw))
    return f"{text}%{socket.if_indextoname(device)}" if device and text.startswith("fe80:") else text
