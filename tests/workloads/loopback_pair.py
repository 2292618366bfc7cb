"""Two processes of one tree that talk to each other over TCP on one host, at full speed both ways.

    python -m tests.workloads.loopback_pair STATUS_ADDRESS PORT ADDRESS...

The parent listens on every ADDRESS, its child connects to each; then both send and check endless random streams, and
neither ever waits for the other's word.  Who connects to STATUS_ADDRESS is told, for every line that he sends, as JSON:
for each end {"received", "sent", "wrong"}; wrong is empty, or tells of the first byte that was not the right one, or of
the end of the connection.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import select
import socket
import struct
import sys

from tests.workloads.randomstream import RandomStream

SLOT = struct.Struct("@QQ112s")  # received, sent, what is wrong; native, so that each number is stored whole
LARGEST = 1 << 17


class End:
    """One end of a connection: its two streams, and its slot in the memory that both processes share."""

    def __init__(self, sock: socket.socket, incoming: int, outgoing: int, shared: mmap.mmap, slot: int) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._in = RandomStream(incoming)
        self._out = RandomStream(outgoing)
        self._shared = shared
        self._at = slot * SLOT.size
        self._random = random.Random(slot)
        self.wrong = ""

    def work(self) -> None:
        """Receive and send what can be."""
        try:
            with contextlib.suppress(BlockingIOError):
                data = self.sock.recv(self._random.randint(1, LARGEST))
                self.wrong = self.wrong or (self._in.check(data) if data else "end of the stream")
            with contextlib.suppress(BlockingIOError):
                self._out.advance(self.sock.send(self._out.peek()))
        except OSError as error:
            self.wrong = self.wrong or repr(error)
        SLOT.pack_into(self._shared, self._at, self._in.position, self._out.position, self.wrong.encode()[:112])


def serve(ends: list[End], status: socket.socket | None, shared: mmap.mmap, count: int) -> None:
    """The loop of one process, for ever."""
    epoll = select.epoll()
    by_fd = {end.sock.fileno(): end for end in ends}
    for fd in by_fd:
        epoll.register(fd, select.EPOLLIN | select.EPOLLOUT)
    askers: dict[int, socket.socket] = {}
    if status is not None:
        epoll.register(status, select.EPOLLIN)
    while True:
        for fd, _ in epoll.poll():
            if fd in by_fd:
                by_fd[fd].work()
                if by_fd[fd].wrong:
                    epoll.unregister(fd)
            elif fd in askers:
                if askers[fd].recv(4096):
                    found = [SLOT.unpack_from(shared, n * SLOT.size) for n in range(count)]
                    told = [
                        {"received": got, "sent": sent, "wrong": wrong.rstrip(b"\0").decode()}
                        for got, sent, wrong in found
                    ]
                    askers[fd].sendall(json.dumps(told).encode() + b"\n")
                else:
                    askers.pop(fd).close()
            elif status is not None:
                asker, _ = status.accept()
                askers[asker.fileno()] = asker
                epoll.register(asker, select.EPOLLIN)


def main(status_address: str, port: int, addresses: list[str]) -> None:
    """Make the pair and let it run."""
    count = 2 * len(addresses)
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
    listeners = [
        socket.create_server((address, port + 1 + n), family=family)
        for n, (address, family) in enumerate(zip(addresses, families, strict=True))
    ]
    if os.fork() == 0:
        names = [listener.getsockname()[:2] for listener in listeners]
        for listener in listeners:
            listener.close()
        socks = [socket.create_connection(name) for name in names]
        serve([End(s, 2 * n, 2 * n + 1, shared, 2 * n + 1) for n, s in enumerate(socks)], None, shared, count)
    accepted = [listener.accept()[0] for listener in listeners]
    family = socket.AF_INET6 if ":" in status_address else socket.AF_INET
    status = socket.create_server((status_address, port), family=family)
    serve([End(s, 2 * n + 1, 2 * n, shared, 2 * n) for n, s in enumerate(accepted)], status, shared, count)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
