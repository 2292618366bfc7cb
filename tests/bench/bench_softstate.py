"""What soft state is worth: bytes that a peer gets right after a move, beside a control with none restored.

``python -m tests.bench.bench_softstate [ROUNDS]`` (as root).  A server streams to a client over a path of
20 ms (a relay in a process of its own, since the kernel has no netem here); when its window is open the connection
moves to another host, with its address.  Each round moves twice, with and without soft state.  Nothing is judged.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator

from tcpstate.capture import Capture, replay
from tcpstate.discard import discard_connections
from tcpstate.export import export_connections
from tcpstate.freeze import quiet
from tcpstate.kernel.sockets import SO, Level
from tcpstate.kernel.tcp import TCP, TcpInfo
from tcpstate.rebuild import rebuild_connections, release_connections
from tcpstate.rehearsal import rehearse
from tcpstate.silence import Blackhole
from tests.bench.results import note
from tests.tscnet import SERVICE, Host, Net, Space, net, pair, sh

DELAY = 0.010  # seconds, each way
WINDOW = 300  # segments that are in flight at the move
STEPS = (0.025, 0.050, 0.100, 0.200)
ROUNDS = 5
CONTROLS = ("cubic", "reno", "bbr")
PORT = 7000
SIOCETHTOOL, ETHTOOL_STXCSUM, ETHTOOL_SGSO, ETHTOOL_SGRO, ETHTOOL_STSO = 0x8946, 0x17, 0x24, 0x2C, 0x1F


def plain(space: Space, device: str) -> None:
    """Frames as they would be on a wire: no offload of checksums and segments."""
    with space, socket.socket() as sock:
        for command in (ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO):
            value = ctypes.create_string_buffer(struct.pack("II", command, 0), 8)
            request = struct.pack("16sQ16x", device.encode(), ctypes.addressof(value))
            fcntl.ioctl(sock, SIOCETHTOOL, request)


@contextlib.contextmanager
def far(hosts: Net, host: Host) -> Iterator[None]:
    """Everything between ``host`` and the bridge takes DELAY each way."""
    relay = Space(hosts.bridge.name + "relay")
    port = f"p{host.number}"
    sh(f"ip -n {hosts.bridge.name} link set {port} nomaster")
    sh(f"ip -n {hosts.bridge.name} link set {port} netns {relay.name} name near")
    sh(f"ip -n {relay.name} link add far type veth peer name {port} netns {hosts.bridge.name}")
    sh(f"ip -n {hosts.bridge.name} link set {port} master br0 up")
    for device in ("near", "far"):
        sh(f"ip -n {relay.name} link set {device} up promisc on")
        plain(relay, device)
    for space, device in ((host, "eth0"), (hosts.a, "eth0"), (hosts.b, "eth0"), (hosts.bridge, port)):
        plain(space, device)
    for one in (hosts.a, hosts.b):
        plain(hosts.bridge, f"p{one.number}")
    pid = os.fork()
    if not pid:
        try:
            with relay:
                forward("near", "far")
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        relay.close()


def forward(*devices: str) -> None:
    """Until killed."""
    socks = []
    for device in devices:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind((device, 3))
        sock.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, 64 << 20)
        sock.setsockopt(Level.SOCKET, SO.SNDBUFFORCE, 64 << 20)
        sock.setblocking(False)
        socks.append(sock)
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, to, frame = heapq.heappop(waiting)
            with contextlib.suppress(OSError):
                socks[to].send(frame)
        timeout = max(0.0, waiting[0][0] - now) if waiting else 1.0
        for sock in select.select(socks, [], [], timeout)[0]:
            with contextlib.suppress(BlockingIOError):
                for _ in range(64):
                    frame, address = sock.recvfrom(1 << 17)
                    if address[2] != socket.PACKET_OUTGOING:
                        count += 1
                        heapq.heappush(waiting, (time.monotonic() + DELAY, count, 1 - socks.index(sock), frame))


class Client(threading.Thread):
    """Reads all, and notes when how much had come."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.marks: list[tuple[float, int]] = [(0.0, 0)]
        self.measured = False
        self.start()

    def run(self) -> None:
        """Until the end of the stream."""
        total = 0
        try:
            while data := self.sock.recv(1 << 20):
                total += len(data)
                self.marks.append((time.monotonic(), total))
        except ConnectionResetError:
            # it is cut off in full flow at the end; not before
            if not self.measured:
                raise

    def by(self, moment: float) -> int:
        """Bytes that had come by then."""
        return max((total for at, total in self.marks if at <= moment), default=0)


def one_move(hosts: Net, congestion: str, *, soft: bool) -> tuple[list[int], TcpInfo, TcpInfo]:
    """Bytes in each of STEPS after the release; TCP_INFO before the move and after the rebuild."""
    family = socket.AF_INET
    hosts.a.add(family)
    served, peer = pair(hosts.a, hosts.c, family, port=0)
    peer.setsockopt(Level.SOCKET, SO.RCVBUFFORCE, 8 << 20)
    served.setsockopt(Level.SOCKET, SO.SNDBUFFORCE, 8 << 20)
    served.setsockopt(Level.TCP, TCP.CONGESTION, congestion.encode())
    served.setblocking(False)
    client = Client(peer)
    data = bytes(1 << 16)

    def feed(sock: socket.socket, condition: object) -> None:
        while not condition():  # type: ignore[operator]
            try:
                sock.send(data)
            except BlockingIOError:
                time.sleep(0.001)

    def info(sock: socket.socket) -> TcpInfo:
        return TcpInfo.unpack(sock.getsockopt(Level.TCP, TCP.INFO, 280))

    end = time.monotonic() + 10
    feed(served, lambda: info(served).snd_cwnd >= WINDOW or time.monotonic() > end)
    port = served.getsockname()[1]
    before = info(served)
    with hosts.b:
        there = Capture(ports={port})
        there.start()
    with hosts.a, Capture(ports={port}) as here:
        (record,) = export_connections([served], quiet([served]))
        exported = time.monotonic()
        with hosts.b:
            (made,) = socks = rebuild_connections([record], elapsed=time.monotonic() - exported, soft=soft)
        hosts.a.remove(family)
        sh(f"ip -n {hosts.b.name} addr add {SERVICE[family]}/24 dev eth0")
        arrived = here.segments()
    with hosts.b:
        after = info(made)
        release_connections(socks, [record])
        hosts.b.announce(family)
        replay(arrived + there.segments(), [record])
    released = time.monotonic()
    made.setblocking(False)
    feed(made, lambda: time.monotonic() > released + STEPS[-1] + 0.1)
    base = client.by(released)
    got = [client.by(released + step + DELAY) - base for step in STEPS]
    client.measured = True
    made.close()
    discard_connections([served])
    there.close()
    hosts.b.remove(family)
    peer.shutdown(socket.SHUT_RDWR)
    client.join()
    peer.close()
    return got, before, after


def main() -> None:
    """A table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with net() as hosts, far(hosts, hosts.c):
        for host in (hosts.a, hosts.b):
            with host:
                Blackhole().ensure()
                rehearse()
        print(f"path of {2e3 * DELAY:.0f} ms; bytes at the client after the release, KiB; median of {rounds}")
        print(
            "restored           " + "".join(f"{1e3 * s:8.0f} ms" for s in STEPS) + "   cwnd, srtt, rto before -> after"
        )
        for congestion in CONTROLS:
            for soft in (True, False):
                runs = [one_move(hosts, congestion, soft=soft) for _ in range(rounds)]
                middle = [sorted(r[0][i] for r in runs)[rounds // 2] >> 10 for i in range(len(STEPS))]
                _, before, after = runs[-1]
                told = " -> ".join(f"{i.snd_cwnd}, {i.rtt / 1e3:.1f} ms, {i.rto / 1e3:.0f} ms" for i in (before, after))
                name = f"{congestion}, {'soft state' if soft else 'none'}"
                print(f"{name:19}" + "".join(f"{m:11}" for m in middle) + f"   {told}", flush=True)
                note("softstate", what=name, kib=middle, after=[1e3 * step for step in STEPS])


if __name__ == "__main__":
    main()
