"""What arrives while nobody is home: captured on the wire, replayed into the connection once it lives again.

A frozen connection drops what arrives, and nobody tells the peer: it would wait for its own retransmission timer (at
least 200 ms, and doubling).  So the segments are kept by an AF_PACKET socket, on the source from before the freeze, on
the target from before the address comes, and injected by a raw socket, through the loopback interface, once released.

::

    capture = Capture(ports={6379})          # in the network namespace of the calling thread
    capture.start()
    states = freeze.quiet(socks)
    ...
    arrived = capture.segments()             # plain values: they can be sent to the target
    rebuild.release_connections(socks, records)
    replay(arrived, records)
    capture.close()                          # takes some 10 ms: not inside the stop
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from tcpstate.connid import PORT_MAX, ConnId
from tcpstate.kernel import bpf
from tcpstate.kernel.bpf import Ancillary, Instruction, Op
from tcpstate.kernel.interfaces import interface_of
from tcpstate.kernel.packet import (
    ARPHRD_LOOPBACK,
    AUXDATA_SPACE,
    ETH_P_ALL,
    PACKET_HOST,
    PACKET_OUTGOING,
    SOL_PACKET,
    Packet,
    PacketStatus,
    bind_packet,
)
from tcpstate.kernel.sockets import SO, Level, is_v6
from tcpstate.record import ConnectionRecord
from tcpstate.room import overhead, room_for
from tcpstate.segment import SEQ_MASK, Flag, Segment, before, build, intact, parse, split

__all__ = ["Capture", "Injector", "make_ready", "replay", "segment_size", "unanswered", "unknown"]

log = logging.getLogger(__name__)

#: bytes of memory for packets that wait to be fetched
_BUFFER = 64 << 20
#: no merged packet is larger (GRO_MAX_SIZE)
_PACKET_MAX = 512 << 10
#: two instructions per port, and the kernel takes 4096
_PORTS_MAX = 1000
#: five or nine instructions per address
_ADDRESSES_MAX = 100
#: the segment size where none is known: what every IPv6 path carries, less the headers (RFC 8200 5)
_SEGMENT_DEFAULT = 1220
_V4_PROTOCOL = 9
_V6_PROTOCOL = 6
_V6_HEADER = 40
_FLAGS = 13
_DROP: Instruction = (Op.RETURN, 0, 0, 0)


class _Room(threading.local):
    """Where packets are put before they are read, of each thread: made anew each time, it cost 128 page faults."""

    def __init__(self) -> None:
        self.buffer = bytearray(_PACKET_MAX)


_room = _Room()


def make_ready() -> None:
    """What the first look of this thread at a capture would cost."""
    _ = _room.buffer


class _End(NamedTuple):
    """Where one end of a segment stands: its address in the IP header, its port in that of TCP."""

    v4: int
    v6: int
    port: int


_SOURCE, _DESTINATION = _End(12, 8, 0), _End(16, 24, 2)


def _filter(
    *, syn_only: bool, ports: Collection[int] | None, addresses: Collection[str] | None = None
) -> tuple[Instruction, ...]:
    """Arriving TCP for this host, not over loopback (what :func:`replay` injects comes that way), of ``ports`` and
    ``addresses``; ``syn_only``: only SYNs, and the SYN-ACKs that leave.

    The program sees a packet from its IP header on.
    """
    here = _packed(addresses)
    arriving = _program(Flag.SYN if syn_only else None, _DESTINATION, ports, here)
    leaving = _program(Flag.SYN | Flag.ACK, _SOURCE, ports, here) if syn_only else [_DROP]
    return (
        (Op.LOAD_WORD, 0, 0, Ancillary.PKTTYPE),
        (Op.JUMP_EQUAL, 0, 1, PACKET_OUTGOING),
        (Op.JUMP, 0, 0, 2 + len(arriving)),
        # what a switch floods, or a promiscuous interface overhears, is for another host: that one may answer
        (Op.JUMP_EQUAL, 1, 0, PACKET_HOST),
        _DROP,
        *arriving,
        *leaving,
    )


def _packed(addresses: Collection[str] | None) -> list[bytes] | None:
    """In the order of their bytes; None: any."""
    if addresses is None or len(addresses) > _ADDRESSES_MAX:
        return None
    bare = {ipaddress.ip_address(address.partition("%")[0].removeprefix("::ffff:")) for address in addresses}
    return sorted(address.packed for address in bare)


def _program(
    flags: Flag | None, end: _End, ports: Collection[int] | None, here: Sequence[bytes] | None
) -> list[Instruction]:
    """TCP with just these ``flags`` among SYN and ACK (None: any), one ``end`` of which is one of ``ports`` of one of
    the addresses ``here``."""
    v4: list[Instruction] = [
        # X = where TCP begins
        (Op.LOAD_BYTE, 0, 0, _V4_PROTOCOL),
        (Op.JUMP_EQUAL, 1, 0, socket.IPPROTO_TCP),
        _DROP,
        *_among(end.v4, 1, here),
        (Op.LOAD_X_HEADER, 0, 0, 0),
    ]
    v6: list[Instruction] = [
        # extension headers before TCP are rare enough to be left to the peer's retransmission
        (Op.JUMP_EQUAL, 1, 0, 6),
        _DROP,
        (Op.LOAD_BYTE, 0, 0, _V6_PROTOCOL),
        (Op.JUMP_EQUAL, 1, 0, socket.IPPROTO_TCP),
        _DROP,
        *_among(end.v6, 4, here),
        (Op.SET_X, 0, 0, _V6_HEADER),
    ]
    program: list[Instruction] = [
        (Op.LOAD_HALF, 0, 0, Ancillary.HATYPE),
        (Op.JUMP_EQUAL, 0, 1, ARPHRD_LOOPBACK),
        _DROP,
        (Op.LOAD_BYTE, 0, 0, 0),
        (Op.SHIFT_RIGHT, 0, 0, 4),
        (Op.JUMP_EQUAL, 1, 0, 4),
        (Op.JUMP, 0, 0, len(v4) + 1),
        *v4,
        (Op.JUMP, 0, 0, len(v6)),
        *v6,
    ]
    if flags is not None:
        program += [
            (Op.LOAD_BYTE_X, 0, 0, _FLAGS),
            (Op.AND, 0, 0, int(Flag.SYN | Flag.ACK)),
            (Op.JUMP_EQUAL, 1, 0, int(flags)),
            _DROP,
        ]
    if ports is not None and len(ports) <= _PORTS_MAX:
        program.append((Op.LOAD_HALF_X, 0, 0, end.port))
        for port in sorted(ports):
            program += [(Op.JUMP_EQUAL, 0, 1, port), (Op.RETURN, 0, 0, bpf.ACCEPT_ALL)]
        program.append(_DROP)
    else:
        program.append((Op.RETURN, 0, 0, bpf.ACCEPT_ALL))
    return program


def _among(at: int, words: int, here: Sequence[bytes] | None) -> list[Instruction]:
    """Drops a packet in which none of those of ``here`` that have so many words stands there; A is lost."""
    if here is None:
        return []
    fitting = [struct.unpack(f"!{words}I", packed) for packed in here if len(packed) == 4 * words]
    # for each: a word after the other, and a jump past all
    size = (2 * words + 1) * len(fitting) + 1
    program: list[Instruction] = []
    for address in fitting:
        for place, word in enumerate(address):
            program += [(Op.LOAD_WORD, 0, 0, at + 4 * place), (Op.JUMP_EQUAL, 0, 2 * (words - place) - 1, word)]
        program.append((Op.JUMP, 0, 0, size - len(program) - 1))
    return [*program, _DROP]


class Capture:
    """Arriving TCP segments of the calling thread's network namespace. A context manager: starts and closes.

    interfaces  names; None: all but loopback
    syn_only    only the beginnings of new connections: arriving SYNs, leaving SYN-ACKs (:func:`unanswered`)
    ports       only those for these local ports (1,000 at most, else all are taken); without it a host's bulk traffic,
                such as the migration's own, is captured too
    addresses   only those for these local addresses (100 at most, else all are taken): others on the same port may have
                much more to hear
    program     a filter of the caller's in place of all that (:mod:`tcpstate.tuplefilter`)
    """

    def __init__(
        self,
        interfaces: Sequence[str] | None = None,
        *,
        syn_only: bool = False,
        ports: Collection[int] | None = None,
        addresses: Collection[str] | None = None,
        program: tuple[Instruction, ...] | None = None,
    ) -> None:
        for port in ports or ():
            if not 0 <= port <= PORT_MAX:
                raise ValueError(f"port {port} is out of range")
        self._interfaces = interfaces
        self._filter = _filter(syn_only=syn_only, ports=ports, addresses=addresses) if program is None else program
        self._socks: list[socket.socket] = []
        self._lost = 0

    @classmethod
    def adopt(cls, socks: Iterable[socket.socket]) -> Self:
        """The capture that has these sockets (:attr:`sockets`), wherever they were kept meanwhile. It runs."""
        made = cls()
        made._socks = list(socks)
        return made

    def start(self) -> None:
        """Begin to capture. OSError (EPERM without CAP_NET_RAW, ENODEV for an unknown interface)."""
        if self._socks:
            raise RuntimeError("the capture runs already")
        try:
            for name in self._interfaces if self._interfaces is not None else [None]:
                # Protocol 0: nothing arrives before filter and size are set.
                kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
                sock = socket.socket(socket.AF_PACKET, kind, 0)
                self._socks.append(sock)
                bpf.attach(sock, self._filter)
                sock.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, _BUFFER)
                sock.setsockopt(SOL_PACKET, Packet.AUXDATA, 1)
                # ETH_P_IP would see a packet only after the bridge or bond above its interface took it
                bind_packet(sock, ETH_P_ALL, 0 if name is None else socket.if_nametoindex(name))
        except OSError:
            self.close()
            raise

    def segments(self, matching: Callable[[Segment], bool] | None = None) -> list[Segment]:
        """What has arrived since the last time, in order, without waiting; ``matching`` chooses."""
        found = []
        buffer = _room.buffer
        view = memoryview(buffer)
        for sock in self._socks:
            while True:
                try:
                    size, told, _, _ = sock.recvmsg_into([buffer], AUXDATA_SPACE)
                except BlockingIOError:
                    break
                except OSError as error:
                    # an interface went away: what it had brought is here already
                    if error.errno != errno.ENETDOWN:
                        raise
                    continue
                segment = parse(view[:size])
                # What was altered on its way the kernel would drop; our replay has a checksum of its own.
                if segment is None or not (_is_checked(told) or intact(view[:size])):
                    continue
                if matching is None or matching(segment):
                    found.append(segment)
        return found

    def stop(self) -> None:
        """Keep no more; what waits can still be fetched. Costs nothing, unlike :meth:`close`. OSError."""
        for sock in self._socks:
            bpf.attach(sock, (_DROP,))

    @property
    def sockets(self) -> list[socket.socket]:
        """What can be read when something has arrived: for select(). Whoever keeps these open keeps it running."""
        return list(self._socks)

    @property
    def lost(self) -> int:
        """Packets that found no room since the start. Their senders will send them again, after a time-out."""
        for sock in self._socks:
            _, dropped = struct.unpack("II", sock.getsockopt(SOL_PACKET, Packet.STATISTICS, 8))
            # reading clears the kernel's counter
            self._lost += dropped
        return self._lost

    def close(self) -> None:
        """Stop. What was not fetched is forgotten. May be called again."""
        while self._socks:
            self._socks.pop().close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_checked(told: list[tuple[int, int, bytes]]) -> bool:
    """Whether the checksum is known to be right, or there is none to look at."""
    known = PacketStatus.CSUM_NOT_READY | PacketStatus.CSUM_VALID
    return any(
        level == SOL_PACKET and kind == Packet.AUXDATA and int.from_bytes(data[:4], sys.byteorder) & known
        for level, kind, data in told
    )


def unanswered(segments: Iterable[Segment]) -> list[Segment]:
    """The SYNs of a capture with ``syn_only`` that this host did not answer: the ones that may be replayed.

    One that was answered began a connection, which may have ended since; replayed, it would begin again, and be reset.
    """
    found = list(segments)
    both = Flag.SYN | Flag.ACK
    answers = {
        (s.destination, s.destination_port, s.source, s.source_port, s.ack) for s in found if s.flags & both == both
    }
    return [
        s
        for s in found
        if s.begins
        and (s.source, s.source_port, s.destination, s.destination_port, (s.seq + 1) & SEQ_MASK) not in answers
    ]


def _worth(segment: Segment, record: ConnectionRecord) -> bool:
    """Whether the connection does not know yet what the segment says."""
    if segment.flags & (Flag.SYN | Flag.RST):
        # a reset is believed only where it is exactly in order; the kernel judges
        return bool(segment.flags & Flag.RST)
    acknowledges = bool(segment.flags & Flag.ACK) and not before(segment.ack, record.snd_una)
    if segment.sequence_length:
        return before(record.rcv_nxt, segment.end) or (acknowledges and segment.ack != record.snd_una)
    # a pure ACK: a new acknowledgement or another window
    return acknowledges


def replay(
    segments: Iterable[Segment],
    records: Iterable[ConnectionRecord],
    *,
    socks: Iterable[socket.socket] = (),
    unknown: Callable[[Segment], bool] | None = None,
) -> int:
    """Inject segments into the local stack as if they had just arrived; returns how many packets that were.

    socks  the connections of the first records, which get room for it (:mod:`tcpstate.room`)

    What a connection of ``records`` knows already is left out, and what belongs to no such connection, too (the stack
    would answer with a RST): but for SYNs, which begin connections, and what ``unknown`` says yes to.  Merged segments
    are split again.  The addresses must be local.  OSError.
    """
    records = list(records)
    known = {record.conn_id: record for record in records}
    worth: list[tuple[Segment, ConnectionRecord | None]] = []
    arriving: Counter[ConnId] = Counter()
    seen: set[object] = set()
    for segment in segments:
        record = _bare(known, segment.conn_id)
        if record is not None and not (segment.flags & Flag.SYN):
            if not _worth(segment, record):
                continue
        elif not (segment.begins or (unknown is not None and unknown(segment))):
            continue
        # a bridge and its port both bring a packet, and so do a bond and its members
        if segment in seen:
            continue
        seen.add(segment)
        worth.append((segment, record))
        if record is not None:
            arriving[record.conn_id] += len(segment.payload)
    more = [
        (sock, overhead(arriving[record.conn_id], segment_size(record)))
        for sock, record in zip(socks, records, strict=False)
        if arriving[record.conn_id]
    ]
    count = 0
    with room_for(more), Injector() as injector:
        for segment, record in worth:
            for part in split(segment, segment_size(record)):
                count += injector.arrive(part) if record is None else injector.deliver(part, record)
    return count


def unknown(segments: Iterable[Segment], records: Iterable[ConnectionRecord]) -> list[Segment]:
    """Of segments that arrived before a freeze those with data that the frozen connections have not got."""
    known = {record.conn_id: record for record in records}
    found = []
    for segment in segments:
        record = _bare(known, segment.conn_id)
        if record is not None and segment.payload and before(record.rcv_nxt, segment.end):
            found.append(segment)
    return found


class Injector:
    """Sends segments into the local stack as if they had just arrived, through the loopback interface.

    A context manager.

    mark  their SO_MARK
    """

    def __init__(self, mark: int = 0) -> None:
        self._mark = mark
        self._socks: dict[tuple[int, str], socket.socket] = {}
        self._places: dict[str, str] = {}

    def deliver(self, segment: Segment, record: ConnectionRecord) -> int:
        """As :meth:`send`, so that it reaches the socket of ``record`` on whatever interface that listens."""
        scope = socket.if_nametoindex(record.scope) if record.scope else 0
        return self.send(segment, scope, record.device)

    def arrive(self, segment: Segment) -> int:
        """As :meth:`send`, on the interface that has the destination address: a listener may be bound to it."""
        address = segment.destination
        if address not in self._places:
            self._places[address] = interface_of(address)
        device = self._places[address]
        scope = socket.if_nametoindex(device) if device and address.startswith("fe80:") else 0
        return self.send(segment, scope, device)

    def send(self, segment: Segment, scope: int = 0, device: str = "") -> int:
        """Inject one segment, no larger than a packet. 1, or 0 if there was no room for it just now: as if it had been
        lost on its way. OSError.

        scope   interface index for link-local addresses
        device  name of the interface where it seems to arrive: a socket that is bound to one hears nothing of others
                (net/ipv4/route.c: the route's rt_iif is that of the sender's binding)
        """
        family = socket.AF_INET6 if is_v6(segment.destination) else socket.AF_INET
        if (family, device) not in self._socks:
            made = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
            self._socks[family, device] = made
            if self._mark:
                made.setsockopt(Level.SOCKET, SO.MARK, self._mark)
            if device:
                name = device.encode("utf-8", "surrogateescape")
                made.setsockopt(Level.SOCKET, SO.BINDTODEVICE, name)
        to = (segment.destination, 0, 0, scope) if family == socket.AF_INET6 else (segment.destination, 0)
        try:
            self._socks[family, device].sendto(build(segment), to)
        except OSError as error:
            if error.errno in (errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN):
                log.debug("no room to inject a segment of %s", segment.conn_id)
                return 0
            raise
        return 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in self._socks.values():
            sock.close()
        self._socks.clear()


def segment_size(record: ConnectionRecord | None) -> int:
    """Bytes that the peer may send in one segment: what we once told it."""
    learned = None if record is None or record.soft is None else record.soft.advertised_mss
    return learned or _SEGMENT_DEFAULT


def _bare(known: dict[ConnId, ConnectionRecord], conn_id: ConnId) -> ConnectionRecord | None:
    """The record of a connection; segments do not know the scopes of link-local addresses."""
    record = known.get(conn_id)
    if record is None and conn_id.local.startswith("fe80:"):
        for scope in {r.scope for r in known.values() if r.scope}:
            ends = (f"{conn_id.local}%{scope}", conn_id.local_port, f"{conn_id.peer}%{scope}", conn_id.peer_port)
            record = record or known.get(ConnId.tcp(*ends))
    return record
