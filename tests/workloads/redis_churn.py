"""New connections all the time: connect, PING and GET in one send, check, close; another one every few milliseconds.

    python -m tests.workloads.redis_churn PORT ADDRESS...

A connection that has to wait does not keep others from being begun.  Reported: the longest time from connect to
established, and to the last reply.
"""

from __future__ import annotations

import errno
import selectors
import socket
import sys
import time
from typing import Any

from tests.workloads.control import Client, main, patience
from tests.workloads.resp import RespReader, command

INTERVAL = 0.01  # seconds between two connections
MOST = 200  # connections at once
PATIENCE = patience(20.0)  # seconds until a connection counts as failed
KEY, VALUE = b"churn:value", b"as it was set"


class Attempt:
    """One connection from its SYN to its end."""

    def __init__(self, client: RedisChurn, address: str, port: int) -> None:
        self._client = client
        self._address = address
        self._reader = RespReader()
        self._replies: list[object] = []
        self.begun = time.monotonic()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        error = self._socket.connect_ex((address, port))
        if error not in (0, errno.EINPROGRESS):
            self.end(f"connect: {errno.errorcode[error]}")
        else:
            client.watch(self._socket, selectors.EVENT_WRITE, self._connected)

    def _connected(self, _: int) -> None:
        error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self.end(f"connect: {errno.errorcode[error]}")
            return
        self._client.connect_max = max(self._client.connect_max, time.monotonic() - self.begun)
        self._client.selector.modify(self._socket, selectors.EVENT_READ, self._readable)
        self._socket.send(command(b"PING") + command(b"GET", KEY))

    def _readable(self, _: int) -> None:
        try:
            data = self._socket.recv(4096)
        except OSError as error:
            self.end(repr(error))
            return
        if not data:
            self.end("ended by the server")
            return
        self._replies += self._reader.feed(data)
        if len(self._replies) >= 2:
            self.end("" if self._replies == ["PONG", VALUE] else f"replies {self._replies!r:.100}")

    def end(self, wrong: str) -> None:
        """Close; `wrong` is empty if all was well."""
        self._client.over(self)
        if wrong:
            self._client.blame(
                f"new connection to {self._address} after {time.monotonic() - self.begun:.3f} s: {wrong}"
            )
        elif len(self._replies) >= 2:
            self._client.reply_max = max(self._client.reply_max, time.monotonic() - self.begun)
            self._client.completed()
        if self._socket.fileno() in self._client.selector.get_map():
            self._client.selector.unregister(self._socket)
        self._socket.close()


class RedisChurn(Client):
    """Begins connections in turn to each address."""

    def __init__(self, port: int, addresses: list[str]) -> None:
        super().__init__()
        self._port, self._addresses = port, addresses
        self._running: dict[int, Attempt] = {}
        self._next = 0.0
        self._number = 0
        self._stopped = False
        self._gaps = self.new_gaps()
        self.connect_max = self.reply_max = 0.0

    def start(self) -> None:
        """The value that all ask for."""
        with socket.create_connection((self._addresses[0], self._port), timeout=5) as connection:
            connection.sendall(command(b"SET", KEY, VALUE))
            if connection.recv(100) != b"+OK\r\n":
                raise ConnectionError("SET was refused")

    def over(self, attempt: Attempt) -> None:
        """An attempt has ended."""
        self._running.pop(id(attempt), None)

    def completed(self) -> None:
        """An attempt has ended well."""
        self._gaps.reply()

    def tick(self, now: float) -> float:
        """Begin the next one, end those that wait too long."""
        for attempt in [a for a in self._running.values() if now - a.begun > PATIENCE]:
            attempt.end(f"no reply within {PATIENCE} s")
        if now >= self._next and len(self._running) < MOST and not self._stopped:
            self._number += 1
            attempt = Attempt(self, self._addresses[self._number % len(self._addresses)], self._port)
            self._running[id(attempt)] = attempt
            self._next = max(self._next + INTERVAL, now)
        return self._next if not self._stopped else now + 1

    def mark(self) -> dict[str, Any]:
        """Also: connect_ms and reply_ms, the longest, of connections still under way too."""
        now = time.monotonic()
        waiting = max((now - a.begun for a in self._running.values()), default=0.0)
        report = {
            **super().mark(),
            "connect_ms": round(1e3 * self.connect_max, 3),
            "reply_ms": round(1e3 * max(self.reply_max, waiting), 3),
        }
        self.connect_max = self.reply_max = 0.0
        return report

    def finish(self) -> dict[str, Any]:
        """All that were begun must end well."""
        self._stopped = True
        if not self.spin(time.monotonic() + PATIENCE, lambda: not self._running):
            self.blame(f"{len(self._running)} new connections without an answer")
        return {"connections": self._number}


if __name__ == "__main__":
    main(RedisChurn(int(sys.argv[1]), sys.argv[2:]))
