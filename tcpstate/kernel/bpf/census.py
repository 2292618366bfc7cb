"""Everything that tells one connection from what it was, of all connections of a network namespace, in one pass.

A record holds the numbers that a connection's state is made of, and the members that socket options live in.  Two
records of one socket that are equal byte for byte: nothing has arrived, nothing was sent, nothing was read or written,
and no option was set in between.  Nothing is changed but that each socket has a cookie afterwards (SO_COOKIE).

Only kernels that have every one of these members are understood; on others there is no census.
``tests/kernel/test_census.py`` sets every option that we know and looks whether it shows.

Source: include/net/sock.h, include/net/inet_sock.h, include/linux/tcp.h, include/linux/ipv6.h; the iterator as in
:mod:`tcpstate.kernel.bpf.tcpsock`.  bpf_get_socket_cookie for iterators since 5.12; inet_flags since 6.6.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterable
from typing import Final

from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import FRAME, Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.kernel.bpf.tcpsock import iterator_program
from tcpstate.kernel.tcp import TcpState

__all__ = ["NUMBERS", "Census", "census", "describe", "traffic"]

_SK: Final = "inet_conn.icsk_inet.sk."
_INET: Final = "inet_conn.icsk_inet."
_ICSK: Final = "inet_conn."
#: what a record of the connection is made of, or what makes it one that is not idle
NUMBERS: Final = {
    "write_seq": "write_seq",
    "snd_una": "snd_una",
    "snd_nxt": "snd_nxt",
    "rcv_nxt": "rcv_nxt",
    "copied_seq": "copied_seq",
    "snd_wl1": "snd_wl1",
    "snd_wnd": "snd_wnd",
    "max_window": "max_window",
    "rcv_wnd": "rcv_wnd",
    "rcv_wup": "rcv_wup",
    "mss_clamp": "rx_opt.mss_clamp",
    "urg_data": "urg_data",
    "packets_out": "packets_out",
    "retransmits": _ICSK + "icsk_retransmits",
    "probes_out": _ICSK + "icsk_probes_out",
    "backlog": _SK + "sk_backlog.len",
    "err": _SK + "sk_err",
    "err_soft": _SK + "sk_err_soft",
    "shutdown": _SK + "sk_shutdown",
    "nonagle": "nonagle",
    "repair": "repair",
    "is_mptcp": "is_mptcp",
    "out_of_order": "out_of_order_queue.rb_node",
    "errors": _SK + "sk_error_queue.qlen",
    "filter": _SK + "sk_filter",
    "ulp": _ICSK + "icsk_ulp_ops",
    "md5": "md5sig_info",
    "fastopen": "fastopen_req",
}
#: what traffic alone changes, of those and others; no option lives in it but those of
#: :data:`tcpstate.options.VOLATILE` and the sizes of buffers, which are read at the export anyway
_TRAFFIC: Final = (
    *(
        NUMBERS[name]
        for name in (
            "write_seq",
            "snd_una",
            "snd_nxt",
            "rcv_nxt",
            "copied_seq",
            "snd_wl1",
            "snd_wnd",
            "max_window",
            "rcv_wnd",
            "rcv_wup",
            "urg_data",
            "packets_out",
            "retransmits",
            "probes_out",
            "backlog",
            "out_of_order",
        )
    ),
    "segs_in",
    "segs_out",
    "bytes_received",
    "rx_opt.ts_recent",
    "snd_up",
    "urg_seq",
    "window_clamp",
    _ICSK + "icsk_ack.pingpong",
    _SK + "sk_rcvbuf",
    _SK + "sk_sndbuf",
)
#: whatever else must be the same: the rest of the state, and where options live
_OTHERS: Final = (
    "tsoffset", "notsent_lowat", "keepalive_time", "keepalive_intvl", "keepalive_probes", "linger2", "thin_lto",
    "recvmsg_inq", "tcp_tx_delay", "rx_opt.user_mss", "save_syn", "fastopen_no_cookie", "bpf_sock_ops_cb_flags",
    *(_ICSK + name for name in (
        "icsk_user_timeout", "icsk_syn_retries", "icsk_ca_ops", "icsk_rto_min", "icsk_rto_max", "icsk_delack_max",
        "icsk_accept_queue.rskq_defer_accept",
    )),
    *(_INET + name for name in (
        "inet_flags", "uc_ttl", "inet_opt", "tos", "min_ttl", "mc_ttl", "pmtudisc", "convert_csum", "uc_index",
        "mc_index", "mc_addr", "local_port_range", "mc_list", "ipv6_fl_list",
    )),
    *(_SK + name for name in (
        "__sk_common.skc_reuse", "__sk_common.skc_reuseport", "__sk_common.skc_ipv6only",
        "__sk_common.skc_bound_dev_if", "__sk_common.skc_flags", "sk_peek_off", "sk_ll_usec", "sk_busy_poll_budget",
        "sk_prefer_busy_poll", "sk_userlocks", "sk_rcvtimeo", "sk_sndtimeo", "sk_rcvlowat",
        "sk_reserved_mem", "sk_tsflags", "sk_max_pacing_rate", "sk_priority", "sk_mark", "sk_no_check_tx",
        "sk_lingertime", "sk_txrehash", "sk_clockid", "sk_txtime_deadline_mode", "sk_txtime_report_errors",
        "sk_reuseport_cb", "sk_bind_phc",
    )),
)  # fmt: skip
#: of struct ipv6_pinfo, which IPv6 sockets have
_IPV6: Final = (
    "flow_label", "opt", "hop_limit", "pmtudisc", "tclass", "mcast_hops", "frag_size", "ucast_oif", "mcast_oif",
    "rxopt", "srcprefs", "min_hopcount", "sticky_pktinfo.ipi6_ifindex",
)  # fmt: skip
#: the groups of members, each of which begins on a word
_GROUPS: Final = (
    ("tcp_sock", _TRAFFIC),
    ("tcp_sock", (*(path for path in NUMBERS.values() if path not in _TRAFFIC), *_OTHERS)),
    ("ipv6_pinfo", _IPV6),
)
_FRAME_MAX: Final = 512
_WORD: Final = 8


class _Packer:
    """Members copied into the frame, the widest first, so that each lies where it may."""

    def __init__(self, asm: Asm, known: Layout, at: int) -> None:
        self._asm = asm
        self._known = known
        self.at = at

    def copy(self, base: int, structure: str, paths: Iterable[str]) -> list[tuple[str, int, str]]:
        """(path, place in the frame, format) of each member of the structure in register ``base``. BadBtf."""
        places = [(path, self._known.place(structure, path)) for path in paths]
        sizes = {path: 1 if place.bits else place.size for path, place in places}
        told = []
        for path, place in sorted(places, key=lambda one: -sizes[one[0]]):
            size = sizes[path]
            if size not in (1, 2, 4, 8) or (place.bits and place.bit % 8 + place.bits > 8):
                raise BadBtf(f"{path} of {structure} is {size} bytes wide, or a bit field across bytes")
            self._asm.load(size, 1, base, place.bit // 8 if place.bits else place.offset)
            if place.bits:
                self._asm.shift_right(1, place.bit % 8).mask(1, (1 << place.bits) - 1)
            self._asm.store(size, FRAME, self.at, 1)
            told.append((path, self.at, {1: "B", 2: "H", 4: "I", 8: "Q"}[size]))
            self.at += size
        return told


def _sizes(known: Layout) -> list[int]:
    """Bytes of each group."""
    groups = [[known.place(structure, path) for path in paths] for structure, paths in _GROUPS]
    return [-(-sum(1 if p.bits else p.size for p in places) // _WORD) * _WORD for places in groups]


def traffic(known: Layout) -> tuple[int, int]:
    """Where in a record the members lie that traffic alone changes: from, to. BadBtf."""
    return _WORD, _WORD + _sizes(known)[0]


def describe(known: Layout, other: str = "out") -> tuple[Asm, int, dict[str, tuple[int, str]]]:
    """A program that has a socket's record at the bottom of its frame (register 6 is the iterator's meta, 7 the socket,
    8 its struct tcp_sock), or goes on at "out", or at ``other`` if it is not established; bytes of a record; where each
    of :data:`NUMBERS` is in it and its format. BadBtf."""
    size = _WORD + sum(_sizes(known))
    if size > _FRAME_MAX:
        raise BadBtf(f"a record of {size} bytes does not fit the frame")
    start = -size
    asm = Asm().load(8, 6, 1, 0).load(8, 7, 1, 8).jump_if(Jump.EQUAL, 7, 0, "out")
    # what is not established has more state than this tells
    state = known.offset("sock_common", "skc_state")
    asm.load(1, 1, 7, state).jump_if(Jump.NOT_EQUAL, 1, TcpState.ESTABLISHED, other)
    asm.mov(1, 7).call(Helper.SKC_TO_TCP_SOCK).jump_if(Jump.EQUAL, 0, 0, "out").mov(8, 0)
    asm.mov(1, 7).call(Helper.GET_SOCKET_COOKIE)
    for at in range(start, 0, _WORD):
        asm.store_number(8, FRAME, at, 0)
    asm.store(8, FRAME, start, 0)
    packer = _Packer(asm, known, start + _WORD)
    names = {path: name for name, path in NUMBERS.items()}
    told = []
    for structure, paths in _GROUPS[:2]:
        told += packer.copy(8, structure, paths)
        packer.at += -packer.at % _WORD
    numbers = {names[path]: (at - start, form) for path, at, form in told if path in names}
    asm.load(8, 9, 8, known.offset("tcp_sock", _INET + "pinet6")).jump_if(Jump.EQUAL, 9, 0, "tell")
    packer.copy(9, "ipv6_pinfo", _IPV6)
    return asm.label("tell"), size, numbers


def _program(known: Layout) -> tuple[bytes, int, dict[str, tuple[int, str]]]:
    """(code, bytes of a record, where each of :data:`NUMBERS` is in it and its format)."""
    asm, size, numbers = describe(known)
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, -size).set(3, size).call(Helper.SEQ_WRITE)
    return asm.label("out").exit(0).code(), size, numbers


class Census:
    """The attached program. KernelFeatureMissing. Use :func:`census`: one is enough."""

    def __init__(self) -> None:
        known = layout()
        try:
            code, size, numbers = _program(known)
            self._link = iterator_program(code, known)
        except (OSError, BadBtf) as error:
            raise KernelFeatureMissing(
                f"connections cannot be told from what they were: {error}",
                object="bpf_iter_tcp",
                fix="Run as root (CAP_BPF, CAP_PERFMON) on a kernel from 6.6 on with CONFIG_DEBUG_INFO_BTF.",
            ) from None
        known.save()
        self._record = struct.Struct(f"=Q{size - _WORD}s")
        self._numbers = {name: (at - _WORD, struct.Struct("=" + form)) for name, (at, form) in numbers.items()}

    def take(self) -> dict[int, bytes]:
        """The record of each established connection of the calling thread's network namespace, by its cookie.
        OSError."""
        return dict(self._record.iter_unpack(call.iterate(self._link)))

    def numbers(self, record: bytes) -> dict[str, int]:
        """The :data:`NUMBERS` in a record."""
        return {name: form.unpack_from(record, at)[0] for name, (at, form) in self._numbers.items()}

    def close(self) -> None:
        """Give the program up."""
        os.close(self._link)


@functools.cache
def census() -> Census:
    """The one of this process. KernelFeatureMissing."""
    return Census()
