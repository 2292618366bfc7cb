"""What a connection has learned about its path, given back: windows, round-trip times, congestion control, pacing, ECN.

::

    capture   TCP_INFO, read with everything else at the export (:mod:`tcpstate.reading`); no BPF is needed
    rebuild   srtt, rttvar, rto     by injected ACKs (:mod:`tcpstate.roundtrip`); connections with timestamps
              cwnd, ssthresh, ECN   by BPF (:mod:`tcpstate.kernel.bpf.windows`)
              pacing rate           the same; the next ACK computes it anew
              congestion control    by name; its inner state begins anew from these windows

Rebuilt without it a connection begins like a new one: slow start from ten segments, and seconds until it repeats what
is lost.  Where the kernel lends us no BPF all still works, without the windows, and one warning per rebuild says so.

cubic and reno keep both windows.  bbr keeps its congestion window and computes its first pacing rate from that and from
the round-trip time, then measures anew.  What cannot be given: bbr's model of the path, cubic's last maximum, the
doublings of a time-out under way, and round-trip times without timestamps (the kernel measures what was restored by
nothing else).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from tcpstate.connid import ConnId
from tcpstate.errors import KernelFeatureMissing, TcpmigError
from tcpstate.kernel.bpf import windows
from tcpstate.kernel.bpf.windows import SLOTS
from tcpstate.kernel.columns import Column, Field, Reusable, Rows, numbers_of
from tcpstate.kernel.sockets import IP, IPV6, SO, Level, is_v6
from tcpstate.kernel.tcp import (
    CONGESTION_NAME_SIZE,
    INFO_SIZE,
    TCP,
    Repair,
    RepairQueue,
    TcpInfo,
    repair_options,
)
from tcpstate.options import number
from tcpstate.record import DEVICE_OPTION, ConnectionRecord, Family, SoftState, State
from tcpstate.roundtrip import Lesson, Teachers, samples, teach, teaching
from tcpstate.rows import Names, failures
from tcpstate.silence import MARK
from tcpstate.slotted import dataclass

__all__ = [
    "NOTHING",
    "NO_MEANS",
    "Means",
    "Plan",
    "clamp",
    "foresee",
    "give",
    "means",
    "missing",
    "plan",
    "room",
    "way_in",
    "wide_open",
]

_log = logging.getLogger(__name__)

#: connections from which on a round-trip time's deviation is only given where a time-out depends on it
_MANY: Final = 500
#: a window is never larger (RFC 7323 2.3: 1 GiB), whatever a record says
_SEGMENTS_MAX: Final = 1 << 30
#: segments of an initial window (TCP_INIT_CWND); that many less a few for certain, in segments of the negotiated size
_INITIAL: Final = 10
_SURE: Final = 8
#: segments that a larger window must have to spare: queues do not cut into whole segments
_SLACK: Final = 2
#: RFC 6298 2.1 and 2.4, microseconds
_RTO_INITIAL: Final = 1_000_000
#: no time-out is longer (TCP_RTO_MAX; RFC 6298 2.5 asks for 60 s at least), microseconds
_RTO_MAX: Final = 120_000_000
#: what Linux adds to srtt at least (TCP_RTO_MIN), microseconds
_RTO_ABOVE: Final = 200_000


def clamp(soft: SoftState, *, mss: int) -> SoftState:
    """Learned state that does the network no harm whoever made it up: for callers that nobody vouches for.

    mss  bytes of a segment

    cwnd no larger than the initial window of a new connection, min(10 mss, max(2 mss, 14600)) bytes (RFC 6928 2): a
    larger one is a burst into a path that nobody has measured.  A round-trip time whose time-out would be below one
    second is left out (RFC 6298 2.1, 2.4: until it has measured, a sender waits that long): a short one would repeat
    what is not lost.  No pacing rate; ssthresh may be anything (RFC 5681 3.1).
    """
    initial = min(10 * mss, max(2 * mss, 14600)) // mss
    timeout = soft.srtt + max(4 * soft.rttvar, _RTO_ABOVE)
    measured = soft.srtt > 0 and timeout >= _RTO_INITIAL
    return dataclasses.replace(
        soft,
        cwnd=min(soft.cwnd, initial),
        srtt=min(soft.srtt, _RTO_MAX) if measured else 0,
        rttvar=min(soft.rttvar, _RTO_MAX) if measured else 0,
        rto=min(max(soft.rto, _RTO_INITIAL), _RTO_MAX),
        min_rtt=soft.min_rtt if measured else None,
        pacing_rate=None,
    )


def missing() -> KernelFeatureMissing | None:
    """Why congestion windows cannot be given back in this kernel; None if they can. The first time takes up to a
    second (BTF), and the congestion control is registered from then on."""
    try:
        windows.setter()
    except KernelFeatureMissing as error:
        return error
    return None


class Plan(NamedTuple):
    """What one rebuilt connection is given.

    samples  round-trip times; its send queue is to begin so many bytes early
    slot     windows (:func:`tcpstate.kernel.bpf.windows.slot`); None: none
    """

    samples: tuple[int, ...] = ()
    slot: bytes | None = None


NOTHING: Final = Plan()


@dataclass(frozen=True, slots=True)
class Means:
    """What can be given here, found out once for all connections that are rebuilt together.

    windows  congestion windows and what goes with them
    exact    the deviation of round-trip times, too, where no time-out depends on it
    taught   round-trip times, by the kind of socket
    """

    windows: bool
    exact: bool
    taught: Mapping[Family, bool]


#: for connections that begin anew
NO_MEANS: Final = Means(False, False, {})


def means(records: Sequence[ConnectionRecord]) -> Means:
    """What can be given here to the connections of ``records``. Logs one warning for each thing that cannot."""
    lack = missing() if any(r.soft is not None for r in records) else None
    if lack is not None:
        _log.warning("congestion windows are lost, the connections begin with slow start: %s", lack.message)
    taught: dict[Family, bool] = {}
    tried = {r.conn_id.v6 for r in records if (r.conn_id.local, r.conn_id.peer) in _taught} if _taught else set()
    for record in records:
        if record.family not in taught and _teachable(record) and record.soft is not None and record.soft.srtt > 0:
            taught[record.family] = record.conn_id.v6 in tried or _can_teach(record)
    return Means(lack is None, len(records) < _MANY, taught)


def _receptive(record: ConnectionRecord) -> bool:
    """What has ended needs nothing.  The ACKs that teach are not signed, and they come over loopback: a socket of an
    interface hears only that."""
    return not (
        record.soft is None
        or record.state is State.CLOSED
        or record.signing_keys
        or DEVICE_OPTION in record.option_data
    )


def _teachable(record: ConnectionRecord) -> bool:
    return _receptive(record) and record.timestamps is not None and not record.scope


def plan(records: Sequence[ConnectionRecord], known: Means | None = None) -> list[Plan]:
    """What is given to the connections of ``records``. ``known``: what :func:`means` said of them and others."""
    known = means(records) if known is None else known
    taught, windowed, exact = known.taught, known.windows, known.exact
    plans = []
    for record in records:
        soft = record.soft
        if soft is None or not _receptive(record):
            plans.append(NOTHING)
            continue
        lessons: tuple[int, ...] = ()
        if record.timestamps is not None and not record.scope and taught.get(record.family):
            lessons = samples(soft.srtt, soft.rttvar, exact=exact)
            if not windowed:
                # each ACK counts as one segment in slow start, and nothing sets the window afterwards
                lessons = (soft.srtt,)[: len(lessons)]
        plans.append(Plan(lessons, _slot(record, soft) if windowed else None))
    return plans


def _slot(record: ConnectionRecord, soft: SoftState) -> bytes:
    cwnd = soft.cwnd if soft.cwnd < _SEGMENTS_MAX else _SEGMENTS_MAX
    return windows.slot(cwnd, soft.ssthresh, soft.pacing_rate or 0, int(record.negotiated.ecn))


@contextlib.contextmanager
def way_in(known: Means) -> Iterator[Teachers]:
    """What :func:`give` teaches through; for all threads of the block. OSError."""
    v6 = {family is Family.IPV6 for family, can in known.taught.items() if can}
    with teaching(frozenset(socket.AF_INET6 if one else socket.AF_INET for one in v6)) as teachers:
        yield teachers


#: (local, peer) between which injected ACKs have arrived, as foresee() found for the move that comes
_taught: set[tuple[str, str]] = set()
#: an MSS for the attempt
_ANY_MSS: Final = 536


def foresee(pairs: Iterable[tuple[str, str]]) -> None:
    """Try before the stop what :func:`plan` would try in it: whether injected ACKs arrive between these addresses,
    (local, peer). One pair of each family that has a connection is enough. The rules of a
    :class:`~tcpstate.silence.Blackhole` stand."""
    for local, peer in pairs:
        try:
            _try(local, peer, _ANY_MSS)
            _taught.add((local, peer))
        except (TcpmigError, OSError) as error:
            # tried again when it is needed, and told then
            _log.debug("no injected ACKs from %s to %s: %s", peer, local, error)


def _can_teach(record: ConnectionRecord) -> bool:
    """Whether injected ACKs arrive here: tried on a connection that is none, between the same addresses."""
    try:
        _try(record.conn_id.local, record.conn_id.peer, record.negotiated.mss)
    except (TcpmigError, OSError) as error:
        _log.warning("round-trip times are lost, what is lost on its way is repeated late: %s", error)
        return False
    return True


def _try(local: str, peer: str, mss: int) -> None:
    """SoftStateNotRestored, OSError if they do not arrive."""
    v6 = is_v6(local)
    with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.setsockopt(Level.TCP, TCP.REPAIR, Repair.ON)
        if v6:
            sock.setsockopt(Level.IPV6, IPV6.TRANSPARENT, 1)
        else:
            sock.setsockopt(Level.IP, IP.TRANSPARENT, 1)
        for queue in (RepairQueue.SEND, RepairQueue.RECEIVE):
            sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, queue)
            sock.setsockopt(Level.TCP, TCP.QUEUE_SEQ, 1)
        sock.setsockopt(Level.TCP, TCP.REPAIR_QUEUE, RepairQueue.NONE)
        sock.bind((local, 0))
        sock.connect((peer, 1))
        # before it there would be no route
        sock.setsockopt(Level.SOCKET, SO.MARK, struct.pack("I", MARK))
        sock.setsockopt(Level.TCP, TCP.REPAIR_OPTIONS, repair_options(mss, wscale=None, sack=False, timestamps=True))
        name = ConnId.tcp(local, sock.getsockname()[1], peer, 1)
        with teaching(frozenset([socket.AF_INET6 if v6 else socket.AF_INET])) as teachers:
            teach([sock], [Lesson(name, snd_una=2, rcv_nxt=1, samples=(1000,))], teachers)


def give(
    socks: Sequence[socket.socket],
    records: Sequence[ConnectionRecord],
    plans: Sequence[Plan],
    received: Sequence[int],
    teachers: Teachers,
) -> None:
    """Give connected sockets in repair, whose queues are empty yet, what was planned. Their clocks, and their
    congestion controls, are still to be set then.

    received  the sequence number that each expects next, as it is now
    teachers  of :func:`way_in`

    SoftStateNotRestored, ConnectionCallFailed.
    """
    pupils = [i for i, p in enumerate(plans) if p.samples]
    if pupils:
        lessons = [Lesson(records[i].conn_id, records[i].snd_una, received[i], plans[i].samples) for i in pupils]
        teach([socks[i] for i in pupils], lessons, teachers)
    wanted = [i for i, p in enumerate(plans) if p.slot is not None]
    if wanted:
        slots = [slot for p in plans if (slot := p.slot) is not None]
        _windows([socks[i] for i in wanted], [records[i] for i in wanted], slots)


def _build_ours(rows: Rows) -> tuple[Column, Field, Field, Field]:
    fd = rows.column()
    slot, ours, priority = rows.room(4), rows.room(CONGESTION_NAME_SIZE), rows.room(4)
    rows.setsockopt(fd, Level.SOCKET, SO.PRIORITY, slot)
    # the name ends with its first zero byte
    rows.setsockopt(fd, Level.TCP, TCP.CONGESTION, ours, size=CONGESTION_NAME_SIZE, label="setting its windows")
    rows.setsockopt(fd, Level.SOCKET, SO.PRIORITY, priority)
    return fd, slot, ours, priority


def _build_own(rows: Rows) -> tuple[Column, Field, Column]:
    fd, own, size = rows.column(), rows.room(CONGESTION_NAME_SIZE), rows.column()
    rows.setsockopt(fd, Level.TCP, TCP.CONGESTION, own, size=size, label="setting the congestion control")
    return fd, own, size


_ours = Reusable(_build_ours)
_own = Reusable(_build_own)


def _windows(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], slots: Sequence[bytes]) -> None:
    """Their windows; ours is their congestion control then."""
    setter = windows.setter()
    for start in range(0, len(socks), SLOTS):
        part = slice(start, start + SLOTS)
        with setter.lent(slots[part]) as numbers:
            rows, (fd, slot, ours, priority) = _ours.of(len(numbers))
            fd.set(numbers_of(socks[part]))
            slot.set(numbers)
            ours.set_bytes([setter.name.encode()] * len(numbers))
            priority.set([number(r, "so.priority") for r in records[part]])
            with failures(socks[part], Names(records[part])):
                rows.run()


def _go_back(socks: Sequence[socket.socket], records: Sequence[ConnectionRecord]) -> None:
    """Their own congestion control."""
    rows, (fd, own, size) = _own.of(len(socks))
    fd.set(numbers_of(socks))
    own.set_bytes([r.congestion.encode("ascii") for r in records])
    size.set(len(r.congestion) for r in records)
    with failures(socks, Names(records)):
        rows.run()


def room(sock: socket.socket, record: ConnectionRecord) -> int:
    """Bytes that a rebuilt connection can send in one go at its release, whatever it is acknowledged.

    The kernel may shrink a window that was not used for longer than the time-out, but never below the initial one; a
    larger one counts only where :func:`wide_open` holds it open.
    """
    info = TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, INFO_SIZE))
    own = record.soft is not None and missing() is None
    segments = max(min(info.snd_cwnd, _INITIAL), info.snd_cwnd - _SLACK) if own else min(info.snd_cwnd, _INITIAL)
    return min(segments * info.snd_mss, record.windows.snd_wnd)


@contextlib.contextmanager
def wide_open(
    socks: Sequence[socket.socket], records: Sequence[ConnectionRecord], counts: Sequence[int]
) -> Iterator[None]:
    """In the block ``counts`` bytes of each can be sent at once, if :func:`room` said so at the rebuild. Their own
    congestion controls hold afterwards. ConnectionCallFailed."""
    held = []
    for i, (record, count) in enumerate(zip(records, counts, strict=True)):
        if record.soft is not None and count > _SURE * record.negotiated.mss and missing() is None:
            held.append(i)
    if held:
        slots = [_slot(records[i], soft) for i in held if (soft := records[i].soft) is not None]
        _windows([socks[i] for i in held], [records[i] for i in held], slots)
    try:
        yield
    finally:
        if held:
            _go_back([socks[i] for i in held], [records[i] for i in held])
