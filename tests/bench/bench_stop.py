"""A flat profile of the stop of a small server: where its milliseconds go, on both sides.

``python -m tests.bench.bench_stop [MOVES [SCENE]]`` (as root; 10 moves of the echo server). Each function of ours that
takes over 0.1 ms by itself (without what it calls of ours) is named, median and range over the moves; what a side waits
for on the line is ``Channel._wait``. The stops are printed beside it, of moves without the clocks, which make
everything slower: MOVES of them (a multiple of five), and a fifth as many with. Nothing is judged.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from tests.bench.results import note, spread
from tests.hosts import tcpmig, three_hosts
from tests.workloads import scenes

MOVES = 10
EVERY = 5  # moves without clocks come before each with them
LEAST = 0.1  # milliseconds
STOPWATCH = Path(__file__).with_name("stopwatch.py")
#: the stop begins with the one at the source, and ends with the other at the target
FIRST, LAST = "checkpoint.dump.Dump.stop", "migrate.incoming.IncomingTrees.run"

Call = tuple[int, int, int, str]


def calls_of(folder: Path, role: str) -> list[Call]:
    """What one side of the last move has noted; the notes are taken away."""
    (path,) = folder.glob(f"{role}.*.json")
    found = [(begin, end, depth, name) for begin, end, depth, name in json.loads(path.read_text())]
    path.unlink()
    return found


def own_times(calls: list[Call], begin: int, end: int) -> dict[str, float]:
    """Milliseconds that each function took between ``begin`` and ``end``, without those that it called."""
    inside = [(max(a, begin), min(b, end), depth, name) for a, b, depth, name in calls if a < end and b > begin]
    found: dict[str, float] = defaultdict(float)
    above: list[tuple[int, str]] = []
    for a, b, depth, name in sorted(inside, key=lambda call: (call[0], call[2])):
        while above and above[-1][0] >= depth:
            above.pop()
        found[name] += (b - a) / 1e6
        if above:
            found[above[-1][1]] -= (b - a) / 1e6
        above.append((depth, name))
    return found


def show(role: str, moves: list[dict[str, float]]) -> None:
    """One side's table, the longest step first."""
    names = {name for move in moves for name in move}
    rows = [(statistics.median(times), min(times), max(times), name) for name in names if (times := _of(moves, name))]
    print(f"\n{role:48} median    min    max   ms")
    for middle, least, most, name in sorted(rows, reverse=True):
        if middle >= LEAST:
            print(f"{name:48} {middle:6.2f} {least:6.2f} {most:6.2f}")
            note("steps", side=role, step=name, median=middle, min=least, max=most)
    rest = sum(row[0] for row in rows if row[0] < LEAST)
    print(f"{'all others':48} {rest:6.2f}", flush=True)


def _of(moves: list[dict[str, float]], name: str) -> list[float]:
    return [move.get(name, 0.0) for move in moves]


def main() -> None:
    """The tables."""
    moves = int(sys.argv[1]) if len(sys.argv) > 1 else MOVES
    scene = getattr(scenes, sys.argv[2] if len(sys.argv) > 2 else "echo")
    plain = list(tcpmig.TCPMIG)
    sides: dict[str, list[dict[str, float]]] = {"source": [], "target": []}
    stops: dict[bool, list[float]] = {False: [], True: []}
    phases: dict[str, list[float]] = defaultdict(list)
    gaps = []
    with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as name:
        folder = Path(name)
        with scene(hosts, folder) as stage:
            for number, timed in enumerate(([False] * EVERY + [True]) * -(-moves // EVERY)):
                tcpmig.TCPMIG[:] = [sys.executable, str(STOPWATCH), str(folder)] if timed else plain
                report = stage.move()
                stops[timed].append(report.summary["stop_ms"])
                for problem in report.problems:
                    print(f"move {number}: {problem}", flush=True)
                if not timed:
                    gaps.append(report.largest_gap)
                    for phase, ms in report.summary["phases"].items():
                        phases[phase].append(ms)
                    continue
                calls = {role: calls_of(folder, role) for role in sides}
                begin = next(a for a, _, _, name in calls["source"] if name == FIRST)
                end = next(b for _, b, _, name in calls["target"] if name == LAST)
                for role, found in sides.items():
                    found.append(own_times(calls[role], begin, end))
    for role, found in sides.items():
        show(role, found)
    print("\nphase        median    min    max   ms, without the clocks")
    for phase, times in phases.items():
        print(f"{phase:12} {statistics.median(times):6.1f} {min(times):6.1f} {max(times):6.1f}")
    for what, times in (("stop", stops[False]), ("gap", gaps), ("stop, timed", stops[True])):
        print(f"{what:12} {statistics.median(times):6.1f} {min(times):6.1f} {max(times):6.1f}", flush=True)
        note("stop", what=what, moves=len(times), **spread(times))
    note("phases", **{phase: statistics.median(times) for phase, times in phases.items()})


if __name__ == "__main__":
    main()
