"""One server with many threads moves there and back: what does each of them cost the stop, both ends together?

``python -m tests.bench.bench_threads [THREADS ...]`` (as root; 1, 100, 300 and 1,000, six moves each).
All but the first wait for an event that never comes; an echo client with a message every millisecond tells the gap.
The floor, measured in the same run, is C: as many threads stopped, their registers and masks read, let go again
(ptrace); and as many born. Nothing is judged by the clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.results import Row, measured, spread
from tests.hosts import three_hosts
from tests.workloads import scenes

COUNTS = (1, 100, 300, 1_000)
MOVES = 6
PHASES = ("precopy", "stop", "copy", "freeze", "rebuild", "takeover")
SOURCE = Path(__file__).with_suffix(".c")
SLEEPERS = """
import sys, threading
threading.stack_size(1 << 16)
for _ in range(int(sys.argv[1])):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


def floor(count: int) -> dict[str, float]:
    """Milliseconds of the same in C; nothing without a compiler."""
    if shutil.which("gcc") is None:
        return {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        library = Path(folder) / "calls.so"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-pthread", "-o", library, SOURCE], check=True)
        calls = ctypes.CDLL(str(library))
        calls.stops.restype = calls.clones.restype = ctypes.c_double
        argv = [sys.executable, "-IS", "-c", SLEEPERS, str(count - 1)]
        process = ends.enter_context(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        ends.callback(process.kill)
        assert process.stdout is not None
        process.stdout.readline()
        tids = [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]
        numbers = (ctypes.c_int * len(tids))(*tids)
        stops = [calls.stops(numbers, len(tids)) for _ in range(MOVES)]
        clones = [calls.clones(count) for _ in range(MOVES)]
        assert min(stops + clones) >= 0, "a call failed"
        return {"floor": spread(stops)["median"] + spread(clones)["median"]}


def measure(count: int) -> Row:
    """Milliseconds of each phase, the stop and the gap, and of the floor."""
    found: dict[str, list[float]] = {}
    with three_hosts() as hosts, tempfile.TemporaryDirectory(dir=hosts.net.directory) as name:
        with scenes.threads(hosts, Path(name), sleeping=count - 1) as stage:
            for _ in range(MOVES):
                report = stage.move()
                for problem in report.problems:
                    print(f"{count}: {problem}", flush=True)
                times = {"stop_ms": report.summary["stop_ms"], "gap_ms": report.largest_gap, **report.summary["phases"]}
                for what, ms in times.items():
                    found.setdefault(what, []).append(ms)
    return {what: spread(figures) for what, figures in found.items()} | floor(count)


def main() -> None:
    """The table."""
    counts = [int(text) for text in sys.argv[1:]] or list(COUNTS)
    print(
        f"{'threads':>7} {'stop':>20} {'gap':>20} {'each':>6} {'floor':>6}  "
        f"{'  '.join(f'{phase:>8}' for phase in PHASES)}   ms: median (range)"
    )
    alone: float | None = None
    for count in counts:
        row = measured("threads", {"threads": count}, lambda count=count: measure(count))  # type: ignore[misc]
        stop = row["stop_ms"]["median"]
        alone = stop if alone is None else alone
        whole = [
            f"{row[what]['median']:7.1f} ({row[what]['min']:.0f}-{row[what]['max']:.0f})".rjust(20)
            for what in ("stop_ms", "gap_ms")
        ]
        each = f"{(stop - alone) / (count - counts[0]):6.3f}" if count > counts[0] else " " * 6
        least = f"{row['floor']:6.2f}" if "floor" in row else " " * 6
        parts = "  ".join(f"{row[phase]['median']:8.1f}" for phase in PHASES)
        print(f"{count:7} {' '.join(whole)} {each} {least}  {parts}", flush=True)


if __name__ == "__main__":
    main()
