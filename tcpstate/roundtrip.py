"""Round-trip times given to rebuilt connections, so that their retransmission time-out is what it was.

The kernel has no call that sets them, but it measures: of a connection whose send queue begins some bytes early, those
bytes count as sent, and an ACK for each is injected here, whose timestamp echo says how old the byte is.  The kernel
takes the samples into its estimator (RFC 6298 2, RFC 7323 4.1)::

    first sample R     srtt = R, rttvar = R / 2
    next sample        err = R - srtt;  srtt += err / 8;  rttvar += (|err| - rttvar) / 4

Which samples lead to a given pair of srtt and rttvar is computed (:func:`samples`).  While it lasts the connection's
clock counts microseconds, where the kernel can (6.7); else a sample is whole milliseconds.

All this is over before anything of the peer can arrive: the sockets are in repair, their addresses not here yet.  An
ACK that is delayed on its way makes a sample too long by that much, never too short.

Source: net/ipv4/tcp_input.c tcp_rtt_estimator, tcp_ack_update_rtt (what was restored in repair counts as retransmitted:
only timestamps measure it).
"""

from __future__ import annotations

import contextlib
import functools
import math
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Self

from tcpstate.connid import ConnId
from tcpstate.errors import SoftStateNotRestored
from tcpstate.inward import MARK as INWARD
from tcpstate.inward import inward
from tcpstate.kernel.columns import Column, Field, Reusable, Rows, numbers_of
from tcpstate.kernel.machine import SYS
from tcpstate.kernel.sockets import SO, Ioctl, Level, pack_address
from tcpstate.kernel.tcp import INFO_SIZE, TCP, InfoOption, RepairQueue, TcpInfo
from tcpstate.rows import Names, failures
from tcpstate.segment import SEQ_MASK, Flag, Segment, build, timestamp_option
from tcpstate.slotted import dataclass

__all__ = ["SAMPLES_MAX", "Lesson", "Teachers", "samples", "teach", "teaching"]

#: samples that one connection is given at most
SAMPLES_MAX: Final = 5
#: its clock while it is taught; odd: microseconds
_CLOCK: Final = 0x40000001
#: the kernel's least retransmission time-out beyond srtt, microseconds (TCP_RTO_MIN)
_RTO_MIN: Final = 200_000
#: no time-out is longer (TCP_RTO_MAX); nor is a sample
_SAMPLE_MAX: Final = 120_000_000
_TRIES: Final = 50
_PAUSE: Final = 0.001
_WINDOW: Final = 0xFFFF


class Lesson(NamedTuple):
    """What one socket in repair, whose send queue begins ``len(samples)`` bytes early, is taught.

    conn_id     its connection
    snd_una     sequence number after the early bytes
    rcv_nxt     next sequence number expected at this moment
    samples     microseconds, in order
    """

    conn_id: ConnId
    snd_una: int
    rcv_nxt: int
    samples: tuple[int, ...]


def samples(srtt: int, rttvar: int, *, exact: bool = True) -> tuple[int, ...]:
    """Samples that bring the kernel's estimator from nothing to about these values, microseconds.

    exact  False: one sample where a better rttvar would not change the retransmission time-out (the kernel adds at
           least 200 ms to srtt); rttvar is then half of srtt

    Nothing for an srtt of 0: nothing was measured.
    """
    if srtt <= 0:
        return ()
    srtt = min(srtt, _SAMPLE_MAX)
    if not exact and max(4 * rttvar, 2 * srtt) <= _RTO_MIN:
        return (srtt,)
    if rttvar >= 0.375 * srtt:
        # Two samples, s and s + e: srtt = s + e / 8, 4 rttvar = 1.5 s + e
        wanted = min(rttvar, 1.9 * srtt)
        error = max(0.0, (4 * wanted - 1.5 * srtt) / 0.8125)
        if 0.44 * srtt <= wanted <= 0.56 * srtt:
            return (srtt,)
        first = max(1, round(srtt - error / 8))
        return first, min(_SAMPLE_MAX, round(first + error))
    # Each further sample of the same length takes a quarter off rttvar.
    steps = math.log(max(rttvar, 1) / (0.5 * srtt)) / math.log(0.75)
    return (srtt,) * min(SAMPLES_MAX, 1 + round(steps))


@dataclass(slots=True)
class _Sending:
    """The early bytes into the send queue, as sent."""

    fd: Column

    @classmethod
    def build(cls, rows: Rows, count: int) -> Self:
        fd, byte = rows.column(), rows.shared(b"\0")
        rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.SEND)
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        for _ in range(count):
            # each is a segment of its own, and so gives a sample of its own
            rows.call(SYS.sendto, fd, byte, 1, flags, 0, 0, label="queueing an early byte")
        rows.setsockopt(fd, Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
        return cls(fd)


@dataclass(slots=True)
class _Acking:
    """One ACK each, right after its connection's clock was set."""

    fd: Column
    raw: Column
    packet: Field
    length: Column
    address: Field
    left: Field

    @classmethod
    def build(cls, rows: Rows, family: int) -> Self:
        fd, raw, length = rows.column(), rows.column(), rows.column()
        size = len(_destination("::1" if family == socket.AF_INET6 else "127.0.0.1"))
        packet, address = rows.room(_PACKET_MAX), rows.room(size)
        clock = rows.shared(struct.pack("=I", _CLOCK))
        rows.setsockopt(fd, Level.TCP, TCP.TIMESTAMP, clock)
        # no room for it just now: as if it had been lost, and it is sent again
        rows.call(SYS.sendto, raw, packet, length, 0, address, size, ignore=True, label="injecting an ACK")
        # nothing but early bytes is in its queue
        left = rows.room(4)
        rows.call(SYS.ioctl, fd, Ioctl.SIOCOUTQ, left, label=Ioctl.SIOCOUTQ.name)
        return cls(fd, raw, packet, length, address, left)


#: IPv6, TCP, timestamps
_PACKET_MAX: Final = 40 + 20 + 12
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_sending = {n: Reusable(functools.partial(_Sending.build, count=n)) for n in range(1, SAMPLES_MAX + 1)}
_acking = {f: Reusable(functools.partial(_Acking.build, family=f)) for f in _FAMILIES}


@functools.lru_cache(maxsize=1024)
def _destination(address: str) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return pack_address(address.partition("%")[0], 0, family=family)


@dataclass(frozen=True, slots=True)
class Teachers:
    """What :func:`teach` injects through.

    raws  a raw socket for each family
    anew  makes the way in again, if another process has taken it away (:func:`tcpstate.inward.inward`)
    """

    raws: Mapping[int, socket.socket]
    anew: Callable[[], None]


@contextlib.contextmanager
def teaching(families: frozenset[int]) -> Iterator[Teachers]:
    """What :func:`teach` injects through, in the calling thread's network namespace; threads may share it. OSError."""
    with contextlib.ExitStack() as stack:
        anew = stack.enter_context(inward(families))
        yield Teachers({family: stack.enter_context(_raw(family)) for family in families}, anew)


def teach(socks: Sequence[socket.socket], lessons: Sequence[Lesson], teachers: Teachers) -> None:
    """Give each socket its samples. Their send queues are empty afterwards; their clocks are still to be set.

    SoftStateNotRestored if an ACK does not arrive: the socket is of no use then. ConnectionCallFailed, OSError.
    """
    for count in {len(one.samples) for one in lessons}:
        mine = [i for i, one in enumerate(lessons) if len(one.samples) == count]
        rows, sending = _sending[count].of(len(mine))
        sending.fd.set(numbers_of([socks[i] for i in mine]))
        with failures(socks, Names([lessons[i] for i in mine])):
            rows.run()
    todo = list(zip(socks, lessons, strict=True))
    for v6 in {one.conn_id.v6 for one in lessons}:
        _acknowledge(teachers, v6, [pair for pair in todo if pair[1].conn_id.v6 is v6])


def _raw(family: int) -> socket.socket:
    raw = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
    try:
        raw.setsockopt(Level.SOCKET, SO.MARK, INWARD)
    except BaseException:
        raw.close()
        raise
    return raw


def _acknowledge(teachers: Teachers, v6: bool, todo: Sequence[tuple[socket.socket, Lesson]]) -> None:
    raw = teachers.raws[socket.AF_INET6 if v6 else socket.AF_INET]
    first, _ = todo[0]
    first.setsockopt(Level.TCP, TCP.TIMESTAMP, _CLOCK)
    info = TcpInfo.unpack(first.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))
    unit = 1 if info.options & InfoOption.USEC_TS else 1000
    for number in range(max(len(one.samples) for _, one in todo)):
        left = [pair for pair in todo if len(pair[1].samples) > number] if number else todo
        for attempt in range(_TRIES):
            left = _one_round(raw, left, number, unit)
            if not left:
                break
            # softirqs of a busy machine run later: the ACK may be on its way, and comes twice then
            time.sleep(_PAUSE if attempt else 0)
            teachers.anew()
        else:
            raise SoftStateNotRestored("the injected acknowledgement does not arrive", object=str(left[0][1].conn_id))


def _one_round(
    raw: socket.socket, todo: Sequence[tuple[socket.socket, Lesson]], number: int, unit: int
) -> list[tuple[socket.socket, Lesson]]:
    """Inject ACK ``number`` of each; those that have not taken it."""
    packets = [_packet(one, number, unit) for _, one in todo]
    rows, acking = _acking[socket.AF_INET6 if todo[0][1].conn_id.v6 else socket.AF_INET].of(len(todo))
    acking.fd.set(numbers_of([s for s, _ in todo]))
    acking.raw.set([raw.fileno()] * len(todo))
    acking.packet.set_bytes(packets)
    acking.length.set(list(map(len, packets)))
    acking.address.set_bytes([_destination(one.conn_id.local) for _, one in todo])
    with failures([], Names([one for _, one in todo])):
        rows.run()
    lefts = acking.left.u32()
    if not any(lefts):
        return []
    waiting = [len(one.samples) - number - 1 for _, one in todo]
    return [pair for pair, unacked, rest in zip(todo, lefts, waiting, strict=True) if unacked > rest]


def _packet(one: Lesson, number: int, unit: int) -> bytes:
    """The peer's ACK of early byte ``number``."""
    conn, rcv_nxt = one.conn_id, one.rcv_nxt
    ack = (one.snd_una - len(one.samples) + number + 1) & SEQ_MASK
    echo = (_CLOCK - max(1, round(one.samples[number] / unit))) & SEQ_MASK
    form, head, middle, rest, total = _template(conn.peer, conn.local)
    # the sum of all words, modulo 0xffff: numbers of 32 bits count as the sum of their halves
    total = (total + conn.peer_port + conn.local_port + rcv_nxt + ack + echo) % 0xFFFF
    return form.pack(head, conn.peer_port, conn.local_port, rcv_nxt, ack, middle, 0xFFFF - total, rest, echo)


@functools.lru_cache(maxsize=4096)
def _template(peer: str, local: str) -> tuple[struct.Struct, bytes, bytes, bytes, int]:
    """How a packet from ``peer`` is packed: what stands before its ports, before the checksum, and before the echo; and
    the sum of its words where ports, numbers and echo are 0."""
    segment = Segment(
        source=peer.partition("%")[0],
        source_port=0,
        destination=local.partition("%")[0],
        destination_port=0,
        seq=0,
        ack=0,
        flags=Flag.ACK,
        window=_WINDOW,
        # 0 passes as long as the connection has seen no timestamp of the peer, and makes it remember none
        options=timestamp_option(0, 0),
    )
    packet = build(segment)
    at = len(packet) - 20 - len(segment.options)
    (checksum,) = struct.unpack_from("!H", packet, at + 16)
    head, middle, rest = packet[:at], packet[at + 12 : at + 16], packet[at + 18 : -4]
    return struct.Struct(f"!{len(head)}sHHII4sH{len(rest)}sI"), head, middle, rest, 0xFFFF - checksum
