"""Ping-pong: a numbered message to an echo server, the next one a millisecond after its answer.

python -m tests.workloads.echo_client PORT ADDRESS...     one connection to each address
"""

from __future__ import annotations

import selectors
import socket
import struct
import sys
import time
from typing import Any

from tests.workloads.control import Client, main, patience

INTERVAL = 0.001  # seconds from an answer to the next message
MESSAGE = struct.Struct("=QQ")


class PingPong:
    """One connection."""

    def __init__(self, client: EchoClient, number: int, address: str, port: int) -> None:
        self._client = client
        self.address = address
        self._number = number
        self._count = 0
        self._message = b""
        self._got = b""
        self.due = 0.0
        self.open = False
        self.dead = False
        self._gaps = client.new_gaps()
        self.socket = socket.create_connection((address, port), timeout=5)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        client.watch(self.socket, selectors.EVENT_READ, self._readable)

    def send(self) -> None:
        """The next message."""
        self._count += 1
        self._message = MESSAGE.pack(self._number, self._count)
        self.open = True
        try:
            self.socket.send(self._message)
        except OSError as error:
            self._die(repr(error))

    def _readable(self, _: int) -> None:
        try:
            data = self.socket.recv(4096)
        except OSError as error:
            self._die(repr(error))
            return
        if not data:
            self._die("ended by the server")
            return
        self._got += data
        if len(self._got) < MESSAGE.size:
            return
        if self._got != self._message:
            self._client.blame(f"echo of {self.address}: {self._got.hex()} instead of {self._message.hex()}")
        now = time.monotonic()
        self._gaps.reply(now)
        self._got, self.open, self.due = b"", False, now + INTERVAL

    def _die(self, why: str) -> None:
        self._client.blame(f"echo of {self.address}: {why}, message {self._count}")
        self._client.selector.unregister(self.socket)
        self.dead = True


class EchoClient(Client):
    """A connection to each address."""

    def __init__(self, port: int, addresses: list[str]) -> None:
        super().__init__()
        self._port, self._addresses = port, addresses
        self._all: list[PingPong] = []
        self._stopped = False

    def start(self) -> None:
        """Connect."""
        self._all = [PingPong(self, n, a, self._port) for n, a in enumerate(self._addresses)]

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
        """The last echoes must come."""
        self._stopped = True
        self.spin(time.monotonic() + patience(10), lambda: all(one.dead or not one.open for one in self._all))
        for one in self._all:
            if one.open and not one.dead:
                self.blame(f"echo of {one.address}: no answer")
            one.socket.close()
        return {}


if __name__ == "__main__":
    main(EchoClient(int(sys.argv[1]), sys.argv[2:]))
