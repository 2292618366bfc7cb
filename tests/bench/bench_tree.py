"""A tree of many processes moves there and back: ``python -m tests.bench.bench_tree [PROCESSES ...]`` (as root; 10 and
100, four moves each).

A Python forks so many children, which wait for each other in a ring of pipes; after each move a byte goes round.  The
floor is the time that as many forks of the same Python take, which the target needs at the least.  Nothing is judged by
the clock.
"""

from __future__ import annotations

import socket
import subprocess
import sys

from tests.bench.results import Row, measured, spread
from tests.hosts import three_hosts
from tests.hosts.tcpmig import migrate
from tests.workloads.servers import wait_listening

COUNTS = (10, 100)
MOVES = 4
PORT = 7230
TREE = """
import os, socket, sys, time
address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
listener = socket.create_server((address, port))
began = time.perf_counter()
first = source = os.pipe()
for _ in range(count):
    target = os.pipe()
    if not os.fork():
        listener.close()
        os.close(first[1])
        if source is not first: os.close(source[1])
        while byte := os.read(source[0], 1): os.write(target[1], byte)
        os._exit(0)
    if source is not first: os.close(source[1])
    os.close(source[0])
    source = target
os.close(source[1])
took = time.perf_counter() - began
while True:
    peer, _ = listener.accept()
    if peer.recv(1) == b"f": peer.sendall(b"%20.9f" % took)
    else:
        os.write(first[1], b"x")
        peer.sendall(os.read(source[0], 1))
    peer.close()
"""


def measure(count: int) -> Row:
    with three_hosts() as hosts:
        here, there, address = hosts.source, hosts.target, hosts.net.service4
        argv = [sys.executable, "-IS", "-c", TREE, address, PORT, count]
        process = here.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_listening(hosts.client, process, address, PORT)

        def asked(what: bytes, size: int) -> bytes:
            with hosts.client.netns_entered(), socket.create_connection((address, PORT), timeout=30) as sock:
                sock.sendall(what)
                return sock.recv(size, socket.MSG_WAITALL)

        forks, pid = 1e3 * float(asked(b"f", 20)), process.pid
        stops, totals = [], []
        for _ in range(MOVES):
            told = migrate(here, pid, there, timeout=170)
            pid, here, there = told["target_pid"], there, here
            stops.append(told["stop_ms"])
            totals.append(told["total_ms"])
            if asked(b"r", 1) != b"x":
                raise RuntimeError("the ring is broken")
        here.sh(f"kill -9 {pid}")
        here.wait_until_gone(pid)
    return {"forks": forks, "stop": spread(stops), "total": spread(totals)}


def main() -> None:
    """The table."""
    counts = [int(text) for text in sys.argv[1:]] or COUNTS
    print(f"{'processes':>9} {'stop ms':>9} {'range':>17} {'total ms':>9} {'floor: forks ms':>16} {'stop each':>10}")
    for count in counts:
        row = measured("tree", {"processes": count}, lambda count=count: measure(count))  # type: ignore[misc]
        stop = row["stop"]
        scope = f"{stop['min']:.1f}-{stop['max']:.1f}"
        each = stop["median"] / (count + 1)
        figures = f"{stop['median']:9.1f} {scope:>17} {row['total']['median']:9.1f} {row['forks']:16.1f} {each:10.2f}"
        print(f"{count:9} {figures}", flush=True)


if __name__ == "__main__":
    main()
