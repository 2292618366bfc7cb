"""What makes records of connections of parts that need no check: numbers of the kernel's, of the right size."""

from __future__ import annotations

from tcpstate.record import ConnectionRecord, SoftState, Timestamps, Windows
from tcpstate.trusted import maker

__all__ = ["make_record", "make_soft", "make_timestamps", "make_windows"]

make_windows = maker(Windows, "snd_wl1", "snd_wnd", "max_window", "rcv_wnd", "rcv_wup")
make_timestamps = maker(Timestamps, "value", "microseconds")
make_soft = maker(
    SoftState, "cwnd", "ssthresh", "srtt", "rttvar", "rto", "min_rtt", "reordering", "path_mtu", "advertised_mss",
    "pacing_rate",
)  # fmt: skip
make_record = maker(
    ConnectionRecord,
    "conn_id", "family", "state", "snd_una", "snd_nxt", "send_queue", "rcv_nxt", "receive_queue", "windows",
    "negotiated", "buffers", "congestion", "timestamps", "local_fin", "options", "option_data", "filter",
    "filter_locked", "reuse_address", "soft", "flow_info", "scope", "signing_keys", "error", "urgent_in",
    "urgent_taken", "urgent_out", "required", "version",
)  # fmt: skip
