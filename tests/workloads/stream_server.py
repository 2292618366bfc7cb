"""The server side of the random streams: one process, epoll, its positions in its own memory.

    python -m tests.workloads.stream_server PORT ADDRESS...

A peer begins with a header: b"TMHSTRM1", the seed of what it will send, the seed of what it wants to get.  Until the
peer ends its stream both directions run as fast as the peer lets them; every byte that comes is checked.  With
b"TMHSTATS" and a seed (and 8 bytes of nothing) it is told, as JSON, what became of the stream of that seed:
{"received", "sent", "ended", "wrong"}; "unknown" if there was none.
"""

from __future__ import annotations

import dataclasses
import json
import random
import select
import socket
import struct
import sys

from tests.workloads.randomstream import RandomStream

HEADER = struct.Struct("=8sQQ")
STREAM, STATISTICS = b"TMHSTRM1", b"TMHSTATS"
LARGEST = 1 << 18  # bytes of one recv or send at most; the sizes are random, so that all queues get all lengths


@dataclasses.dataclass(slots=True)
class Peer:
    """One connection."""

    socket: socket.socket
    header: bytes = b""
    incoming: RandomStream | None = None
    outgoing: RandomStream | None = None
    ended: bool = False
    wrong: str = ""

    def state(self) -> dict[str, object]:
        """What STATISTICS tells."""
        assert self.incoming is not None
        assert self.outgoing is not None
        return {
            "received": self.incoming.position,
            "sent": self.outgoing.position,
            "ended": self.ended,
            "wrong": self.wrong,
        }


class StreamServer:
    """The loop."""

    def __init__(self, port: int, addresses: list[str]) -> None:
        self._epoll = select.epoll()
        self._random = random.Random(port)
        self._listeners: dict[int, socket.socket] = {}
        self._peers: dict[int, Peer] = {}
        self._by_seed: dict[int, Peer] = {}
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.create_server((address, port), family=family)
            listener.setblocking(False)
            self._listeners[listener.fileno()] = listener
            self._epoll.register(listener, select.EPOLLIN)

    def serve(self) -> None:
        """For ever."""
        while True:
            for fd, events in self._epoll.poll():
                if fd in self._listeners:
                    self._accept(self._listeners[fd])
                    continue
                peer = self._peers[fd]
                try:
                    self._serve(peer, events)
                except BlockingIOError:
                    continue
                except OSError as error:
                    self._end(peer, repr(error))

    def _accept(self, listener: socket.socket) -> None:
        try:
            new, _ = listener.accept()
        except BlockingIOError:
            return
        new.setblocking(False)
        self._peers[new.fileno()] = Peer(new)
        self._epoll.register(new, select.EPOLLIN)

    def _end(self, peer: Peer, wrong: str = "") -> None:
        peer.ended = True
        peer.wrong = peer.wrong or wrong
        self._epoll.unregister(peer.socket)
        del self._peers[peer.socket.fileno()]
        peer.socket.close()

    def _serve(self, peer: Peer, events: int) -> None:
        if peer.outgoing is None or peer.incoming is None:
            self._begin(peer)
            return
        if events & select.EPOLLOUT:
            piece = peer.outgoing.peek()[: self._random.randrange(1, LARGEST)]
            peer.outgoing.advance(peer.socket.send(piece))
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            data = peer.socket.recv(self._random.randrange(1, LARGEST))
            if not data:
                self._end(peer)  # an orderly end: our FIN follows what was sent
                return
            wrong = peer.incoming.check(data)
            if wrong:
                self._end(peer, wrong)

    def _begin(self, peer: Peer) -> None:
        data = peer.socket.recv(HEADER.size - len(peer.header))
        peer.header += data
        if not data:
            self._end(peer)
        if len(peer.header) < HEADER.size:
            return
        kind, first, second = HEADER.unpack(peer.header)
        if kind == STATISTICS:
            known = self._by_seed.get(first)
            state = known.state() if known else {"unknown": True}
            peer.socket.sendall(json.dumps(state).encode())  # short: an empty send queue always has room for it
            self._end(peer)
        elif kind == STREAM:
            peer.incoming, peer.outgoing = RandomStream(first), RandomStream(second)
            self._by_seed[first] = peer
            self._epoll.modify(peer.socket, select.EPOLLIN | select.EPOLLOUT)
        else:
            self._end(peer, f"header {peer.header!r}")


if __name__ == "__main__":
    StreamServer(int(sys.argv[1]), sys.argv[2:]).serve()
