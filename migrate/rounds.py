"""How many rounds of pre-copy: from what was sent, how fast, and what was written meanwhile. No sockets, no clock.

A round takes as long as its bytes; what the processes write meanwhile is the next one's.  So rounds shrink as long as
the line is faster than the processes write, until what remains fits the stop, and further as long as each leaves less
than half of what it sent: all that together takes less than twice the time that was allowed for the stop, and makes of
that a fraction.  If they do not shrink any more the user has said what to do: to copy the rest in the stop, however
long it takes, to leave the processes where they are, to let them run there before the rest has come, or to slow them
down until the rounds get there.

Source: C. Clark et al., Live Migration of Virtual Machines (NSDI 2005), section 3.
"""

from __future__ import annotations

import enum
import itertools
import logging
from collections.abc import Mapping

from migrate.errors import WritesTooFast
from tcpstate.slotted import dataclass

__all__ = ["IfBusy", "Pace", "Round"]

_log = logging.getLogger(__name__)

#: rounds at most
_MOST = 30
#: a round that leaves more than this part of what the one before left is no progress
_SHRINKS = 0.8
#: one that leaves less than this part of what it sent is worth the next one, although the rest fits already
_HALVES = 0.5
#: so many rounds without progress in a row are enough
_IDLE_ROUNDS = 3
#: processes that are slowed down run so much of the time at least
_LEAST_SHARE = 0.05
#: bytes that are always little enough
_LITTLE = 256 << 10
#: bytes per second, as long as nothing was measured
_USUAL = 500e6


class IfBusy(enum.Enum):
    """What to do if the processes write faster than the line carries."""

    STOP = "stop"  # the rest is copied while they stand still
    REFUSE = "refuse"  # they stay
    POSTCOPY = "postcopy"  # they go, and the rest is copied while they run there
    THROTTLE = "throttle"  # they are slowed down, and if that is not enough, the rest is copied in the stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One transfer of memory: bytes on the line, and how long it took, milliseconds."""

    bytes: int
    ms: float


class Pace:
    """The rounds of one migration.

    budget_ms  how long the copy in the stop may take
    throttles  the processes may be slowed down
    """

    def __init__(self, budget_ms: float, *, throttles: bool = False) -> None:
        self._budget_ms = budget_ms
        self._throttles = throttles
        #: the part of the time that the processes are to run
        self.share = 1.0
        self._since = 0
        self._left: list[int] = []
        self._rates: list[float] = []
        self.rounds: list[Round] = []
        #: whether the rest is larger than the budget, and was not going to shrink
        self.busy = False
        #: bytes written during the last round, by process
        self.written: Mapping[int, int] = {}

    @property
    def rate(self) -> float:
        """Bytes per second of the line: the best round's."""
        return max(self._rates, default=_USUAL)

    def predicted_ms(self) -> float:
        """How long the copy in the stop will take, if it came now."""
        return 1e3 * (self._left[-1] if self._left else 0) / self.rate

    def write_rate(self, pid: int) -> float:
        """Bytes per second that a process writes, as of the last round."""
        last = self.rounds[-1].ms if self.rounds else 0.0
        return 1e3 * self.written.get(pid, 0) / last if last else 0.0

    def busiest(self) -> tuple[int, str]:
        """The process that wrote most during the last round, and what that means, in words."""
        pid = max(self.written, key=lambda pid: self.written[pid])
        return pid, (
            f"it writes {self.write_rate(pid) / 1e6:.0f} MB/s, and the line carries {self.rate / 1e6:.0f} MB/s: "
            f"the copy in the stop takes about {self.predicted_ms():.0f} ms"
        )

    def judge(self, if_busy: IfBusy) -> None:
        """Say that the rest is too much, if it is. WritesTooFast if that is not to be."""
        if not self.busy:
            return
        pid, text = self.busiest()
        if if_busy is IfBusy.REFUSE:
            raise WritesTooFast(text, object=f"pid {pid}")
        _log.warning("pid %d: %s", pid, text)

    def go_on(self) -> None:
        """There will be more rounds, after something else: what was written meanwhile is no sign of theirs."""
        self._since = len(self._left)

    def another(self, sent: Round, written: Mapping[int, int]) -> bool:
        """Take note of a round and of what was ``written`` since it began; whether there should be another one."""
        self.rounds.append(sent)
        self.written = dict(written)
        self._left.append(sum(written.values()))
        if sent.ms > 0 and sent.bytes > _LITTLE:
            self._rates.append(1e3 * sent.bytes / sent.ms)
        left = self._left[-1]
        if left <= _LITTLE:
            return False
        if self.predicted_ms() <= self._budget_ms:
            # small rounds are slower by the byte than the best one, by which this was predicted
            return left < _HALVES * sent.bytes and len(self.rounds) < _MOST
        recent = self._left[self._since :][-_IDLE_ROUNDS - 1 :]
        idle = len(recent) > _IDLE_ROUNDS and all(
            after > _SHRINKS * before for before, after in itertools.pairwise(recent)
        )
        if idle and self._throttles and self.share > _LEAST_SHARE:
            # what they write in a round should be half of it at most
            write_rate = 1e3 * left / sent.ms if sent.ms else self.rate
            self.share = max(_LEAST_SHARE, self.share * min(0.5, 0.5 * self.rate / write_rate))
            self._since = len(self._left)
            idle = False
        self.busy = idle or len(self.rounds) >= _MOST
        return not self.busy
