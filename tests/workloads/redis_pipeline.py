"""Pipelined SET, GET and INCR on several connections; every reply is compared with what it must be.

    python -m tests.workloads.redis_pipeline PORT ADDRESS...     one connection to each address (repeat one for more)

Each connection has keys of its own, so that the replies are known in advance whatever the others do.  One counter is
shared: at the end it must be the number of all increments that were answered.
"""

from __future__ import annotations

import random
import selectors
import socket
import sys
import time
from collections import deque
from typing import Any

from tests.workloads.control import Client, main, patience
from tests.workloads.resp import RespReader, command

BATCH = 16  # commands in one send
MOST = 64  # unanswered commands of one connection
INTERVAL = 0.002  # seconds between two batches of one connection
SHARED = b"pipeline:shared"


class Connection:
    """One connection, its keys' values as they must be, and the replies that are due."""

    def __init__(self, client: RedisPipeline, number: int, address: str, port: int) -> None:
        self._client = client
        self._random = random.Random(number)
        self.name = f"pipeline connection {number} to {address}"
        self._prefix = b"pipeline:%d:" % number
        self.socket = socket.create_connection((address, port), timeout=5)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._reader = RespReader()
        self._values: dict[bytes, bytes] = {}
        self._count = 0
        self.shared = 0  # increments of the shared counter that were answered
        self.due: deque[object] = deque()
        self._out = b""
        self._gaps = client.new_gaps()
        self.dead = False
        client.watch(self.socket, selectors.EVENT_READ, self.readable)

    def batch(self) -> None:
        """Send the next commands, if not too many are unanswered."""
        if len(self.due) + BATCH <= MOST and not self.dead and not self._out:
            self._out = b"".join(self._next() for _ in range(BATCH))
        self._flush()

    def last_batch(self) -> None:
        """Send what is left of a batch, waiting for room; none is begun."""
        self.socket.settimeout(patience(10))
        try:
            if not self.dead:
                self.socket.sendall(self._out)
        except OSError as error:
            self._die(repr(error))
        self._out = b""
        self.socket.setblocking(False)

    def _flush(self) -> None:
        if self._out and not self.dead:
            try:
                self._out = self._out[self.socket.send(self._out) :]
            except BlockingIOError:
                return
            except OSError as error:
                self._die(repr(error))

    def _next(self) -> bytes:
        kind = self._random.random()
        key = self._prefix + b"%d" % self._random.randrange(500)
        if kind < 0.4:
            value = self._random.randbytes(self._random.choice((1, 20, 300, 4000)))
            self._values[key] = value
            self.due.append("OK")
            return command(b"SET", key, value)
        if kind < 0.8:
            self.due.append(self._values.get(key))
            return command(b"GET", key)
        if kind < 0.9:
            self._count += 1
            self.due.append(self._count)
            return command(b"INCR", self._prefix + b"count")
        self.due.append(int)  # others increment it too: any number
        return command(b"INCR", SHARED)

    def readable(self, _: int) -> None:
        """Replies."""
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            self._die(repr(error))
            return
        if not data:
            self._die("ended by the server")
            return
        self._gaps.reply()
        for reply in self._reader.feed(data):
            expected = self.due.popleft() if self.due else "none"
            if expected is int:
                self.shared += 1
                expected = reply if type(reply) is int else int
            if reply != expected or type(reply) is not type(expected):
                self._client.blame(f"{self.name}: {reply!r:.80} instead of {expected!r:.80}")

    def _die(self, why: str) -> None:
        self._client.blame(f"{self.name}: {why} with {len(self.due)} replies due")
        self._client.selector.unregister(self.socket)
        self.dead = True


class RedisPipeline(Client):
    """All connections."""

    def __init__(self, port: int, addresses: list[str]) -> None:
        super().__init__()
        self._port, self._addresses = port, addresses
        self._connections: list[Connection] = []
        self._begin = 0

    def start(self) -> None:
        """Connect; the shared counter may stand anywhere."""
        self._begin = int(self._ask(b"INCRBY", SHARED, b"0"))
        for number, address in enumerate(self._addresses):
            connection = Connection(self, number, address, self._port)
            self._connections.append(connection)
        for number in range(len(self._addresses)):
            self._ask(b"DEL", b"pipeline:%d:count" % number, *(b"pipeline:%d:%d" % (number, k) for k in range(500)))

    def _ask(self, *words: bytes) -> Any:
        with socket.create_connection((self._addresses[0], self._port), timeout=5) as connection:
            connection.sendall(command(*words))
            reader = RespReader()
            while not (replies := reader.feed(data := connection.recv(4096))):
                if not data:
                    raise ConnectionError("ended by the server")
            return replies[0]

    def tick(self, now: float) -> float:
        """A batch on each connection."""
        for connection in self._connections:
            connection.batch()
        return now + INTERVAL

    def finish(self) -> dict[str, Any]:
        """Every reply must come, and the shared counter must be right."""
        connections = self._connections
        for connection in connections:
            connection.last_batch()
        self._connections = []  # no further batches
        self.spin(time.monotonic() + patience(10), lambda: all(c.dead or not c.due for c in connections))
        for connection in connections:
            if connection.due:
                self.blame(f"{connection.name}: {len(connection.due)} replies missing")
        expected = self._begin + sum(connection.shared for connection in connections)
        total = self._ask(b"INCRBY", SHARED, b"0")
        if total != expected:
            self.blame(f"the shared counter is {total}, {expected} increments were answered")
        for connection in connections:
            connection.socket.close()
        return {}


if __name__ == "__main__":
    main(RedisPipeline(int(sys.argv[1]), sys.argv[2:]))
