"""GB/s of memory into a file and out of it, and from host to host: ``python -m tests.bench.bench_files [MIB]`` (as
root; 1024).

Bytes of memory by the time that the library needs for a whole checkpoint or restore (``total_ms``), and for a migration
without rounds.  The floors, of the same bytes: memcpy; write(2) with fsync(2) and read(2) in the same place; a plain
connection over the same line.  A file is digested as it is written, and verified whole as it is read; a line is not
(docs/design/architecture.md).  Nothing is judged by the clock.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.bench import criu, floors
from tests.bench.bench_precopy import WRITER
from tests.bench.results import Row, measured, spread
from tests.bench.subject import command, own_directories, subject
from tests.hosts import three_hosts
from tests.hosts.tcpmig import migrate
from tests.workloads.servers import wait_listening

MIB = 1024
TIMES = 3
PORT = 7210
#: a disk, and memory
PLACES = {"disk": "/var/tmp", "tmpfs": "/dev/shm"}


def show(what: str, figures: Mapping[str, float]) -> None:
    print(f"{what:40s} {figures['median']:8.2f} {figures['min']:8.2f} {figures['max']:8.2f}", flush=True)


def to_file(place: str, mib: int) -> Row:
    """GB/s of a checkpoint into one of PLACES and of a restore out of it, and the floors."""
    size, found = mib << 20, dict[str, list[float]](write=[], dump=[], read=[], restore=[])
    with contextlib.ExitStack() as ends:
        state = Path(ends.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        ends.enter_context(own_directories(state))
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(dir=PLACES[place])))
        one = ends.enter_context(subject(mib, state))
        for _ in range(TIMES):
            found["write"].append(floors.write_rate(folder / "plain", size))
            found["read"].append(floors.read_rate(folder / "plain"))
            (folder / "plain").unlink()
            _, told = command("checkpoint", one.pid, "-o", folder / "image", "--stop-and-copy")
            one.ended()
            found["dump"].append(size / told["total_ms"] / 1e6)
            _, told = command("restore", folder / "image")
            found["restore"].append(size / told["total_ms"] / 1e6)
            (folder / "image").unlink()
        if not criu.lacking():
            dumped, restored = criu.dump_and_restore(one.pid, folder / "criu", one.ended)
            found |= {"criu dump": [size / dumped / 1e9], "criu restore": [size / restored / 1e9]}
    return {what: spread(figures) for what, figures in found.items()}


def over_the_line(mib: int) -> Row:
    """GB/s of a migration without rounds, of the copy in it, and of a plain connection."""
    size = mib << 20
    with three_hosts() as hosts:
        here, there = hosts.source, hosts.target
        lines = [floors.line_rate(here, there, size, address=there.ip4) for _ in range(TIMES)]
        argv = [sys.executable, "-IS", "-c", WRITER, hosts.net.service4, PORT, mib, 0]
        process = here.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_listening(hosts.client, process, hosts.net.service4, PORT)
        pid, whole, copies = process.pid, [], []
        for _ in range(TIMES):
            told = migrate(here, pid, there, options=["--stop-and-copy"], timeout=170)
            pid, here, there = told["target_pid"], there, here
            whole.append(size / told["total_ms"] / 1e6)
            copies.append(size / told["phases"]["copy"] / 1e6)
        here.sh(f"kill -9 {pid}")
        here.wait_until_gone(pid)
    return {"connection": spread(lines), "copy": spread(copies), "migration": spread(whole)}


def main() -> None:
    """The table."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else MIB
    print(f"{f'GB/s, {mib} MiB':40s} {'median':>8s} {'min':>8s} {'max':>8s}")
    memcpy = measured(
        "files",
        {"place": "memory", "mib": mib},
        lambda: {"memcpy": spread([floors.memcpy_rate(mib << 20) for _ in range(TIMES)])},
    )
    show("floor: memcpy", memcpy["memcpy"])
    for place in PLACES:
        row = measured("files", {"place": place, "mib": mib}, lambda place=place: to_file(place, mib))  # type: ignore[misc]
        for what, name in (
            ("write", "floor: write and fsync"),
            ("dump", "checkpoint"),
            ("criu dump", "criu dump"),
            ("read", "floor: read"),
            ("restore", "restore"),
            ("criu restore", "criu restore"),
        ):
            if what in row:
                show(f"{name}, {place}", row[what])
    row = measured("files", {"place": "TCP", "mib": mib}, lambda: over_the_line(mib))
    show("floor: plain connection", row["connection"])
    show("migrate --stop-and-copy, its copy", row["copy"])
    show("migrate --stop-and-copy, the whole", row["migration"])
    if criu.lacking():
        print(f"({criu.lacking()}: nothing to compare with)")


if __name__ == "__main__":
    main()
