"""How the harness steers a client: lines in, JSON lines out.

    client prints   {"ready": true}                   its connections stand
    harness writes  before | after | mark | finish    a line
    client prints   {...}                             its answer: what it saw; always with "wrong", a list of texts

    before   a migration comes: leave requests half sent, replies unread, ...
    after    it is over: complete and check them
    mark     gaps since the last mark
    finish   check what is left, end; the program ends after this answer (also when stdin ends)

Everything that goes wrong is reported, never raised: a client that dies would take the evidence with it.
"""

from __future__ import annotations

import json
import os
import selectors
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests.workloads.gaps import GapLog

__all__ = ["Client", "patience"]

MAX_WRONG = 20  # after so many texts they are only counted


def patience(seconds: float) -> float:
    """How long a client waits for what must come: as it says, or TMH_PATIENCE seconds if that is longer."""
    return max(seconds, float(os.environ.get("TMH_PATIENCE", "0")))


class Client:
    """Base of the clients: a selector loop that never waits in one connection.

    A client registers its sockets with `watch` and returns from `tick` the time when it is to be called again.
    """

    def __init__(self) -> None:
        # select() takes microseconds; epoll's timeouts are whole milliseconds, as long as the pauses between requests.
        self.selector = selectors.SelectSelector()
        self.gap_logs: list[GapLog] = []
        self.wrong: list[str] = []
        self.wrongs = 0
        self._lines = b""
        self._finished = False

    # ---- to be overridden

    def start(self) -> None:
        """Make the connections."""

    def tick(self, now: float) -> float:
        """Send what is due; the time of the next call."""
        return now + 1

    def before(self) -> dict[str, Any]:
        """A migration comes."""
        return {}

    def after(self) -> dict[str, Any]:
        """A migration is over."""
        return {}

    def finish(self) -> dict[str, Any]:
        """Check what is left."""
        return {}

    def mark(self) -> dict[str, Any]:
        """What was seen since the last mark: the largest gap of any connection, the number of replies."""
        reports = [log.mark() for log in self.gap_logs]
        if not reports:
            return {}
        return {**max(reports, key=lambda report: report["gap_ms"]), "replies": sum(r["replies"] for r in reports)}

    # ---- for the clients

    def new_gaps(self) -> GapLog:
        """The gap log of one more connection."""
        self.gap_logs.append(GapLog())
        return self.gap_logs[-1]

    def blame(self, what: str) -> None:
        """Something is wrong: a reply, an end of file, a reset."""
        self.wrongs += 1
        if len(self.wrong) < MAX_WRONG:
            self.wrong.append(f"{time.monotonic():.3f} {what}")

    def watch(self, file: Any, events: int, call: Callable[[int], None]) -> None:
        """`call(events)` when the file is ready."""
        self.selector.register(file, events, call)

    def spin(self, until: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Run the loop until `done()` or that time; whether it is done."""
        while not done():
            now = time.monotonic()
            if now >= until:
                return False
            self._turn(min(until, self.tick(now)))
        return True

    # ---- the loop

    def _turn(self, until: float) -> None:
        for key, events in self.selector.select(max(0.0, until - time.monotonic())):
            key.data(events)

    def _read_lines(self, _: int) -> None:
        piece = os.read(0, 4096)
        if not piece:
            self.selector.unregister(0)
        self._lines += piece or b"finish\n"

    def _answer(self, answer: dict[str, Any]) -> None:
        print(json.dumps({**answer, "wrongs": self.wrongs, "wrong": self.wrong}), flush=True)

    def _obey(self, line: str) -> None:
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "before": self.before,
            "after": self.after,
            "mark": self.mark,
            "replies": lambda: {"replies": [log.replies for log in self.gap_logs]},
            "finish": self.finish,
        }
        try:
            answer = steps[line]()
        except Exception as error:
            self.blame(f"{line}: {error!r} {traceback.format_exc(limit=-2)}")
            answer = {}
        if line == "finish":
            answer = {**self.mark(), **answer}
            self._finished = True
        self._answer(answer)

    def run(self) -> int:
        """The whole program; exit status 0 if nothing was wrong."""
        try:
            self.start()
        except Exception as error:
            self.blame(f"start: {error!r}")
            self._answer({})
            return 1
        self.watch(0, selectors.EVENT_READ, self._read_lines)
        self._answer({"ready": True})
        while not self._finished:
            try:
                self._turn(self.tick(time.monotonic()))
            except Exception as error:
                self.blame(f"{error!r} {traceback.format_exc(limit=-2)}")
                time.sleep(0.01)  # a client whose every turn fails shall not eat the machine
            line, newline, rest = self._lines.partition(b"\n")
            if newline:
                self._lines = rest
                self._obey(line.decode().strip())
        return 1 if self.wrongs else 0


def quiet_gc() -> None:
    """No collection pauses in the middle of a measured gap."""
    import gc

    gc.freeze()
    gc.disable()


def main(client: Client) -> None:
    """Run a client and exit with its status."""
    quiet_gc()
    sys.exit(client.run())
