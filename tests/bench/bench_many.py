"""One server with many connections moves there and back: what does each of them cost the stop?

``python -m tests.bench.bench_many [CONNECTIONS...]`` (as root; 0, 100, 1,000 and 10,000, six moves each).
One in a hundred is active: all of these say something again and again, also while the server stands still, and must
have each answer.  An echo client with a message every millisecond tells the gap.  Nothing is judged by the clock.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.results import Row, measured, spread
from tests.hosts import three_hosts
from tests.workloads import scenes
from tests.workloads.many import ask, opened

COUNTS = (0, 100, 1_000, 10_000)
MOVES = 6
ACTIVE = 100
PAUSE = 0.1  # seconds between two messages of an active one
PHASES = ("precopy", "prepare", "stop", "copy", "freeze", "rebuild", "takeover")


def talk(active: Sequence[socket.socket], over: threading.Event) -> None:
    while not over.wait(PAUSE):
        ask(active, b"during")


def measure(count: int) -> Row:
    """Milliseconds of each phase, the stop and the gap."""
    found: dict[str, list[float]] = {}
    with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as name:
        with scenes.echo(hosts, Path(name)) as stage, contextlib.ExitStack() as ends:
            with hosts.client.netns_entered():
                clients = opened(ends, (hosts.net.service4, 7000), count)
            ask(clients, b"before")
            for _ in range(MOVES):
                over = threading.Event()
                with ThreadPoolExecutor(1) as pool:
                    talking = pool.submit(talk, clients[::ACTIVE], over)
                    try:
                        report = stage.move()
                    finally:
                        over.set()
                    talking.result()
                for problem in report.problems:
                    print(f"{count}: {problem}", flush=True)
                assert report.summary["connections"] >= count
                times = {"stop_ms": report.summary["stop_ms"], "gap_ms": report.largest_gap, **report.summary["phases"]}
                for what, ms in times.items():
                    found.setdefault(what, []).append(ms)
            ask(clients, b"after!")
    return {what: spread(figures) for what, figures in found.items()}


def main() -> None:
    """The table."""
    # ours, and those of the server, which has its limit from us
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    counts = [int(text) for text in sys.argv[1:]] or list(COUNTS)
    print(f"{'connections':>11} {'stop':>18} {'gap':>18}  {'  '.join(f'{p:>8}' for p in PHASES)}   ms: median (range)")
    for count in counts:
        found = measured("many", {"connections": count}, lambda count=count: measure(count))  # type: ignore[misc]
        whole = [
            f"{found[what]['median']:7.1f} ({found[what]['min']:.0f}-{found[what]['max']:.0f})".rjust(18)
            for what in ("stop_ms", "gap_ms")
        ]
        parts = "  ".join(f"{found[phase]['median']:8.1f}" for phase in PHASES)
        print(f"{count:11} {' '.join(whole)}  {parts}", flush=True)


if __name__ == "__main__":
    main()
