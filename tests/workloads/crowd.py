"""Thousands of connections of one client program over one move: ``crowd ADDRESS PORT COUNT SEED``.

A third says nothing meanwhile; a third speaks all the time, each of them every few seconds; a third has answers that it
does not read and that its window does not take, so that both ends have a full queue.  It reads one word a line, and
answers each with a JSON line when it is done::

    backlog   the third third asks, until each has an answer that has come in part
    speak     the second third begins to speak
    check     all that was asked for is read and compared, and everybody asks once more;
              ``bytes``: how many were compared, ``spoken``: messages since ``speak``

It ends with a traceback if a byte is wrong or a connection breaks.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import select
import socket
import sys
import time

from tests.workloads.many import PATIENCE

SMALL, LARGE = 96, 12_288  # bytes, multiples of 32
WINDOW = 4096  # bytes: SO_RCVBUF of the third third
TURN, AT_ONCE = 0.05, 20  # seconds from one turn of speaking to the next; so many speak in one


class Crowd:
    """The connections, by their numbers, and what each has yet to hear."""

    def __init__(self, address: tuple[str, int], count: int, seed: int) -> None:
        self._seed = seed
        self._epoll = select.epoll()
        self._socks = [_connected(address, small=number % 3 == 2) for number in range(count)]
        self._numbers = {sock.fileno(): number for number, sock in enumerate(self._socks)}
        self._owed = [bytearray() for _ in range(count)]
        self._asked = [0] * count
        self._waiting: set[int] = set()  # those that have something to hear
        self.bytes = 0
        self.spoken = 0
        self._turn: int | None = None
        for sock in self._socks:
            self._epoll.register(sock, select.EPOLLIN)

    @property
    def everybody(self) -> range:
        return range(len(self._socks))

    @property
    def speakers(self) -> range:
        return self.everybody[1::3]

    @property
    def silent(self) -> range:
        """Those that do not read for a while."""
        return self.everybody[2::3]

    def ask(self, number: int, size: int) -> None:
        """One of them sends something that was not sent before, and is to have it back."""
        start = f"{self._seed} {number} {self._asked[number]}".encode()
        text = hashlib.sha256(start).digest() * (size // 32)
        self._asked[number] += 1
        self._owed[number] += text
        self._waiting.add(number)
        self._socks[number].sendall(text)

    def hear(self, timeout: float) -> None:
        """Read and compare what is there; ``timeout`` in seconds."""
        for fd, _ in self._epoll.poll(timeout, 512):
            number = self._numbers[fd]
            found, owed = self._socks[number].recv(1 << 16, socket.MSG_DONTWAIT), self._owed[number]
            if not found or found != owed[: len(found)]:
                raise RuntimeError(f"connection {self._seed}/{number}: {len(found)} bytes that are not what was asked")
            del owed[: len(found)]
            self.bytes += len(found)
            if not owed:
                self._waiting.discard(number)

    def hear_all(self) -> None:
        """Until nobody waits for anything. Raises TimeoutError."""
        end = time.monotonic() + PATIENCE
        while self._waiting:
            self.hear(1.0)
            if time.monotonic() > end:
                raise TimeoutError(f"crowd {self._seed}: {len(self._waiting)} connections wait for an answer")

    def ask_everybody(self) -> None:
        for number in self.everybody:
            self.ask(number, SMALL)
            self.hear(0)
        self.hear_all()

    def backlog(self) -> None:
        """Those that do not read ask for more than their window takes, and get a part of it."""
        for number in self.silent:
            self._epoll.unregister(self._socks[number])
            self.ask(number, LARGE)
        end = time.monotonic() + PATIENCE
        for number in self.silent:
            # the queue of a connection is told by its bytes: nothing else shows that the answer has begun to come
            while not 0 < len(self._socks[number].recv(LARGE, socket.MSG_PEEK | socket.MSG_DONTWAIT)) < LARGE:
                if time.monotonic() > end:
                    raise TimeoutError(f"connection {self._seed}/{number}: it has no part of its answer")
                time.sleep(0.01)

    def speak(self) -> None:
        """From now on, one turn for each call of :meth:`turn`."""
        self._turn = 0

    def turn(self) -> None:
        """The next of those that speak do so."""
        if self._turn is None:
            return
        for number in self.speakers[self._turn : self._turn + AT_ONCE]:
            self.ask(number, SMALL)
            self.spoken += 1
        self._turn = (self._turn + AT_ONCE) % len(self.speakers)

    def check(self) -> None:
        """Nobody speaks of himself any more; all is read; all ask once more."""
        self._turn = None
        for number in self.silent:
            self._epoll.register(self._socks[number], select.EPOLLIN)
        self.hear_all()
        self.ask_everybody()


def _connected(address: tuple[str, int], *, small: bool) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)  # before the window is told
    sock.settimeout(PATIENCE)
    sock.connect(address)
    return sock


def main() -> None:
    """Until its input ends."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    address, port, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    crowd = Crowd((address, port), count, seed)
    crowd.ask_everybody()
    print(json.dumps({"connections": count}), flush=True)
    lines, due = b"", 0.0
    while True:
        while not select.select([0], [], [], 0)[0]:
            crowd.hear(TURN)
            if time.monotonic() >= due:
                crowd.turn()
                due = time.monotonic() + TURN
        piece = os.read(0, 4096)
        if not piece:
            return
        *words, lines = (lines + piece).split(b"\n")
        for word in words:
            {b"backlog": crowd.backlog, b"speak": crowd.speak, b"check": crowd.check}[word]()
            print(json.dumps({"bytes": crowd.bytes, "spoken": crowd.spoken}), flush=True)


if __name__ == "__main__":
    main()
