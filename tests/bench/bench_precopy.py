"""What a move costs by the size of a process's memory and by how fast it writes: with rounds of pre-copy, without, and
with memory that comes later.

``python -m tests.bench.bench_precopy [MIB ...]`` (as root; 64, 256 and 1024; 8192 takes 20 GB: what this machine has no
room for is named).  The process writes
pages at random, and counts in a loop in the time that it has left: ``slower`` is by how much less it counted per second
while the command ran and it did not stand still, than before.  ``sent`` is bytes on the line over bytes of memory.
What the stop consists of is named step by step: all threads stopped; what is left of memory copied, and the processes
built; connections frozen and exported; rebuilt; committed; addresses, release and the first instruction.  The floors
are memcpy of the same bytes, and writing them into memory that is not there yet, in the same run.  Nothing is judged
by the clock.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from tests.bench.floors import memcpy_rate, new_memory_rate
from tests.bench.results import Row, measured, spread
from tests.hosts import ThreeHosts, three_hosts
from tests.hosts.tcpmig import migrate
from tests.workloads.servers import wait_listening

PORT = 7200
SIZES = (64, 256, 1024)  # MiB
RATES = (0, 20, 200)  # MB/s written
MOVES = 4
LARGE = 4096  # MiB, from which on two moves must do
STEPS = ("stop", "copy", "freeze", "rebuild", "commit", "takeover")
WRITER = """
import mmap, random, socket, sys, time
address, port, size, rate = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20, float(sys.argv[4]) * 1e6
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block = random.Random(1).randbytes(1 << 20)
for at in range(0, size, len(block)): memory[at : at + len(block)] = block
listener = socket.create_server((address, port)); listener.setblocking(False)
chance = random.Random(2)
peers, done, counted = [], 0, 0
while True:
    began = time.monotonic()
    for _ in range(int(rate * 0.005 / 4096)):
        memory[chance.randrange(size // 4096) * 4096] = done & 255
        done += 1
    try: peers.append(listener.accept()[0]); peers[-1].setblocking(False)
    except BlockingIOError: pass
    for peer in peers:
        try:
            if peer.recv(1): peer.sendall(b"%19d\\n" % counted)
        except (BlockingIOError, ConnectionError): pass
    until = began + 0.005
    while time.monotonic() < until: counted += 1
"""


def memcpy_ms(size: int) -> float:
    """The floor: one copy of so many bytes."""
    return size / memcpy_rate(min(size, 1 << 30)) / 1e6


def room() -> int:
    """MiB of memory that a process here may have, so that it fits twice, and something beside it."""
    with open("/proc/meminfo", encoding="ascii") as file:
        found = next(line for line in file if line.startswith("MemAvailable:"))
    return (int(found.split()[1]) >> 10) * 2 // 5


class Watch:
    """Asks the process how far it has counted, every 20 ms, from the third host."""

    def __init__(self, hosts: ThreeHosts) -> None:
        with hosts.client.netns_entered():
            self._sock = socket.create_connection((hosts.net.service4, PORT))
        self._seen: list[tuple[float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            self._sock.sendall(b"?")
            answer = self._sock.recv(20, socket.MSG_WAITALL)
            self._seen.append((time.monotonic(), int(answer)))

    def rate(self, start: float, end: float, stood: float = 0.0) -> float:
        """Counted per second between two times, without ``stood`` seconds of them."""
        part = [one for one in self._seen if start <= one[0] <= end]
        if len(part) < 2:
            return 0.0
        return (part[-1][1] - part[0][1]) / max(1e-3, part[-1][0] - part[0][0] - stood)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._sock.close()


def moves(hosts: ThreeHosts, size: int, rate: int, options: Sequence[str]) -> Row:
    here, there = hosts.source, hosts.target
    if not here.sh("ip -j addr show to " + hosts.net.service4).strip("[]{}, \n"):
        here, there = there, here
    argv = [sys.executable, "-IS", "-c", WRITER, hosts.net.service4, PORT, size, rate]
    process = here.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_listening(hosts.client, process, hosts.net.service4, PORT, timeout=60)
    pid = process.pid
    stops, totals, sent, rounds, slower = [], [], [], [], []
    steps: dict[str, list[float]] = {step: [] for step in STEPS}
    watch = Watch(hosts)
    for _ in range(MOVES if size < LARGE else 2):
        time.sleep(1.0)
        began = time.monotonic()
        summary = migrate(here, pid, there, options=options, timeout=170)
        before = watch.rate(began - 0.9, began)
        slower.append(1 - watch.rate(began, time.monotonic(), summary["stop_ms"] / 1e3) / before if before else 0.0)
        pid, here, there = summary["target_pid"], there, here
        stops.append(summary["stop_ms"])
        for step, found in steps.items():
            found.append(summary["phases"].get(step, 0.0))
        totals.append(summary["total_ms"])
        sent.append(summary["bytes_sent"] / (size << 20))
        rounds.append(len(summary["rounds"]))
    watch.close()
    here.sh(f"kill -9 {pid}")
    here.wait_until_gone(pid)
    return {
        "stop": spread(stops),
        "steps": {step: spread(found) for step, found in steps.items()},
        "total": spread(totals),
        "sent": spread(sent),
        "slower": spread(slower),
        "rounds": max(rounds),
        "memcpy": memcpy_ms(size << 20),
        "new": (size << 20) / new_memory_rate(size << 20) / 1e6,
    }


def measure(size: int, rate: int, *options: str) -> None:
    """One line of the table."""
    how = " ".join(options) or "rounds"

    def work() -> Row:
        with three_hosts() as hosts:
            return moves(hosts, size, rate, options)

    row = measured("precopy", {"mib": size, "rate": rate, "how": how}, work)
    figures = f"{row['stop']['median']:8.1f} {row['stop']['max']:8.1f} {row['total']['median']:9.0f}"
    figures += f" {row['sent']['median']:6.2f} {100 * row['slower']['median']:8.0f} {row['rounds']:6d}"
    steps = "".join(f" {row['steps'][step]['median']:8.1f}" for step in STEPS)
    print(f"{size:5d} {rate:5d} {how:16s} {figures} {row['memcpy']:9.1f} {row['new']:7.0f} {steps}", flush=True)


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:]] or SIZES
    steps = "".join(f" {step:>8s}" for step in STEPS)
    print(f"  MiB  MB/s how              stop ms  max stop  total ms   sent slower % rounds memcpy ms  new ms {steps}")
    for size in sizes:
        if size > room():
            print(f"{size:5d} (not measured: there is room for {room()} MiB)", flush=True)
            continue
        for rate in RATES:
            measure(size, rate)
        measure(size, RATES[0], "--stop-and-copy")
        measure(size, RATES[-1], "--lazy")


if __name__ == "__main__":
    main()
