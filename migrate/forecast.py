"""What a migration would take, said before it: rounds, bytes, and how long the processes would stand still.

The line is measured with random bytes, the writing of the processes by looking (:mod:`checkpoint.memory.forecast`), and
the rounds are those of :mod:`migrate.rounds`.  It is a forecast: what the processes do next may differ.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Final

from checkpoint.memory.forecast import Observed, observe
from checkpoint.verdict import Verdict
from migrate.clock import monotonic_ns
from migrate.fileoptions import shared_and_apart
from migrate.messages import Message, Needs, Probe, Probed
from migrate.rounds import Pace, Round
from tcpstate.slotted import dataclass

__all__ = ["Forecast", "forecast", "foresee", "line_rate"]

#: bytes of one Probe
_PIECE: Final = 1 << 20
#: a volley that took so many seconds is long enough, and so many probes are enough
_LONG: Final = 0.1
_MOST: Final = 32
#: milliseconds of a stop beside the copy: connections, processes, the address (docs/design/stop.md)
_REST_MS: Final = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """About what will be.

    rounds      as in a migration's summary; the last one is that of the stop
    stop_ms     how long the processes stand still
    total_ms    all rounds and the stop
    bytes_sent  memory on the line
    line_rate   bytes per second of the line
    write_rate  bytes per second that the processes write
    busy        they write too fast for --max-downtime
    """

    rounds: tuple[Round, ...]
    stop_ms: float
    total_ms: float
    bytes_sent: int
    line_rate: float
    write_rate: float
    busy: bool


def forecast(
    observed: Sequence[Observed], *, rate: float, budget_ms: float, precopy: bool, shipped: int = 0
) -> Forecast:
    """Play it through.

    rate       bytes per second of the line
    budget_ms  --max-downtime
    precopy    there are rounds
    shipped    bytes of files that travel along, in the stop
    """
    left = sum(one.bytes for one in observed)
    pace = Pace(budget_ms)
    while precopy:
        sent = Round(bytes=left, ms=1e3 * left / rate)
        written = {one.pid: one.written(sent.ms / 1e3) for one in observed}
        left = sum(written.values())
        if not pace.another(sent, written):
            break
    left += shipped + sum(one.still for one in observed)
    last = Round(bytes=left, ms=1e3 * left / rate)
    rounds = (*pace.rounds, last)
    stop_ms = last.ms + _REST_MS
    longest = max((when for one in observed for when, _ in one.writes), default=0.0)
    return Forecast(
        rounds=rounds,
        stop_ms=stop_ms,
        total_ms=sum(one.ms for one in pace.rounds) + stop_ms,
        bytes_sent=sum(one.bytes for one in rounds),
        line_rate=rate,
        write_rate=sum(one.written(longest) for one in observed) / longest if longest else 0.0,
        busy=pace.busy,
    )


def foresee(needs: Needs, there: Sequence[Verdict], rate: float, budget_ms: float, precopy: bool) -> Forecast:
    """Look at the processes, and play it through. ``there``: what the target said of their files."""
    observed = observe(pid for tree in needs.trees for pid in tree.pids)
    shipped = 0
    for path in shared_and_apart(needs.written, there)[1]:
        # gone meanwhile: its verdict will be another one
        with contextlib.suppress(OSError):
            shipped += os.stat(path).st_blocks * 512
    return forecast(observed, rate=rate, budget_ms=budget_ms, precopy=precopy, shipped=shipped)


def line_rate(say: Callable[[Message], None], hear: Callable[[type[Probed]], Probed]) -> float:
    """Bytes per second that the line carries to the target: of the last of some volleys, each twice the one before."""
    say(Probe(data=b""))
    began = monotonic_ns()
    hear(Probed)
    trip = monotonic_ns() - began
    # not compressible, as a line may try
    piece = os.urandom(_PIECE)
    count = 1
    while True:
        began = monotonic_ns()
        for _ in range(count):
            say(Probe(data=piece))
        for _ in range(count):
            hear(Probed)
        took = max(monotonic_ns() - began - trip, 1) / 1e9
        if took >= _LONG or count >= _MOST:
            return count * _PIECE / took
        count *= 2
