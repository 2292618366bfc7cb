"""What `--address forward` costs a connection in bulk: ``python -m tests.bench.bench_forward [MIB]`` (as root; 512).

One connection from a third host, GB/s in each direction: to a server at the source, where the line is plain (the
floor); after the server has moved with its address left behind, so that the source forwards each segment to the target.
Nothing is judged by the clock.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time

from tests.bench.results import Row, measured, spread
from tests.hosts import three_hosts
from tests.hosts.tcpmig import migrate
from tests.workloads.servers import wait_listening

MIB = 512
TIMES = 5
PORT = 7220
#: takes as many bytes as it is told, or sends them: "<MiB" or ">MiB", in 8 bytes
SERVER = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
block, into = bytes(1 << 20), bytearray(1 << 20)
while True:
    peer, _ = listener.accept()
    while order := peer.recv(8, socket.MSG_WAITALL):
        count = int(order[1:])
        if order[:1] == b">":
            for _ in range(count): peer.sendall(block)
            continue
        left = count << 20
        while left:
            got = peer.recv_into(into)
            if not got: sys.exit(1)
            left -= got
        peer.sendall(b".")
"""


def rates(sock: socket.socket, mib: int) -> tuple[float, float]:
    """GB/s to the server, and from it."""
    block, into, size = bytes(1 << 20), bytearray(1 << 20), mib << 20
    began = time.perf_counter()
    sock.sendall(b"<%07d" % mib)
    for _ in range(mib):
        sock.sendall(block)
    if sock.recv(1) != b".":
        raise ConnectionError("the server has ended")
    middle = time.perf_counter()
    sock.sendall(b">%07d" % mib)
    left = size
    while left:
        got = sock.recv_into(into)
        if not got:
            raise ConnectionError("the server has ended")
        left -= got
    return size / (middle - began) / 1e9, size / (time.perf_counter() - middle) / 1e9


def measure(mib: int) -> Row:
    with three_hosts() as hosts, contextlib.ExitStack() as ends:
        address = hosts.net.service4
        argv = [sys.executable, "-IS", "-c", SERVER, address, PORT]
        server = hosts.source.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_listening(hosts.client, server, address, PORT)
        with hosts.client.netns_entered():
            sock = ends.enter_context(socket.create_connection((address, PORT)))
        rates(sock, mib)  # until its windows are open
        plain = [rates(sock, mib) for _ in range(TIMES)]
        told = migrate(
            hosts.source, server.pid, hosts.target, options=["--address", "forward", "--forward-to", hosts.target.ip4]
        )
        rates(sock, mib)
        forwarded = [rates(sock, mib) for _ in range(TIMES)]
        sock.close()
        hosts.target.sh(f"kill -9 {told['target_pid']}")
    return {
        f"{what} {way}": spread([one[place] for one in figures])
        for what, figures in (("plain", plain), ("forwarded", forwarded))
        for place, way in enumerate(("in", "out"))
    }


def main() -> None:
    """The table."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else MIB
    row = measured("forward", {"mib": mib}, lambda: measure(mib))
    print(f"{f'GB/s, {mib} MiB on one connection':40s} {'median':>8s} {'min':>8s} {'max':>8s}")
    for what, name in (
        ("plain in", "floor: client to server, plain"),
        ("forwarded in", "client to server, forwarded"),
        ("plain out", "floor: server to client, plain"),
        ("forwarded out", "server to client, forwarded"),
    ):
        print(f"{name:40s} {row[what]['median']:8.2f} {row[what]['min']:8.2f} {row[what]['max']:8.2f}")


if __name__ == "__main__":
    main()
