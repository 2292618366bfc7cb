"""One server with many connections moves there and back: what does each of them cost the stop?

``python -m tests.bench.bench_many [CONNECTIONS...]`` (as root; 100, 1,000 and 10,000, six moves each).
One in a hundred is active: it sends a message while the server stands still, and must have the answer afterwards.  An
echo client with a message every millisecond tells the gap.  Nothing is judged by the clock.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import tempfile
from pathlib import Path

from tests.bench.results import Row, measured, spread
from tests.hosts import three_hosts
from tests.workloads import scenes
from tests.workloads.many import ask, hear, opened

COUNTS = (100, 1_000, 10_000)
MOVES = 6
ACTIVE = 100
PHASES = ("precopy", "prepare", "stop", "copy", "freeze", "rebuild", "takeover")


def measure(count: int) -> Row:
    """Milliseconds of each phase, the stop and the gap."""
    found: dict[str, list[float]] = {}
    with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as name:
        with scenes.echo(hosts, Path(name)) as stage, contextlib.ExitStack() as ends:
            with hosts.client.netns_entered():
                clients = opened(ends, (hosts.net.service4, 7000), count)
            ask(clients, b"before")
            for _ in range(MOVES):
                active = clients[::ACTIVE]
                for client in active:
                    client.send(b"during")
                report = stage.move()
                hear(active, b"during")
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
