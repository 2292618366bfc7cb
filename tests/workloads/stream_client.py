"""Full-speed random streams in both directions, every byte checked at its position.

    python -m tests.workloads.stream_client [--rate MB/S] [--seed N] PORT ADDRESS...

One connection to each address.  Sizes of sends and receives are random, and now and then a connection reads nothing for
some milliseconds, so that windows close and queues are long at some of the moments when a migration strikes.
--rate limits each direction of each connection (0 = as fast as it goes).
"""

from __future__ import annotations

import argparse
import json
import random
import selectors
import socket
import time
from typing import Any

from tests.workloads.control import Client, main
from tests.workloads.randomstream import RandomStream
from tests.workloads.stream_server import HEADER, LARGEST, STATISTICS, STREAM

PAUSES = 0.002  # chance that a connection stops reading after a receive
PAUSE = 0.005  # seconds of it
BUCKET = 0.005  # seconds' worth of bytes that may be sent or read in one go when the rate is limited
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Stream:
    """One connection."""

    def __init__(self, client: StreamClient, seed: int, address: str, port: int, rate: float) -> None:
        self._client = client
        self._random = random.Random(seed)
        self._rate = rate
        self.address = address
        self.seed = seed
        self.out, self.into = RandomStream(seed), RandomStream(seed + 1)
        self.gaps = client.new_gaps()
        self.begun = time.monotonic()
        self.resume = 0.0
        self.sending = True
        self.dead = False
        self.ended = False
        self._wanted = READ
        self.socket = socket.create_connection((address, port), timeout=5)
        self.socket.sendall(HEADER.pack(STREAM, seed, seed + 1))
        self.socket.setblocking(False)
        client.watch(self.socket, READ, self._ready)

    def _allowed(self, position: int, now: float) -> bool:
        return not self._rate or position < (now - self.begun) * self._rate + self._rate * BUCKET

    def choose(self, now: float) -> float:
        """Register for what may be done now; when to look again."""
        if self.dead or self.ended:
            return now + 1
        wanted = READ if now >= self.resume and (not self.sending or self._allowed(self.into.position, now)) else 0
        wanted |= WRITE if self.sending and self._allowed(self.out.position, now) else 0
        if wanted != self._wanted:
            if not self._wanted:
                self._client.watch(self.socket, wanted, self._ready)
            elif not wanted:
                self._client.selector.unregister(self.socket)
            else:
                self._client.selector.modify(self.socket, wanted, self._ready)
            self._wanted = wanted
        return now + (BUCKET if self._rate else 0.5) if now >= self.resume else self.resume

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self.out.advance(self.socket.send(self.out.peek()[: self._random.randrange(1, LARGEST)]))
            if events & READ:
                self._read()
        except BlockingIOError:
            return
        except OSError as error:
            self.die(repr(error))

    def _read(self) -> None:
        data = self.socket.recv(self._random.randrange(1, LARGEST))
        if not data:
            if self.sending:
                self.die("ended early by the server")
            self.ended = True
            return
        wrong = self.into.check(data)
        if wrong:
            self.die(wrong)
            return
        now = time.monotonic()
        self.gaps.reply(now)
        if self._random.random() < PAUSES:
            self.resume = now + PAUSE

    def die(self, why: str) -> None:
        """Report and stop."""
        positions = f"{self.out.position} sent, {self.into.position} received"
        self._client.blame(f"stream {self.seed} with {self.address}: {why} ({positions})")
        if self._wanted:
            self._client.selector.unregister(self.socket)
        self._wanted = 0
        self.dead = True


class StreamClient(Client):
    """All connections."""

    def __init__(self, port: int, addresses: list[str], rate: float, seed: int) -> None:
        super().__init__()
        self._port, self._addresses, self._rate, self._seed = port, addresses, rate, seed
        self._streams: list[Stream] = []

    def start(self) -> None:
        """Connect."""
        for number, address in enumerate(self._addresses):
            stream = Stream(self, self._seed + 2 * number, address, self._port, self._rate)
            self._streams.append(stream)

    def tick(self, now: float) -> float:
        """Limits and pauses."""
        return min((stream.choose(now) for stream in self._streams), default=now + 1)

    def mark(self) -> dict[str, Any]:
        """Also: bytes of all connections so far, and where each connection is: [sent, received]."""
        return {
            **super().mark(),
            "positions": [[stream.out.position, stream.into.position] for stream in self._streams],
            "sent": sum(stream.out.position for stream in self._streams),
            "received": sum(stream.into.position for stream in self._streams),
        }

    def finish(self) -> dict[str, Any]:
        """End our streams; all that the server sent must come, and its end; both sides must have counted the same."""
        for stream in self._streams:
            stream.sending = False
            if not stream.dead:
                stream.socket.shutdown(socket.SHUT_WR)
        self.spin(time.monotonic() + 60, lambda: all(stream.dead or stream.ended for stream in self._streams))
        for stream in self._streams:
            if not stream.dead and not stream.ended:
                self.blame(f"stream {stream.seed}: the server did not end it")
            self._compare(stream)
            stream.socket.close()
        return {}

    def _compare(self, stream: Stream) -> None:
        with socket.create_connection((stream.address, self._port), timeout=10) as connection:
            connection.sendall(HEADER.pack(STATISTICS, stream.seed, 0))
            told = b""
            while data := connection.recv(4096):
                told += data
        state = json.loads(told)
        must = {"received": stream.out.position, "sent": stream.into.position, "ended": True, "wrong": ""}
        if state != must:
            self.blame(f"stream {stream.seed}: the server tells {state}, the client {must}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=0.0, help="MB/s in each direction of each connection")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("port", type=int)
    parser.add_argument("addresses", nargs="+")
    given = parser.parse_args()
    main(StreamClient(given.port, given.addresses, given.rate * 1e6, given.seed))
