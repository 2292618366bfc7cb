"""The stop of a process by the size of its memory and by how fast it writes: with rounds of pre-copy, and without.

``python tests/bench/bench_precopy.py [MIB ...]`` (as root; 64, 256 and 1024).  The process writes at random.  The floor
is memcpy of the same bytes in the same run.  Nothing is judged by the clock.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import time

from tests.hosts import ThreeHosts, three_hosts
from tests.hosts.tcpmig import migrate
from tests.workloads.servers import wait_listening

PORT = 7200
SIZES = (64, 256, 1024)  # MiB
RATES = (0, 20, 200)  # MB/s written
MOVES = 4
WRITER = """
import mmap, random, socket, sys, time
address, port, size, rate = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20, float(sys.argv[4]) * 1e6
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block = random.Random(1).randbytes(1 << 20)
for at in range(0, size, len(block)): memory[at : at + len(block)] = block
listener = socket.create_server((address, port)); listener.setblocking(False)
chance = random.Random(2)
peers, done = [], 0
while True:
    began = time.monotonic()
    for _ in range(int(rate * 0.005 / 4096)):
        memory[chance.randrange(size // 4096) * 4096] = done & 255
        done += 1
    try: peers.append(listener.accept()[0]); peers[-1].setblocking(False)
    except BlockingIOError: pass
    for peer in peers:
        try:
            if peer.recv(1): peer.sendall(b"%d %d\\n" % (done, time.monotonic_ns()))
        except (BlockingIOError, ConnectionError): pass
    time.sleep(max(0.0, began + 0.005 - time.monotonic()))
"""


def memcpy_ms(size: int) -> float:
    """The floor: one copy of so many bytes."""
    source, target = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
    ctypes.memset(source, 1, size)
    ctypes.memmove(target, source, size)
    began = time.perf_counter()
    ctypes.memmove(target, source, size)
    return 1e3 * (time.perf_counter() - began)


def measure(hosts: ThreeHosts, size: int, rate: int, *options: object) -> None:
    here, there = hosts.source, hosts.target
    if not here.sh("ip -j addr show to " + hosts.net.service4).strip("[]{}, \n"):
        here, there = there, here
    argv = [sys.executable, "-IS", "-c", WRITER, hosts.net.service4, PORT, size, rate]
    process = here.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_listening(hosts.client, process, hosts.net.service4, PORT)
    pid = process.pid
    stops, totals, sent, rounds = [], [], [], []
    for _ in range(MOVES):
        summary = migrate(here, pid, there, options=options, timeout=170)
        pid, here, there = summary["target_pid"], there, here
        stops.append(summary["stop_ms"])
        totals.append(summary["total_ms"])
        sent.append(summary["bytes_sent"] / (size << 20))
        rounds.append(len(summary["rounds"]))
    here.sh(f"kill -9 {pid}")
    here.wait_until_gone(pid)
    how = " ".join(map(str, options)) or "rounds"
    figures = f"{statistics.median(stops):8.1f} {max(stops):8.1f} {statistics.median(totals):9.0f}"
    figures += f" {statistics.median(sent):9.2f} {max(rounds):6d} {memcpy_ms(size << 20):9.1f}"
    print(f"{size:5d} {rate:5d} {how:16s} {figures}", flush=True)


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:]] or SIZES
    print("  MiB  MB/s how              stop ms  max stop  total ms  sent/MiB rounds memcpy ms")
    for size in sizes:
        for rate in RATES:
            with three_hosts() as hosts:
                measure(hosts, size, rate)
        with three_hosts() as hosts:
            measure(hosts, size, RATES[0], "--stop-and-copy")


if __name__ == "__main__":
    main()
