"""Gaps between successive replies, by the monotonic clock: what the users of a service notice."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["GapLog"]


class GapLog:
    """The largest gap since the last mark, and the longest ones with their times.

    A gap runs from one reply to the next, also while no request is out: so clients that wait between requests report at
    least that wait.  `pause` ends a stretch: the time until the next reply is no gap.
    """

    KEPT = 20

    def __init__(self) -> None:
        self.largest = 0.0
        self.replies = 0
        self._last: float | None = None
        self._list: list[tuple[float, float]] = []  # (seconds, when it ended), the longest

    def reply(self, now: float | None = None) -> None:
        """A reply came."""
        now = time.monotonic() if now is None else now
        if self._last is not None and now - self._last > self.largest:
            self.largest = now - self._last
            self._list = [*self._list[-self.KEPT + 1 :], (self.largest, now)]
        self._last = now
        self.replies += 1

    def waiting(self, now: float) -> None:
        """No reply yet: the gap that is still open counts."""
        if self._last is not None and now - self._last > self.largest:
            self.largest = now - self._last

    def pause(self) -> None:
        """The time until the next reply is no gap."""
        self._last = None

    def mark(self) -> dict[str, Any]:
        """Report since the last mark and start anew: {gap_ms, replies, gaps: [[ms, monotonic time], ...]}."""
        self.waiting(time.monotonic())
        report = {
            "gap_ms": round(1e3 * self.largest, 3),
            "replies": self.replies,
            "gaps": [[round(1e3 * seconds, 3), round(when, 6)] for seconds, when in self._list[-3:]],
        }
        self.largest, self.replies, self._list = 0.0, 0, []
        return report
