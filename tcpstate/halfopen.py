"""Handshakes that are half done (SYN_RECV), so that the last ACK finds somebody at the target.

The peer has had our SYN and ACK, or will have; it may count the connection as established already.  Nothing of it is a
socket yet: the kernel keeps a request, which the BPF iterator shows (:func:`capture`).  At the target a BPF program
waits for the peer's ACK and vouches for it (:mod:`tcpstate.kernel.bpf.handshake`); the kernel makes the connection from
that ACK, timestamps included.  The second step is not repeated there: a peer that has not heard it sends its SYN again,
and begins anew with the listener.

Source: include/linux/tcp.h struct tcp_request_sock, include/net/inet_sock.h struct inet_request_sock.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Collection, Sequence
from typing import Final

from tcpstate.connid import ConnId, canonical_address
from tcpstate.errors import KernelFeatureMissing
from tcpstate.kernel.bpf import call
from tcpstate.kernel.bpf.asm import Asm, Helper, Jump
from tcpstate.kernel.bpf.btf import BadBtf
from tcpstate.kernel.bpf.handshake import Agreed, Vouching
from tcpstate.kernel.bpf.layout import Layout, layout
from tcpstate.kernel.bpf.tcpsock import iterator_program
from tcpstate.segment import SEQ_MASK
from tcpstate.slotted import dataclass

__all__ = ["HalfOpen", "capture", "expect"]

_REQUEST: Final = "tcp_request_sock"
_INET: Final = "inet_request_sock"
_COMMON: Final = "req.__req_common."
_WSCALE_MAX: Final = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfOpen:
    """One handshake whose last ACK has not come.

    conn_id      the connection that it will be
    rcv_isn, snt_isn  the initial sequence numbers of the peer and of ours
    mss          the peer's segment size, bytes
    snd_wscale, rcv_wscale  shifts; None: windows are not scaled
    sack, timestamps, ecn   whether they were agreed on

    Raises ValueError for numbers that no handshake has.
    """

    conn_id: ConnId
    rcv_isn: int
    snt_isn: int
    mss: int
    snd_wscale: int | None
    rcv_wscale: int | None
    sack: bool
    timestamps: bool
    ecn: bool

    def __post_init__(self) -> None:
        if not (0 <= self.rcv_isn <= SEQ_MASK and 0 <= self.snt_isn <= SEQ_MASK and 0 < self.mss <= 0xFFFF):
            raise ValueError("numbers of a handshake are out of range")
        shifts = (self.snd_wscale, self.rcv_wscale)
        if shifts != (None, None) and not all(s is not None and 0 <= s <= _WSCALE_MAX for s in shifts):
            raise ValueError(f"window scales {shifts} are out of range")


def _program(known: Layout) -> bytes:
    size = known.size(_REQUEST)
    start = -(size + -size % 8)
    asm = Asm().mov(9, 1).load(8, 6, 9, 0).load(8, 7, 9, 8).jump_if(Jump.EQUAL, 7, 0, "out")
    asm.mov(1, 7).call(Helper.SKC_TO_TCP_REQUEST_SOCK).jump_if(Jump.EQUAL, 0, 0, "out").mov(3, 0)
    asm.frame(1, start).set(2, size).call(Helper.PROBE_READ_KERNEL)
    asm.load(8, 1, 6, known.offset("bpf_iter_meta", "seq")).frame(2, start).set(3, size).call(Helper.SEQ_WRITE)
    return asm.label("out").exit(0).code()


class _Reader:
    """The attached program, and where in its records things are."""

    _NUMBERS: Final = ("rcv_isn", "snt_isn")
    _FIELDS: Final = ("snd_wscale", "rcv_wscale", "wscale_ok", "sack_ok", "tstamp_ok", "ecn_ok")

    def __init__(self, known: Layout) -> None:
        self.size = known.size(_REQUEST)
        self._numbers = {name: known.place(_REQUEST, name) for name in self._NUMBERS}
        self._numbers["mss"] = known.place(_INET, "req.mss")
        for name in ("skc_family", "skc_num", "skc_dport", "skc_daddr", "skc_rcv_saddr"):
            self._numbers[name] = known.place(_INET, _COMMON + name)
        self._fields = {name: known.place(_INET, name) for name in self._FIELDS}
        self._v6 = {}
        try:
            self._v6 = {n: known.place(_INET, _COMMON + n) for n in ("skc_v6_daddr", "skc_v6_rcv_saddr")}
        except BadBtf:
            # a kernel without IPv6: there are no such requests
            self._v6 = {}
        self.link = iterator_program(_program(known), known)

    def requests(self) -> list[HalfOpen]:
        data = call.iterate(self.link)
        return [self._one(data[at : at + self.size]) for at in range(0, len(data) - self.size + 1, self.size)]

    def _one(self, record: bytes) -> HalfOpen:
        n = {k: int.from_bytes(record[p.offset : p.offset + p.size], "little") for k, p in self._numbers.items()}
        whole = int.from_bytes(record, "little")
        f = {k: whole >> p.bit & (1 << p.bits) - 1 for k, p in self._fields.items()}
        v6 = n["skc_family"] == socket.AF_INET6
        ends = ("skc_v6_rcv_saddr", "skc_v6_daddr") if v6 else ("skc_rcv_saddr", "skc_daddr")
        places = self._v6 if v6 else self._numbers
        raw = [record[places[end].offset : places[end].offset + (16 if v6 else 4)] for end in ends]
        local, peer = (canonical_address(socket.inet_ntop(n["skc_family"], address)) for address in raw)
        return HalfOpen(
            conn_id=ConnId("tcp", local, n["skc_num"], peer, socket.ntohs(n["skc_dport"])),
            rcv_isn=n["rcv_isn"],
            snt_isn=n["snt_isn"],
            mss=n["mss"],
            snd_wscale=f["snd_wscale"] if f["wscale_ok"] else None,
            rcv_wscale=f["rcv_wscale"] if f["wscale_ok"] else None,
            sack=bool(f["sack_ok"]),
            timestamps=bool(f["tstamp_ok"]),
            ecn=bool(f["ecn_ok"]),
        )


@functools.cache
def _reader() -> _Reader:
    known = layout()
    try:
        return _Reader(known)
    except (OSError, BadBtf) as error:
        raise KernelFeatureMissing(f"half-open connections cannot be read: {error}", object="bpf_iter_tcp") from None
    finally:
        known.save()


def capture(ports: Collection[int]) -> list[HalfOpen]:
    """The half-open connections to these local ports in the calling thread's network namespace. They stay as they are:
    shut the listeners first, else one may complete meanwhile. KernelFeatureMissing, OSError."""
    return [one for one in _reader().requests() if one.conn_id.local_port in ports]


def expect(half_open: Sequence[HalfOpen]) -> Vouching:
    """From now on the last ACKs of these handshakes complete them, on every interface of the calling thread's network
    namespace, until what is returned is closed. Its listeners listen. KernelFeatureMissing, OSError."""
    vouching = Vouching([index for index, _ in socket.if_nameindex()])
    try:
        for one in half_open:
            vouching.expect(one.conn_id, _agreed(one))
    except BaseException:
        vouching.close()
        raise
    return vouching


def _agreed(one: HalfOpen) -> Agreed:
    return Agreed(
        seq=(one.rcv_isn + 1) & SEQ_MASK,
        ack=(one.snt_isn + 1) & SEQ_MASK,
        mss=one.mss,
        snd_wscale=one.snd_wscale,
        rcv_wscale=one.rcv_wscale,
        sack=one.sack,
        ecn=one.ecn,
        timestamps=(None, None) if one.timestamps else None,
    )
