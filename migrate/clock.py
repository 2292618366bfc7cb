"""How long ago something happened on another host, without comparing two hosts' wall clocks.

The source asks the target for its CLOCK_MONOTONIC and notes its own before and after.  The answer was given some time
in between; the exchange with the shortest round trip bounds it best (RFC 5905 section 10 argues likewise).  A time of
the source then translates into one of the target, wrong by half that round trip at most, plus what the two quartzes
drift since.  CLOCK_MONOTONIC is the clock of TCP's timestamps (tcp_clock_ns).
"""

from __future__ import annotations

import time
from dataclasses import field

from tcpstate.slotted import dataclass

__all__ = ["Laps", "Offset", "elapsed_since", "monotonic_ns"]

#: exchanges older than this many nanoseconds give way to newer ones: quartzes drift up to 100 ppm, 10 us in this time
FRESH_NS = 100_000_000

monotonic_ns = time.monotonic_ns


@dataclass(slots=True)
class Laps:
    """How long each step of something takes that is done one after the other.

    phases  milliseconds by name
    """

    phases: dict[str, float] = field(default_factory=dict)
    _at: int = field(default_factory=monotonic_ns)

    def begin(self) -> None:
        """What came before belongs to no step."""
        self._at = monotonic_ns()

    def done(self, name: str) -> None:
        """A step has ended, and the next one begins."""
        now = monotonic_ns()
        self.phases[name] = self.phases.get(name, 0.0) + (now - self._at) / 1e6
        self._at = now


@dataclass(slots=True)
class Offset:
    """The target's clock as seen from the source: values in nanoseconds of CLOCK_MONOTONIC.

    offset_ns  to be added to a time of the source
    error_ns   the offset is wrong by this much at most
    """

    offset_ns: int = 0
    error_ns: int = -1
    _taken_ns: int = 0

    @property
    def known(self) -> bool:
        """Whether there has been an exchange."""
        return self.error_ns >= 0

    def exchange(self, sent_ns: int, there_ns: int, received_ns: int) -> None:
        """Take in one exchange; ValueError if it was received before it was sent."""
        if received_ns < sent_ns:
            raise ValueError("a measurement was received before it was sent")
        error = (received_ns - sent_ns + 1) // 2
        if not self.known or error <= self.error_ns or received_ns - self._taken_ns > FRESH_NS:
            self.offset_ns = there_ns - (sent_ns + received_ns) // 2
            self.error_ns = error
            self._taken_ns = received_ns

    def there(self, here_ns: int) -> int:
        """A time of the source as a time of the target."""
        return here_ns + self.offset_ns

    def here(self, there_ns: int) -> int:
        """A time of the target as a time of the source."""
        return there_ns - self.offset_ns


def elapsed_since(then_ns: int, now_ns: int) -> float:
    """Seconds between two times of one host, never below zero: a connection's timestamp must not run backwards (PAWS,
    RFC 7323 section 5), and the translation may be wrong by more than the time that passed."""
    return max(0, now_ns - then_ns) / 1e9
