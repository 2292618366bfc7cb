"""Connections that a migration finds in the middle of something.

python -m tests.workloads.redis_waiting PORT ADDRESS...

idle      connected at the start, not used before the end
half      before: half of a SET is sent; after: the rest, and the value is read back
backlog   before: megabytes are asked for and left unread, so that the queues of both sides fill and the window closes;
          after: read, every byte compared
"""

from __future__ import annotations

import random
import socket
import sys
import time
from typing import Any

from tests.workloads.control import Client, main, patience
from tests.workloads.resp import RespReader, command

BIG = 1 << 20  # bytes of the value of which the backlog is made
TIMES = 8  # how often it is asked for
SETTLE = 0.1  # seconds for the queues to fill
PATIENCE = patience(15.0)  # seconds until an answer counts as missing


class Connection:
    """A connection that is used in turn, blocking, with a time limit."""

    def __init__(self, address: str, port: int) -> None:
        self.address = address
        self.socket = socket.create_connection((address, port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = RespReader()
        self._replies: list[object] = []

    def send(self, data: bytes) -> None:
        """All of it."""
        self.socket.sendall(data)

    def reply(self) -> object:
        """The next reply."""
        while not self._replies:
            data = self.socket.recv(1 << 20)
            if not data:
                raise ConnectionError(f"ended by the server after {self._reader.pending} bytes of a reply")
            self._replies += self._reader.feed(data)
        return self._replies.pop(0)

    def ask(self, *words: bytes) -> object:
        """Command and reply."""
        self.send(command(*words))
        return self.reply()


class RedisWaiting(Client):
    """The three kinds, to each address."""

    def __init__(self, port: int, addresses: list[str]) -> None:
        super().__init__()
        self._port, self._addresses = port, addresses
        self._big = random.Random(6379).randbytes(BIG)
        self._round = 0
        self._halves: list[tuple[Connection, bytes, bytes, bytes]] = []

    def start(self) -> None:
        """Connect; the big value is stored."""
        self._idle = [Connection(a, self._port) for a in self._addresses]
        self._half = [Connection(a, self._port) for a in self._addresses]
        self._backlog = [Connection(a, self._port) for a in self._addresses]
        self._expect(self._backlog[0], "OK", self._backlog[0].ask(b"SET", b"waiting:big", self._big))

    def _expect(self, connection: Connection, expected: object, got: object) -> None:
        if got != expected:
            self.blame(f"connection to {connection.address}: {got!r:.80} instead of {expected!r:.80}")

    def before(self) -> dict[str, Any]:
        """Half a command, and a backlog."""
        self._round += 1
        for number, connection in enumerate(self._half):
            key, value = b"waiting:%d:%d" % (number, self._round), random.randbytes(50_000)
            whole = command(b"SET", key, value)
            cut = random.randrange(1, len(whole))
            connection.send(whole[:cut])
            self._halves.append((connection, whole[cut:], key, value))
        for connection in self._backlog:
            connection.send(command(b"GET", b"waiting:big") * TIMES)
        time.sleep(SETTLE)
        return {"unread": len(self._backlog) * TIMES * BIG}

    def after(self) -> dict[str, Any]:
        """The other half, and all of the backlog."""
        start = time.monotonic()
        for connection, rest, key, value in self._halves:
            connection.send(rest)
            self._expect(connection, "OK", connection.reply())
            self._expect(connection, value, connection.ask(b"GET", key))
            connection.ask(b"DEL", key)
        self._halves = []
        half = time.monotonic()
        for connection in self._backlog:
            for _ in range(TIMES):
                self._expect(connection, self._big, connection.reply())
        return {
            "half_ms": round(1e3 * (half - start), 3),
            "backlog_ms": round(1e3 * (time.monotonic() - half), 3),
        }

    def finish(self) -> dict[str, Any]:
        """The idle connections must still answer."""
        for connection in self._idle:
            self._expect(connection, "PONG", connection.ask(b"PING"))
            self._expect(connection, self._big, connection.ask(b"GET", b"waiting:big"))
        for connection in (*self._idle, *self._half, *self._backlog):
            connection.socket.close()
        return {}


if __name__ == "__main__":
    main(RedisWaiting(int(sys.argv[1]), sys.argv[2:]))
