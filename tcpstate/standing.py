"""Records of connections that go on: idle ones, read without stopping or freezing anything.

A census (:mod:`tcpstate.kernel.bpf.census`) before and one after whatever else is asked of a connection: if they agree,
nothing has happened to it in between, and its record is as exact as one that was exported in repair mode.  The later
census is kept: :func:`unchanged` compares the connection with it, whenever that is.

Only what is plainly idle has a record here: established, nothing in its queues, nothing lost or out of order, room on
both sides, no keys, no filter, nothing corked or urgent.  Everything else is left to the export.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Final

from tcpstate import options
from tcpstate.export import idle_records
from tcpstate.freeze import Gate, QuietState, read_originals
from tcpstate.kernel.bpf.census import census
from tcpstate.kernel.columns import Column, Field, Reusable, Rows, numbers_of
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TcpState
from tcpstate.reading import Numbers, read_live
from tcpstate.record import ConnectionRecord
from tcpstate.rows import failures
from tcpstate.slotted import dataclass

__all__ = ["Standing", "cookies", "idle", "read_standing", "supposed", "unchanged"]

#: must be 0 of an idle connection
_QUIET: Final = (
    "urg_data", "packets_out", "retransmits", "probes_out", "backlog", "err", "err_soft", "shutdown", "repair",
    "is_mptcp", "out_of_order", "errors", "filter", "ulp", "md5", "fastopen",
)  # fmt: skip
_CORKED: Final = 2  # TCP_NAGLE_CORK, include/net/tcp.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """An idle connection.

    record   as an export would give it
    state    what freezing it would change
    cookie   of its socket
    census   what the census said
    """

    record: ConnectionRecord
    state: QuietState
    cookie: int
    census: bytes


def idle(numbers: Mapping[str, int]) -> bool:
    """Whether the numbers of a census are those of a connection at rest."""
    n = numbers
    return (
        not any(n[name] for name in _QUIET)
        and n["write_seq"] == n["snd_una"] == n["snd_nxt"]
        and n["rcv_nxt"] == n["copied_seq"]
        and n["snd_wnd"] > 0
        and n["rcv_wnd"] > 0
        and not n["nonagle"] & _CORKED
    )


def _build_cookies(rows: Rows) -> tuple[Column, Field]:
    fd = rows.column()
    return fd, rows.getsockopt(fd, Level.SOCKET, SO.COOKIE, 8)


_cookies = Reusable(_build_cookies)


def cookies(socks: Sequence[socket.socket]) -> list[int]:
    """The SO_COOKIE of each. ConnectionCallFailed."""
    rows, (fd, value) = _cookies.of(len(socks))
    fd.set(numbers_of(socks))
    with failures(socks):
        rows.run()
    return [low | high << 32 for low, high in zip(value.u32(), value.u32(4), strict=True)]


def read_standing(
    socks: Sequence[socket.socket], before: Mapping[int, bytes]
) -> list[tuple[ConnectionRecord, QuietState, int] | None]:
    """The record, originals and cookie of each socket that is idle, as :data:`before` (a census) has it; None of the
    others. They are true only of those that a census afterwards finds unchanged.

    UnsupportedSocket, ForeignFilter, ConnectionCallFailed: of the first that has the trouble.
    """
    counts = census()
    found: list[tuple[ConnectionRecord, QuietState, int] | None] = [None] * len(socks)
    named = cookies(socks)
    known = {i: counts.numbers(before[c]) for i, c in enumerate(named) if c in before}
    mine = [i for i, numbers in known.items() if idle(numbers)]
    some = [socks[i] for i in mine]
    if not some:
        return found
    states = read_originals(some)
    saved = options.save(some)
    begun = time.monotonic()
    told: list[Numbers] = []
    living = [False] * len(some)
    for at, (i, one) in enumerate(zip(mine, read_live(some), strict=True)):
        n = known[i]
        # has it ended by now?
        living[at] = one.number == TcpState.ESTABLISHED and any(one.peer_family)
        if not living[at]:
            continue
        told.append(
            # what was asked later may tell of later: then the census is not the same afterwards
            one._replace(
                outq=0,
                nsd=0,
                inq=0,
                mss=n["mss_clamp"],
                snd_wl1=n["snd_wl1"],
                snd_wnd=n["snd_wnd"],
                max_window=n["max_window"],
                rcv_wnd=n["rcv_wnd"],
                rcv_wup=n["rcv_wup"],
                write_seq=n["write_seq"],
                rcv_nxt=n["rcv_nxt"],
            )
        )
    mine, some = list(compress(mine, living)), list(compress(some, living))
    states, saved = list(compress(states, living)), list(compress(saved, living))
    records = idle_records(told, some, states, saved, time.monotonic() - begun)
    for i, record, state in zip(mine, records, states, strict=True):
        if state.gate is Gate.FILTER and not state.filter and "so.peek_off" not in record.options:
            found[i] = record, state, named[i]
    return found


def supposed(
    read: Sequence[tuple[ConnectionRecord, QuietState, int] | None], before: Mapping[int, bytes]
) -> list[Standing | None]:
    """Those of :func:`read_standing`, which are true if a later census has their ``census`` as well."""
    return [
        None if one is None else Standing(record=one[0], state=one[1], cookie=one[2], census=before[one[2]])
        for one in read
    ]


def unchanged(
    read: Sequence[tuple[ConnectionRecord, QuietState, int] | None], before: Mapping[int, bytes]
) -> list[Standing | None]:
    """Those of :func:`read_standing` to which nothing has happened since ``before``. KernelFeatureMissing, OSError."""
    now = census().take()
    return [one if one is not None and now.get(one.cookie) == one.census else None for one in supposed(read, before)]
