"""Is a rebuilt connection what its record says? Asked before the commit, while it is still in repair.

:func:`differences` asks the kernel only for what is compared, and looks closer, by exporting it again
(:func:`read_back`, :func:`compare`), at a connection where anything is not as expected.
"""

from __future__ import annotations

import dataclasses
import functools
import socket
from collections.abc import Mapping, Sequence
from typing import Final

from tcpstate import giving, opening, options
from tcpstate.export import export_connections
from tcpstate.freeze import Gate, QuietState
from tcpstate.kernel.sockets import Level, unpack_address
from tcpstate.kernel.tcp import TCP, InfoOption, RepairQueue, TcpState
from tcpstate.options import Stage, number
from tcpstate.reading import PEEK, SMALL, Raw, peek_from, peeking_on, read_numbers, read_queues
from tcpstate.record import ConnectionRecord, Negotiated, State
from tcpstate.segment import SEQ_MASK
from tcpstate.slotted import dataclass
from tcpstate.urgent import held_back

__all__ = ["Difference", "compare", "differences", "read_back"]

_NEGOTIATED: Final = int(InfoOption.TIMESTAMPS | InfoOption.SACK | InfoOption.WSCALE)
_CHUNK: Final = 1 << 20
#: of the scales beside the options
_SHIFT: Final = 8


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
    # keys are no matter of comparison: reading them takes a pass over all sockets
    return export_connections(socks, states, keys=[r.signing_keys for r in records])


def compare(record: ConnectionRecord, found: ConnectionRecord) -> list[Difference]:
    """Where ``found``, a rebuilt connection's export before its release, contradicts ``record``.

    Its send queue may still lack what the release will send; the options that wait for the release are not compared.
    """
    record = held_back(record)
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


def differences(
    socks: Sequence[socket.socket],
    records: Sequence[ConnectionRecord],
    early: Mapping[int, Sequence[memoryview]] | None = None,
) -> list[tuple[int, Difference]]:
    """(place, difference) of rebuilt connections that are not released yet, as :func:`compare` finds them.

    early  what :func:`~tcpstate.rebuild.rebuild_connections` was given
    """
    if not socks:
        return []
    waiting = [i for i, record in enumerate(records) if record.unopened]
    if waiting:
        opened = [i for i, record in enumerate(records) if not record.unopened]
        mine = {at: early[i] for at, i in enumerate(opened) if i in early} if early else None
        found_here = differences([socks[i] for i in opened], [records[i] for i in opened], mine)
        result = [(opened[at], difference) for at, difference in found_here]
        return result + [(i, Difference(*d)) for i in waiting for d in opening.differences(socks[i], records[i])]
    heads = early or {}
    records = [held_back(record) for record in records]
    found = read_numbers(socks)
    suspects = giving.unlike(socks, [r.options for r in records])
    address, name = functools.cache(_address), functools.cache(_name)
    agreed = functools.cache(_agreed)
    for i, (raw, record) in enumerate(zip(found, records, strict=True)):
        head = sum(map(len, heads[i])) if i in heads else 0
        n, told, conn = record.negotiated, raw.told, record.conn_id
        if (
            _numbers(raw) != _expected(record, head)
            or told.info_options & _NEGOTIATED | told.scales << _SHIFT != agreed(n)
            or name(told.congestion) != record.congestion
            or told.outq not in (0, record.sent)
            or address(told.local_family, told.local_rest) != conn.local.partition("%")[0]
            or told.local_port != socket.htons(conn.local_port)
            or address(told.peer_family, told.peer_rest) != conn.peer.partition("%")[0]
            or told.peer_port != socket.htons(conn.peer_port)
        ):
            suspects.add(i)
    suspects |= _other_bytes(socks, records, found, heads)
    result = []
    for i in sorted(suspects):
        (again,) = read_back([socks[i]], [records[i]])
        whole = dataclasses.replace(records[i], receive_queue=b"".join((*heads.get(i, ()), records[i].receive_queue)))
        # peeking at a queue may have moved the window since
        same = {"windows"} if _windows(found[i]) == _expected_windows(records[i]) else set()
        result += [(i, difference) for difference in compare(whole, again) if difference.what not in same]
    return result


def _numbers(raw: Raw) -> tuple[int, ...]:
    told = raw.told
    return told.number, (told.write_seq - told.outq) & SEQ_MASK, told.rcv_nxt, told.inq, told.mss, *_windows(raw)


def _windows(raw: Raw) -> tuple[int, ...]:
    told = raw.told
    return told.snd_wl1, told.snd_wnd, told.max_window, told.rcv_wnd, told.rcv_wup


def _expected(record: ConnectionRecord, head: int) -> tuple[int, ...]:
    unread = head + len(record.receive_queue)
    numbers = int(TcpState.ESTABLISHED), record.snd_una, record.rcv_nxt, unread, record.negotiated.mss
    return *numbers, *_expected_windows(record)


def _expected_windows(record: ConnectionRecord) -> tuple[int, ...]:
    w = record.windows
    return w.snd_wl1, w.snd_wnd, w.max_window, w.rcv_wnd, w.rcv_wup


def _agreed(n: Negotiated) -> int:
    """Of TCP_INFO: options, and both scales behind them."""
    scaled = n.snd_wscale is not None and n.rcv_wscale is not None
    bits = (InfoOption.SACK if n.sack else 0) | (InfoOption.TIMESTAMPS if n.timestamps else 0)
    bits |= InfoOption.WSCALE if scaled else 0
    return int(bits) | ((n.snd_wscale or 0) | (n.rcv_wscale or 0) << 4) << _SHIFT


def _address(family: bytes, rest: bytes) -> str:
    """The text of what stands before and behind the port in a struct sockaddr."""
    return unpack_address(family + bytes(2) + rest)[0]


def _name(congestion: bytes) -> str:
    return congestion.rstrip(b"\0").decode("ascii", "replace")


def _other_bytes(
    socks: Sequence[socket.socket],
    records: Sequence[ConnectionRecord],
    found: list[Raw],
    heads: Mapping[int, Sequence[memoryview]],
) -> set[int]:
    """Which have other bytes in their queues than was told."""
    filled = [i for i, raw in enumerate(found) if raw.inq or raw.told.outq]
    small = [i for i in filled if found[i].inq <= SMALL and i not in heads]
    other = set()
    read_queues(small, socks, found, [None] * len(socks))
    for i in small:
        if found[i].receive_queue != records[i].receive_queue:
            other.add(i)
    for i in sorted(set(filled) - set(small)):
        if not _same(socks[i], [*heads.get(i, ()), memoryview(records[i].receive_queue)]):
            other.add(i)
        if found[i].told.outq:
            found[i].send_queue = peek_from(socks[i], RepairQueue.SEND, found[i].told.outq)
    for i in filled:
        if found[i].told.outq != len(found[i].send_queue) or not records[i].send_queue.startswith(found[i].send_queue):
            other.add(i)
    return other


def _same(sock: socket.socket, pieces: Sequence[memoryview]) -> bool:
    """Whether the receive queue begins with these bytes, read piece by piece."""
    buffer = bytearray(_CHUNK)
    sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.RECEIVE)
    try:
        with peeking_on(sock) as moves:
            if not moves:
                return b"".join(pieces) == sock.recv(sum(map(len, pieces)) or 1, PEEK)
            for piece in pieces:
                at = 0
                while at < len(piece):
                    part = piece[at : at + _CHUNK]
                    count = sock.recv_into(buffer, len(part), PEEK)
                    # startswith compares memory; == of a memoryview goes item by item
                    if not count or not buffer.startswith(part[:count]):
                        return False
                    at += count
            return True
    except BlockingIOError:
        return False
    finally:
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
