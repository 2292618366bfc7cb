"""Is a rebuilt connection what its record says? Asked before the commit, while it is still in repair."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from tcpstate import options
from tcpstate.export import export_connections
from tcpstate.freeze import Gate, QuietState
from tcpstate.options import Stage, number
from tcpstate.record import ConnectionRecord, State

__all__ = ["Difference", "compare", "read_back"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a rebuilt connection is not what its record says."""

    what: str
    expected: object
    found: object

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected!r}, found {self.found!r}"


def read_back(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> list[ConnectionRecord]:
    """Export rebuilt connections that are not released yet, to be compared with their records."""
    states = [
        QuietState(
            filter=record.filter,
            filter_locked=record.filter_locked,
            mark=number(record, "so.mark"),
            user_timeout=number(record, "tcp.user_timeout"),
            keepalive=bool(number(record, "so.keepalive")),
            reuse_address=record.reuse_address,
            minimum_ttl=number(record, "ip.minttl"),
            minimum_hops=number(record, "ipv6.minhopcount"),
            gate=Gate.FILTER,
        )
        for record in records
    ]
    return export_connections(socks, states)


def compare(record: ConnectionRecord, found: ConnectionRecord) -> list[Difference]:
    """Where ``found``, a rebuilt connection's export before its release, contradicts ``record``.

    Its send queue may still lack what the release will send; the options that wait for the release are not compared.
    """
    pairs: list[tuple[str, object, object]] = [
        ("conn-ID", record.conn_id, found.conn_id),
        ("family", record.family, found.family),
        # FINs come with the release
        ("state", State.ESTABLISHED, found.state),
        ("snd_una", record.snd_una, found.snd_una),
        ("rcv_nxt", record.rcv_nxt, found.rcv_nxt),
        ("windows", record.windows, found.windows),
        ("what was negotiated", _without_ecn(record), _without_ecn(found)),
        ("congestion control", record.congestion, found.congestion),
    ]
    differences = [Difference(*pair) for pair in pairs if pair[1] != pair[2]]
    # queues are told by length: their bytes may be secret and are certainly long
    if found.receive_queue != record.receive_queue:
        differences.append(_queue("receive queue", record.receive_queue, found.receive_queue))
    if not record.send_queue.startswith(found.send_queue) or len(found.send_queue) not in (0, record.sent):
        differences.append(_queue("send queue", record.send_queue[: record.sent], found.send_queue))
    for keyword, value in record.options.items():
        option = options.BY_KEYWORD.get(keyword)
        if option is not None and option.stage is not Stage.RELEASED and found.options.get(keyword) != value:
            differences.append(Difference(keyword, value, found.options.get(keyword)))
    return differences


def _without_ecn(record: ConnectionRecord) -> tuple[object, ...]:
    n = record.negotiated
    return n.mss, n.snd_wscale, n.rcv_wscale, n.sack, n.timestamps


def _queue(what: str, expected: bytes, found: bytes) -> Difference:
    if len(expected) != len(found):
        return Difference(what, f"{len(expected)} bytes", f"{len(found)} bytes")
    return Difference(what, f"{len(expected)} bytes", "other bytes of the same length")
