"""Every field of struct tcp_info, by the header's name without ``tcpi_``. Source: include/uapi/linux/tcp.h.

:class:`tcpstate.kernel.tcp.TcpInfo` is the part that the export needs; this is the whole, for who wants to look.
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["FIELDS", "field_names", "unpack_fields"]

#: (name, struct code, offset); younger kernels append, and return as much as they have
FIELDS: Final[tuple[tuple[str, str, int], ...]] = (
    ("state", "B", 0),
    ("ca_state", "B", 1),
    ("retransmits", "B", 2),
    ("probes", "B", 3),
    ("backoff", "B", 4),
    ("options", "B", 5),
    ("rto", "I", 8),
    ("ato", "I", 12),
    ("snd_mss", "I", 16),
    ("rcv_mss", "I", 20),
    ("unacked", "I", 24),
    ("sacked", "I", 28),
    ("lost", "I", 32),
    ("retrans", "I", 36),
    ("last_data_sent", "I", 44),
    ("last_data_recv", "I", 52),
    ("last_ack_recv", "I", 56),
    ("pmtu", "I", 60),
    ("rcv_ssthresh", "I", 64),
    ("rtt", "I", 68),
    ("rttvar", "I", 72),
    ("snd_ssthresh", "I", 76),
    ("snd_cwnd", "I", 80),
    ("advmss", "I", 84),
    ("reordering", "I", 88),
    ("rcv_rtt", "I", 92),
    ("rcv_space", "I", 96),
    ("total_retrans", "I", 100),
    ("pacing_rate", "Q", 104),
    ("max_pacing_rate", "Q", 112),
    ("bytes_acked", "Q", 120),
    ("bytes_received", "Q", 128),
    ("segs_out", "I", 136),
    ("segs_in", "I", 140),
    ("notsent_bytes", "I", 144),
    ("min_rtt", "I", 148),
    ("data_segs_in", "I", 152),
    ("data_segs_out", "I", 156),
    ("delivery_rate", "Q", 160),
    ("busy_time", "Q", 168),
    ("rwnd_limited", "Q", 176),
    ("sndbuf_limited", "Q", 184),
    ("delivered", "I", 192),
    ("delivered_ce", "I", 196),
    ("bytes_sent", "Q", 200),
    ("bytes_retrans", "Q", 208),
    ("dsack_dups", "I", 216),
    ("reord_seen", "I", 220),
    ("rcv_ooopack", "I", 224),
    ("snd_wnd", "I", 228),
    ("rcv_wnd", "I", 232),  # 6.2
    ("rehash", "I", 236),  # 6.2
    ("total_rto", "H", 240),  # 6.7, as the next two
    ("total_rto_recoveries", "H", 242),
    ("total_rto_time", "I", 244),
    ("received_ce", "I", 248),  # 6.18, as what follows
    ("delivered_e1_bytes", "I", 252),
    ("delivered_e0_bytes", "I", 256),
    ("delivered_ce_bytes", "I", 260),
    ("received_e1_bytes", "I", 264),
    ("received_e0_bytes", "I", 268),
    ("received_ce_bytes", "I", 272),
    ("accecn_fail_mode", "H", 276),
    ("accecn_opt_seen", "H", 278),
)
_SCALES: Final = 6
_LIMITED: Final = 7


def field_names() -> frozenset[str]:
    """All names that :func:`unpack_fields` may give."""
    return frozenset({"snd_wscale", "rcv_wscale", "delivery_rate_app_limited", *(name for name, _, _ in FIELDS)})


def unpack_fields(data: bytes) -> dict[str, int]:
    """Of what getsockopt(TCP_INFO) returned: the fields that this kernel has. ValueError if it is not even the first
    version of the struct."""
    if len(data) <= _LIMITED:
        raise ValueError(f"TCP_INFO of {len(data)} bytes")
    # bit fields: the low half is snd_wscale on little-endian machines
    found = {
        "snd_wscale": data[_SCALES] & 15,
        "rcv_wscale": data[_SCALES] >> 4,
        "delivery_rate_app_limited": data[_LIMITED] & 1,
    }
    for name, code, offset in FIELDS:
        if offset + struct.calcsize(code) <= len(data):
            (found[name],) = struct.unpack_from(code, data, offset)
    return found
