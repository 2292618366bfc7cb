"""Sends back what it gets, on many connections, in one process.

python -m tests.workloads.echo_server PORT ADDRESS...
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys

MOST_OWED = 4 << 20  # bytes that a peer may leave unread before we stop reading from it


class EchoServer:
    """An epoll loop; what could not be sent yet is kept per connection."""

    def __init__(self, port: int, addresses: list[str]) -> None:
        self._epoll = select.epoll()
        self._listeners: dict[int, socket.socket] = {}
        self._peers: dict[int, socket.socket] = {}
        self._owed: dict[int, bytes] = {}
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.create_server((address, port), family=family, backlog=128)
            listener.setblocking(False)
            self._listeners[listener.fileno()] = listener
            self._epoll.register(listener, select.EPOLLIN)

    def serve(self) -> None:
        """For ever."""
        while True:
            for fd, events in self._epoll.poll():
                if fd in self._listeners:
                    self._accept(self._listeners[fd])
                elif not self._echo(self._peers[fd], events):
                    self._epoll.unregister(fd)
                    self._owed.pop(fd)
                    self._peers.pop(fd).close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            peer, _ = listener.accept()
        except BlockingIOError:
            return
        peer.setblocking(False)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[peer.fileno()] = peer
        self._owed[peer.fileno()] = b""
        self._epoll.register(peer, select.EPOLLIN)

    def _echo(self, peer: socket.socket, events: int) -> bool:
        """False at the end of the connection."""
        fd = peer.fileno()
        owed = self._owed[fd]
        try:
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                data = peer.recv(1 << 16)
                if not data:
                    return False
                owed += data
            with contextlib.suppress(BlockingIOError):  # no room in the send queue: it stays owed
                owed = owed[peer.send(owed) :] if owed else owed
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._owed[fd] = owed
        wanted = (select.EPOLLOUT if owed else 0) | (select.EPOLLIN if len(owed) < MOST_OWED else 0)
        self._epoll.modify(fd, wanted)
        return True


if __name__ == "__main__":
    EchoServer(int(sys.argv[1]), sys.argv[2:]).serve()
