"""Keep-alive clients of a web server: one request after the other on the same connections, each reply compared.

    python -m tests.workloads.http_keepalive --root FOLDER [--connections N] PORT ADDRESS...

The files of FOLDER, which the server serves, are what is asked for and compared with.
"""

from __future__ import annotations

import argparse
import random
import selectors
import socket
import time
from pathlib import Path
from typing import Any

from tests.workloads.control import Client, main

INTERVAL = 0.002  # seconds from a reply to the next request of the connection


class KeepAlive:
    """One connection."""

    def __init__(self, client: HttpKeepAlive, number: int, address: str, port: int) -> None:
        self._client = client
        self._random = random.Random(number)
        self.name = f"keep-alive connection {number} to {address}"
        self._name = ""
        self._got = bytearray()
        self._gaps = client.new_gaps()
        self.due = 0.0
        self.open = False
        self.dead = False
        self.socket = socket.create_connection((address, port), timeout=5)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        client.watch(self.socket, selectors.EVENT_READ, self._readable)

    def send(self) -> None:
        """The next request."""
        self._name = self._random.choice(self._client.names)
        self.open = True
        try:
            self.socket.send(f"GET /{self._name} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        except OSError as error:
            self._die(repr(error))

    def _readable(self, _: int) -> None:
        try:
            data = self.socket.recv(1 << 18)
        except OSError as error:
            self._die(repr(error))
            return
        if not data:
            self._die("ended by the server")
            return
        self._got += data
        end = self._got.find(b"\r\n\r\n")
        if end < 0:
            return
        head, body = bytes(self._got[:end]).decode("latin-1"), bytes(self._got[end + 4 :])
        expected = self._client.files[self._name]
        if len(body) < len(expected) and head.startswith("HTTP/1.1 200"):
            return
        if not head.startswith("HTTP/1.1 200") or body != expected:
            self._client.blame(
                f"{self.name}: {self._name}: {head.splitlines()[0]}, {len(body)} of {len(expected)} bytes"
            )
        now = time.monotonic()
        self._gaps.reply(now)
        self._got.clear()
        self.open, self.due = False, now + INTERVAL

    def _die(self, why: str) -> None:
        self._client.blame(
            f"{self.name}: {why}, asked for {self._name!r}, {len(self._got)} bytes of the reply are there"
        )
        self._client.selector.unregister(self.socket)
        self.dead = True


class HttpKeepAlive(Client):
    """All connections."""

    def __init__(self, port: int, addresses: list[str], root: Path, connections: int) -> None:
        super().__init__()
        self._port = port
        self._addresses = [addresses[n % len(addresses)] for n in range(connections)]
        self.files = {path.name: path.read_bytes() for path in sorted(root.iterdir()) if path.is_file()}
        self.names = list(self.files)
        self._all: list[KeepAlive] = []
        self._stopped = False

    def start(self) -> None:
        """Connect."""
        self._all = [KeepAlive(self, n, a, self._port) for n, a in enumerate(self._addresses)]

    def tick(self, now: float) -> float:
        """Send what is due."""
        following = now + 1
        for one in self._all:
            if not one.open and not one.dead and not self._stopped:
                if one.due <= now:
                    one.send()
                else:
                    following = min(following, one.due)
        return following

    def finish(self) -> dict[str, Any]:
        """The last replies must come."""
        self._stopped = True
        self.spin(time.monotonic() + 10, lambda: all(one.dead or not one.open for one in self._all))
        for one in self._all:
            if one.open and not one.dead:
                self.blame(f"{one.name}: no reply")
            one.socket.close()
        return {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("port", type=int)
    parser.add_argument("addresses", nargs="+")
    given = parser.parse_args()
    main(HttpKeepAlive(given.port, given.addresses, given.root, given.connections))
